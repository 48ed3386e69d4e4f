//! What it takes to begin an answer, and may take long: a model that has to be loaded first, a place in memory for it, a long prompt.
//!
//! A client waits for the answer's head. A balancer would take the silence for a loss, so it gets the head of a stream in time, signs of
//! life after it, and where nothing comes of it the refusal as an event.

use std::time::Duration;

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use tidegate_common::contract::{ApiError, event};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use super::{App, frame::Frame};
use crate::{
    duty::Duty,
    record::{Outcome, Record},
};

/// How often a request that waits shows that it is alive.
pub(super) const WAIT_INTERVAL: Duration = Duration::from_millis(900);

/// A request on its way to an answer.
pub(super) enum Opening<T> {
    /// It has arrived.
    Done(Result<T, ApiError>),
    /// A balancer must hear something before it does.
    Slow(Slow<T>),
}

/// One that goes on opening.
pub(super) struct Slow<T>(BoxFuture<'static, Result<T, ApiError>>);

/// Why there is no answer.
pub(super) enum Unopened {
    /// For this reason.
    Refused(ApiError),
    /// The node lets go.
    LetGo,
    /// The balancer has left.
    Left,
}

impl<T> Opening<T> {
    /// Awaits `opening`, for a balancer only as long as it may hear nothing.
    pub(super) async fn begin(
        frame: &Frame,
        opening: impl Future<Output = Result<T, ApiError>> + Send + 'static,
    ) -> Self {
        let mut opening = opening.boxed();
        if !frame.wire {
            return Self::Done(opening.await);
        }
        match timeout(WAIT_INTERVAL, &mut opening).await {
            Ok(done) => Self::Done(done),
            Err(_) => Self::Slow(Slow(opening)),
        }
    }
}

impl<T> Slow<T> {
    /// Awaits the rest, and shows the balancer that the node is alive.
    pub(super) async fn finish(mut self, app: &App, balancer: &mpsc::Sender<Bytes>) -> Result<T, Unopened> {
        let let_go = app.duties.reached(Duty::LettingGo);
        tokio::pin!(let_go);
        let mut signs = interval(WAIT_INTERVAL);
        signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                done = &mut self.0 => return done.map_err(Unopened::Refused),
                () = &mut let_go => return Err(Unopened::LetGo),
                () = balancer.closed() => return Err(Unopened::Left),
                // one that has not been read yet says the same
                _ = signs.tick() => drop(balancer.try_send(Bytes::from_static(event::WAIT))),
            }
        }
    }
}

impl Unopened {
    /// Tells the balancer, and the record.
    pub(super) async fn tell(self, mut record: Record, path: &str, balancer: &mpsc::Sender<Bytes>) {
        let mut out = Vec::new();
        match self {
            Self::Left => return,
            Self::LetGo => {
                record.end(Outcome::HandedOver);
                out.extend_from_slice(event::HANDOVER);
            }
            Self::Refused(error) => {
                record.refused(&error);
                event::write_refusal(&mut out, &error.to_refusal_at(path));
            }
        }
        let _ = balancer.send(out.into()).await;
    }
}

/// An answer of events, which `write` sends. It is a task of its own, so that a deadline holds for a reader that has stopped reading too.
pub(super) fn stream<W: Future<Output = ()> + Send + 'static>(
    write: impl FnOnce(mpsc::Sender<Bytes>) -> W,
) -> Response {
    let (sender, frames) = mpsc::channel::<Bytes>(1);
    tokio::spawn(write(sender));
    let frames = ReceiverStream::new(frames).map(Ok::<Bytes, std::convert::Infallible>);
    let mut response = Response::new(Body::from_stream(frames));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(event::CONTENT_TYPE));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
