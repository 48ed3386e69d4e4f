//! The shapes of answers: what the official clients of each API expect, as events or as one JSON body.
//!
//! A shape sees the steps of an answer in their order. What it writes depends on nothing else, so a node that takes an answer up shows
//! its shape the steps that the client has had, and goes on where the client is.

mod chat;
mod completion;
mod messages;
mod query;
mod responses;

use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tidegate_common::contract::event;

use super::{
    choice::{Said, Scored, Spelled, Step, Why},
    frame::Frame,
};

pub(super) use chat::Chat;
pub(super) use completion::Completion;
pub(super) use messages::Messages;
pub(super) use query::Query;
pub(super) use responses::Responses;

/// What stands for an impossible token: JSON has no infinity.
const LOGPROB_MIN: f32 = -9999.0;

/// One API's answers.
pub(super) trait Shape: Send {
    /// The prompt is known.
    fn begin(&mut self, _prompt_tokens: usize) {}

    /// The events that a step makes.
    fn step(&mut self, step: &Step, out: &mut Vec<Event>);

    /// The events after the last step; at least one.
    fn tail(&mut self, said: &[&Said], usage: Usage, out: &mut Vec<Event>);

    /// The whole answer.
    fn whole(&self, said: &[&Said], usage: Usage) -> Value;
}

/// One server-sent event.
pub(super) struct Event {
    pub(super) name: Option<&'static str>,
    pub(super) data: String,
}

/// Tokens counted for one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) completion: usize,
    /// How many of the completion's tokens were thoughts.
    pub(super) reasoning: usize,
}

/// What all pieces of one answer share.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) request: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
}

impl Event {
    /// Without a name.
    pub(super) fn of(data: &impl Serialize) -> Self {
        Self { name: None, data: serde_json::to_string(data).expect("our own answers can be written as JSON") }
    }

    /// The last event of OpenAI's streams.
    pub(super) fn done() -> Self {
        Self { name: None, data: event::DONE.into() }
    }
}

impl Usage {
    fn json(self) -> Value {
        let mut json = json!({"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion});
        if self.reasoning > 0 {
            json["completion_tokens_details"] = json!({"reasoning_tokens": self.reasoning});
        }
        json
    }
}

impl Head {
    pub(super) fn new(frame: &Frame, model: &str, device: &str) -> Self {
        Self {
            request: frame.id.to_string(),
            created: frame.created,
            model: model.to_owned(),
            fingerprint: format!("tidegate-{}-{device}", env!("CARGO_PKG_VERSION")),
        }
    }

    /// An id of the answer itself.
    fn id(&self, prefix: &str) -> String {
        [prefix, &self.request].concat()
    }

    /// An id of a part of it: the same on every node. `digits` hexadecimal digits, at most 64.
    fn part_id(&self, prefix: &str, part: &str, digits: usize) -> String {
        let digest = Sha256::digest(format!("{}/{part}", self.request));
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{prefix}{}", &hex[..digits])
    }

    /// The id of a call. Nine letters and digits, the longest that Mistral's templates take, go with every model.
    fn call_id(&self, choice: u32, index: usize) -> String {
        self.part_id("", &format!("call/{choice}/{index}"), 9)
    }

    fn wrap<C>(&self, prefix: &str, object: &'static str, choices: C) -> Wrapped<'_, C> {
        Wrapped {
            id: self.id(prefix),
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage: None,
        }
    }
}

/// What OpenAI's completions and their chunks have in common. Chunks are written with each token, so nothing is copied that can be
/// borrowed.
#[derive(Serialize)]
struct Wrapped<'a, C> {
    id: String,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: C,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
}

impl<C> Wrapped<'_, C> {
    fn with(mut self, usage: Usage) -> Self {
        self.usage = Some(usage.json());
        self
    }
}

/// OpenAI's word.
fn finish_reason(why: Option<&Why>) -> Option<&'static str> {
    Some(match why? {
        Why::Stop | Why::StopString(_) => "stop",
        Why::Length => "length",
        Why::ToolCalls => "tool_calls",
    })
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

#[cfg(test)]
mod tests;
