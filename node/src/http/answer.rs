//! One generation, from its request to its last byte: as a stream of events for clients and balancers, or as one JSON body.
//!
//! To a balancer every event carries its tokens, so that another node can go on after any of them; the events of a choice that was
//! taken up here begin after the tokens that the client has had.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, Request},
    response::IntoResponse,
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture};
use serde_json::Value;
use tidegate_common::contract::{ApiError, ErrorKind, EventId, event};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, Sleep, sleep, sleep_until},
};
use tokio_stream::StreamMap;

use super::{
    App, Reply,
    ask::{Body as AskBody, ValidChoice, ValidRequest},
    check,
    choice::{Choice, Said, Step},
    frame::Frame,
    opening::{self, Opening, WAIT_INTERVAL},
    shape::{self, Head, Shape, Usage},
};
use crate::{
    duty::Duty,
    engine::{Event, Refused, Tokens},
    record::{Outcome, Record},
    sample::Logprobs,
    served::Loaded,
};

/// After the deadline, how long a client gets to read the last event.
const WRITE_GRACE: Duration = Duration::from_secs(1);

/// Bytes of one token id and its comma in JSON.
const TOKEN_BYTES_MAX: usize = 8;

/// Bytes of a body too large that are read and thrown away.
const DISCARD_BYTES_MAX: usize = 64 << 20;

/// How long they are.
const DISCARD_TIME_MAX: Duration = Duration::from_secs(2);

/// Serves one generation.
pub(super) async fn serve<B: AskBody>(app: Arc<App>, request: Request<Body>) -> axum::response::Response {
    let frame = Frame::read(request.headers(), app.config.request.timeout);
    let path = request.uri().path().to_owned();
    let mut record = Record::begin(&app.metrics, &path, &frame.id, frame.arrived).traced(app.trace(request.headers()));
    let mut response = match Opening::begin(&frame, open::<B>(app.clone(), frame.clone(), request)).await {
        Opening::Done(Ok(answer)) if frame.wire || answer.stream => answer.with(record).into_stream(),
        Opening::Done(Ok(answer)) => answer.with(record).into_json().await,
        Opening::Done(Err(error)) => {
            record.refused(&error);
            Reply::refusal(&error, &path).into_response()
        }
        Opening::Slow(slow) => opening::stream(|balancer| async move {
            match slow.finish(&app, &balancer).await {
                Ok(answer) => answer.with(record).send(balancer).await,
                Err(unopened) => unopened.tell(record, &path, &balancer).await,
            }
        }),
    };
    name_request(&mut response, &frame);
    response
}

/// Every answer says which request it is for.
pub(super) fn name_request(response: &mut axum::response::Response, frame: &Frame) {
    if let Ok(id) = HeaderValue::from_str(frame.id.as_str()) {
        response.headers_mut().insert(tidegate_common::contract::headers::REQUEST_ID, id);
    }
}

/// Reads a request, and finds the model that it names.
pub(super) async fn read<B: serde::de::DeserializeOwned + Send + 'static>(
    app: &App,
    frame: &Frame,
    request: Request<Body>,
    model: impl Fn(&B) -> Option<&str>,
) -> Result<(B, Arc<Loaded>), ApiError> {
    app.refuse_while_draining()?;
    let bytes = read_body(app, frame, request.into_body()).await?;
    let body: B = aside(move || check::parse(&bytes)).await?;
    let loaded = app.model(model(&body), frame.deadline).await?;
    frame.refuse_unlike(&loaded)?;
    Ok((body, loaded))
}

/// Reads, checks and submits a request.
async fn open<B: AskBody>(app: Arc<App>, frame: Frame, request: Request<Body>) -> Result<Answer, ApiError> {
    let path = request.uri().path().to_owned();
    let (body, loaded) = read(&app, &frame, request, B::model).await?;
    let (inner, held, its_frame) = (app.clone(), loaded.clone(), frame.clone());
    let valid = aside(move || {
        let head = Head::new(&its_frame, &held.name, &held.device);
        body.ask(head)?.validate(&inner, &held, &its_frame)
    });
    let valid = valid.await?;
    app.refuse_while_draining()?;
    Answer::submit(&app, loaded, path, frame, valid)
}

/// Does `work` on a thread that serves nobody: JSON, templates, tokenizers and grammars take milliseconds.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| internal())?
}

/// Reads a body within its size and its time.
async fn read_body(app: &App, frame: &Frame, body: Body) -> Result<Vec<u8>, ApiError> {
    let request = &app.config.request;
    // a balancer sends a client's body again with the tokens that the client has had
    let resumed = if frame.wire { request.choices_max * app.models.context_max() * TOKEN_BYTES_MAX } else { 0 };
    let deadline = Instant::from_std(frame.deadline);
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
    /// The model it began with, held to the last byte.
    loaded: Arc<Loaded>,
    path: String,
    frame: Frame,
    shape: Box<dyn Shape>,
    stream: bool,
    prompt_tokens: usize,
    choices: Vec<Running>,
    /// Tokens of the choices that the engine works on.
    tokens: StreamMap<u32, Tokens>,
    record: Option<Record>,
    watch: Watch,
    beats_seen: u64,
    begun: bool,
    ended: bool,
}

