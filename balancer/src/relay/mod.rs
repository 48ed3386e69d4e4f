//! Carrying one generation to its end: from node to node if need be, while the client sees one answer without a seam.
//!
//! `turn` says who is asked next, or how long to wait for one who can be, within the `budget` of the whole balancer; `request` makes
//! what a node is sent, `foreign` what others are, `upstream` opens a node's answer, `events` cuts it into whole events, `delivered` remembers the tokens that
//! the client has had, `client` writes to it. This file decides what comes after each loss. Its rules: nothing moves after the last
//! event, nor after a 4xx, but for 429: a node that is full says nothing about the next one.

mod turn;
mod budget;
mod request;
mod foreign;
mod upstream;
pub(crate) mod events;
pub(crate) mod delivered;
mod client;

use std::{sync::Arc, time::Duration};

use pingora::{connectors::http::Connector, protocols::http::ServerSession};
use tidegate_common::{
    contract::{ApiError, ErrorKind, headers},
    ids::NodeId,
};
use tokio::time::Instant;
use tracing::{info, warn};

pub(crate) use budget::Budget;
pub(crate) use request::Generation;

use crate::{
    answer::Answer,
    config::RelayConfig,
    pool::{PoolView, Target},
    record::Record,
    serve::Ended,
};
use client::{Client, Interrupt};
use delivered::Delivered;
use events::Tail;
use foreign::Cutter;
use request::NodeRequest;
use turn::Stop;
use upstream::{Opened, Upstream};

/// The status of a node that has as many requests as it may.
const FULL: u16 = 429;
/// The status of a node that would have answered otherwise than the one that began.
const UNLIKE: u16 = 412;
/// The status of a request whose time is over.
const LATE: u16 = 504;

/// Carries generations.
pub(crate) struct Relay {
    pub(crate) connector: Arc<Connector>,
    pub(crate) rules: RelayConfig,
    pub(crate) pool: Arc<PoolView>,
    pub(crate) budget: Budget,
}

/// How one node's part of a stream ended.
enum LegEnd {
    /// The last event has passed; the client's answer is whole.
    Done,
    /// The node gave a whole answer that is not a stream, to be passed on as it is.
    Answered(Answer),
    /// The node does not take requests now; its words are kept in case all say so.
    Busy(Answer),
    /// The node was lost.
    Lost(Loss),
    /// The client left, or the request's time is over.
    Interrupted(Interrupt),
}

impl LegEnd {
    /// The word in traces.
    fn word(&self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Answered(_) => "answered",
            Self::Busy(_) => "busy",
            Self::Lost(loss) => loss.as_str(),
            Self::Interrupted(Interrupt::ClientGone) => "client_gone",
            Self::Interrupted(Interrupt::Deadline) => "deadline",
        }
    }
}

impl From<Interrupt> for LegEnd {
    fn from(interrupt: Interrupt) -> Self {
        Self::Interrupted(interrupt)
    }
}

/// How a node can be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    /// No connection.
    Connect,
    /// The connection broke.
    Reset,
    /// Silence longer than `stall_timeout`.
    Stalled,
    /// The answer ended without its last event.
    Ended,
    /// A status of 500 or more.
    Status(u16),
    /// The node wants to let go.
    Handover,
    /// The answer is not what a node writes.
    Malformed,
    /// It takes no requests now (503).
    Busy,
    /// It has as many requests as it may (429).
    Full,
    /// It would go on otherwise than the nodes before it have begun (412).
    Unlike,
}

impl Loss {
    /// The word in logs and metrics.
    fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Reset => "reset",
            Self::Stalled => "stalled",
            Self::Ended => "ended",
            Self::Status(_) => "status",
            Self::Handover => "handover",
            Self::Malformed => "malformed",
            Self::Busy => "busy",
            Self::Full => "full",
            Self::Unlike => "unlike",
        }
    }

    /// Whether it says about the node what a failed probe says.
    fn counts(self) -> bool {
        matches!(self, Self::Connect | Self::Stalled)
    }

    /// Whether the request itself may have brought it about. A node that lets go after it has worked does as it was told to.
    fn is_suspicious(self, has_progressed: bool) -> bool {
        match self {
            Self::Connect | Self::Busy | Self::Full | Self::Unlike => false,
            Self::Handover => !has_progressed,
            Self::Reset | Self::Stalled | Self::Ended | Self::Status(_) | Self::Malformed => true,
        }
    }

    fn error(self) -> ApiError {
        match self {
            Self::Connect | Self::Busy | Self::Full | Self::Handover => {
                ApiError::new(ErrorKind::Unavailable, "node_unavailable", "no node could take the request")
                    .with_retry_after(Duration::from_secs(1))
            }
            Self::Unlike => {
                let message = "the node was lost, and the others that are ready would go on otherwise: their models or configurations differ";
                ApiError::new(ErrorKind::BadGateway, "nodes_differ", message)
            }
            Self::Stalled => ApiError::new(ErrorKind::DeadlineExceeded, "node_stalled", "the node fell silent"),
            Self::Reset | Self::Ended | Self::Status(_) | Self::Malformed => {
                ApiError::new(ErrorKind::BadGateway, "node_lost", "the node was lost, and no other could go on")
            }
        }
    }
}

