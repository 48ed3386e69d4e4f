//! The end of a request: exactly one terminal record, one log line and one count, whichever way it ended.
//!
//! The record is written when it is dropped, so a request that was cut short by its client or by the end of the process has one too.

use std::sync::Arc;

use prometheus::IntGauge;
use tidegate_common::{contract::ApiError, ids::NodeId};
use tokio::time::Instant;
use tracing::info;

use crate::{ctx::RequestCtx, metrics::Metrics};

/// What is known of a request so far; the whole of it when dropped.
pub(crate) struct Record {
    metrics: Arc<Metrics>,
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
    first_token: Option<Instant>,
}

impl Record {
    pub(crate) fn new(metrics: Arc<Metrics>, ctx: RequestCtx) -> Self {
        metrics.open_requests.inc();
        Self {
            metrics,
            ctx,
            model: String::new(),
            node: None,
            status: 0,
            reason: "aborted",
            retries: 0,
            resumes: 0,
            tokens: 0,
            prompt_tokens: None,
            first_token: None,
        }
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
        self.metrics.retries.with_label_values(&[why]).inc();
    }

    /// Another node takes the stream up.
    pub(crate) fn resumed(&mut self, why: &str) {
        self.resumes += 1;
        self.metrics.resumes.with_label_values(&[why]).inc();
    }

    /// One more open stream, until the guard is dropped.
    pub(crate) fn open_stream(&self) -> OpenStream {
        self.metrics.open_streams.inc();
        OpenStream(self.metrics.open_streams.clone())
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let ctx = &self.ctx;
        let duration_s = ctx.started.elapsed().as_secs_f64();
        let ttft_s = self.first_token.map(|at| at.duration_since(ctx.started).as_secs_f64());
        self.metrics.open_requests.dec();
        self.metrics.duration.with_label_values(&[ctx.path]).observe(duration_s);
        if let Some(seconds) = ttft_s {
            self.metrics.first_token.with_label_values(&[ctx.path]).observe(seconds);
        }
        let labels = [ctx.path, self.model.as_str(), &self.status.to_string(), self.reason];
        self.metrics.requests.with_label_values(&labels).inc();
        info!(
            request_id = %ctx.id,
            client = ctx.client.map(tracing::field::display),
            http = ctx.http,
            method = %ctx.method,
            path = ctx.path,
            model = self.model,
            tenant = ctx.tenant().map(tracing::field::display),
            credential = ctx.principal.as_ref().map(|p| tracing::field::display(&p.credential)),
            node = self.node.as_ref().map(tracing::field::display),
            status = self.status,
            reason = self.reason,
            retries = self.retries,
            resumes = self.resumes,
            tokens = self.tokens,
            prompt_tokens = self.prompt_tokens,
            duration_ms = duration_s * 1e3,
            ttft_ms = ttft_s.map(|s| s * 1e3),
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
