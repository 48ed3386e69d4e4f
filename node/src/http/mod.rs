//! The node's public face: an OpenAI API, health and metrics. It answers from the first moment, and says "loading" until it can do more.

mod door;
mod frame;
mod check;
mod ask;
mod grammar;
mod opening;
mod answer;
mod choice;
mod once;
mod embed;
mod tokens;
mod shape;
mod openapi;
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
    http::{HeaderMap, Method, Request, Uri, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use serde_json::json;
use tidegate_common::{
    contract::{ApiError, ErrorKind, Health, ModelHealth, ModelState, Status, headers, paths},
    trace::{TRACEPARENT, TRACESTATE, Tracer},
};

use crate::{
    config::NodeConfig,
    duty::{Duties, Duty, Wishes},
    record::{Metrics, Traced},
    served::{Loaded, Models},
};
use ask::{Body as AskBody, ChatRequest, CompletionRequest, MessagesRequest, QueryRequest, ResponsesRequest};
use door::Door;
use embed::EmbeddingsRequest;
use openapi::{Described, RequestBody};
pub(crate) use reply::Reply;
use tokens::{DetokenizeRequest, TokenizeRequest};

/// What every handler sees.
pub struct App {
    /// The configuration.
    pub config: NodeConfig,
    /// The models served here.
    pub models: Models,
    /// Counters.
    pub metrics: Metrics,
    /// What the node does with requests.
    pub duties: Duties,
    /// Who wants it drained.
    pub wishes: Wishes,
    /// Where traces are exported to, if they are.
    pub tracer: Option<Arc<Tracer>>,
    /// Start of the process.
    pub started: Instant,
}

impl App {
    /// What `/health` says.
    pub fn health(&self) -> Health {
        let c = &self.config;
        let models = self.models.health(c.stall_after);
        let (status, reason) = self.status(&models);
        let sum = |read: fn(&ModelHealth) -> u32| models.iter().map(read).fold(0, u32::saturating_add);
        let (mut device, mut context, mut step) = (String::new(), 0, 0);
        self.models.for_each_ready(|loaded| {
            device.clone_from(&loaded.device);
            context = context.max(loaded.context as u32);
            step += loaded.engine.stats().steps.load(Relaxed);
        });
        Health {
            status,
            uptime: self.started.elapsed().as_secs(),
            node: c.id.clone(),
            model: c.default_model().name.clone(),
            version: c.version.clone(),
            color: c.color.clone(),
            site: c.site.clone(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            device,
            context,
            running: sum(|m| m.running),
            waiting: sum(|m| m.waiting),
            kv_blocks_free: sum(|m| m.kv_blocks_free),
            kv_blocks_total: sum(|m| m.kv_blocks_total),
            step,
            reason,
            models: Some(models),
        }
    }

    /// One model that is silent takes itself out of its pool; when all that stand are, the node is stalled.
    fn status(&self, models: &[ModelHealth]) -> (Status, Option<String>) {
        let silent = models.iter().find(|m| m.state == ModelState::Stalled);
        let stands = models.iter().any(|m| m.state == ModelState::Ready);
        match silent {
            _ if self.is_draining() => (Status::Draining, Some("the node takes no new requests".to_owned())),
            _ if !self.models.is_started() => (Status::Loading, Some("the model is loading".to_owned())),
            Some(silent) if !stands => (Status::Stalled, silent.reason.clone()),
            _ => (Status::Healthy, None),
        }
    }

    /// The place in a trace of a request with these headers, where traces are exported.
    fn trace(&self, headers: &HeaderMap) -> Option<Traced> {
        let tracer = self.tracer.as_ref()?;
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        Some(Traced::new(tracer, tracer.begin(header(TRACEPARENT), header(TRACESTATE))))
    }

    /// Whether it takes nothing new.
    fn is_draining(&self) -> bool {
        self.duties.now() != Duty::Serving
    }

    /// How long until a refused request is likely to be taken.
    fn expected_wait(&self) -> Duration {
        let mut longest = Duration::ZERO;
        self.models.for_each_ready(|loaded| longest = longest.max(loaded.engine.stats().backlog()));
        longest
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
        if !self.is_draining() {
            return Ok(());
        }
        let text = "this node is draining and takes no new requests";
        Err(ApiError::new(ErrorKind::Unavailable, "draining", text).with_retry_after(Duration::from_secs(1)))
    }
}

/// All routes of the node.
pub fn router(app: Arc<App>) -> Router {
    let add = |router: Router<Arc<App>>, (about, handler): (Described, MethodRouter<Arc<App>>)| {
        router.route(about.path, handler.fallback(wrong_method))
    };
    routes()
        .into_iter()
        .fold(Router::new(), add)
        .fallback(unknown_path)
        .layer(axum::middleware::from_fn_with_state(Door::new(app.clone()), Door::pass))
        .layer(axum::middleware::map_response_with_state(app.clone(), name_node))
        .with_state(app)
}

/// What is served at which path; the router and the document are both made of it.
fn routes() -> Vec<(Described, MethodRouter<Arc<App>>)> {
    let generation = |path, summary, body| Described { path, method: "post", summary, body: Some(body), streams: true };
    let question = |path, summary, body| Described { path, method: "post", summary, body: Some(body), streams: false };
    let view = |path, summary| Described { path, method: "get", summary, body: None, streams: false };
    let chat = RequestBody::of::<ChatRequest>;
    vec![
        (
            generation(paths::CHAT_COMPLETIONS, "A chat completion, as the OpenAI API has it.", chat()),
            post(generate::<ChatRequest>),
        ),
        (
            generation(paths::COMPLETIONS, "A text completion.", RequestBody::of::<CompletionRequest>()),
            post(generate::<CompletionRequest>),
        ),
        (generation(paths::CHAT, "A chat completion, by a shorter path.", chat()), post(generate::<ChatRequest>)),
        (
            generation(paths::API_CHAT, "A query in, an answer out.", RequestBody::of::<QueryRequest>()),
            post(generate::<QueryRequest>),
        ),
        (
            generation(
                paths::RESPONSES,
                "A response, as the OpenAI API has it.",
                RequestBody::of::<ResponsesRequest>(),
            ),
            post(generate::<ResponsesRequest>),
        ),
        (
            generation(
                paths::MESSAGES,
                "A message, as the Anthropic API has it.",
                RequestBody::of::<MessagesRequest>(),
            ),
            post(generate::<MessagesRequest>),
        ),
        (
            question(paths::EMBEDDINGS, "Vectors for texts.", RequestBody::of::<EmbeddingsRequest>()),
            post(once::serve::<EmbeddingsRequest>),
        ),
        (
            question(paths::TOKENIZE, "The tokens of a text or a conversation.", RequestBody::of::<TokenizeRequest>()),
            post(once::serve::<TokenizeRequest>),
        ),
        (
            question(paths::DETOKENIZE, "The text of tokens.", RequestBody::of::<DetokenizeRequest>()),
            post(once::serve::<DetokenizeRequest>),
        ),
        (view(paths::MODELS, "The models served here."), get(models)),
        (view(paths::HEALTH, "Whether requests can be served."), get(health)),
        (view(paths::METRICS, "Metrics in Prometheus' text format; at the node alone."), get(metrics)),
        (view(paths::OPENAPI, "This document."), get(document)),
        (view(paths::DOCS, "The same for people."), get(docs)),
    ]
}

fn described() -> Vec<Described> {
    routes().into_iter().map(|(about, _)| about).collect()
}

async fn document() -> Response {
    Reply::json(200, &openapi::document(&described())).into_response()
}

async fn docs() -> Response {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], openapi::page(&openapi::document(&described())))
        .into_response()
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
    let model = |(id, context): (String, Option<usize>)| json!({"id": id, "object": "model", "created": created, "owned_by": "tidegate", "max_model_len": context});
    let data: Vec<_> = app.models.offered().into_iter().map(model).collect();
    Reply::json(200, &json!({"object": "list", "data": data})).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render(&app.models)).into_response()
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
