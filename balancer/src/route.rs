//! Where a request goes: by path and method first, then by model to a pool. What is not listed here does not exist outside.

use std::time::Duration;

use http::Method;
use tidegate_common::contract::{ApiError, ErrorKind, paths};

use crate::pool::{Pool, Snapshot};

/// What a path and method mean at the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// The edge's own health.
    Health,
    /// All models.
    Models,
    /// The document of the API at this path, which any node gives.
    Document(&'static str),
    /// A generation at this path.
    Generation(&'static str),
    /// What the private listener shows at this path, for credentials that may see it.
    Private(&'static str),
}

/// The cluster as this balancer sees it.
pub(crate) const MEMBERS: &str = "/members";

/// Methods that a known path takes.
pub(crate) fn allowed(path: &str) -> Option<&'static str> {
    match path {
        paths::HEALTH => Some("GET, HEAD"),
        paths::MODELS | paths::OPENAPI | paths::DOCS | paths::METRICS | MEMBERS => Some("GET"),
        _ if paths::is_generation(path) => Some("POST"),
        _ => None,
    }
}

/// The label of all paths that are none of the API's.
pub(crate) const OTHER: &str = "other";

/// A path as a label: one of ours, or one word for all others.
pub(crate) fn label(path: &str) -> &'static str {
    let known = [paths::HEALTH, paths::MODELS, paths::OPENAPI, paths::DOCS, paths::METRICS, MEMBERS]
        .into_iter()
        .chain(paths::GENERATIONS);
    known.into_iter().find(|known| *known == path).unwrap_or(OTHER)
}

/// Routes by path and method.
pub(crate) fn route(method: &Method, path: &str) -> Result<Route, ApiError> {
    match (method, path) {
        (&Method::GET | &Method::HEAD, paths::HEALTH) => Ok(Route::Health),
        (&Method::GET, paths::MODELS) => Ok(Route::Models),
        (&Method::GET, paths::OPENAPI | paths::DOCS) => Ok(Route::Document(label(path))),
        (&Method::GET, paths::METRICS | MEMBERS) => Ok(Route::Private(label(path))),
        (&Method::POST, path) if paths::is_generation(path) => Ok(Route::Generation(label(path))),
        (method, path) => Err(refusal(method, path)),
    }
}

fn refusal(method: &Method, path: &str) -> ApiError {
    let shown: String = path.chars().take(200).collect();
    match allowed(path) {
        Some(methods) => {
            let message = format!("{shown} takes {methods}, not {method}");
            ApiError::new(ErrorKind::MethodNotAllowed, "method_not_allowed", message)
        }
        None => unknown(&shown),
    }
}

/// There is nothing at this path.
pub(crate) fn unknown(path: &str) -> ApiError {
    ApiError::new(ErrorKind::NotFound, "unknown_path", format!("there is no {path} here"))
}

/// The pool that serves `model`; without a name, that of the members' default model, or the only one there is.
pub(crate) fn pool<'a>(snapshot: &'a Snapshot, model: Option<&str>) -> Result<(&'a str, &'a Pool), ApiError> {
    let mut models = snapshot.models.iter();
    let default = snapshot.default_model.as_deref().filter(|model| snapshot.models.contains_key(*model));
    let found = match model.or(default) {
        Some(name) => snapshot.models.get_key_value(name).ok_or_else(|| missing_model(snapshot, name))?,
        None => match (models.next(), models.next()) {
            (Some(only), None) => only,
            (None, _) => return Err(nobody_ready("no node has joined this cluster yet")),
            (Some(_), Some(_)) => {
                return Err(ApiError::invalid("model", "several models are served here; name one of them in 'model'"));
            }
        },
    };
    if found.1.is_empty() {
        return Err(nobody_ready(&format!("no node that serves '{}' is ready now", found.0)));
    }
    Ok((found.0, found.1))
}

/// Before any node is known, a model cannot be said not to exist.
fn missing_model(snapshot: &Snapshot, name: &str) -> ApiError {
    if snapshot.models.is_empty() {
        return nobody_ready("no node has joined this cluster yet");
    }
    ApiError::model_not_found(name)
}

/// Code of the refusal that waiting may help.
pub(crate) const NOBODY_READY: &str = "no_ready_node";

/// Nobody can take the request now.
pub(crate) fn nobody_ready(message: &str) -> ApiError {
    ApiError::new(ErrorKind::Unavailable, NOBODY_READY, message).with_retry_after(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_without_a_model_gets_the_one_that_the_members_agree_on() {
        let pool = || Pool { members: 1, ..Pool::default() };
        let models = || [("a".to_owned(), pool()), ("b".to_owned(), pool())].into();
        let refusal = |snapshot: &Snapshot, model| super::pool(snapshot, model).unwrap_err();
        let agreed = Snapshot { models: models(), default_model: Some("b".into()), ..Snapshot::default() };
        assert!(refusal(&agreed, None).message.contains("'b'"), "its pool was found, and has nobody ready");
        let at_odds = Snapshot { models: models(), ..Snapshot::default() };
        assert_eq!(refusal(&at_odds, None).status(), 400);
        assert_eq!(refusal(&at_odds, Some("c")).status(), 404);
        let gone = Snapshot { models: models(), default_model: Some("c".into()), ..Snapshot::default() };
        assert_eq!(refusal(&gone, None).status(), 400);
    }

    #[test]
    fn only_what_is_public_has_a_route() {
        assert_eq!(route(&Method::GET, "/health"), Ok(Route::Health));
        assert_eq!(route(&Method::POST, "/v1/chat/completions"), Ok(Route::Generation("/v1/chat/completions")));
        for (method, path, status) in [
            (Method::GET, "/v1/chat/completions", 405),
            (Method::DELETE, "/v1/models", 405),
            (Method::POST, "/metrics", 405),
            (Method::GET, "/v1/models/", 404),
            (Method::POST, "/", 404),
        ] {
            assert_eq!(route(&method, path).unwrap_err().status(), status, "{method} {path}");
        }
        assert_eq!(label("/secret"), "other");
    }
}
