//! The private listener: loads and unloads models, says how they stand, and drains the node. It stands on loopback only and never meets a client's request.
//!
//! A page in a browser of this machine reaches loopback too, so nothing is taken that a page could send without being asked: a body must
//! be `application/json`, and a request that names an origin is refused.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{Request, State},
    http::{HeaderMap, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use tidegate_common::{
    contract::{ApiError, ErrorKind},
    ids::NodeId,
};
use tokio::task::AbortHandle;
use tracing::{info, warn};

use crate::{
    config::{LoadWhen, ModelConfig, check_name},
    duty::Duty,
    http::{App, Reply},
    models::{ModelError, ModelRef, Store},
    run::{RunError, bind, until_idle},
    served::{self, Report, Unaddable, Unloadable, WantError},
};

/// Where models are loaded.
pub const LOAD: &str = "/admin/models/load";

/// Where they are unloaded.
pub const UNLOAD: &str = "/admin/models/unload";

/// Where they are shown.
pub const MODELS: &str = "/admin/models";

/// Where the node is drained.
pub const DRAIN: &str = "/admin/drain";

/// Where that is taken back.
pub const UNDRAIN: &str = "/admin/undrain";

/// Longest that a load is waited for; it goes on when nobody waits.
const LOAD_WAIT_MAX: Duration = Duration::from_secs(3600);

/// Longest that an unload waits for running answers; they go on when nobody waits.
const UNLOAD_WAIT_MAX: Duration = Duration::from_secs(30);

/// Longest that a drain is waited for; it goes on when nobody waits.
const DRAIN_WAIT_MAX: Duration = Duration::from_secs(30);

/// Body of `POST /admin/models/load`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadRequest {
    /// A name that this node serves, or a reference of a model that is on this machine.
    pub model: String,
    /// The name to serve it under; its own when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Body of `POST /admin/models/unload`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnloadRequest {
    /// The model's name in the API.
    pub name: String,
}

/// Body of `POST /admin/drain` and `/admin/undrain`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Which node is meant; any other refuses.
    pub node: NodeId,
}

/// Answer of both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// Whether it was so before.
    pub already: bool,
    /// Answers that still run.
    pub running: usize,
}

/// Answer of all that is about models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Which node this is.
    pub node: NodeId,
    /// Bytes that all models together may take.
    pub models_memory: u64,
    /// All models.
    pub models: Vec<Report>,
}

/// Serves for as long as what it returns lives. None where there is to be no such listener, or where another process has the address
/// that nobody asked for.
///
/// # Errors
/// When the address that the configuration names cannot be had.
pub(crate) fn serve(app: &Arc<App>) -> Result<Option<Serving>, RunError> {
    let Some(admin) = app.config.admin else { return Ok(None) };
    let listener = match bind(admin.listen).and_then(tokio::net::TcpListener::from_std) {
        Ok(listener) => listener,
        Err(error) if admin.is_named => return Err(RunError::listen("node.admin.listen", admin.listen, error)),
        Err(error) => {
            warn!(address = %admin.listen, %error, "no private listener; set node.admin.listen to have one");
            return Ok(None);
        }
    };
    info!(node = %app.config.id, address = %address(&listener, admin.listen), "private listener");
    let service = router(app.clone());
    let task = tokio::spawn(async move { axum::serve(listener, service).await });
    Ok(Some(Serving(task.abort_handle())))
}

fn address(listener: &tokio::net::TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

/// The listener; it ends when this is dropped.
pub(crate) struct Serving(AbortHandle);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route(MODELS, get(show))
        .route(LOAD, post(load))
        .route(UNLOAD, post(unload))
        .route(DRAIN, post(drain))
        .route(UNDRAIN, post(undrain))
        .fallback(async || {
            Reply::from(ApiError::new(ErrorKind::NotFound, "unknown_path", format!("see {MODELS} {DRAIN} {UNDRAIN}")))
        })
        .layer(axum::middleware::from_fn(refuse_pages))
        .with_state(app)
}

async fn refuse_pages(request: Request, next: Next) -> Response {
    if request.headers().contains_key(header::ORIGIN) {
        let message = "requests of web pages are not taken here";
        return Reply::from(ApiError::new(ErrorKind::Forbidden, "origin", message)).into_response();
    }
    next.run(request).await
}

async fn show(State(app): State<Arc<App>>) -> Reply {
    table(&app, 200)
}

fn table(app: &App, status: u16) -> Reply {
    let models = app.models.reports(app.config.stall_after);
    Reply::json(status, &Table { node: app.config.id.clone(), models_memory: app.models.bytes_max(), models })
}

async fn load(State(app): State<Arc<App>>, headers: HeaderMap, body: Bytes) -> Result<Reply, Reply> {
    let request: LoadRequest = read(&headers, &body)?;
    let model = meant(&app, request)?;
    let (name, store) = (model.name.clone(), Store::open(&app.config.data_dir));
    let reference = model.model.clone();
    let located = tokio::task::spawn_blocking(move || store.locate(&reference)).await;
    match located {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(not_here(&error)),
        Err(error) => return Err(ApiError::new(ErrorKind::Internal, "internal", error.to_string()).into()),
    }
    match app.models.want(model, Instant::now() + LOAD_WAIT_MAX).await {
        Ok(()) => Ok(table(&app, 200)),
        Err(WantError::Refused(refusal)) => Err(failed(&app, &name, served::refusal(refusal))),
        Err(WantError::Unaddable(reason)) => Err(taken(&name, reason)),
    }
}

