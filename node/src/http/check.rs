//! Single checks that requests share. Each refusal names the field, the limit, and the config key that moves it.

use std::ops::RangeInclusive;

use serde::de::DeserializeOwned;
use tidegate_common::contract::{ApiError, ErrorKind};

use crate::served::Loaded;

/// Reads a body.
///
/// # Errors
/// When it is not JSON, or a field has the wrong type; the field is named.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let broken = |e: &serde_json::Error| {
        ApiError::new(ErrorKind::InvalidRequest, "invalid_json", format!("the body is not valid JSON: {e}"))
    };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let body = serde_path_to_error::deserialize::<_, T>(&mut deserializer).map_err(|e| {
        let (path, inner) = (e.path().to_string(), e.into_inner());
        match inner.classify() {
            serde_json::error::Category::Data if path != "." => {
                ApiError::invalid(path.clone(), format!("{path}: {inner}"))
            }
            serde_json::error::Category::Data => {
                let message = format!("the body must be a JSON object: {inner}");
                ApiError::new(ErrorKind::InvalidRequest, "invalid_body", message)
            }
            _ => broken(&inner),
        }
    })?;
    deserializer.end().map_err(|e| broken(&e))?;
    Ok(body)
}

pub(super) fn missing(field: &str) -> ApiError {
    ApiError::invalid(field, format!("'{field}' is missing"))
}

pub(super) fn unsupported(field: &str, instead: &str) -> ApiError {
    ApiError::new(ErrorKind::InvalidRequest, "unsupported", format!("'{field}' is not supported: {instead}"))
        .with_param(field)
}

/// A whole number within its range.
pub(super) fn whole(
    field: &str,
    value: Option<i64>,
    range: RangeInclusive<i64>,
    default: i64,
) -> Result<i64, ApiError> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(&value) => Ok(value),
        Some(value) if *range.end() == i64::MAX => {
            Err(ApiError::invalid(field, format!("{field} = {value} must be at least {}", range.start())))
        }
        Some(value) => Err(outside(field, value, range.start(), range.end())),
    }
}

/// A number within its range.
pub(super) fn real(field: &str, value: Option<f64>, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
    match value {
        Some(value) if !range.contains(&value) => Err(outside(field, value, range.start(), range.end())),
        value => Ok(value.map(|v| v as f32)),
    }
}

fn outside(
    field: &str,
    value: impl std::fmt::Display,
    from: impl std::fmt::Display,
    to: impl std::fmt::Display,
) -> ApiError {
    ApiError::invalid(field, format!("{field} = {value} must be from {from} to {to}"))
}

/// Tokens that the vocabulary has.
pub(super) fn known(field: &str, tokens: Vec<u32>, loaded: &Loaded) -> Result<Vec<u32>, ApiError> {
    let vocab = loaded.tokenizer.vocab();
    match tokens.iter().find(|t| **t as usize >= vocab) {
        Some(token) => Err(ApiError::invalid(field, format!("token id {token} is outside the vocabulary of {vocab}"))),
        None => Ok(tokens),
    }
}

/// A text's tokens; a `bare` text is no rendered template. Text that cannot fit the context, however it is cut into tokens, is refused
/// before it costs time.
pub(super) fn encode(field: &str, text: &str, bare: bool, loaded: &Loaded) -> Result<Vec<u32>, ApiError> {
    let bytes_max = loaded.context.saturating_mul(loaded.tokenizer.token_bytes_max());
    if text.len() > bytes_max {
        let message = format!(
            "the prompt has {} bytes, more than {} tokens can spell; node.max_context sets the context",
            text.len(),
            loaded.context
        );
        return Err(too_long(field, message));
    }
    let encoded = loaded.tokenizer.encode(text, bare);
    encoded.map_err(|e| ApiError::invalid(field, format!("the tokenizer refuses this text: {e}")))
}

/// A prompt that leaves `room` for at least so many tokens.
pub(super) fn fits(field: &str, prompt: &[u32], room: usize, loaded: &Loaded) -> Result<(), ApiError> {
    if prompt.is_empty() {
        return Err(ApiError::invalid(field, format!("'{field}' is empty")));
    }
    if prompt.len() + room <= loaded.context {
        return Ok(());
    }
    let message = format!(
        "the prompt has {} tokens, and the context of {} must hold at least {room} more; node.max_context sets it, up to what the model was made for",
        prompt.len(),
        loaded.context
    );
    Err(too_long(field, message))
}

fn too_long(field: &str, message: String) -> ApiError {
    ApiError { code: "context_length_exceeded", ..ApiError::invalid(field, message) }
}
