//! What a client may make the edge hold of one request: the size and pace of its head and its body.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT};
use pingora::{
    ErrorType::{ConnectionClosed, H2Error, ReadError, ReadTimedout},
    protocols::http::ServerSession,
};
use tidegate_common::contract::{ApiError, ErrorKind};
use tokio::time::timeout;

use crate::config::LimitsConfig;

/// How long an early refusal goes on reading what the client still sends, so that the client can read the refusal.
const LINGER: Duration = Duration::from_secs(5);

/// Judges a request's head by its size.
pub(crate) fn check_head(session: &ServerSession, limits: &LimitsConfig) -> Result<(), ApiError> {
    let headers = &session.req_header().headers;
    if headers.len() > limits.headers_max {
        return Err(bad_head("too_many_headers", "too many header lines (balancer.limits.max_headers)"));
    }
    let Some(h1) = session.as_http1() else { return Ok(()) }; // h2 bounds its list itself
    let raw = h1.get_headers_raw_bytes();
    if raw.len() > limits.header_bytes_max {
        return Err(bad_head("headers_too_large", "the header is too large (balancer.limits.max_header_bytes)"));
    }
    Ok(())
}

fn bad_head(code: &'static str, message: &str) -> ApiError {
    ApiError::new(ErrorKind::InvalidRequest, code, message)
}

/// Why there is no body.
#[derive(Debug)]
pub(crate) enum BodyError {
    /// The client is told why.
    Refused(ApiError),
    /// The client is not there any more.
    ClientGone,
}

impl From<ApiError> for BodyError {
    fn from(error: ApiError) -> Self {
        Self::Refused(error)
    }
}

/// Reads a whole body within its bounds of size and time.
pub(crate) async fn read_body(session: &mut ServerSession, limits: &LimitsConfig) -> Result<Bytes, BodyError> {
    let declared = session.get_header(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > limits.body_bytes_max as u64) {
        return Err(too_large(limits).into());
    }
    if session.get_header(EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        session.write_continue_response().await.map_err(|_| BodyError::ClientGone)?;
    }
    session.set_read_timeout(Some(limits.body_timeout));
    match timeout(limits.body_timeout, collect(session, limits)).await {
        Ok(body) => body,
        Err(_) => Err(too_slow().into()),
    }
}

async fn collect(session: &mut ServerSession, limits: &LimitsConfig) -> Result<Bytes, BodyError> {
    let Some(first) = next_part(session).await? else { return Ok(Bytes::new()) };
    let mut body = BytesMut::from(first);
    while body.len() <= limits.body_bytes_max {
        match next_part(session).await? {
            Some(part) => body.extend_from_slice(&part),
            None => return Ok(body.freeze()),
        }
    }
    Err(too_large(limits).into())
}

async fn next_part(session: &mut ServerSession) -> Result<Option<Bytes>, BodyError> {
    let read = session.read_request_body().await;
    read.map_err(|e| match e.etype() {
        ConnectionClosed | ReadError | H2Error => BodyError::ClientGone,
        ReadTimedout => too_slow().into(),
        _ => {
            // where it ends nobody knows, so nothing that follows may be read as a request
            session.set_keepalive(None);
            bad_head("malformed_body", "the body's framing is broken").into()
        }
    })
}

fn too_large(limits: &LimitsConfig) -> ApiError {
    let message = format!("the body is larger than {} bytes (balancer.limits.max_body)", limits.body_bytes_max);
    ApiError::new(ErrorKind::TooLarge, "body_too_large", message)
}

fn too_slow() -> ApiError {
    ApiError::new(ErrorKind::RequestTimeout, "body_timeout", "the body took too long to arrive")
}

/// Reads on for a bounded time after an early refusal: closing on unread data would destroy the refusal on its way.
pub(crate) async fn linger(session: &mut ServerSession) {
    session.set_total_drain_timeout(Some(LINGER));
    let _ = session.drain_request_body().await;
}
