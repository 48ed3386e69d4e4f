//! The end of a request: exactly one terminal record, one log line and one count, whichever way it ended.
//!
//! The record is written when it is dropped, so a request that was cut short by its client or by the end of the process has one too.

use std::{borrow::Cow, net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use pingora::protocols::http::ServerSession;
use prometheus::IntGauge;
use serde::Serialize;
use tidegate_common::{
    contract::{ApiError, headers, paths},
    ids::{NodeId, RequestId},
    trace::Tracer,
};
use tokio::time::Instant;
use tracing::info;

use crate::{
    audit::{self, Audit, Place},
    ctx::RequestCtx,
    journal::Journal,
    live::Current,
    metrics::Metrics,
};

/// Longest text of a client's that is repeated in a record, in characters.
const CLIENT_TEXT_MAX: usize = 256;

/// Where records go.
pub(crate) struct Books {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) audit: Option<Arc<Audit>>,
    pub(crate) tracer: Option<Arc<Tracer>>,
    pub(crate) live: Current,
}

/// What is known of a request so far; the whole of it when dropped.
pub(crate) struct Record {
    books: Arc<Books>,
    /// Its way, where traces are exported.
    pub(crate) journal: Option<Box<Journal>>,
    /// Held for the audit log's record of it.
    place: Option<Place>,
    /// What was asked, where the audit log is to have it.
    body: Option<Bytes>,
    /// Bytes of bodies, from the client and to it.
    bytes: (usize, usize),
    /// Time that nodes have worked on it.
    pub(crate) upstream: Duration,
    pub(crate) ctx: RequestCtx,
    /// The model that a pool was found for; never what a client made up.
    pub(crate) model: String,
    /// The last node that worked on it.
    pub(crate) node: Option<NodeId>,
    /// Status sent to the client, 0 when none was.
    pub(crate) status: u16,
    /// Why it ended.
    pub(crate) reason: &'static str,
    /// Attempts moved on before the client had anything.
    pub(crate) retries: u32,
    /// Changes of node in the middle of the stream.
    pub(crate) resumes: u32,
    /// Tokens that passed.
    pub(crate) tokens: usize,
    /// Tokens of the prompt, where a node has said how many.
    pub(crate) prompt_tokens: Option<u32>,
    /// The whole answer, where it was copied for the cache.
    pub(crate) copy: Option<Vec<u8>>,
    first_token: Option<Instant>,
}

impl Record {
    pub(crate) fn new(books: &Arc<Books>, ctx: RequestCtx) -> Self {
        books.metrics.open_requests.inc();
        Self {
            books: Arc::clone(books),
            journal: None,
            place: None,
            body: None,
            bytes: (0, 0),
            upstream: Duration::ZERO,
            ctx,
            model: String::new(),
            node: None,
            status: 0,
            reason: "aborted",
            retries: 0,
            resumes: 0,
            tokens: 0,
            prompt_tokens: None,
            copy: None,
            first_token: None,
        }
    }

    /// Sees to it that the request can be recorded, where none may go without. Asking for the edge's health is no request of anybody's.
    pub(crate) fn admit(&mut self) -> Result<(), ApiError> {
        if let Some(audit) = self.books.audit.as_ref().filter(|_| self.ctx.path != paths::HEALTH) {
            self.place = audit.admit()?;
        }
        Ok(())
    }

    /// Begins its trace, where traces are exported; a request without an id of its own has the trace's.
    pub(crate) fn trace(&mut self, session: &ServerSession) {
        let Some(tracer) = &self.books.tracer else { return };
        let journal = Journal::begin(tracer, session);
        if session.get_header(headers::REQUEST_ID).is_none() {
            self.ctx.id = RequestId::of_trace(journal.trace());
        }
        self.journal = Some(Box::new(journal));
    }

    /// What the client asks, whole.
    pub(crate) fn asked(&mut self, body: &Bytes) {
        let bytes_max = self.books.audit.as_ref().and_then(|audit| audit.body_bytes_max());
        self.body = bytes_max.map(|max| body.slice(..body.len().min(max)));
    }

    /// What has passed through this session.
    pub(crate) fn passed(&mut self, session: &ServerSession) {
        self.bytes = (session.body_bytes_read(), session.body_bytes_sent());
    }

    /// The answer ended well, or as the node wanted it.
    pub(crate) fn answered(&mut self, status: u16) {
        (self.status, self.reason) = (status, "ok");
    }

    /// The edge refused or gave up.
    pub(crate) fn refused(&mut self, error: &ApiError) {
        (self.status, self.reason) = (error.status(), error.code);
    }

    /// The first token has reached the client.
    pub(crate) fn first_token(&mut self) {
        self.first_token.get_or_insert_with(Instant::now);
    }

    /// An attempt was given up before the client had anything.
    pub(crate) fn retried(&mut self, why: &str) {
        self.retries += 1;
        self.books.metrics.retries.with_label_values(&[why]).inc();
        self.moved("retry", why);
    }

    /// Another node takes the stream up.
    pub(crate) fn resumed(&mut self, why: &str) {
        self.resumes += 1;
        self.books.metrics.resumes.with_label_values(&[why]).inc();
        self.moved("resume", why);
    }

