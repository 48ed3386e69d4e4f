//! Answers that come in one piece and may take a while: to a client one JSON body, to a balancer a stream of one event, with signs of life
//! until then.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use axum::{
    body::Body,
    extract::State,
    http::Request,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tidegate_common::contract::{ApiError, EventId, event};
use tokio::sync::mpsc;

use super::{
    App, Reply, answer,
    frame::Frame,
    opening::{self, Opening, WAIT_INTERVAL},
};
use crate::{
    duty::Duty,
    record::{Outcome, Record},
    served::Loaded,
};

/// A request that is answered in one piece.
pub(super) trait Question: DeserializeOwned + Send + 'static {
    /// The model it names.
    fn model(&self) -> Option<&str>;

    /// Checks it and begins. Takes milliseconds: not for a thread that serves others.
    ///
    /// # Errors
    /// What is wrong with it, or why it cannot be taken now.
    fn begin(self, app: &App, loaded: &Arc<Loaded>, frame: &Frame) -> Result<Begun, ApiError>;
}

/// Work on an answer.
pub(super) struct Begun {
    pub(super) prompt_tokens: usize,
    pub(super) work: Pin<Box<dyn Future<Output = Result<Value, Outcome>> + Send>>,
}

impl Begun {
    /// An answer that is there already.
    pub(super) fn done(prompt_tokens: usize, value: Value) -> Self {
        Self { prompt_tokens, work: Box::pin(std::future::ready(Ok(value))) }
    }
}

/// Serves one request.
pub(super) async fn serve<Q: Question>(State(app): State<Arc<App>>, request: Request<Body>) -> Response {
    let frame = Frame::read(request.headers(), app.config.request.timeout);
    let path = request.uri().path().to_owned();
    let mut record = Record::begin(&app.metrics, &path, &frame.id, frame.arrived).traced(app.trace(request.headers()));
    let its_frame = frame.clone();
    let mut response = match Opening::begin(&frame, open::<Q>(app.clone(), frame.clone(), request)).await {
        Opening::Done(Ok((loaded, begun))) => {
            record.admitted(begun.prompt_tokens, false);
            Once { app, loaded, frame: its_frame, path, record, prompt_tokens: begun.prompt_tokens }
                .answer(begun.work)
                .await
        }
        Opening::Done(Err(error)) => {
            record.refused(&error);
            Reply::refusal(&error, &path).into_response()
        }
        Opening::Slow(slow) => opening::stream(|balancer| async move {
            match slow.finish(&app, &balancer).await {
                Ok((loaded, begun)) => {
                    record.admitted(begun.prompt_tokens, false);
                    Once { app, loaded, frame: its_frame, path, record, prompt_tokens: begun.prompt_tokens }
                        .send(begun.work, balancer)
                        .await;
                }
                Err(unopened) => unopened.tell(record, &path, &balancer).await,
            }
        }),
    };
    answer::name_request(&mut response, &frame);
    response
}

async fn open<Q: Question>(
    app: Arc<App>,
    frame: Frame,
    request: Request<Body>,
) -> Result<(Arc<Loaded>, Begun), ApiError> {
    let (body, loaded) = answer::read(&app, &frame, request, Q::model).await?;
    let held = loaded.clone();
    let begun = answer::aside(move || body.begin(&app, &held, &frame)).await?;
    Ok((loaded, begun))
}

/// Where the answer goes, and what is kept of it.
struct Once {
    app: Arc<App>,
    /// Held until the answer is out.
    loaded: Arc<Loaded>,
    frame: Frame,
    path: String,
    record: Record,
    prompt_tokens: usize,
}

impl Once {
    async fn answer(mut self, work: impl Future<Output = Result<Value, Outcome>> + Send + 'static) -> Response {
        if self.frame.wire {
            return opening::stream(|balancer| self.send(work, balancer));
        }
        let done = self.bounded(work).await;
        self.record.end(done.as_ref().map_or_else(|outcome| *outcome, |_| Outcome::Finished));
        match done {
            Ok(value) => Reply::json(200, &value).into_response(),
            Err(outcome) => {
                let error = outcome.error();
                self.record.answered(&error);
                Reply::refusal(&error, &self.path).into_response()
            }
        }
    }

    /// `work`, unless the node lets go or the time is over first.
    fn bounded<W: Future<Output = Result<Value, Outcome>>>(
        &self,
        work: W,
    ) -> impl Future<Output = Result<Value, Outcome>> + use<W> {
        let let_go = self.app.duties.reached(Duty::LettingGo);
        let deadline = tokio::time::Instant::from_std(self.frame.deadline);
        async move {
            tokio::select! {
                biased;
                done = work => done,
                () = let_go => Err(Outcome::HandedOver),
                () = tokio::time::sleep_until(deadline) => Err(Outcome::TimedOut),
            }
        }
    }

    async fn send(mut self, work: impl Future<Output = Result<Value, Outcome>>, balancer: mpsc::Sender<Bytes>) {
        let work = self.bounded(work);
        tokio::pin!(work);
        let mut beats_seen = 0;
        let done = loop {
            tokio::select! {
                biased;
                done = &mut work => break done,
                () = balancer.closed() => return,
                () = tokio::time::sleep(WAIT_INTERVAL) => {}
            }
            // as long as the engine itself shows life
            let beats = self.loaded.engine.stats().beats.load(Relaxed);
            if std::mem::replace(&mut beats_seen, beats) != beats {
                let _ = balancer.send(Bytes::from_static(event::WAIT)).await;
            }
        };
        let mut out = Vec::new();
        event::write(&mut out, Some(&EventId::Prompt(self.prompt_tokens as u32)), None, None);
        match &done {
            Ok(value) => event::write(&mut out, Some(&EventId::End), None, Some(value.to_string().as_bytes())),
            Err(outcome) if outcome.is_late() => {
                let error = outcome.error();
                self.record.answered(&error);
                event::write_refusal(&mut out, &error.to_refusal_at(&self.path));
            }
            Err(_) => out.extend_from_slice(event::HANDOVER),
        }
        self.record.end(done.map_or_else(|outcome| outcome, |_| Outcome::Finished));
        let _ = balancer.send(out.into()).await;
    }
}