/// What a generation has come through so far.
struct Journey {
    tried: Vec<NodeId>,
    /// Whether a node has taken it: those after that one treat it as one of theirs.
    is_taken: bool,
    /// Nodes that were known to be away, and were asked all the same.
    tried_suspects: Vec<NodeId>,
    last_was_suspect: bool,
    /// Whether what the client has had came from a foreign upstream, whose tokens nobody knows.
    began_abroad: bool,
    delivered: Delivered,
    /// The words of the last node that said 503 or 429.
    busy: Option<(NodeId, Answer)>,
    last: Option<Loss>,
    /// Losses that may be the request's own doing: one that ends every node it meets must not go on to the next for ever.
    suspicious: u32,
    /// Tokens delivered when the last node was lost.
    tokens_at_loss: usize,
    /// While nobody can be asked: when waiting ends.
    patience: Option<Instant>,
}

impl Journey {
    fn new(choices: u32) -> Self {
        Self {
            tried: Vec::new(),
            is_taken: false,
            tried_suspects: Vec::new(),
            last_was_suspect: false,
            began_abroad: false,
            delivered: Delivered::new(choices),
            busy: None,
            last: None,
            suspicious: 0,
            tokens_at_loss: 0,
            patience: None,
        }
    }

    /// A node was lost.
    fn note(&mut self, target: &Target, loss: Loss) {
        let tried = if target.is_suspect { &mut self.tried_suspects } else { &mut self.tried };
        tried.retain(|id| *id != target.id);
        tried.push(target.id.clone());
        self.last_was_suspect = target.is_suspect;
        let has_progressed = self.delivered.total() > self.tokens_at_loss;
        self.tokens_at_loss = self.delivered.total();
        self.last = Some(loss);
        self.suspicious += u32::from(!target.is_suspect && loss.is_suspicious(has_progressed));
    }

    /// Whether it waits for room as long as it may take at all: a node had taken it, and one of the others only lacks a place.
    fn waits_for_room(&self) -> bool {
        self.is_taken && self.busy.as_ref().is_some_and(|(_, answer)| answer.status == FULL)
    }

    /// Whether the next node must go on instead of beginning.
    fn is_resuming(&self, client: &Client<'_>) -> bool {
        client.has_data() || self.delivered.total() > 0
    }

    /// Says in a request whether a node had taken it before.
    fn mark(&self, mut request: NodeRequest) -> pingora::Result<NodeRequest> {
        if self.is_taken {
            request.head.insert_header(headers::MOVED, "1")?;
        }
        Ok(request)
    }

    /// Another leg begins; the first is none that anything led to, and one that a node refused to begin is none.
    fn count(&self, record: &mut Record, client: &Client<'_>) {
        match self.last {
            None => {}
            Some(loss @ (Loss::Busy | Loss::Full | Loss::Unlike)) => record.retried(loss.as_str()),
            Some(loss) if self.is_resuming(client) => record.resumed(loss.as_str()),
            Some(loss) => record.retried(loss.as_str()),
        }
    }
}

impl Record {
    /// Tells a node its place in the request's trace.
    fn mark(&self, mut request: NodeRequest) -> pingora::Result<NodeRequest> {
        if let Some(journal) = &self.journal {
            journal.mark(&mut request.head)?;
        }
        Ok(request)
    }
}

