//! What a node is sent: the client's body untouched, or with the tokens delivered so far, under headers that the edge alone writes.
//!
//! Headers are built from nothing, so no header of a client's can pass for one of ours; few of the client's own go along.

use std::time::Duration;

use bytes::Bytes;
use pingora::http::RequestHeader;
use tidegate_common::{
    contract::{Resume, event, headers},
    ids::NodeId,
};

use super::delivered::Delivered;
use crate::{
    body::{Wish, with_field},
    ctx::RequestCtx,
    pool::Target,
};

/// One generation, as its client asked for it.
pub(crate) struct Generation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    pub(super) body: Bytes,
    /// The model that the client named.
    pub(crate) model: Option<String>,
    /// Drawn once, so that every node that the stream meets samples the same; `None` when the body brings its own.
    seed: Option<u64>,
    pub(crate) stream: bool,
    pub(crate) choices: u32,
    /// Who is asked first while it takes requests: it has answered what came before.
    pub(crate) prefers: Option<NodeId>,
}

/// A request ready to be sent.
pub(crate) struct NodeRequest {
    pub(crate) head: Box<RequestHeader>,
    pub(crate) body: Bytes,
    pub(crate) silence: Silence,
}

/// How long an answer may be silent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Silence {
    /// As long as a node's, which gives signs of life.
    OfNode,
    AtMost(Duration),
    /// Until the request's own time is over.
    Unbounded,
}

impl Silence {
    /// The bound, where a node's is this.
    pub(super) fn bound(self, of_node: Duration) -> Option<Duration> {
        match self {
            Self::OfNode => Some(of_node),
            Self::AtMost(bound) => Some(bound),
            Self::Unbounded => None,
        }
    }
}

impl Generation {
    /// The document at this path, from a node of this model: no generation, and carried like one.
    pub(crate) fn document(path: &'static str, model: String) -> Self {
        Self {
            method: "GET",
            path,
            body: Bytes::new(),
            model: Some(model),
            seed: None,
            stream: false,
            choices: 1,
            prefers: None,
        }
    }

    pub(crate) fn new(path: &'static str, body: Bytes, wish: &Wish) -> Self {
        let seed = (!wish.seeded).then(rand::random);
        let (model, stream, choices) = (wish.model.clone(), wish.stream, wish.choices);
        Self { method: "POST", path, body, model, seed, stream, choices, prefers: None }
    }

    /// The request for `target`.
    pub(crate) fn request(
        &self,
        ctx: &RequestCtx,
        target: &Target,
        time_left: Duration,
        resume: Option<&Delivered>,
    ) -> pingora::Result<NodeRequest> {
        let body = resume
            .map_or_else(|| self.body.clone(), |delivered| with_field(&self.body, Resume::FIELD, &delivered.resume()));
        let mut head = RequestHeader::build(self.method, self.path.as_bytes(), Some(12))?;
        head.insert_header("host", target.authority.as_str())?;
        head.insert_header("content-type", "application/json")?;
        head.insert_header("content-length", body.len().to_string())?;
        head.insert_header("accept", event::CONTENT_TYPE)?;
        head.insert_header(headers::REQUEST_ID, ctx.id.as_str())?;
        head.insert_header(headers::STREAM, "1")?;
        head.insert_header(headers::CREATED, ctx.created.0.to_string())?;
        head.insert_header(headers::DEADLINE_MS, time_left.as_millis().to_string())?;
        if let Some(seed) = self.seed {
            head.insert_header(headers::SEED, seed.to_string())?;
        }
        if let Some(fingerprint) = resume.and_then(Delivered::fingerprint) {
            head.insert_header(headers::FINGERPRINT, fingerprint.to_string())?;
        }
        if let Some(payer) = ctx.payer() {
            head.insert_header(headers::TENANT, payer.as_ref())?;
        }
        Ok(NodeRequest { head: Box::new(head), body, silence: Silence::OfNode })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokens_go_in_front_and_nothing_else_changes() {
        let resume = Resume { tokens: vec![vec![1, 2], vec![]] };
        let body = Bytes::from_static(b" {\"messages\": [{\"a\": 1}], \"x\":\"\xc3\xbc\"}");
        let expected = " {\"tidegate_resume\":{\"tokens\":[[1,2],[]]},\"messages\": [{\"a\": 1}], \"x\":\"ü\"}";
        assert_eq!(with_field(&body, Resume::FIELD, &resume), expected);
        assert_eq!(
            with_field(&Bytes::from_static(b"{ }"), Resume::FIELD, &Resume::default()),
            &b"{\"tidegate_resume\":{\"tokens\":[]} }"[..]
        );
    }
}
