//! What a foreign upstream is sent, and how its stream is known to be whole.
//!
//! It gets the client's body and nothing else of the client's: no header, no key. What it streams passes in whole events, and is whole
//! when the API's own last event has come. Its tokens are unknown, so nobody can go on where it was lost.

use bytes::{Bytes, BytesMut};
use pingora::http::RequestHeader;
use serde::Deserialize;
use serde_json::{Map, Value};
use tidegate_common::contract::{event, paths};

use super::{
    delivered::Delivered,
    events::{EVENT_BYTES_MAX, Events, Malformed, Passed, Tail},
    request::{Generation, NodeRequest, Silence},
};
use crate::{answer::Answer, record::Record, upstreams::Foreign};

/// Fields that begin so are Tidegate's own.
const OWN_FIELDS: &str = "tidegate_";

/// Where below a base URL an API stands, if it is none of Tidegate's own.
fn path_below(path: &str) -> Option<&str> {
    let is_common = [paths::CHAT_COMPLETIONS, paths::COMPLETIONS, paths::RESPONSES, paths::MESSAGES, paths::EMBEDDINGS]
        .contains(&path);
    path.strip_prefix("/v1").filter(|_| is_common)
}

impl Generation {
    /// Whether foreign upstreams have this API at all.
    pub(super) fn is_common(&self) -> bool {
        path_below(self.path).is_some()
    }

    /// The request for a foreign upstream, for the pool of `model`.
    pub(super) fn request_abroad(&self, foreign: &Foreign, model: &str) -> pingora::Result<NodeRequest> {
        let path = foreign.path(path_below(self.path).unwrap_or(self.path));
        let body = body_abroad(&self.body, self.model.as_deref(), foreign.name_of(model));
        let mut head = RequestHeader::build(self.method, path.as_bytes(), Some(8))?;
        head.insert_header("host", foreign.authority())?;
        head.insert_header("user-agent", concat!("tidegate/", env!("CARGO_PKG_VERSION")))?;
        head.insert_header("content-type", "application/json")?;
        head.insert_header("content-length", body.len().to_string())?;
        head.insert_header("accept", if self.stream { event::CONTENT_TYPE } else { "application/json" })?;
        if let Some(authorization) = foreign.authorization() {
            head.insert_header("authorization", authorization.clone())?;
        }
        // a whole answer comes when it is whole
        let silence = if self.stream { Silence::AtMost(foreign.stall_timeout()) } else { Silence::Unbounded };
        Ok(NodeRequest { head: Box::new(head), body, silence })
    }
}

/// The body as it came, unless it names the model otherwise than the upstream does or has fields of Tidegate's own.
fn body_abroad(body: &Bytes, named: Option<&str>, theirs: &str) -> Bytes {
    let may_have_own_fields = memchr::memmem::find(body, OWN_FIELDS.as_bytes()).is_some();
    if named == Some(theirs) && !may_have_own_fields {
        return body.clone();
    }
    // it was read as an object before, so it is one
    let Ok(mut fields) = serde_json::from_slice::<Map<String, Value>>(body) else { return body.clone() };
    fields.retain(|name, _| !name.starts_with(OWN_FIELDS));
    fields.insert("model".into(), theirs.into());
    serde_json::to_vec(&fields).map_or_else(|_| body.clone(), Bytes::from)
}

/// Cuts a stream into whole events, whoever writes it.
pub(super) enum Cutter {
    /// A node of ours.
    Ours(Events),
    /// A foreign upstream.
    Theirs(Whole),
}

impl Cutter {
    pub(super) fn new(is_foreign: bool) -> Self {
        if is_foreign { Self::Theirs(Whole::default()) } else { Self::Ours(Events::default()) }
    }

    pub(super) fn push(&mut self, chunk: &[u8], delivered: &mut Delivered) -> Result<Passed, Malformed> {
        match self {
            Self::Ours(events) => events.push(chunk, delivered),
            Self::Theirs(whole) => {
                let passed = whole.push(chunk);
                delivered.passed_abroad(std::mem::take(&mut whole.events));
                passed
            }
        }
    }
}

/// Whole events of a foreign stream, untouched. Each byte is looked at once.
#[derive(Debug, Default)]
pub(super) struct Whole {
    /// What no whole event has been made of yet.
    rest: BytesMut,
    /// Where in `rest` the line begins that has no end yet.
    line_at: usize,
    /// Where in `rest` to look for its end.
    seen: usize,
    /// Whether the unfinished event is the last one.
    is_last: bool,
    /// Data of this read.
    events: usize,
}

impl Whole {
    /// Takes one read; after the last event, the rest is ignored.
    fn push(&mut self, chunk: &[u8]) -> Result<Passed, Malformed> {
        self.rest.extend_from_slice(chunk);
        let (mut finished, mut tail) = (0, None);
        while tail.is_none() {
            let Some(end) = memchr::memchr(b'\n', &self.rest[self.seen..]).map(|at| self.seen + at + 1) else {
                self.seen = self.rest.len();
                break;
            };
            let line = self.rest[self.line_at..end].trim_ascii_end();
            self.is_last |= is_last(line);
            self.events += usize::from(line.starts_with(b"data:") && !self.is_last);
            if line.is_empty() {
                finished = end;
                tail = self.is_last.then_some(Tail::End);
            }
            (self.line_at, self.seen) = (end, end);
        }
        let bytes = self.rest.split_to(finished).freeze();
        self.line_at -= finished;
        self.seen -= finished;
        if self.rest.len() > EVENT_BYTES_MAX { Err(Malformed) } else { Ok(Passed { bytes, tail }) }
    }
}