async fn unload(State(app): State<Arc<App>>, headers: HeaderMap, body: Bytes) -> Result<Reply, Reply> {
    let UnloadRequest { name } = read(&headers, &body)?;
    match app.models.unload(&name, Instant::now() + UNLOAD_WAIT_MAX).await {
        // 202: its running answers go on, and its memory is free after them
        Ok(is_free) => Ok(table(&app, if is_free { 200 } else { 202 })),
        Err(Unloadable::Unknown) => Err(ApiError::model_not_found(&name).into()),
        Err(Unloadable::Loading) => {
            let message = format!("'{name}' is being loaded; unload it once it stands");
            let error = ApiError::new(ErrorKind::Unavailable, "loading", message);
            Err(error.with_retry_after(Duration::from_secs(1)).into())
        }
    }
}

async fn drain(State(app): State<Arc<App>>, headers: HeaderMap, body: Bytes) -> Result<Reply, Reply> {
    let already = addressed(&app, &headers, &body)? != Duty::Serving;
    app.wishes.set_private(true);
    let drained = async {
        app.duties.reached(Duty::LettingGo).await;
        until_idle(&app).await;
    };
    // the bound is only the caller's
    let _ = tokio::time::timeout(DRAIN_WAIT_MAX, drained).await;
    Ok(Reply::json(200, &Drained { already, running: app.models.open() }))
}

async fn undrain(State(app): State<Arc<App>>, headers: HeaderMap, body: Bytes) -> Result<Reply, Reply> {
    let already = addressed(&app, &headers, &body)? == Duty::Serving;
    app.wishes.set_private(false);
    if app.wishes.in_registry() {
        let message =
            "the registry wants this node drained too; take that back with `tidegate undrain`, without --admin";
        return Err(ApiError::invalid("node", message).into());
    }
    let _ = tokio::time::timeout(DRAIN_WAIT_MAX, app.duties.reached(Duty::Serving)).await;
    Ok(Reply::json(200, &Drained { already, running: app.models.open() }))
}

/// What this node does now, if it is the one that is meant.
fn addressed(app: &App, headers: &HeaderMap, body: &[u8]) -> Result<Duty, Reply> {
    let DrainRequest { node } = read(headers, body)?;
    if node != app.config.id {
        let message = format!("this is the private listener of node '{}'", app.config.id);
        return Err(ApiError::invalid("node", message).into());
    }
    Ok(app.duties.now())
}

fn read<T: serde::de::DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T, Reply> {
    let is_json = |value: &header::HeaderValue| {
        value
            .to_str()
            .is_ok_and(|v| v.split(';').next().is_some_and(|v| v.trim().eq_ignore_ascii_case("application/json")))
    };
    if !headers.get(header::CONTENT_TYPE).is_some_and(is_json) {
        let message = "the body must be of content-type application/json";
        return Err(ApiError::new(ErrorKind::UnsupportedMediaType, "not_json", message).into());
    }
    serde_json::from_slice(body)
        .map_err(|e| ApiError::new(ErrorKind::InvalidRequest, "invalid_body", format!("the body: {e}")).into())
}

/// The model that a request names: one of the table by its name, or any by its reference.
fn meant(app: &App, request: LoadRequest) -> Result<ModelConfig, Reply> {
    let LoadRequest { model: text, name } = request;
    if let Some(name) = &name {
        check_name(name).map_err(|reason| ApiError::invalid("name", format!("a model's name {reason}")))?;
    }
    if let Some(known) = app.models.config_of(&text) {
        let name = name.unwrap_or_else(|| known.name.clone());
        return Ok(ModelConfig { name, ..known });
    }
    let model: ModelRef = text.parse().map_err(|e| ApiError::invalid("model", format!("{e}")))?;
    let own = ModelConfig::new(model);
    Ok(ModelConfig { name: name.unwrap_or(own.name), load: LoadWhen::FirstUse, ..own })
}

fn not_here(error: &ModelError) -> Reply {
    ApiError::new(ErrorKind::NotFound, "model_not_here", error.to_string()).with_param("model").into()
}

fn taken(name: &str, reason: Unaddable) -> Reply {
    let message = match reason {
        Unaddable::NameTaken => {
            format!("another model is served as '{name}'; unload it first, or give this one another name")
        }
        Unaddable::TooMany => "there are as many models as a node can have; unload one first".to_owned(),
    };
    ApiError::invalid("name", message).into()
}

/// Here the reason may be told in full.
fn failed(app: &App, name: &str, error: ApiError) -> Reply {
    let reports = app.models.reports(app.config.stall_after);
    let why = reports.into_iter().find(|report| report.health.name == name).and_then(|report| report.error);
    Reply::from(match why {
        Some(why) => ApiError { message: why, ..error },
        None => error,
    })
}
