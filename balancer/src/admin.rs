//! The private listener: what operators, `tidegate status` and a load balancer in front ask. It never meets a client's request.

use std::sync::Arc;

use async_trait::async_trait;
use http::{Method, Response, StatusCode, header};
use pingora::{apps::http_app::ServeHttp, protocols::http::ServerSession};
use serde::{Deserialize, Serialize};
use tidegate_common::{
    contract::{ApiError, ErrorKind, ModelHealth},
    ids::{Color, NodeId, SiteName},
};

use crate::{
    drain::OpenRequests,
    metrics::{self, Metrics},
    pool::PoolView,
};

pub use crate::pool::Phase;

/// Body of `GET /members`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// How far the registry's view is to be trusted.
    pub registry: RegistryLink,
    /// Every member, ready or not.
    pub members: Vec<MemberReport>,
}

/// Whether the balancer hears from the registry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistryLink {
    /// Nothing has been read yet.
    #[default]
    Connecting,
    /// The view follows the registry.
    Live,
    /// Out of reach; the view is the last known.
    Lost,
}

/// One member as the balancer sees it; load is what its last answered probe said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberReport {
    /// The node's id.
    pub node: NodeId,
    /// `host:port` it is reached by.
    pub address: String,
    /// The model it serves.
    pub model: String,
    /// Version of the model or its deployment.
    pub version: String,
    /// Blue or green.
    pub color: Color,
    /// Where it stands.
    pub site: SiteName,
    /// Share in round-robin.
    pub weight: u32,
    /// Where it stands in its life.
    pub state: Phase,
    /// Since when, in Unix seconds.
    pub since: u64,
    /// Whether the registry lists it.
    pub listed: bool,
    /// Device class.
    pub device: Option<String>,
    /// Sequences in its batch.
    pub running: Option<u32>,
    /// Sequences that wait.
    pub waiting: Option<u32>,
    /// KV blocks free or evictable.
    pub kv_blocks_free: Option<u32>,
    /// All KV blocks.
    pub kv_blocks_total: Option<u32>,
    /// Steps finished since its start.
    pub step: Option<u64>,
    /// Each of its models; empty before the first answered probe, and for nodes of earlier releases.
    #[serde(default)]
    pub models: Vec<ModelHealth>,
    /// Why the last probe did not find it healthy.
    pub last_probe_error: Option<String>,
}

/// The private listener's application.
pub(crate) struct Admin {
    pub(crate) pool: Arc<PoolView>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) open: Arc<OpenRequests>,
}

impl Admin {
    fn respond(&self, method: &Method, path: &str) -> Response<Vec<u8>> {
        if method != Method::GET && method != Method::HEAD {
            return error(&ApiError::new(ErrorKind::MethodNotAllowed, "method_not_allowed", "only GET is taken here"));
        }
        match path {
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => self.readiness(),
            "/members" => json(StatusCode::OK, &self.pool.load().report),
            "/metrics" => answer(StatusCode::OK, metrics::MEDIA_TYPE, self.metrics.render()),
            _ => error(&ApiError::new(ErrorKind::NotFound, "unknown_path", "see /metrics /members /healthz /readyz")),
        }
    }

    fn readiness(&self) -> Response<Vec<u8>> {
        if self.open.is_draining() {
            text(StatusCode::SERVICE_UNAVAILABLE, "draining\n")
        } else if self.pool.load().has_ready() {
            text(StatusCode::OK, "ready\n")
        } else {
            text(StatusCode::SERVICE_UNAVAILABLE, "no member is ready\n")
        }
    }
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let head = session.req_header();
        let mut response = self.respond(&head.method, head.uri.path());
        if head.method == Method::HEAD {
            response.body_mut().clear();
        }
        response
    }
}

fn text(status: StatusCode, body: &str) -> Response<Vec<u8>> {
    answer(status, "text/plain", body.into())
}

fn json(status: StatusCode, body: &impl Serialize) -> Response<Vec<u8>> {
    answer(status, "application/json", serde_json::to_vec(body).unwrap_or_default())
}

fn error(error: &ApiError) -> Response<Vec<u8>> {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json(status, &error.to_json())
}

fn answer(status: StatusCode, media_type: &'static str, body: Vec<u8>) -> Response<Vec<u8>> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let length = response.body().len();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(media_type));
    headers.insert(header::CONTENT_LENGTH, length.into());
    response
}
