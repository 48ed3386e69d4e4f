//! What a node is sent: the client's body untouched, or with the tokens delivered so far, under headers that the edge alone writes.
//!
//! Headers are built from nothing, so no header of a client's can pass for one of ours; few of the client's own go along.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use pingora::http::RequestHeader;
use tidegate_common::contract::{Resume, event, headers};

use super::delivered::Delivered;
use crate::{body::Wish, ctx::RequestCtx, pool::Target};

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
        Self { method: "GET", path, body: Bytes::new(), model: Some(model), seed: None, stream: false, choices: 1 }
    }

    pub(crate) fn new(path: &'static str, body: Bytes, wish: &Wish) -> Self {
        let seed = (!wish.seeded).then(rand::random);
        Self { method: "POST", path, body, model: wish.model.clone(), seed, stream: wish.stream, choices: wish.choices }
    }

    /// The request for `target`.
    pub(crate) fn request(
        &self,
        ctx: &RequestCtx,
        target: &Target,
        time_left: Duration,
        resume: Option<&Delivered>,
    ) -> pingora::Result<NodeRequest> {
        let body = resume.map_or_else(|| self.body.clone(), |delivered| with_resume(&self.body, &delivered.resume()));
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

/// The body with one more field. It is known to be a JSON object, so the field goes right behind its first brace.
fn with_resume(body: &Bytes, resume: &Resume) -> Bytes {
    let brace = memchr::memchr(b'{', body).map_or(0, |at| at + 1);
    let (open, rest) = body.split_at(brace);
    let is_empty = rest.trim_ascii_start().starts_with(b"}");
    let value = serde_json::to_vec(resume).unwrap_or_default(); // lists of numbers always serialize
    let mut out = BytesMut::with_capacity(body.len() + value.len() + Resume::FIELD.len() + 4);
    out.put_slice(open);
    out.put_slice(b"\"");
    out.put_slice(Resume::FIELD.as_bytes());
    out.put_slice(b"\":");
    out.put_slice(&value);
    if !is_empty {
        out.put_slice(b",");
    }
    out.put_slice(rest);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokens_go_in_front_and_nothing_else_changes() {
        let resume = Resume { tokens: vec![vec![1, 2], vec![]] };
        let body = Bytes::from_static(b" {\"messages\": [{\"a\": 1}], \"x\":\"\xc3\xbc\"}");
        let expected = " {\"tidegate_resume\":{\"tokens\":[[1,2],[]]},\"messages\": [{\"a\": 1}], \"x\":\"ü\"}";
        assert_eq!(with_resume(&body, &resume), expected);
        assert_eq!(
            with_resume(&Bytes::from_static(b"{ }"), &Resume::default()),
            &b"{\"tidegate_resume\":{\"tokens\":[]} }"[..]
        );
    }
}
