//! JSON answers and refusals as HTTP responses.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tidegate_common::contract::ApiError;

/// A JSON answer.
pub(crate) struct Reply {
    status: u16,
    body: Vec<u8>,
    retry_after_s: Option<u64>,
}

impl Reply {
    /// `body` as JSON.
    pub(crate) fn json(status: u16, body: &impl Serialize) -> Self {
        let body = serde_json::to_vec(body).expect("our own answers can be written as JSON");
        Self { status, body, retry_after_s: None }
    }
}

impl Reply {
    /// A refusal in the shape that clients of `path` expect.
    pub(super) fn refusal(error: &ApiError, path: &str) -> Self {
        Self { retry_after_s: error.retry_after_s(), ..Self::json(error.status(), &error.to_json_at(path)) }
    }
}

impl From<ApiError> for Reply {
    fn from(error: ApiError) -> Self {
        Self::refusal(&error, "")
    }
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