impl Relay {
    /// Carries `generation` to its end and notes in `record` how it went.
    pub(crate) async fn carry(
        &self,
        session: &mut ServerSession,
        record: &mut Record,
        generation: &Generation,
    ) -> Ended {
        let _open = record.open_stream();
        let deadline = record.ctx.started + self.rules.request_timeout;
        let mut client = Client::new(session, generation.stream, &record.ctx, deadline);
        let mut journey = Journey::new(generation.choices);
        if self.rules.resumes_max == 0 {
            journey.delivered = Delivered::counting();
        }
        loop {
            let target = match self.next(&mut client, record, generation, &mut journey).await {
                Ok(target) => target,
                Err(Stop::Refused(error)) => return give_up(client, record, journey, error).await,
                Err(Stop::Interrupted(interrupt)) => return interrupted(client, record, interrupt).await,
            };
            journey.count(record, &client);
            record.node = Some(target.id.clone());
            let asked = Instant::now();
            if let Some(journal) = &mut record.journal {
                journal.ask(&target.id);
            }
            let end = self.leg(&mut client, record, generation, &target, &mut journey).await;
            record.upstream += asked.elapsed();
            journey.delivered.tell(record);
            if let Some(journal) = &mut record.journal {
                journal.told(end.word());
            }
            match end {
                LegEnd::Done => {
                    record.answered(200);
                    record.copy = client.take_copy();
                    return Ended::Whole;
                }
                LegEnd::Answered(answer) if client.has_begun() => {
                    return break_off(client, record, &journey, &answer).await;
                }
                LegEnd::Answered(answer) => {
                    if target.foreign.is_some() {
                        foreign::tell_usage(&answer, record);
                    }
                    return pass_on(client, record, &target.id, answer).await;
                }
                LegEnd::Busy(answer) => {
                    let loss = if answer.status == FULL { Loss::Full } else { Loss::Busy };
                    journey.busy = Some((target.id.clone(), answer));
                    self.move_on(record, &mut journey, &target, loss);
                }
                LegEnd::Lost(loss) => self.move_on(record, &mut journey, &target, loss),
                LegEnd::Interrupted(interrupt) => return interrupted(client, record, interrupt).await,
            }
        }
    }

    fn move_on(&self, record: &Record, journey: &mut Journey, target: &Target, loss: Loss) {
        // a node that says no is well, and the news of it would wake whoever waits to ask again at once
        if !matches!(loss, Loss::Full | Loss::Unlike) {
            self.pool.lost(target, loss.counts());
        }
        journey.note(target, loss);
        let (why, tokens) = (loss.as_str(), journey.delivered.total());
        info!(request_id = %record.ctx.id, node = %target.id, why, tokens, "node lost");
    }

    /// One node's part.
    async fn leg(
        &self,
        client: &mut Client<'_>,
        record: &mut Record,
        generation: &Generation,
        target: &Arc<Target>,
        journey: &mut Journey,
    ) -> LegEnd {
        let resume = journey.is_resuming(client).then_some(&journey.delivered);
        let request = match &target.foreign {
            Some(foreign) => generation.request_abroad(foreign, &record.model),
            None => generation
                .request(&record.ctx, target, client.time_left(), resume)
                .and_then(|request| journey.mark(request))
                .and_then(|request| record.mark(request)),
        };
        let request = match request {
            Ok(request) => request,
            Err(error) => {
                warn!(error = %error, "cannot write a request");
                return LegEnd::Lost(Loss::Malformed);
            }
        };
        // boxed, so that what connecting needs is given back before the stream begins
        let opened = client.unless_interrupted(Box::pin(Upstream::open(self, target, request))).await;
        match opened {
            Ok(Ok(Opened::Stream(_))) if target.foreign.is_some() && !generation.stream => {
                LegEnd::Lost(Loss::Malformed)
            }
            Ok(Ok(Opened::Stream(upstream))) => self.stream(client, record, upstream, target, journey).await,
            Ok(Ok(Opened::Whole(answer))) => judge(answer, target, resume.is_some()),
            Ok(Err(loss)) => LegEnd::Lost(loss),
            Err(interrupt) => interrupt.into(),
        }
    }