/// What is watched beside the tokens from the first to the last: timers anew for each token would cost more than it.
struct Watch {
    handover: BoxFuture<'static, ()>,
    deadline: Pin<Box<Sleep>>,
    /// Set anew by each sign of life.
    silence: Pin<Box<Sleep>>,
}

impl Watch {
    fn new(app: &App, frame: &Frame) -> Self {
        Self {
            handover: Box::pin(app.duties.reached(Duty::LettingGo)),
            deadline: Box::pin(sleep_until(Instant::from_std(frame.deadline))),
            silence: Box::pin(sleep(WAIT_INTERVAL)),
        }
    }
}

/// One choice of it.
struct Running {
    choice: Choice,
    /// Log-probabilities of the given tokens, until they have come.
    scores: Option<(usize, oneshot::Receiver<Vec<Logprobs>>)>,
}

impl Running {
    /// Takes the log-probabilities that were asked for, if they are there: they come before the first token.
    fn take_scores(&mut self) {
        let Some((prompt_len, receiver)) = &mut self.scores else { return };
        if let Ok(scores) = receiver.try_recv() {
            self.choice.supply(*prompt_len, &scores);
            self.scores = None;
        }
    }

    fn is_whole(&self) -> bool {
        self.choice.ended().is_some() && self.scores.is_none()
    }
}

impl Answer {
    fn submit(
        app: &App,
        loaded: Arc<Loaded>,
        path: String,
        frame: Frame,
        valid: ValidRequest,
    ) -> Result<Self, ApiError> {
        let (mut choices, mut generations) = (Vec::new(), Vec::new());
        for ValidChoice { choice, generation, scores } in valid.choices {
            let prompt_len = generation.as_ref().map_or(0, |generation| generation.prompt_len);
            choices.push(Running { choice, scores: scores.map(|receiver| (prompt_len, receiver)) });
            generations.extend(generation);
        }
        let indices: Vec<u32> = generations.iter().map(|g| g.choice).collect();
        let tokens =
            loaded.engine.submit(&frame.owner, generations).map_err(|refused| refusal(refused, app, &loaded))?;
        Ok(Self {
            watch: Watch::new(app, &frame),
            loaded,
            path,
            frame,
            shape: valid.shape,
            stream: valid.stream,
            prompt_tokens: valid.prompt_tokens,
            choices,
            tokens: indices.into_iter().zip(tokens).collect(),
            record: None,
            beats_seen: 0,
            begun: false,
            ended: false,
        })
    }

    fn with(mut self, mut record: Record) -> Self {
        record.of_model(&self.loaded.name);
        record.admitted(self.prompt_tokens, self.stream);
        self.record = Some(record);
        self
    }

    fn into_stream(self) -> axum::response::Response {
        opening::stream(|client| self.send(client))
    }

