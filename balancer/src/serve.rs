//! A connection's requests, one after another: reading each head within its deadline, running the stages, keeping the connection.
//!
//! What HTTP leaves open is closed here and in `limits`: total deadlines instead of those per read, one meaning of a body's length,
//! answers in the API's own error shape.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::CACHE_CONTROL;
use pingora::{
    ErrorType::InvalidHTTPHeader,
    apps::{HttpPersistentSettings, HttpServerApp, HttpServerOptions, ReusedHttpStream},
    protocols::http::{
        ServerSession,
        v2::server::{H2Options, default_h2_options},
    },
    server::ShutdownWatch,
};
use serde_json::json;
use tidegate_common::contract::{ApiError, ErrorKind, event, paths};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    answer::{self, Answer},
    auth::UnixSeconds,
    body::{self, Wish},
    cache::{Asked, Cache, Kept, Key},
    ctx::RequestCtx,
    drain::OpenRequests,
    limits::{self, Account, BodyError, Doors, Limits, Places},
    live::{Current, Live},
    metrics::{self, Metrics},
    policy,
    record::{Books, Record},
    relay::Generation,
    route::{self, Route},
    sessions::{self, Dialogue, Question, Sessions},
    strict,
};

/// The field of a node's API that has what was said before a question.
const HISTORY: &str = "history";
/// How long a connection without a request stays at the end.
const LINGER: Duration = Duration::from_millis(500);
/// How long unread rest of a body may take before a connection is kept.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// The service that clients meet.
pub(crate) struct Edge {
    pub(crate) live: Current,
    pub(crate) places: Places,
    pub(crate) limits: Arc<Limits>,
    pub(crate) doors: Arc<Doors>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) books: Arc<Books>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) open: Arc<OpenRequests>,
    pub(crate) options: HttpServerOptions,
    pub(crate) started: Instant,
}

/// A question, its dialogue, and what was said in it so far.
struct GoingOn {
    question: Question,
    key: sessions::Key,
    so_far: Dialogue,
}

/// What the cache has of a request.
enum Found {
    /// Its answer.
    Hit(Kept),
    /// Not yet, and its answer is to be kept by this key.
    Miss(Key),
    /// Nothing, and nothing is to be kept.
    Nothing,
}

/// How a request left its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The answer's body has ended, if need be with an error; another request may follow.
    Whole,
    /// Nobody is there any more.
    ClientGone,
}

impl From<pingora::Result<()>> for Ended {
    fn from(written: pingora::Result<()>) -> Self {
        if written.is_ok() { Self::Whole } else { Self::ClientGone }
    }
}

/// Bytes of one HTTP/2 stream's answer that may wait for the client to read.
const H2_SEND_BUFFER: usize = 64 << 10;

/// Marks a connection that has carried a request before.
struct Reused;

#[async_trait]
impl HttpServerApp for Edge {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        session.set_pipelining_enabled(true);
        session.set_write_timeout(Some(self.live.load().config.limits.write_timeout));
        session.set_total_drain_timeout(Some(DRAIN_TIMEOUT));
        if !self.read_head(&mut session, shutdown.clone()).await {
            return None;
        }
        let open = self.open.enter();
        if *shutdown.borrow() {
            session.set_keepalive(None);
        }
        let ended = self.handle(&mut session).await;
        let kept = self.finish(session, ended).await;
        drop(open);
        kept
    }

    fn h2_options(&self) -> Option<H2Options> {
        let live = self.live.load();
        let limits = &live.config.limits;
        let mut options = default_h2_options();
        options
            .max_header_list_size(u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX))
            .max_concurrent_streams(limits.doors.streams_max)
            .max_send_buffer_size(H2_SEND_BUFFER);
        Some(options)
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }
}

impl Edge {
    /// Whether there is a request to handle.
    async fn read_head(&self, session: &mut ServerSession, shutdown: ShutdownWatch) -> bool {
        let reused = session.take_connection_user_context().is_some();
        let bound = {
            let limits = &self.live.load().config.limits;
            if reused { limits.idle_timeout } else { limits.header_timeout }
        };
        let read = tokio::select! {
            biased;
            read = timeout(bound, session.read_request()) => read,
            () = self.lingered(shutdown) => return false,
        };
        let error = match read {
            Ok(Ok(present)) => return present,
            Ok(Err(e)) if *e.etype() == InvalidHTTPHeader => {
                ApiError::new(ErrorKind::InvalidRequest, "malformed_request", "the request's head is not valid HTTP")
            }
            Ok(Err(_)) => return false,
            Err(_) if reused => return false,
            Err(_) => ApiError::new(ErrorKind::RequestTimeout, "header_timeout", "the header took too long to arrive"),
        };
        let mut record = Record::new(&self.books, RequestCtx::of_unread(session));
        record.refused(&error);
        let _ = answer::refuse_unread(session, record.ctx.stamp(), &error).await;
        session.shutdown().await;
        false
    }