/// Notes what a whole answer says of its tokens, in any of the APIs' words.
pub(super) fn tell_usage(answer: &Answer, record: &mut Record) {
    let Ok(RawAnswer { usage }) = serde_json::from_slice(&answer.body) else { return };
    record.prompt_tokens = usage.prompt_tokens.or(usage.input_tokens);
    record.tokens = usage.completion_tokens.or(usage.output_tokens).unwrap_or(0) as usize;
}

#[derive(Deserialize)]
struct RawAnswer {
    usage: RawUsage,
}

#[derive(Deserialize)]
struct RawUsage {
    prompt_tokens: Option<u32>,
    input_tokens: Option<u32>,
    completion_tokens: Option<u32>,
    output_tokens: Option<u32>,
}

/// Whether a line says that its event is the last: of chat and completions, of responses, of messages.
fn is_last(line: &[u8]) -> bool {
    let value = |name: &[u8]| line.strip_prefix(name).map(<[u8]>::trim_ascii);
    const NAMES: [&[u8]; 4] = [b"response.completed", b"response.incomplete", b"response.failed", b"message_stop"];
    value(b"data:") == Some(event::DONE.as_bytes()) || value(b"event:").is_some_and(|name| NAMES.contains(&name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(stream: &[u8], cuts: &[usize]) -> (Vec<u8>, Option<Tail>) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let (mut whole, mut out, mut tail) = (Whole::default(), Vec::new(), None);
        for pair in cuts.windows(2).filter(|pair| pair[0] < pair[1]) {
            if tail.is_none() {
                let passed = whole.push(&stream[pair[0]..pair[1]]).unwrap();
                out.extend_from_slice(&passed.bytes);
                tail = passed.tail;
            }
        }
        (out, tail)
    }

    #[test]
    fn a_stream_is_whole_with_its_apis_last_event() {
        for last in [
            "data: [DONE]\n\n",
            "data:[DONE]\r\n\r\n",
            "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
            "event: response.completed\ndata: {}\n\n",
            "event: response.failed\ndata: {}\n\n",
        ] {
            let stream = format!(": ping\n\nid: 7\ndata: {{\"a\": \"[DONE]\"}}\n\n{last}");
            let with_more = format!("{stream}data: more\n\n");
            assert_eq!(all(with_more.as_bytes(), &[]), (stream.into_bytes(), Some(Tail::End)), "{last:?}");
        }
    }

    #[test]
    fn half_an_event_does_not_pass() {
        assert_eq!(all(b"data: a\n\ndata: b\n", &[]), (b"data: a\n\n".to_vec(), None));
        assert_eq!(all(b"data: a\n\ndata: [DONE]\n", &[]), (b"data: a\n\n".to_vec(), None));
    }

    #[test]
    fn a_body_changes_only_where_it_must() {
        let abroad =
            |body: &'static str, named, theirs| body_abroad(&Bytes::from_static(body.as_bytes()), named, theirs);
        let body = r#"{ "model": "m", "x": 1.50 }"#;
        assert_eq!(abroad(body, Some("m"), "m"), body);
        assert_eq!(abroad(body, Some("m"), "org/m"), r#"{"model":"org/m","x":1.5}"#);
        assert_eq!(abroad(r#"{"x":"ü"}"#, None, "m"), r#"{"x":"ü","model":"m"}"#);
        let own = r#"{"a":["tidegate_x"],"tidegate_x":{"b":1},"model":"m"}"#;
        assert_eq!(abroad(own, Some("m"), "m"), r#"{"a":["tidegate_x"],"model":"m"}"#);
    }

    #[test]
    fn apis_of_our_own_are_not_asked_for_abroad() {
        assert_eq!(path_below(paths::CHAT_COMPLETIONS), Some("/chat/completions"));
        assert_eq!([paths::CHAT, paths::API_CHAT, paths::TOKENIZE, paths::OPENAPI].map(path_below), [None; 4]);
    }

    proptest! {
        /// Law: where reads cut the stream makes no difference, and what passes is whole events from its beginning.
        #[test]
        fn cuts_make_no_difference(
            lines in prop::collection::vec(prop_oneof![Just(""), Just("data: x"), Just(": c"), Just("data: [DONE]")], 0..30),
            crlf: bool,
            cuts in prop::collection::vec(any::<usize>(), 0..30),
        ) {
            let stream = lines.join(if crlf { "\r\n" } else { "\n" });
            let (out, tail) = all(stream.as_bytes(), &[]);
            prop_assert_eq!(all(stream.as_bytes(), &cuts), (out.clone(), tail.clone()));
            prop_assert!(stream.as_bytes().starts_with(&out));
            let text = String::from_utf8(out).unwrap();
            let last = text.lines().rfind(|line| !line.is_empty());
            prop_assert_eq!(text.contains("[DONE]"), tail.is_some());
            prop_assert!(tail.is_none() || text.ends_with('\n') && last.is_some());
        }

        #[test]
        fn any_bytes_are_read_without_panic(stream: Vec<u8>, cuts in prop::collection::vec(any::<usize>(), 0..9)) {
            all(&stream, &cuts);
        }
    }
}
