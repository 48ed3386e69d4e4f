//! One node's answer, through Pingora's pooled connector. Dropping it closes the connection, which cancels the node's sequence.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use pingora::{
    Error, ErrorType::ReadTimedout, connectors::http::Connector, http::ResponseHeader,
    protocols::http::client::HttpSession, upstreams::peer::HttpPeer,
};
use tidegate_common::contract::event;
use tokio::time::timeout;

use super::{Loss, Relay, request::NodeRequest};
use crate::{answer::Answer, pool::Target};

/// How often a connection from the pool may turn out dead before the node counts as lost: it can die between two requests.
const STALE_MAX: u32 = 3;
/// Largest answer that is not a stream.
const WHOLE_BYTES_MAX: usize = 8 << 20;
/// How long an idle connection to a node is kept.
const IDLE: Duration = Duration::from_secs(60);
/// How long the end of a finished answer may take; it usually has come with the last event.
const END_TIMEOUT: Duration = Duration::from_millis(50);

/// A stream of events that a node has begun.
pub(crate) struct Upstream {
    session: HttpSession,
    target: Arc<Target>,
}

/// What a node answered with.
pub(crate) enum Opened {
    /// Events.
    Stream(Box<Upstream>),
    /// A whole answer.
    Whole(Answer),
}

/// One attempt on one connection.
enum Attempt {
    Opened(Opened),
    /// A connection from the pool was dead: nothing is said about the node.
    Stale,
    Lost(Loss),
}

impl Upstream {
    /// Sends the request and reads the answer's head.
    pub(crate) async fn open(relay: &Relay, target: &Arc<Target>, request: NodeRequest) -> Result<Opened, Loss> {
        for _ in 0..STALE_MAX {
            match Self::attempt(relay, target, &request).await {
                Attempt::Opened(opened) => return Ok(opened),
                Attempt::Lost(loss) => return Err(loss),
                Attempt::Stale => {}
            }
        }
        Err(Loss::Reset)
    }

    async fn attempt(relay: &Relay, target: &Arc<Target>, request: &NodeRequest) -> Attempt {
        let (mut session, reused) = match target.connector(&relay.connector).get_http_session(&target.peer).await {
            Ok(session) => session,
            Err(_) => return Attempt::Lost(Loss::Connect),
        };
        session.set_read_timeout(request.silence.bound(relay.rules.stall_timeout));
        session.set_write_timeout(Some(relay.rules.stall_timeout));
        if let Err(error) = exchange(&mut session, request).await {
            let loss = loss(&error);
            return if reused && loss == Loss::Reset { Attempt::Stale } else { Attempt::Lost(loss) };
        }
        let Some(head) = session.response_header() else { return Attempt::Lost(Loss::Malformed) };
        if is_stream(head) {
            return Attempt::Opened(Opened::Stream(Box::new(Self { session, target: Arc::clone(target) })));
        }
        match whole(session, &target.peer, target.connector(&relay.connector)).await {
            Ok(answer) => Attempt::Opened(Opened::Whole(answer)),
            Err(loss) => Attempt::Lost(loss),
        }
    }

    /// The next bytes; there are always more until the last event.
    pub(crate) async fn read(&mut self) -> Result<Bytes, Loss> {
        match self.session.read_response_body().await {
            Ok(Some(bytes)) => Ok(bytes),
            Ok(None) => Err(Loss::Ended),
            Err(error) => Err(loss(&error)),
        }
    }

    /// Keeps the connection for the next request, when the answer ends as it should.
    pub(crate) async fn keep(mut self, connector: &Connector) {
        let ended = self.session.response_done()
            || matches!(timeout(END_TIMEOUT, self.session.read_response_body()).await, Ok(Ok(None)));
        if ended {
            self.target.connector(connector).release_http_session(self.session, &self.target.peer, Some(IDLE)).await;
        }
    }
}

async fn exchange(session: &mut HttpSession, request: &NodeRequest) -> pingora::Result<()> {
    session.write_request_header(request.head.clone()).await?;
    session.write_request_body(request.body.clone(), true).await?;
    session.finish_request_body().await?;
    session.read_response_header().await
}

fn loss(error: &Error) -> Loss {
    if *error.etype() == ReadTimedout { Loss::Stalled } else { Loss::Reset }
}

fn is_stream(head: &ResponseHeader) -> bool {
    let media_type = head.headers.get(CONTENT_TYPE).map(|v| v.as_bytes()).unwrap_or_default();
    head.status == 200 && media_type.starts_with(event::CONTENT_TYPE.as_bytes())
}

async fn whole(mut session: HttpSession, peer: &HttpPeer, connector: &Connector) -> Result<Answer, Loss> {
    let head = session.response_header().ok_or(Loss::Malformed)?;
    let text = |name| head.headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let mut answer = Answer {
        status: head.status.as_u16(),
        media_type: text(CONTENT_TYPE).unwrap_or_else(|| "application/json".into()),
        retry_after: text(RETRY_AFTER),
        body: Bytes::new(),
    };
    let mut body = BytesMut::new();
    while let Some(part) = session.read_response_body().await.map_err(|e| loss(&e))? {
        body.extend_from_slice(&part);
        if body.len() > WHOLE_BYTES_MAX {
            return Err(Loss::Malformed);
        }
    }
    answer.body = body.freeze();
    connector.release_http_session(session, peer, Some(IDLE)).await;
    Ok(answer)
}