    async fn stream(
        &self,
        client: &mut Client<'_>,
        record: &mut Record,
        mut upstream: Box<Upstream>,
        target: &Target,
        journey: &mut Journey,
    ) -> LegEnd {
        let is_foreign = target.foreign.is_some();
        let mut events = Cutter::new(is_foreign);
        let (was_taken, is_resuming) = (journey.is_taken, journey.is_resuming(client));
        journey.is_taken |= !is_foreign;
        journey.busy = None;
        loop {
            let chunk = match client.unless_interrupted(upstream.read()).await {
                Ok(Ok(chunk)) => chunk,
                Ok(Err(loss)) => return LegEnd::Lost(loss),
                Err(interrupt) => return interrupt.into(),
            };
            let Ok(passed) = events.push(&chunk, &mut journey.delivered) else {
                return LegEnd::Lost(Loss::Malformed);
            };
            journey.patience = None;
            if let Err(interrupt) = client.pass(passed.bytes, &target.id).await {
                return interrupt.into();
            }
            journey.began_abroad = is_foreign && client.has_data();
            if journey.delivered.total() > 0 || journey.began_abroad {
                record.first_token();
            }
            match passed.tail {
                None => {}
                Some(Tail::Handover) => return LegEnd::Lost(Loss::Handover),
                Some(Tail::Refused(refusal)) => {
                    journey.is_taken = was_taken;
                    return judge(Answer::from(*refusal), target, is_resuming);
                }
                Some(Tail::End) => {
                    if client.end(&target.id).await.is_err() {
                        return Interrupt::ClientGone.into();
                    }
                    upstream.keep(&self.connector).await;
                    return LegEnd::Done;
                }
            }
        }
    }
}

/// What comes after an answer that is not a stream.
fn judge(answer: Answer, target: &Target, is_resuming: bool) -> LegEnd {
    let (status, is_foreign) = (answer.status, target.foreign.is_some());
    match status {
        FULL | 503 => LegEnd::Busy(answer),
        UNLIKE if is_resuming => LegEnd::Lost(Loss::Unlike),
        // wherever else it was asked, its time would be over too
        LATE if !is_foreign => LegEnd::Answered(answer),
        500.. => LegEnd::Lost(Loss::Status(status)),
        _ if is_foreign && is_ours_to_mend(status) => {
            warn!(node = %target.id, status, "the upstream refuses the edge: see its api_key_file and base_url");
            LegEnd::Lost(Loss::Status(status))
        }
        _ => LegEnd::Answered(answer),
    }
}

/// Whether a foreign upstream's answer is about what the edge sent of its own, and so nothing for the client.
fn is_ours_to_mend(status: u16) -> bool {
    matches!(status, 401 | 403 | 300..=399)
}

async fn pass_on(client: Client<'_>, record: &mut Record, node: &NodeId, answer: Answer) -> Ended {
    record.status = answer.status;
    record.reason = if answer.status < 400 { "ok" } else { "node_refused" };
    client.answer(Some(node), answer).await.into()
}

/// A node refuses, and the client's answer has begun. Why a stream cannot be taken up there is nothing for the client; that its time is
/// over is, and whatever is said of a request that has only waited.
async fn break_off(client: Client<'_>, record: &mut Record, journey: &Journey, answer: &Answer) -> Ended {
    let is_for_client = answer.status == LATE || !journey.is_resuming(&client);
    match serde_json::from_slice(&answer.body) {
        Ok(error) if is_for_client && answer.status >= 400 => {
            (record.status, record.reason) = (200, "node_refused");
            client.end_with(error).await
        }
        _ => fail(client, record, Loss::Malformed.error()).await,
    }
}

async fn interrupted(client: Client<'_>, record: &mut Record, interrupt: Interrupt) -> Ended {
    match interrupt {
        Interrupt::ClientGone => {
            record.status = if client.has_begun() { 200 } else { 0 };
            record.reason = "client_gone";
            Ended::ClientGone
        }
        Interrupt::Deadline => {
            let message = "the request took longer than it may (balancer.relay.request_timeout)";
            fail(client, record, ApiError::new(ErrorKind::DeadlineExceeded, "request_timeout", message)).await
        }
    }
}

/// Nobody can go on. When all that was heard is that nodes are busy, their own words say it best.
async fn give_up(client: Client<'_>, record: &mut Record, journey: Journey, error: ApiError) -> Ended {
    match journey.busy {
        Some((node, answer)) if matches!(journey.last, Some(Loss::Busy | Loss::Full)) && !client.has_begun() => {
            pass_on(client, record, &node, answer).await
        }
        _ => fail(client, record, error).await,
    }
}

async fn fail(client: Client<'_>, record: &mut Record, error: ApiError) -> Ended {
    record.refused(&error);
    warn!(request_id = %record.ctx.id, code = error.code, retries = record.retries, resumes = record.resumes, "request failed");
    if client.has_begun() {
        record.status = 200;
    }
    client.fail(&error).await
}
