//! One generation, from its request to its last byte: as a stream of events for clients and balancers, or as one JSON body.
//!
//! To a balancer every event carries its tokens, so that another node can go on after any of them; the events of a choice that was
//! taken up here begin after the tokens that the client has had.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, Request, Response, StatusCode, header},
    response::IntoResponse,
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use serde_json::Value;
use tidegate_common::contract::{ApiError, ErrorKind, EventId, event};
use tokio::sync::mpsc;
use tokio_stream::{StreamMap, wrappers::ReceiverStream};

use super::{
    Api, App, Reply,
    api::{Head, Usage},
    ask::{self, ValidRequest},
    frame::Frame,
};
use crate::{
    engine::{Event, Refused, Tokens},
    output::Text,
    record::{Outcome, Record},
    served::Loaded,
    text::Tokenizer,
};

/// How often a request that waits shows that it is alive.
const WAIT_INTERVAL: Duration = Duration::from_millis(900);

/// After the deadline, how long a client gets to read the last event.
const WRITE_GRACE: Duration = Duration::from_secs(1);

/// Bytes of one token id and its comma in JSON.
const TOKEN_BYTES_MAX: usize = 8;

/// Bytes of a body too large that are read and thrown away.
const DISCARD_BYTES_MAX: usize = 64 << 20;

/// How long they are.
const DISCARD_TIME_MAX: Duration = Duration::from_secs(2);

/// Serves one generation.
pub(super) async fn serve(app: Arc<App>, api: Api, request: Request<Body>) -> axum::response::Response {
    let frame = Frame::read(request.headers(), app.config.request.timeout);
    let mut record = Record::begin(&app.metrics, request.uri().path(), &frame.id, frame.arrived);
    let mut response = match open(&app, api, &frame, request).await {
        Ok(answer) if frame.wire || answer.stream => answer.with(record).into_stream(),
        Ok(answer) => answer.with(record).into_json().await,
        Err(error) => {
            record.refused(&error);
            Reply::from(error).into_response()
        }
    };
    if let Ok(id) = HeaderValue::from_str(frame.id.as_str()) {
        response.headers_mut().insert(tidegate_common::contract::headers::REQUEST_ID, id);
    }
    response
}

/// Reads, checks and submits a request.
async fn open(app: &Arc<App>, api: Api, frame: &Frame, request: Request<Body>) -> Result<Answer, ApiError> {
    app.refuse_while_draining()?;
    let bytes = read_body(app, frame, request.into_body()).await?;
    let body = aside(move || ask::parse(&bytes)).await?;
    let loaded = app.model(body.model.as_deref(), frame.deadline).await?;
    let (inner, held, seed) = (app.clone(), loaded.clone(), frame.seed);
    let valid = aside(move || body.validate(api, &inner, &held, seed)).await?;
    app.refuse_while_draining()?;
    Answer::submit(app.clone(), loaded, api, frame.clone(), valid)
}

/// Does `work` on a thread that serves nobody: JSON, templates and tokenizers take milliseconds for long prompts.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| internal())?
}

/// Reads a body within its size and its time.
async fn read_body(app: &App, frame: &Frame, body: Body) -> Result<Vec<u8>, ApiError> {
    let request = &app.config.request;
    // a balancer sends a client's body again with the tokens that the client has had
    let resumed = if frame.wire { request.choices_max * app.models.context_max() * TOKEN_BYTES_MAX } else { 0 };
    let deadline = tokio::time::Instant::from_std(frame.deadline);
    let reading = read_at_most(body, request.body_bytes_max.saturating_add(resumed));
    tokio::time::timeout_at(deadline, reading).await.map_err(|_| too_slow())?
}