    /// Returns some time after the end has begun: a client that does not know of it yet may have sent a request, or be about to.
    async fn lingered(&self, mut shutdown: ShutdownWatch) {
        // an error means that the end is past
        let _ = shutdown.wait_for(|set| *set).await;
        let _open = self.open.enter();
        sleep(LINGER).await;
    }

    async fn handle(&self, session: &mut ServerSession) -> Ended {
        let judged = strict::judge(session);
        let live = self.live.load_full();
        let mut record = Record::new(&self.books, RequestCtx::of(session, &live.config.trusted));
        record.trace(session);
        let outcome = match judged.and_then(|()| record.admit()) {
            Ok(()) => self.stages(&live, session, &mut record).await,
            Err(error) => Err(error),
        };
        let ended = match outcome {
            Ok(ended) => ended,
            Err(error) => refuse(session, &mut record, &error).await,
        };
        record.passed(session);
        ended
    }

    /// The stages in their order; each either passes the request on or refuses it.
    async fn stages(&self, live: &Live, session: &mut ServerSession, record: &mut Record) -> Result<Ended, ApiError> {
        let limits = &live.config.limits;
        if let Err(error) = limits::check_head(session, limits) {
            session.set_keepalive(None);
            return Err(error);
        }
        let head = session.req_header();
        let route = route::route(&head.method, head.uri.path());
        if route == Ok(Route::Health) {
            return Ok(self.health(live, session, record).await);
        }
        demand_address(live, session, &record.ctx)?;
        self.limits.knock(live.rules(), &mut record.ctx)?;
        if let Some(auth) = &live.config.auth {
            let principal = record.ctx.principal.insert(auth.principal(session, UnixSeconds::now()).await?);
            if let Ok(route) = route {
                principal.demand(policy::scope(route.action()))?;
            }
        }
        if let Ok(route) = route {
            (record.ctx.action, record.ctx.policies) = (route.action(), Arc::clone(&live.config.policies));
            if !matches!(route, Route::Generation(_)) {
                record.ctx.demand_path()?;
            }
        }
        let _place = self.places.enter(limits.concurrent_requests_max)?;
        let route = route?;
        let is_generation = matches!(route, Route::Generation(_));
        let mut account = self.limits.enter(is_generation, live.rules(), &mut record.ctx)?;
        if !is_generation {
            account.reserve(0, live.rules(), &mut record.ctx).await?;
        }
        match route {
            Route::Health => Ok(self.health(live, session, record).await),
            Route::Models => Ok(self.models(live, session, record).await),
            Route::Document(path) => document(live, path, session, record).await,
            Route::Generation(path) => self.generate(live, path, session, record, account).await,
            // whoever could ask without a credential is nobody that may see it
            Route::Private(path) if record.ctx.principal.is_none() => Err(route::unknown(path)),
            Route::Private(paths::METRICS) => Ok(self.figures(session, record).await),
            Route::Private(_) => Ok(members(live, session, record).await),
        }
    }

    async fn health(&self, live: &Live, session: &mut ServerSession, record: &mut Record) -> Ended {
        let snapshot = live.relay.pool.load();
        let (status, word) = if snapshot.has_ready() { (200, "healthy") } else { (503, "unavailable") };
        let ready: usize = snapshot.models.values().map(|pool| pool.ready.len()).sum();
        let members: usize = snapshot.models.values().map(|pool| pool.members).sum();
        let uptime = self.started.elapsed().as_secs();
        let body = json!({"status": word, "uptime": uptime, "ready": ready, "members": members});
        write_json(session, record, status, &body).await
    }

    /// Each model once, whichever nodes serve it.
    async fn models(&self, live: &Live, session: &mut ServerSession, record: &mut Record) -> Ended {
        let snapshot = live.relay.pool.load();
        let created = record.ctx.created.0 - self.started.elapsed().as_secs().min(record.ctx.created.0);
        let model = |id: &String| json!({"id": id, "object": "model", "created": created, "owned_by": "tidegate"});
        let ids: BTreeMap<_, _> = snapshot.models.iter().filter(|(_, pool)| !pool.ready.is_empty()).collect();
        let data: Vec<_> = ids.into_keys().filter(|id| record.ctx.shows_model(id)).map(model).collect();
        write_json(session, record, 200, &json!({"object": "list", "data": data})).await
    }

