//! The client's side of a relayed answer: one head, then events as they come, or one JSON body at the end.
//!
//! While anything is awaited, the client's connection and the request's deadline are watched with it.

use std::{pin::Pin, time::Duration};

use bytes::Bytes;
use http::{Version, header};
use pingora::protocols::http::ServerSession;
use serde_json::Value;
use tidegate_common::{
    contract::{ApiError, error_event_at, event},
    ids::{NodeId, RequestId},
};
use tokio::time::{Instant, Sleep, sleep_until};

use super::events;
use crate::{
    answer::{self, Answer},
    ctx::{RequestCtx, Stamp},
    limits::Allowance,
    serve::Ended,
};

/// Why carrying on makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interrupt {
    /// The client has left.
    ClientGone,
    /// The request's time is over.
    Deadline,
}

/// The client of one generation.
pub(crate) struct Client<'a> {
    session: &'a mut ServerSession,
    frame: Frame,
    deadline: Pin<Box<Sleep>>,
    wants_stream: bool,
    begun: bool,
    has_data: bool,
    /// The last event's data so far, for a client that wants one body.
    last: Option<Bytes>,
    /// What it has had, while somebody wants it.
    copy: Option<Copy>,
}

/// What each head of an answer says; a relay holds the rest of the request's frame.
struct Frame {
    id: RequestId,
    allowance: Option<Box<Allowance>>,
    cache: Option<&'static str>,
}

impl Frame {
    fn stamp(&self) -> Stamp<'_> {
        Stamp { id: &self.id, allowance: self.allowance.as_deref(), cache: self.cache }
    }
}

/// An answer on its way into the cache.
struct Copy {
    bytes: Vec<u8>,
    bytes_max: usize,
}

impl<'a> Client<'a> {
    pub(crate) fn new(session: &'a mut ServerSession, wants_stream: bool, ctx: &RequestCtx, deadline: Instant) -> Self {
        let deadline = Box::pin(sleep_until(deadline));
        let frame = Frame { id: ctx.id.clone(), allowance: ctx.allowance.clone(), cache: ctx.cache };
        let copy = (ctx.copy_bytes_max > 0).then(|| Copy { bytes: Vec::new(), bytes_max: ctx.copy_bytes_max });
        Self { session, frame, deadline, wants_stream, begun: false, has_data: false, last: None, copy }
    }

    /// Whether the head of the answer is out, so that what goes wrong can no longer change it.
    pub(crate) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Whether the client has had more than comments, so that its answer can only go on and not begin anew.
    pub(crate) fn has_data(&self) -> bool {
        self.has_data
    }

    /// What is left of the request's time.
    pub(crate) fn time_left(&self) -> Duration {
        self.deadline.deadline().saturating_duration_since(Instant::now())
    }

    /// Awaits `work`, unless the client leaves or the time is over first; then `work` is dropped.
    pub(crate) async fn unless_interrupted<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Interrupt> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            _ = self.session.read_body_or_idle(true) => Err(Interrupt::ClientGone),
            () = self.deadline.as_mut() => Err(Interrupt::Deadline),
        }
    }

    /// The whole answer, once it has ended, where it was to be copied and is not too large.
    pub(crate) fn take_copy(&mut self) -> Option<Vec<u8>> {
        self.copy.take().map(|copy| copy.bytes)
    }

    fn copy(&mut self, bytes: &[u8]) {
        let Some(copy) = self.copy.as_mut() else { return };
        if copy.bytes.len() + bytes.len() > copy.bytes_max {
            self.copy = None;
            return;
        }
        copy.bytes.extend_from_slice(bytes);
    }

    /// Whole events of a node pass.
    pub(crate) async fn pass(&mut self, events: Bytes, node: &NodeId) -> Result<(), Interrupt> {
        if events.is_empty() {
            return Ok(());
        }
        if !self.wants_stream {
            if let Some(data) = events::last_data(&events) {
                self.last = Some(events.slice_ref(data));
            }
            return Ok(());
        }
        self.copy(&events);
        let written = self.write_events(events, node).await;
        written.map_err(|_| Interrupt::ClientGone)
    }

    async fn write_events(&mut self, events: Bytes, node: &NodeId) -> pingora::Result<()> {
        if !self.begun {
            self.begun = true;
            self.write_head(node).await?;
        }
        self.has_data = self.has_data || events::last_data(&events).is_some();
        self.session.write_response_body(events, false).await
    }

    async fn write_head(&mut self, node: &NodeId) -> pingora::Result<()> {
        let stamp = self.frame.stamp();
        let mut head = answer::head(200, event::CONTENT_TYPE, stamp, Some(node))?;
        head.insert_header(header::CACHE_CONTROL, "no-cache")?;
        if self.session.req_header().version == Version::HTTP_11 {
            head.insert_header(header::TRANSFER_ENCODING, "chunked")?;
        }
        self.session.write_response_header(Box::new(head)).await
    }

    /// The last event has passed.
    pub(crate) async fn end(&mut self, node: &NodeId) -> pingora::Result<()> {
        if self.wants_stream {
            if !self.begun {
                self.begun = true;
                self.write_head(node).await?;
            }
            return self.session.write_response_body(Bytes::new(), true).await;
        }
        let body = self.last.take().unwrap_or_default();
        self.copy(&body);
        let stamp = self.frame.stamp();
        answer::write(self.session, stamp, Some(node), Answer::json(200, body)).await
    }

    /// Passes a whole answer on.
    pub(crate) async fn answer(self, node: Option<&NodeId>, answer: Answer) -> pingora::Result<()> {
        let stamp = self.frame.stamp();
        answer::write(self.session, stamp, node, answer).await
    }

    /// Ends with an error: as the whole answer, or as the last event of a stream that has begun.
    pub(crate) async fn fail(self, error: &ApiError) -> Ended {
        if !self.begun {
            let stamp = self.frame.stamp();
            return answer::refuse(self.session, stamp, error).await.into();
        }
        let body = error.to_json_at(self.session.req_header().uri.path());
        self.end_with(body).await
    }

    /// Ends a stream that has begun with an error, given as the body that it would have as a whole answer.
    pub(crate) async fn end_with(self, error: Value) -> Ended {
        let (name, data) = error_event_at(self.session.req_header().uri.path(), error);
        let mut out = Vec::new();
        event::write(&mut out, None, name, Some(data.to_string().as_bytes()));
        // the body ends as HTTP wants it, so the connection may serve the next request
        self.session.write_response_body(out.into(), true).await.into()
    }
}
