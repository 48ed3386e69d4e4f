//! Server-sent events between node and balancer (WHATWG HTML, section "Server-sent events").
//!
//! With `x-tidegate-stream: 1` each event says in its `id:` field which tokens it stands for, `id: <choice>:<offset>:<token,token>`,
//! and the last event of the stream says `id: end`. The balancer keeps these lines and drops them; `data:` bytes pass untouched.
//! An event may have an `id:` and no `data:` (a token that makes no text yet). Events with data and no `id:` belong to the next one that has
//! one, and reach the client with it or not at all: so a token may make several events. The first event of a generation, `id: by:<fingerprint>`,
//! says which nodes could go on with it, the next, `id: prompt:<tokens>`, how long its prompt is, as the edge counts no tokens itself. `event: handover` asks the balancer to go on elsewhere.
//! The comment `: wait` says that a waiting request is still alive. `event: refused` says in the place of an answer why there is none, where
//! the stream's head has gone out before that was known.

use std::{fmt, str::FromStr};

use super::Refusal;
use crate::ids::Fingerprint;

/// Media type of an event stream.
pub const CONTENT_TYPE: &str = "text/event-stream";

/// What a node writes while a request waits, at least once a second.
pub const WAIT: &[u8] = b": wait\n\n";

/// What a node writes to let go of a stream.
pub const HANDOVER: &[u8] = b"event: handover\ndata: {}\n\n";

/// Name of the event whose data is a [`Refusal`].
pub const REFUSED: &str = "refused";

/// Data of the last event that the OpenAI API sends to a streaming client.
pub const DONE: &str = "[DONE]";

/// The `id:` field of one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventId {
    /// Tokens of one choice.
    Tokens {
        /// Index of the choice, below the request's `n`.
        choice: u32,
        /// How many tokens of this choice earlier events carried.
        offset: u32,
        /// The tokens this event stands for; never empty.
        tokens: Vec<u32>,
    },
    /// Nodes with this fingerprint make the tokens that follow.
    By(Fingerprint),
    /// The prompt has this many tokens. A node may leave it out.
    Prompt(u32),
    /// Nothing comes after this event.
    End,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (choice, offset, tokens) = match self {
            Self::Tokens { choice, offset, tokens } => (choice, offset, tokens),
            Self::By(fingerprint) => return write!(f, "by:{fingerprint}"),
            Self::Prompt(tokens) => return write!(f, "prompt:{tokens}"),
            Self::End => return f.write_str("end"),
        };
        write!(f, "{choice}:{offset}:")?;
        for (i, token) in tokens.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{token}")?;
        }
        Ok(())
    }
}

/// An `id:` field that is none of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an event id of a tidegate node")]
pub struct InvalidEventId;

impl FromStr for EventId {
    type Err = InvalidEventId;

    fn from_str(text: &str) -> Result<Self, InvalidEventId> {
        if text == "end" {
            return Ok(Self::End);
        }
        if let Some(fingerprint) = text.strip_prefix("by:") {
            return fingerprint.parse().map(Self::By).map_err(|_| InvalidEventId);
        }
        if let Some(tokens) = text.strip_prefix("prompt:") {
            return tokens.parse().map(Self::Prompt).map_err(|_| InvalidEventId);
        }
        let mut parts = text.splitn(3, ':');
        let mut number = || parts.next()?.parse::<u32>().ok();
        let (choice, offset) = (number().ok_or(InvalidEventId)?, number().ok_or(InvalidEventId)?);
        let tokens = parts.next().ok_or(InvalidEventId)?.split(',').map(str::parse);
        let tokens = tokens.collect::<Result<Vec<u32>, _>>().map_err(|_| InvalidEventId)?;
        Ok(Self::Tokens { choice, offset, tokens })
    }
}

/// Appends one whole event to `out`. `data` must be one line, as JSON without layout is.
pub fn write(out: &mut Vec<u8>, id: Option<&EventId>, name: Option<&str>, data: Option<&[u8]>) {
    if let Some(id) = id {
        out.extend_from_slice(format!("id: {id}\n").as_bytes());
    }
    if let Some(name) = name {
        out.extend_from_slice(format!("event: {name}\n").as_bytes());
    }
    if let Some(data) = data {
        debug_assert!(!data.contains(&b'\n'), "event data of more than one line");
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(data);
        out.push(b'\n');
    }
    out.push(b'\n');
}

/// Appends the event that refuses the request; nothing comes after it.
pub fn write_refusal(out: &mut Vec<u8>, refusal: &Refusal) {
    let data = serde_json::to_string(refusal).expect("a refusal can be written as JSON");
    write(out, None, Some(REFUSED), Some(data.as_bytes()));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_reads_back_as_written(choice: u32, offset: u32, tokens in prop::collection::vec(any::<u32>(), 1..9)) {
            let id = EventId::Tokens { choice, offset, tokens };
            prop_assert_eq!(id.to_string().parse::<EventId>(), Ok(id));
        }

        #[test]
        fn any_text_is_read_without_panic(text: String) {
            let _ = text.parse::<EventId>();
        }
    }

    #[test]
    fn foreign_ids_are_refused() {
        for text in ["", "7", "1:2", "1:2:", "1:2:x", "-1:0:5", "by:", "by:7", "prompt:", "prompt:-1"] {
            assert_eq!(text.parse::<EventId>(), Err(InvalidEventId), "{text}");
        }
        assert_eq!("end".parse(), Ok(EventId::End));
        let by = EventId::By(Fingerprint::new(7));
        assert_eq!(by.to_string().parse(), Ok(by));
        assert_eq!("prompt:12".parse(), Ok(EventId::Prompt(12)));
        assert_eq!(EventId::Prompt(12).to_string(), "prompt:12");
    }

    #[test]
    fn an_event_is_written_as_lines_and_a_blank_one() {
        let mut out = Vec::new();
        write(&mut out, Some(&EventId::Tokens { choice: 0, offset: 4, tokens: vec![9, 8] }), None, Some(b"{}"));
        write(&mut out, Some(&EventId::End), None, Some(DONE.as_bytes()));
        assert_eq!(out, b"id: 0:4:9,8\ndata: {}\n\nid: end\ndata: [DONE]\n\n");
    }
}