    async fn send(mut self, client: mpsc::Sender<Bytes>) {
        let last_word = Instant::from_std(self.frame.deadline) + WRITE_GRACE;
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
                    self.accept(choice, &event);
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
                    return Reply::refusal(&error, &self.path).into_response();
                }
            }
        }
    }

    /// The next bytes of the stream; none after its end.
    async fn next_frame(&mut self) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        if self.frame.wire && !std::mem::replace(&mut self.begun, true) {
            event::write(&mut out, Some(&EventId::By(self.loaded.fingerprint)), None, None);
            event::write(&mut out, Some(&EventId::Prompt(self.prompt_tokens as u32)), None, None);
        }
        while !self.ended && out.is_empty() {
            match self.next().await {
                Next::Token(choice, event) => {
                    self.write_token(choice, &event, &mut out);
                    // whatever else is there goes out in the same write
                    while let Some(Some((choice, event))) = self.tokens.next().now_or_never() {
                        self.write_token(choice, &event, &mut out);
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
        if self.choices.iter().all(Running::is_whole) {
            return Next::Finished;
        }
        let Watch { handover, deadline, silence } = &mut self.watch;
        silence.as_mut().reset(Instant::now() + WAIT_INTERVAL);
        tokio::select! {
            biased;
            // tokens that are there go out before anything ends the answer
            token = self.tokens.next() => match token {
                Some((choice, event)) => Next::Token(choice, event),
                None => self.after_last(),
            },
            () = handover => Next::Broken(Outcome::HandedOver),
            () = deadline => Next::Broken(self.late()),
            () = silence => Next::Silence,
        }
    }

    /// Every channel has closed: a choice without tokens has what it asked for, or the engine has dropped one.
    fn after_last(&mut self) -> Next {
        self.choices.iter_mut().for_each(Running::take_scores);
        let is_whole = self.choices.iter().all(Running::is_whole);
        if is_whole { Next::Finished } else { Next::Broken(Outcome::EngineLost) }
    }

    /// Adds a token to its choice.
    fn accept(&mut self, choice: u32, event: &Event) -> Step {
        let running = &mut self.choices[choice as usize];
        running.take_scores();
        let step = running.choice.take(event.token, event.logprobs.as_deref(), event.finish);
        if let Some(record) = &mut self.record {
            if !record.has_tokens() {
                record.begun(self.tokens.values().filter_map(Tokens::begun_at).min());
            }
            record.token(choice);
        }
        if let Some(why) = &step.ended {
            self.tokens.remove(&choice);
            if let Some(record) = &mut self.record {
                record.choice_ended(why.finish());
            }
        }
        step
    }

    fn write_token(&mut self, choice: u32, event: &Event, out: &mut Vec<u8>) {
        let offset = self.choices[choice as usize].choice.tokens();
        let step = self.accept(choice, event);
        let mut events = Vec::new();
        if self.stream {
            self.shape.step(&step, &mut events);
        }
        self.write_events(|| EventId::Tokens { choice, offset, tokens: vec![event.token] }, &events, out);
    }

    /// Events that belong together: the last one carries the id, which goes to balancers only, if need be without data.
    fn write_events(&self, id: impl FnOnce() -> EventId, events: &[shape::Event], out: &mut Vec<u8>) {
        let id = self.frame.wire.then(id);
        let Some((last, before)) = events.split_last() else {
            if id.is_some() {
                event::write(out, id.as_ref(), None, None);
            }
            return;
        };
        before.iter().for_each(|e| event::write(out, None, e.name, Some(e.data.as_bytes())));
        event::write(out, id.as_ref(), last.name, Some(last.data.as_bytes()));
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
        let mut events = Vec::new();
        if self.stream {
            let empty = self.choices.iter_mut().filter_map(|running| running.choice.empty_step()).collect::<Vec<_>>();
            empty.iter().for_each(|step| self.shape.step(step, &mut events));
            let usage = self.usage();
            let said: Vec<&Said> = self.choices.iter_mut().map(|running| running.choice.said()).collect();
            self.shape.tail(&said, usage, &mut events);
        } else {
            events.push(shape::Event::of(&self.whole()));
        }
        self.write_events(|| EventId::End, &events, out);
    }

    /// A balancer goes on elsewhere, unless the request's time is over; a client that came directly is told.
    fn write_break(&mut self, outcome: Outcome, out: &mut Vec<u8>) {
        self.end(outcome);
        if !self.frame.wire {
            let (name, data) = outcome.error().to_event_at(&self.path);
            event::write(out, None, name, Some(data.to_string().as_bytes()));
        } else if outcome.is_late() {
            let error = outcome.error();
            if let Some(record) = &mut self.record {
                record.answered(&error);
            }
            event::write_refusal(out, &error.to_refusal_at(&self.path));
        } else {
            out.extend_from_slice(event::HANDOVER);
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.ended = true;
        self.tokens.clear();
        if let Some(record) = &mut self.record {
            record.end(outcome);
        }
    }

    /// The deadline has passed.
    fn late(&self) -> Outcome {
        let is_waiting = self.tokens.values().all(Tokens::is_waiting);
        if is_waiting { Outcome::TimedOutWaiting } else { Outcome::TimedOut }
    }

    fn usage(&mut self) -> Usage {
        let mut usage = Usage { prompt: self.prompt_tokens, completion: 0, reasoning: 0 };
        for running in &mut self.choices {
            let said = running.choice.said();
            usage.completion += said.tokens as usize;
            usage.reasoning += said.tokens_reasoning as usize;
        }
        usage
    }

    fn whole(&mut self) -> Value {
        self.choices.iter_mut().for_each(|running| drop(running.choice.empty_step()));
        let usage = self.usage();
        let said: Vec<&Said> = self.choices.iter_mut().map(|running| running.choice.said()).collect();
        self.shape.whole(&said, usage)
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

pub(super) fn refusal(refused: Refused, app: &App, loaded: &Loaded) -> ApiError {
    let limits = &app.config.engine;
    let message = match refused {
        Refused::Full => format!(
            "{} sequences run and {} wait already; try again later, or raise node.max_queue or node.max_batch_size",
            limits.batch_size_max, limits.queue_max
        ),
        Refused::TenantFull => format!(
            "{} sequences of this tenant run or wait already; try again later, or raise node.max_queue_per_tenant",
            limits.places_tenant()
        ),
        Refused::Dead => return Outcome::EngineLost.error(),
    };
    ApiError::new(ErrorKind::RateLimited, "queue_full", message).with_retry_after(loaded.engine.stats().backlog())
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
