//! What the edge writes itself: whole JSON answers and refusals in the OpenAI shape. Head and body leave in one write where they fit.

use bytes::Bytes;
use http::{Method, header};
use pingora::{http::ResponseHeader, protocols::http::ServerSession};
use tidegate_common::{
    contract::{ApiError, ErrorKind, Refusal, headers},
    ids::NodeId,
};

use crate::{
    ctx::Stamp,
    limits::{self, Allowance},
    route,
};

/// A whole answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) media_type: String,
    pub(crate) retry_after: Option<String>,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(status: u16, body: Bytes) -> Self {
        Self { status, media_type: "application/json".into(), retry_after: None, body }
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        let retry_after = refusal.retry_after_s.map(|seconds| seconds.to_string());
        Self { retry_after, ..Self::json(refusal.status, refusal.body.to_string().into()) }
    }
}

/// Writes a whole answer.
pub(crate) async fn write(
    session: &mut ServerSession,
    stamp: Stamp<'_>,
    node: Option<&NodeId>,
    answer: Answer,
) -> pingora::Result<()> {
    let mut head = head(answer.status, &answer.media_type, stamp, node)?;
    if let Some(after) = &answer.retry_after {
        head.insert_header(header::RETRY_AFTER, after)?;
    }
    whole(session, head, answer.body).await
}

/// Writes a refusal. One that comes before the body was read reads on a little, so that the client can read it.
pub(crate) async fn refuse(session: &mut ServerSession, stamp: Stamp<'_>, error: &ApiError) -> pingora::Result<()> {
    let mut head = head(error.status(), "application/json", stamp, None)?;
    if let Some(seconds) = error.retry_after_s() {
        head.insert_header(header::RETRY_AFTER, seconds.to_string())?;
    }
    match error.kind {
        ErrorKind::Unauthenticated => head.insert_header(header::WWW_AUTHENTICATE, "Bearer")?,
        ErrorKind::MethodNotAllowed => {
            let methods = route::allowed(session.req_header().uri.path()).unwrap_or_default();
            head.insert_header(header::ALLOW, methods)?;
        }
        _ => {}
    }
    let body = error.to_json_at(session.req_header().uri.path());
    whole(session, head, body.to_string().into()).await?;
    if !session.is_body_done() {
        if session.as_http1().is_some() && session.get_keepalive().is_none() {
            // nothing more will be said, and the client need not wait to know
            session.shutdown().await;
        }
        limits::linger(session).await;
    }
    Ok(())
}

/// Writes a refusal of a request whose head could not be read; nothing about the request may be asked of the session.
pub(crate) async fn refuse_unread(
    session: &mut ServerSession,
    stamp: Stamp<'_>,
    error: &ApiError,
) -> pingora::Result<()> {
    session.set_write_timeout(Some(std::time::Duration::from_secs(1)));
    let body = Bytes::from(error.to_json().to_string());
    let mut head = head(error.status(), "application/json", stamp, None)?;
    head.set_content_length(body.len())?;
    session.write_response_header(Box::new(head)).await?;
    session.write_response_body(body, true).await
}

/// A response's head with what every answer carries.
pub(crate) fn head(
    status: u16,
    media_type: &str,
    stamp: Stamp<'_>,
    node: Option<&NodeId>,
) -> pingora::Result<ResponseHeader> {
    let mut head = ResponseHeader::build(status, Some(12))?;
    head.insert_header(header::CONTENT_TYPE, media_type)?;
    head.insert_header(headers::REQUEST_ID, stamp.id.as_str())?;
    if let Some(cache) = stamp.cache {
        head.insert_header("x-cache", cache)?;
    }
    for (name, value) in stamp.allowance.into_iter().flat_map(Allowance::headers) {
        head.insert_header(name, value)?;
    }
    if let Some(node) = node {
        head.insert_header(headers::NODE, node.as_str())?;
    }
    Ok(head)
}

async fn whole(session: &mut ServerSession, mut head: ResponseHeader, body: Bytes) -> pingora::Result<()> {
    head.set_content_length(body.len())?;
    let headless = session.req_header().method == Method::HEAD;
    session.write_response_header(Box::new(head)).await?;
    session.write_response_body(if headless { Bytes::new() } else { body }, true).await
}
