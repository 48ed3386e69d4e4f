//! The door: how many requests may be inside at once, each from before its body is read to the last byte of its answer. As many again
//! may come from nodes that were lost.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body::{Frame, SizeHint};
use tidegate_common::{
    contract::{ApiError, ErrorKind, headers},
    ids::RequestId,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{App, Reply, frame};
use crate::record::Record;

/// Counts who is inside.
#[derive(Clone)]
pub(super) struct Door {
    app: Arc<App>,
    places: Arc<Semaphore>,
    places_moved: Arc<Semaphore>,
}

impl Door {
    pub(super) fn new(app: Arc<App>) -> Self {
        let places = || Arc::new(Semaphore::new(app.config.request.concurrent_max));
        Self { places: places(), places_moved: places(), app }
    }

    /// Middleware. What has no body to hold passes freely, and so does what operators send.
    pub(super) async fn pass(State(door): State<Self>, request: Request, next: Next) -> Response {
        let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
        let counts = |path: &String| request.method() == Method::POST && !path.starts_with("/admin");
        let Some(path) = path.filter(counts) else { return next.run(request).await };
        let places = if frame::is_moved(request.headers()) { &door.places_moved } else { &door.places };
        match Arc::clone(places).try_acquire_owned() {
            Ok(place) => next.run(request).await.map(|body| Body::new(Held { body, _place: place })),
            Err(_) => door.refuse(&path, &request),
        }
    }

    fn refuse(&self, path: &str, request: &Request) -> Response {
        let id = request.headers().get(headers::REQUEST_ID).and_then(|id| id.to_str().ok());
        let message = format!(
            "{} requests are being served already; try again later, or raise node.max_concurrent_requests",
            self.app.config.request.concurrent_max
        );
        let error = ApiError::new(ErrorKind::RateLimited, "too_many_requests", message)
            .with_retry_after(self.app.expected_wait());
        Record::begin(&self.app.metrics, path, &RequestId::from_client(id), Instant::now()).refused(&error);
        Reply::refusal(&error, path).into_response()
    }
}

/// A body that holds its request's place.
struct Held {
    body: Body,
    _place: OwnedSemaphorePermit,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_comes_back_with_the_end_of_the_body() {
        let places = Arc::new(Semaphore::new(1));
        let place = places.clone().try_acquire_owned().unwrap();
        let body = Body::new(Held { body: Body::from("whole"), _place: place });
        assert_eq!((body.size_hint().exact(), places.available_permits()), (Some(5), 0));
        drop(body);
        assert_eq!(places.available_permits(), 1);
    }
}