    async fn figures(&self, session: &mut ServerSession, record: &mut Record) -> Ended {
        record.answered(200);
        let body = Bytes::from(self.metrics.render());
        let answer = Answer { media_type: metrics::MEDIA_TYPE.into(), ..Answer::json(200, body) };
        answer::write(session, record.ctx.stamp(), None, answer).await.into()
    }

    async fn generate(
        &self,
        live: &Live,
        path: &'static str,
        session: &mut ServerSession,
        record: &mut Record,
        mut account: Account,
    ) -> Result<Ended, ApiError> {
        let body = match limits::read_body(session, &live.config.limits).await {
            Ok(body) => body,
            Err(BodyError::Refused(error)) => return Err(error),
            Err(BodyError::ClientGone) => {
                record.reason = "client_gone";
                return Ok(Ended::ClientGone);
            }
        };
        record.asked(&body);
        let wish = Wish::read(&body)?;
        let going_on = self.dialogue(path, record, &body)?;
        let (body, prefers) = match &going_on {
            Some(GoingOn { so_far, .. }) if !so_far.messages.is_empty() => {
                (body::with_field(&body, HISTORY, &so_far.messages), so_far.node.clone())
            }
            _ => (body, None),
        };
        let found = self.look(live, session, path, record, &body, &wish)?;
        if let Found::Hit(kept) = found {
            account.reserve(0, live.rules(), &mut record.ctx).await?;
            record.answered(200);
            self.remember(live, going_on, &kept.body, wish.stream, record);
            let answer = Answer { media_type: kept.media_type.into(), ..Answer::json(200, kept.body) };
            return Ok(answer::write(session, record.ctx.stamp(), None, answer).await.into());
        }
        let body_bytes = body.len();
        let estimate = wish.tokens_estimate(body_bytes, live.config.limits.quotas.answer_tokens);
        account.reserve(estimate, live.rules(), &mut record.ctx).await?;
        if going_on.is_some() {
            record.ctx.copy_bytes_max = record.ctx.copy_bytes_max.max(live.config.sessions.answer_bytes_max());
        }
        let mut generation = Generation::new(path, body, &wish);
        generation.prefers = prefers;
        let ended = live.relay.carry(session, record, &generation).await;
        account.settle(tokens_used(record, body_bytes));
        if let Some(copy) = record.copy.take().map(Bytes::from) {
            if let (Found::Miss(key), Some(config)) = (found, &live.config.cache) {
                let media_type = if wish.stream { event::CONTENT_TYPE } else { "application/json" };
                self.cache.put(key, Kept { media_type, body: copy.clone() }, config, Instant::now());
                self.metrics.show_cache(self.cache.size());
            }
            self.remember(live, going_on, &copy, wish.stream, record);
        }
        Ok(ended)
    }

    /// The dialogue that a question goes on with, and what was said in it.
    fn dialogue(&self, path: &'static str, record: &Record, body: &[u8]) -> Result<Option<GoingOn>, ApiError> {
        let question = if path == paths::API_CHAT { Question::read(body)? } else { None };
        let Some(question) = question else { return Ok(None) };
        let key = question.key(&record.ctx.payer().unwrap_or_default())?;
        Ok(Some(GoingOn { question, key, so_far: self.sessions.get(&key, Instant::now()) }))
    }

    /// A question of a dialogue has been answered.
    fn remember(&self, live: &Live, going_on: Option<GoingOn>, answer: &[u8], is_stream: bool, record: &Record) {
        let Some(GoingOn { question, key, .. }) = going_on else { return };
        let Some(answer) = sessions::answer_in(answer, is_stream) else { return };
        let turn = question.answered(answer, record.node.clone());
        self.sessions.add(key, turn, &live.config.sessions, Instant::now());
        self.metrics.show_sessions(self.sessions.size());
    }

