//! Every refusal a client can see, in the OpenAI error shape, with one table from kind to HTTP status.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::paths;

/// What went wrong, and so which status and `type` the client sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request is malformed or asks for what cannot be.
    InvalidRequest,
    /// No credential, or one that is not known.
    Unauthenticated,
    /// The credential does not allow this.
    Forbidden,
    /// No such path or model.
    NotFound,
    /// The path exists, but not with this method.
    MethodNotAllowed,
    /// The body took too long to arrive.
    RequestTimeout,
    /// A condition of the request does not hold here.
    PreconditionFailed,
    /// The body is larger than accepted.
    TooLarge,
    /// The body is not of a media type accepted here.
    UnsupportedMediaType,
    /// More requests than the caller or the server may have now.
    RateLimited,
    /// A fault of ours.
    Internal,
    /// A node broke off or answered with nonsense.
    BadGateway,
    /// Not now: loading, draining, no healthy node.
    Unavailable,
    /// The request's deadline passed.
    DeadlineExceeded,
}

impl ErrorKind {
    /// HTTP status and the error object's `type`.
    pub fn table(self) -> (u16, &'static str) {
        match self {
            Self::InvalidRequest => (400, "invalid_request_error"),
            Self::Unauthenticated => (401, "authentication_error"),
            Self::Forbidden => (403, "permission_error"),
            Self::NotFound => (404, "not_found_error"),
            Self::MethodNotAllowed => (405, "invalid_request_error"),
            Self::RequestTimeout => (408, "invalid_request_error"),
            Self::PreconditionFailed => (412, "invalid_request_error"),
            Self::TooLarge => (413, "invalid_request_error"),
            Self::UnsupportedMediaType => (415, "invalid_request_error"),
            Self::RateLimited => (429, "rate_limit_error"),
            Self::Internal => (500, "internal_error"),
            Self::BadGateway => (502, "upstream_error"),
            Self::Unavailable => (503, "unavailable_error"),
            Self::DeadlineExceeded => (504, "timeout_error"),
        }
    }
}

impl ErrorKind {
    /// The error object's `type` in Anthropic's API.
    fn anthropic(self) -> &'static str {
        match self {
            Self::TooLarge => "request_too_large",
            Self::Internal | Self::BadGateway => "api_error",
            Self::Unavailable => "overloaded_error",
            kind => kind.table().1,
        }
    }
}

/// One refusal, as the client sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Decides status and `type`.
    pub kind: ErrorKind,
    /// A short stable word for programs, such as `model_not_found`.
    pub code: &'static str,
    /// For people: what is wrong, and which knob moves it.
    pub message: String,
    /// The request's field at fault, if one is.
    pub param: Option<String>,
    /// When to try again.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// A refusal of this kind.
    pub fn new(kind: ErrorKind, code: &'static str, message: impl Into<String>) -> Self {
        Self { kind, code, message: message.into(), param: None, retry_after: None }
    }

    /// A malformed or impossible request.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidRequest, "invalid_value", message).with_param(param)
    }

    /// The model is not served here.
    pub fn model_not_found(model: &str) -> Self {
        let model: String = model.chars().take(200).collect();
        let message = format!("the model '{model}' does not exist here; GET /v1/models lists those that do");
        Self::new(ErrorKind::NotFound, "model_not_found", message).with_param("model")
    }

    /// Names the field at fault.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Says when to try again.
    #[must_use]
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// HTTP status.
    pub fn status(&self) -> u16 {
        self.kind.table().0
    }

    /// Value of the `Retry-After` header in whole seconds, at least one.
    pub fn retry_after_s(&self) -> Option<u64> {
        self.retry_after.map(|after| after.as_secs_f64().ceil().max(1.0) as u64)
    }

    /// The body that clients of `path` expect: Anthropic's for messages, OpenAI's for all else.
    pub fn to_json_at(&self, path: &str) -> Value {
        if path != paths::MESSAGES {
            return self.to_json();
        }
        json!({"type": "error", "error": {"type": self.kind.anthropic(), "message": self.message, "param": self.param, "code": self.code}})
    }

    /// The last event of a stream of `path` that cannot go on: its name, if it has one, and its data.
    pub fn to_event_at(&self, path: &str) -> (Option<&'static str>, Value) {
        error_event_at(path, self.to_json_at(path))
    }

    /// The same for a balancer, which may still make any answer of it.
    pub fn to_refusal_at(&self, path: &str) -> Refusal {
        Refusal { status: self.status(), retry_after_s: self.retry_after_s(), body: self.to_json_at(path) }
    }

    /// The body: `{"error": {"message", "type", "param", "code"}}`.
    pub fn to_json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind.table().1, "param": self.param, "code": self.code}})
    }
}

/// The last event of a stream of `path`, of the body that the error would have as a whole answer: its name, if it has one, and its data.
pub fn error_event_at(path: &str, body: Value) -> (Option<&'static str>, Value) {
    match path {
        paths::MESSAGES => (Some("error"), body),
        paths::RESPONSES => {
            let Value::Object(error) = &body["error"] else { return (Some("error"), body) };
            let field = |name| error.get(name).unwrap_or(&Value::Null);
            let (code, message, param) = (field("code"), field("message"), field("param"));
            (Some("error"), json!({"type": "error", "code": code, "message": message, "param": param}))
        }
        _ => (None, body),
    }
}

/// What a node says in the place of an answer when the head of a stream to a balancer is out already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The status that the answer would have had, 400 to 599.
    pub status: u16,
    /// Its `Retry-After`, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u64>,
    /// Its body.
    pub body: Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_the_openai_shape() {
        let error = ApiError::invalid("temperature", "temperature must be from 0 to 2")
            .with_retry_after(Duration::from_millis(20));
        assert_eq!(error.status(), 400);
        assert_eq!(error.retry_after_s(), Some(1));
        let expected = r#"{"error":{"message":"temperature must be from 0 to 2","type":"invalid_request_error","param":"temperature","code":"invalid_value"}}"#;
        assert_eq!(error.to_json().to_string(), expected);
    }

    #[test]
    fn each_api_gets_the_shape_its_clients_read() {
        let error = ApiError::new(ErrorKind::Unavailable, "loading", "wait");
        assert_eq!(error.to_json_at(paths::MESSAGES)["error"]["type"], "overloaded_error");
        assert_eq!(error.to_json_at(paths::MESSAGES)["type"], "error");
        assert_eq!(error.to_json_at(paths::RESPONSES), error.to_json());
        let event = r#"{"type":"error","code":"loading","message":"wait","param":null}"#;
        assert_eq!(error.to_event_at(paths::RESPONSES).1.to_string(), event);
        assert_eq!(error.to_event_at(paths::CHAT), (None, error.to_json()));
    }
}