    fn moved(&mut self, kind: &'static str, why: &str) {
        if let Some(journal) = &mut self.journal {
            journal.moved(kind, why);
        }
    }

    /// One more open stream, until the guard is dropped.
    pub(crate) fn open_stream(&self) -> OpenStream {
        self.books.metrics.open_streams.inc();
        OpenStream(self.books.metrics.open_streams.clone())
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let duration = self.ctx.started.elapsed();
        let ttft = self.first_token.map(|at| at.duration_since(self.ctx.started));
        self.count(duration, ttft);
        let (place, journal) = (self.place.take(), self.journal.take());
        let mut entry = self.entry(duration, ttft);
        entry.trace = journal.as_ref().map(|journal| format!("{:032x}", journal.trace()));
        if self.books.live.load().config.access_log {
            entry.log();
        }
        if let Some(audit) = self.books.audit.as_ref().filter(|_| self.is_for_audit()) {
            audit.record("request", &entry, place);
        }
        if let Some(journal) = journal {
            journal.export(&entry, self.ctx.started);
        }
    }
}

impl Record {
    /// A load balancer asks for the edge's health every second, and nobody else is meant by it.
    fn is_for_audit(&self) -> bool {
        self.reason != audit::UNAVAILABLE && !(self.ctx.path == paths::HEALTH && self.reason == "ok")
    }

    fn count(&self, duration: Duration, ttft: Option<Duration>) {
        let (metrics, path) = (&self.books.metrics, self.ctx.path);
        metrics.open_requests.dec();
        metrics.duration.with_label_values(&[path]).observe(duration.as_secs_f64());
        if let Some(ttft) = ttft {
            metrics.first_token.with_label_values(&[path]).observe(ttft.as_secs_f64());
        }
        let labels = [path, self.model.as_str(), &self.status.to_string(), self.reason];
        metrics.requests.with_label_values(&labels).inc();
    }

    fn entry(&self, duration: Duration, ttft: Option<Duration>) -> Entry<'_> {
        let ctx = &self.ctx;
        let shortened = |text: &str| text.chars().take(CLIENT_TEXT_MAX).collect::<String>();
        Entry {
            request_id: ctx.id.as_str(),
            trace: None,
            client: ctx.client,
            http: ctx.http,
            tls: ctx.tls.as_ref().map(|tls| &*tls.version),
            method: ctx.method.as_str(),
            path: ctx.path,
            target: ctx.target.as_ref().map(|uri| shortened(uri.path())),
            agent: ctx.agent.as_ref().and_then(|agent| agent.to_str().ok()).map(shortened),
            model: &self.model,
            owner: ctx.tenant().map(|owner| &**owner),
            credential: ctx.principal.as_ref().map(|principal| principal.credential.to_string()),
            node: self.node.as_ref().map(NodeId::as_str),
            status: self.status,
            reason: self.reason,
            cache: self.ctx.cache,
            retries: self.retries,
            resumes: self.resumes,
            prompt_tokens: self.prompt_tokens,
            tokens: self.tokens,
            bytes_in: self.bytes.0,
            bytes_out: self.bytes.1,
            duration_ms: milliseconds(duration),
            upstream_ms: (!self.upstream.is_zero()).then(|| milliseconds(self.upstream)),
            ttft_ms: ttft.map(milliseconds),
            body: self.body.as_deref().map(String::from_utf8_lossy),
        }
    }
}

/// With three digits after the point: more says nothing.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// A request as it is logged and recorded.
#[derive(Serialize)]
pub(crate) struct Entry<'a> {
    pub(crate) request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) client: Option<IpAddr>,
    pub(crate) http: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<&'a str>,
    pub(crate) method: &'a str,
    pub(crate) path: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent: Option<String>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) owner: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) credential: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<&'a str>,
    pub(crate) status: u16,
    pub(crate) reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cache: Option<&'static str>,
    pub(crate) retries: u32,
    pub(crate) resumes: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_tokens: Option<u32>,
    pub(crate) tokens: usize,
    pub(crate) bytes_in: usize,
    pub(crate) bytes_out: usize,
    pub(crate) duration_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) upstream_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ttft_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) body: Option<Cow<'a, str>>,
}

impl Entry<'_> {
    /// The line that each request has in the log; what is asked is never in it.
    fn log(&self) {
        info!(
            request_id = self.request_id,
            trace = self.trace,
            client = self.client.map(tracing::field::display),
            http = self.http,
            tls = self.tls,
            method = self.method,
            path = self.path,
            target = self.target,
            agent = self.agent,
            model = self.model,
            tenant = self.owner,
            credential = self.credential,
            node = self.node,
            status = self.status,
            reason = self.reason,
            cache = self.cache,
            retries = self.retries,
            resumes = self.resumes,
            prompt_tokens = self.prompt_tokens,
            tokens = self.tokens,
            bytes_in = self.bytes_in,
            bytes_out = self.bytes_out,
            duration_ms = self.duration_ms,
            upstream_ms = self.upstream_ms,
            ttft_ms = self.ttft_ms,
            "request"
        );
    }
}

/// One open stream.
pub(crate) struct OpenStream(IntGauge);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}