    /// What the cache has of this, as far as there is one and the client wants it. Who may not ask for the model gets nothing of it either.
    fn look(
        &self,
        live: &Live,
        session: &ServerSession,
        path: &'static str,
        record: &mut Record,
        body: &[u8],
        wish: &Wish,
    ) -> Result<Found, ApiError> {
        let Some(config) = &live.config.cache else { return Ok(Found::Nothing) };
        let snapshot = live.relay.pool.load();
        let wants = session.get_header(CACHE_CONTROL).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let wants = wants.to_ascii_lowercase();
        let found = route::pool(&snapshot, wish.model.as_deref()).ok();
        let known = found.and_then(|(model, pool)| Some((model, pool.fingerprint()?)));
        let Some((model, fingerprint)) = known.filter(|_| !wants.contains("no-store")) else {
            return Ok(self.looked(record, "bypass", Found::Nothing));
        };
        record.ctx.demand_model(model)?;
        let owner = record.ctx.payer().unwrap_or_default();
        let principal = record.ctx.principal.as_deref();
        let sites = principal.and_then(|principal| principal.grant.sites.as_deref()).unwrap_or_default();
        let asked = Asked { path, model, fingerprint, owner: &owner, sites, body, wish };
        let Some(key) = asked.key(config) else { return Ok(self.looked(record, "bypass", Found::Nothing)) };
        model.clone_into(&mut record.model);
        match self.cache.get(&key, Instant::now()).filter(|_| !wants.contains("no-cache")) {
            Some(kept) => Ok(self.looked(record, "hit", Found::Hit(kept))),
            None => {
                record.ctx.copy_bytes_max = config.answer_bytes_max;
                Ok(self.looked(record, "miss", Found::Miss(key)))
            }
        }
    }

    fn looked(&self, record: &mut Record, outcome: &'static str, found: Found) -> Found {
        record.ctx.cache = Some(outcome);
        self.metrics.cache_requests.with_label_values(&[outcome]).inc();
        found
    }

    /// A client took its request back.
    fn note_reset(&self, peer: SocketAddr) {
        if self.doors.was_reset(peer, &self.live.load().config.limits.doors) {
            self.metrics.refused("resets").inc();
        }
    }

    async fn finish(&self, mut session: ServerSession, ended: Ended) -> Option<ReusedHttpStream> {
        if ended == Ended::ClientGone {
            let peer = session.client_addr().and_then(|address| address.as_inet()).copied();
            if let Some(peer) = peer.filter(|_| session.as_http2().is_some()) {
                self.note_reset(peer);
            }
            session.shutdown().await;
            return None;
        }
        let mut settings = HttpPersistentSettings::for_session(&session);
        settings.set_user_context(Box::new(Reused));
        let kept = session.finish().await.ok().flatten()?;
        Some(ReusedHttpStream::from_reusable_stream(kept, settings))
    }
}

/// Tokens of the prompt and of the answer; what nobody has counted is estimated, and what came to nothing costs nothing.
fn tokens_used(record: &Record, body_bytes: usize) -> u64 {
    let prompt = match record.prompt_tokens {
        Some(tokens) => tokens.into(),
        None if record.tokens > 0 || record.reason == "ok" => body::prompt_estimate(body_bytes),
        None => 0,
    };
    prompt + record.tokens as u64
}

/// Refuses a client that a proxy of ours forwards and that may not come in.
fn demand_address(live: &Live, session: &ServerSession, ctx: &RequestCtx) -> Result<(), ApiError> {
    let local = session.server_addr().and_then(|address| address.as_inet()).copied();
    match ctx.client {
        Some(client) if !live.config.permits(local, client) => Err(ApiError::new(
            ErrorKind::Forbidden,
            "address_not_allowed",
            "requests from this address are not taken here",
        )),
        _ => Ok(()),
    }
}

async fn members(live: &Live, session: &mut ServerSession, record: &mut Record) -> Ended {
    let report = serde_json::to_value(&live.relay.pool.load().report).unwrap_or_default();
    write_json(session, record, 200, &report).await
}

/// Nodes know the API; all of them say the same of it.
async fn document(
    live: &Live,
    path: &'static str,
    session: &mut ServerSession,
    record: &mut Record,
) -> Result<Ended, ApiError> {
    let snapshot = live.relay.pool.load();
    let ready = snapshot.models.iter().find(|(_, pool)| !pool.ready.is_empty() && pool.nodes > 0);
    let model = ready.map(|(model, _)| model.clone());
    let model = model.ok_or_else(|| route::nobody_ready("no node is ready to tell of its API"))?;
    drop(snapshot);
    Ok(live.relay.carry(session, record, &Generation::document(path, model)).await)
}

async fn write_json(session: &mut ServerSession, record: &mut Record, status: u16, body: &serde_json::Value) -> Ended {
    record.answered(status);
    let answer = Answer::json(status, Bytes::from(body.to_string()));
    answer::write(session, record.ctx.stamp(), None, answer).await.into()
}

async fn refuse(session: &mut ServerSession, record: &mut Record, error: &ApiError) -> Ended {
    record.refused(error);
    answer::refuse(session, record.ctx.stamp(), error).await.into()
}
