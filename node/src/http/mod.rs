//! The node's public face: an OpenAI API, health and metrics. It answers from the first moment, and says "loading" until it can do more.

mod door;
mod frame;
mod check;
mod ask;
mod grammar;
mod answer;
mod choice;
mod shape;
mod reply;
#[cfg(fuzzing)]
pub mod fuzz;

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Method, Request, Uri, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use serde_json::json;
use tidegate_common::{
    contract::{ApiError, ErrorKind, Health, Status, headers, paths},
    shutdown::Shutdown,
};

use crate::{
    config::NodeConfig,
    record::Metrics,
    served::{Loaded, Models},
};
use ask::{Body as AskBody, ChatRequest, CompletionRequest, MessagesRequest, QueryRequest, ResponsesRequest};
use door::Door;
use reply::Reply;

/// What every handler sees.
pub struct App {
    /// The configuration.
    pub config: NodeConfig,
    /// The models served here.
    pub models: Models,
    /// Counters.
    pub metrics: Metrics,
    /// Set when the node takes nothing new.
    pub draining: Shutdown,
    /// Set when running answers must be let go of.
    pub handover: Shutdown,
    /// Start of the process.
    pub started: Instant,
}

impl App {
    /// What `/health` says.
    pub fn health(&self) -> Health {
        let c = &self.config;
        let loaded = self.models.default();
        let stats = loaded.as_ref().map(|l| l.engine.stats());
        let load =
            |read: fn(&crate::engine::Stats) -> u64| stats.map_or(0, |s| u32::try_from(read(s)).unwrap_or(u32::MAX));
        let silent = stats.map(|s| s.silent_for()).filter(|silent| *silent > c.stall_after);
        let (status, reason) = match (silent, stats) {
            _ if self.draining.is_set() => (Status::Draining, Some("the node is shutting down".to_owned())),
            (_, None) => (Status::Loading, Some("the model is loading".to_owned())),
            (Some(silent), _) => (Status::Stalled, Some(format!("no step has ended for {} s", silent.as_secs()))),
            _ => (Status::Healthy, None),
        };
        Health {
            status,
            uptime: self.started.elapsed().as_secs(),
            node: c.id.clone(),
            model: c.served_model_name.clone(),
            version: c.version.clone(),
            color: c.color.clone(),
            site: c.site.clone(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            device: loaded.as_ref().map(|l| l.device.clone()).unwrap_or_default(),
            context: loaded.as_ref().map_or(0, |l| l.context as u32),
            running: load(|s| s.running.load(Relaxed)),
            waiting: load(|s| s.waiting.load(Relaxed)),
            kv_blocks_free: load(|s| s.blocks_free.load(Relaxed)),
            kv_blocks_total: load(|s| s.blocks_total),
            step: stats.map_or(0, |s| s.steps.load(Relaxed)),
            reason,
        }
    }

    /// How long until a refused request is likely to be taken.
    fn expected_wait(&self) -> Duration {
        self.models.ready().iter().map(|loaded| loaded.engine.stats().backlog()).max().unwrap_or_default()
    }

    /// What stands of the model that a request names, or of the default one. Hold it to the answer's last byte: an unload waits for
    /// nobody, and ends nothing that is held. It may have to be loaded first, which is waited for until `deadline`.
    ///
    /// # Errors
    /// When no such model is served here, it cannot be had now, or the node is draining.
    async fn model(&self, name: Option<&str>, deadline: Instant) -> Result<Arc<Loaded>, ApiError> {
        self.refuse_while_draining()?;
        self.models.get(name, deadline).await
    }

    /// # Errors
    /// While the node is draining.
    fn refuse_while_draining(&self) -> Result<(), ApiError> {
        if !self.draining.is_set() {
            return Ok(());
        }
        let text = "this node is shutting down and takes no new requests";
        Err(ApiError::new(ErrorKind::Unavailable, "draining", text).with_retry_after(Duration::from_secs(1)))
    }
}

/// All routes of the node.
pub fn router(app: Arc<App>) -> Router {
    let only = |route: MethodRouter<Arc<App>>| route.fallback(wrong_method);
    Router::new()
        .route(paths::CHAT_COMPLETIONS, only(post(generate::<ChatRequest>)))
        .route(paths::COMPLETIONS, only(post(generate::<CompletionRequest>)))
        .route(paths::CHAT, only(post(generate::<ChatRequest>)))
        .route(paths::API_CHAT, only(post(generate::<QueryRequest>)))
        .route(paths::RESPONSES, only(post(generate::<ResponsesRequest>)))
        .route(paths::MESSAGES, only(post(generate::<MessagesRequest>)))
        .route(paths::MODELS, only(get(models)))
        .route(paths::HEALTH, only(get(health)))
        .route(paths::METRICS, only(get(metrics)))
        .fallback(unknown_path)
        .layer(axum::middleware::from_fn_with_state(Door::new(app.clone()), Door::pass))
        .layer(axum::middleware::map_response_with_state(app.clone(), name_node))
        .with_state(app)
}

async fn generate<B: AskBody>(State(app): State<Arc<App>>, request: Request<Body>) -> Response {
    answer::serve::<B>(app, request).await
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let health = app.health();
    let status = if health.status == Status::Healthy { 200 } else { 503 };
    Reply::json(status, &health).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let created = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let created = created - app.started.elapsed().as_secs();
    let context = app.models.default().map(|l| l.context);
    let model = json!({"id": app.config.served_model_name, "object": "model", "created": created, "owned_by": "tidegate", "max_model_len": context});
    Reply::json(200, &json!({"object": "list", "data": [model]})).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let loaded = app.models.default();
    let text = app.metrics.render(loaded.as_ref().map(|l| l.engine.stats()));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let message = format!("{method} is not for {}; see the API in the README", uri.path());
    Reply::from(ApiError::new(ErrorKind::MethodNotAllowed, "method_not_allowed", message)).into_response()
}

async fn unknown_path(uri: Uri) -> Response {
    let path: String = uri.path().chars().take(200).collect();
    Reply::from(ApiError::new(ErrorKind::NotFound, "unknown_path", format!("there is nothing at {path}")))
        .into_response()
}

/// Every answer says which node it came from.
async fn name_node(State(app): State<Arc<App>>, mut response: Response) -> Response {
    if let Ok(id) = app.config.id.as_str().parse() {
        response.headers_mut().insert(headers::NODE, id);
    }
    response
}
