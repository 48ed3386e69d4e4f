//! A request's way as spans: one for the request, one for each node that was asked, with each move to another node as an event.
//!
//! While the request runs these are plain values; they become spans at its end, and only where somebody wants to see them.

use std::{sync::Arc, time::SystemTime};

use pingora::{http::RequestHeader, protocols::http::ServerSession};
use tidegate_common::{
    ids::NodeId,
    trace::{Context, KeyValue, Span, SpanKind, TRACEPARENT, TRACESTATE, Tracer, new_span, operation},
};
use tokio::time::Instant;

use crate::record::Entry;

/// What is kept of one request's way.
pub(crate) struct Journal {
    tracer: Arc<Tracer>,
    context: Context,
    legs: Vec<Leg>,
    moves: Vec<Move>,
}

/// One node's part.
struct Leg {
    span: u64,
    node: NodeId,
    began: Instant,
    ended: Option<Instant>,
    outcome: &'static str,
}

/// From one node to the next.
struct Move {
    /// Whether it was in the middle of the stream.
    kind: &'static str,
    why: String,
    at: Instant,
}

impl Journal {
    /// Of the request whose head `session` has just read.
    pub(crate) fn begin(tracer: &Arc<Tracer>, session: &ServerSession) -> Self {
        let header = |name: &str| session.get_header(name).and_then(|value| value.to_str().ok());
        let context = tracer.begin(header(TRACEPARENT), header(TRACESTATE));
        Self { tracer: Arc::clone(tracer), context, legs: Vec::new(), moves: Vec::new() }
    }

    /// The trace's number.
    pub(crate) fn trace(&self) -> u128 {
        self.context.trace
    }

    /// A node is asked.
    pub(crate) fn ask(&mut self, node: &NodeId) {
        let leg = Leg { span: new_span(), node: node.clone(), began: Instant::now(), ended: None, outcome: "cut" };
        self.legs.push(leg);
    }

    /// Tells a node its place in the trace.
    pub(crate) fn mark(&self, head: &mut RequestHeader) -> pingora::Result<()> {
        let Some(leg) = self.legs.last() else { return Ok(()) };
        head.insert_header(TRACEPARENT, self.context.traceparent(leg.span))?;
        if let Some(state) = self.context.tracestate() {
            head.insert_header(TRACESTATE, state)?;
        }
        Ok(())
    }

    /// The node that was asked last has done its part.
    pub(crate) fn told(&mut self, outcome: &'static str) {
        if let Some(leg) = self.legs.last_mut() {
            (leg.ended, leg.outcome) = (Some(Instant::now()), outcome);
        }
    }

    /// The request goes on at another node.
    pub(crate) fn moved(&mut self, kind: &'static str, why: &str) {
        self.moves.push(Move { kind, why: why.to_owned(), at: Instant::now() });
    }

    /// The request has ended as `entry` says.
    pub(crate) fn export(self, entry: &Entry<'_>, started: Instant) {
        if !self.context.is_sampled {
            return;
        }
        let clock = Clock::now();
        for leg in &self.legs {
            self.tracer.export(&self.context, leg.span(self.context.span, &clock));
        }
        let name = format!("{} {}", entry.method, entry.path);
        let mut whole = Span::request(name, &self.context, clock.time(started), clock.system);
        whole.attributes = entry.attributes();
        let event = |m: Move| (m.kind, clock.time(m.at), vec![KeyValue::new("tidegate.reason", m.why)]);
        whole.events = self.moves.into_iter().map(event).collect();
        whole.error = (entry.status >= 500 || entry.reason_is_error()).then(|| entry.reason.into());
        self.tracer.export(&self.context, whole);
    }
}

impl Leg {
    fn span(&self, request: u64, clock: &Clock) -> Span {
        let ended = self.ended.map_or(clock.system, |at| clock.time(at));
        let mut span = Span::part(format!("ask {}", self.node), request, clock.time(self.began), ended);
        (span.id, span.kind) = (self.span, SpanKind::Client);
        span.attributes = vec![
            KeyValue::new("tidegate.node", self.node.to_string()),
            KeyValue::new("tidegate.outcome", self.outcome),
        ];
        span.error = (!matches!(self.outcome, "ok" | "answered")).then(|| self.outcome.into());
        span
    }
}

/// Now, by the clock that measures and by the one that dates.
struct Clock {
    system: SystemTime,
    instant: Instant,
}

impl Clock {
    fn now() -> Self {
        Self { system: SystemTime::now(), instant: Instant::now() }
    }

    fn time(&self, at: Instant) -> SystemTime {
        self.system.checked_sub(self.instant.saturating_duration_since(at)).unwrap_or(self.system)
    }
}

impl Entry<'_> {
    /// Whether a stream that had begun did not come to its end.
    fn reason_is_error(&self) -> bool {
        self.status == 200 && self.reason != "ok"
    }

    fn attributes(&self) -> Vec<KeyValue> {
        let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let mut all = vec![
            KeyValue::new("http.request.method", self.method.to_owned()),
            KeyValue::new("http.route", self.path),
            KeyValue::new("http.response.status_code", i64::from(self.status)),
            KeyValue::new("tidegate.request_id", self.request_id.to_owned()),
            KeyValue::new("tidegate.reason", self.reason),
            KeyValue::new("tidegate.retries", i64::from(self.retries)),
            KeyValue::new("tidegate.resumes", i64::from(self.resumes)),
        ];
        all.extend(self.client.map(|client| KeyValue::new("client.address", client.to_string())));
        all.extend(self.agent.as_ref().map(|agent| KeyValue::new("user_agent.original", agent.clone())));
        all.extend(self.owner.map(|owner| KeyValue::new("tidegate.owner", owner.to_owned())));
        all.extend(self.node.map(|node| KeyValue::new("tidegate.node", node.to_owned())));
        if let Some(operation) = operation(self.path).filter(|_| !self.model.is_empty()) {
            all.push(KeyValue::new("gen_ai.operation.name", operation));
            all.push(KeyValue::new("gen_ai.provider.name", "tidegate"));
            all.push(KeyValue::new("gen_ai.request.model", self.model.to_owned()));
            all.push(KeyValue::new("gen_ai.usage.output_tokens", whole(self.tokens as u64)));
            all.extend(self.prompt_tokens.map(|n| KeyValue::new("gen_ai.usage.input_tokens", i64::from(n))));
            all.extend(self.ttft_ms.map(|ms| KeyValue::new("gen_ai.response.time_to_first_chunk", ms / 1e3)));
        }
        all
    }
}