/// Reads a body of at most `bytes_max`. What is beyond is read and thrown away for a while, since a client that is still writing does
/// not read the refusal.
async fn read_at_most(body: Body, bytes_max: usize) -> Result<Vec<u8>, ApiError> {
    let mut parts = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(part) = parts.next().await {
        let part = part
            .map_err(|e| ApiError::new(ErrorKind::InvalidRequest, "body_broken", format!("the body broke off: {e}")))?;
        if bytes.len() + part.len() > bytes_max {
            let discard = async {
                let mut left = DISCARD_BYTES_MAX;
                while let Some(Ok(part)) = parts.next().await {
                    left = left.saturating_sub(part.len());
                    if left == 0 {
                        return;
                    }
                }
            };
            let _ = tokio::time::timeout(DISCARD_TIME_MAX, discard).await;
            let message = format!("the body is larger than {bytes_max} bytes; node.max_body sets the limit");
            return Err(ApiError::new(ErrorKind::TooLarge, "body_too_large", message));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}

fn too_slow() -> ApiError {
    let message = "the body took longer to come than node.request_timeout allows";
    ApiError::new(ErrorKind::RequestTimeout, "body_timeout", message)
}

fn internal() -> ApiError {
    ApiError::new(ErrorKind::Internal, "internal", "the node failed to read this request")
}

/// A running generation.
struct Answer {
    app: Arc<App>,
    /// The model it began with, held to the last byte.
    loaded: Arc<Loaded>,
    frame: Frame,
    head: Head,
    opens_choices: bool,
    stream: bool,
    include_usage: bool,
    prompt_tokens: usize,
    texts: Vec<Text>,
    /// Choices that still run.
    running: StreamMap<u32, Tokens>,
    record: Option<Record>,
    beats_seen: u64,
    ended: bool,
}

impl Answer {
    fn submit(
        app: Arc<App>,
        loaded: Arc<Loaded>,
        api: Api,
        frame: Frame,
        valid: ValidRequest,
    ) -> Result<Self, ApiError> {
        let mut texts = Vec::with_capacity(valid.choices.len());
        let mut generations = Vec::new();
        for (mut generation, had) in valid.choices {
            let mut text = Text::new(&valid.stops);
            replay(&mut text, &had, &generation.stop, &loaded.tokenizer);
            if text.finish().is_none() {
                generation.tokens.extend(had);
                generations.push(generation);
            }
            texts.push(text);
        }
        let indices: Vec<u32> = generations.iter().map(|g| g.choice).collect();
        let tokens = loaded.engine.submit(generations).map_err(|refused| refusal(refused, &app))?;
        let head = Head::new(api, &frame, &loaded.name, &loaded.device);
        Ok(Self {
            frame,
            head,
            opens_choices: api.opens_choices(),
            stream: valid.stream,
            include_usage: valid.include_usage,
            prompt_tokens: valid.prompt_tokens,
            texts,
            running: indices.into_iter().zip(tokens).collect(),
            record: None,
            beats_seen: 0,
            ended: false,
            app,
            loaded,
        })
    }

    fn with(mut self, mut record: Record) -> Self {
        record.admitted(self.prompt_tokens, self.stream);
        self.record = Some(record);
        self
    }

    fn into_stream(self) -> axum::response::Response {
        let (sender, frames) = mpsc::channel::<Bytes>(1);
        // a task of its own, so that the deadline holds for a client that stops reading too
        tokio::spawn(self.send(sender));
        let frames = ReceiverStream::new(frames).map(Ok::<Bytes, std::convert::Infallible>);
        let mut response = Response::new(Body::from_stream(frames));
        *response.status_mut() = StatusCode::OK;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(event::CONTENT_TYPE));
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }

    async fn send(mut self, client: mpsc::Sender<Bytes>) {
        let last_word = tokio::time::Instant::from_std(self.frame.deadline) + WRITE_GRACE;
        loop {
            let frame = tokio::select! {
                frame = self.next_frame() => frame,
                () = client.closed() => None,
            };
            let Some(frame) = frame else { return };
            match tokio::time::timeout_at(last_word, client.send(frame.into())).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => return self.end(Outcome::TimedOut),
            }
        }
    }

    async fn into_json(mut self) -> axum::response::Response {
        loop {
            match self.next().await {
                Next::Token(choice, event) => {
                    self.accept(choice, event);
                }
                Next::Silence => {}
                Next::Finished => {
                    self.end(Outcome::Finished);
                    return Reply::json(200, &self.whole()).into_response();
                }
                Next::Broken(outcome) => {
                    let error = outcome.error();
                    self.end(outcome);
                    if let Some(record) = &mut self.record {
                        record.answered(&error);
                    }
                    return Reply::from(error).into_response();
                }
            }
        }
    }

    /// The next bytes of the stream; none after its end.
    async fn next_frame(&mut self) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        while !self.ended && out.is_empty() {
            match self.next().await {
                Next::Token(choice, event) => {
                    self.write_token(choice, event, &mut out);
                    // whatever else is there goes out in the same write
                    while let Some(Some((choice, event))) = self.running.next().now_or_never() {
                        self.write_token(choice, event, &mut out);
                    }
                }
                Next::Silence => self.write_wait(&mut out),
                Next::Finished => self.write_tail(&mut out),
                Next::Broken(outcome) => self.write_break(outcome, &mut out),
            }
        }
        (!out.is_empty()).then_some(out)
    }

    async fn next(&mut self) -> Next {
        if self.texts.iter().all(|t| t.finish().is_some()) {
            return Next::Finished;
        }
        let mut handover = self.app.handover.clone();
        let deadline = tokio::time::Instant::from_std(self.frame.deadline);
        tokio::select! {
            biased;
            // tokens that are there go out before anything ends the answer
            token = self.running.next() => match token {
                Some((choice, event)) => Next::Token(choice, event),
                // every channel closed, and a choice has no end: the engine dropped it
                None => Next::Broken(Outcome::EngineLost),
            },
            () = handover.wait() => Next::Broken(Outcome::HandedOver),
            () = tokio::time::sleep_until(deadline) => Next::Broken(Outcome::TimedOut),
            () = tokio::time::sleep(WAIT_INTERVAL) => Next::Silence,
        }
    }

    /// Adds a token to its text.
    fn accept(&mut self, choice: u32, event: Event) {
        let text = &mut self.texts[choice as usize];
        text.push(&self.loaded.tokenizer, event.token, event.finish);
        if let Some(record) = &mut self.record {
            record.token(choice);
            text.finish().into_iter().for_each(|finish| record.choice_ended(finish));
        }
        if text.finish().is_some() {
            self.running.remove(&choice);
        }
    }

    fn write_token(&mut self, choice: u32, event: Event, out: &mut Vec<u8>) {
        let offset = self.texts[choice as usize].tokens();
        let token = event.token;
        self.accept(choice, event);
        let text = &mut self.texts[choice as usize];
        let finish = text.finish();
        let opens = offset == 0 && self.opens_choices;
        let fresh = text.take();
        let data = (self.stream && (opens || finish.is_some() || !fresh.is_empty()))
            .then(|| self.head.piece(choice, fresh, opens, finish));
        let id = EventId::Tokens { choice, offset, tokens: vec![token] };
        self.write_event(Some(id), data.as_ref(), out);
    }

    /// `id` goes to balancers only; an event without data too.
    fn write_event(&self, id: Option<EventId>, data: Option<&Value>, out: &mut Vec<u8>) {
        let data = data.map(|d| serde_json::to_vec(d).expect("our own answers can be written as JSON"));
        let id = id.filter(|_| self.frame.wire);
        if id.is_some() || data.is_some() {
            event::write(out, id.as_ref(), None, data.as_deref());
        }
    }

    /// A sign of life to a balancer, as long as the engine itself shows one.
    fn write_wait(&mut self, out: &mut Vec<u8>) {
        let beats = self.loaded.engine.stats().beats.load(Relaxed);
        let lives = std::mem::replace(&mut self.beats_seen, beats) != beats;
        if self.frame.wire && lives {
            out.extend_from_slice(event::WAIT);
        }
    }

    fn write_tail(&mut self, out: &mut Vec<u8>) {
        self.end(Outcome::Finished);
        if !self.stream {
            return self.write_event(Some(EventId::End), Some(&self.whole()), out);
        }
        if self.include_usage {
            self.write_event(None, Some(&self.head.usage_piece(self.usage())), out);
        }
        let id = self.frame.wire.then_some(EventId::End);
        event::write(out, id.as_ref(), None, Some(event::DONE.as_bytes()));
    }

    /// A balancer goes on elsewhere; a client that came directly, or whose time is over, is told.
    fn write_break(&mut self, outcome: Outcome, out: &mut Vec<u8>) {
        self.end(outcome);
        if self.frame.wire && outcome != Outcome::TimedOut {
            out.extend_from_slice(event::HANDOVER);
        } else {
            self.write_event(Some(EventId::End), Some(&outcome.error().to_json()), out);
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.ended = true;
        self.running.clear();
        if let Some(record) = &mut self.record {
            record.end(outcome);
        }
    }

    fn usage(&self) -> Usage {
        Usage { prompt: self.prompt_tokens, completion: self.texts.iter().map(|t| t.tokens() as usize).sum() }
    }

    fn whole(&self) -> Value {
        self.head.whole(self.texts.iter().map(|t| (t.whole(), t.finish())), self.usage())
    }
}

/// What comes next of a generation.
enum Next {
    Token(u32, Event),
    /// Nothing for [`WAIT_INTERVAL`].
    Silence,
    /// Every choice has ended.
    Finished,
    /// It cannot go on here.
    Broken(Outcome),
}

/// Brings a text to where it was when the client had `tokens`.
fn replay(text: &mut Text, tokens: &[u32], rule: &crate::stop::StopRule, tokenizer: &Tokenizer) {
    for (i, token) in tokens.iter().enumerate() {
        text.push(tokenizer, *token, rule.after(*token, i + 1));
    }
    text.take();
}

fn refusal(refused: Refused, app: &App) -> ApiError {
    match refused {
        Refused::Full => {
            let limits = &app.config.engine;
            let message = format!(
                "{} requests run and {} wait already; try again later, or raise node.max_queue or node.max_batch_size",
                limits.batch_size_max, limits.queue_max
            );
            ApiError::new(ErrorKind::RateLimited, "queue_full", message).with_retry_after(app.metrics.expected_wait())
        }
        Refused::Dead => Outcome::EngineLost.error(),
    }
}

impl futures::Stream for Tokens {
    type Item = Event;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Event>> {
        self.events.poll_recv(cx)
    }
}
