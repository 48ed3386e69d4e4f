//! The shapes of answers: what the official clients of each path expect, as JSON.

use serde_json::{Value, json};

use super::frame::Frame;
use crate::stop::Finish;

/// Which of the paths a request came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    /// `/v1/chat/completions` and its short form.
    Chat,
    /// `/v1/completions`
    Completion,
    /// `/api/v1/chat`: a query in, an answer out.
    Query,
}

/// Tokens counted for one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) completion: usize,
}

/// What all pieces of one answer share.
#[derive(Debug, Clone)]
pub(super) struct Head {
    api: Api,
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Api {
    /// The field that holds the prompt.
    pub(super) fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Completion => "prompt",
            Self::Query => "query",
        }
    }

    /// Whether the first piece of a choice says something before any text.
    pub(super) fn opens_choices(self) -> bool {
        self == Self::Chat
    }
}

impl Usage {
    fn json(self) -> Value {
        json!({"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion})
    }
}

impl Head {
    pub(super) fn new(api: Api, frame: &Frame, model: &str, device: &str) -> Self {
        let prefix = match api {
            Api::Chat => "chatcmpl-",
            Api::Completion => "cmpl-",
            Api::Query => "chat-",
        };
        let fingerprint = format!("tidegate-{}-{device}", env!("CARGO_PKG_VERSION"));
        Self { api, id: format!("{prefix}{}", frame.id), created: frame.created, model: model.to_owned(), fingerprint }
    }

    fn wrap(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint, "choices": choices})
    }

    /// One piece of a stream.
    pub(super) fn piece(&self, choice: u32, text: &str, first: bool, finish: Option<Finish>) -> Value {
        match self.api {
            Api::Chat => {
                let mut delta = serde_json::Map::new();
                if first {
                    delta.insert("role".into(), "assistant".into());
                }
                if first || !text.is_empty() {
                    delta.insert("content".into(), text.into());
                }
                let choice = json!({"index": choice, "delta": delta, "logprobs": null, "finish_reason": finish});
                self.wrap("chat.completion.chunk", json!([choice]))
            }
            Api::Completion => {
                let choice = json!({"index": choice, "text": text, "logprobs": null, "finish_reason": finish});
                self.wrap("text_completion", json!([choice]))
            }
            Api::Query => json!({"id": self.id, "answer": text, "finish_reason": finish}),
        }
    }

    /// The piece after the last, for clients that asked for it.
    pub(super) fn usage_piece(&self, usage: Usage) -> Value {
        if self.api == Api::Query {
            return json!({"id": self.id, "answer": "", "usage": usage.json()});
        }
        let object = if self.api == Api::Completion { "text_completion" } else { "chat.completion.chunk" };
        let mut piece = self.wrap(object, json!([]));
        piece["usage"] = usage.json();
        piece
    }

    /// A whole answer. `choices`: text and reason of each.
    pub(super) fn whole<'a>(
        &self,
        mut choices: impl Iterator<Item = (&'a str, Option<Finish>)>,
        usage: Usage,
    ) -> Value {
        let mut whole = match self.api {
            Api::Chat => {
                let choice = |(i, (text, finish)): (usize, (&str, Option<Finish>))| {
                    let message = json!({"role": "assistant", "content": text, "refusal": null});
                    json!({"index": i, "message": message, "logprobs": null, "finish_reason": finish})
                };
                self.wrap("chat.completion", choices.enumerate().map(choice).collect())
            }
            Api::Completion => {
                let choice = |(i, (text, finish)): (usize, (&str, Option<Finish>))| json!({"index": i, "text": text, "logprobs": null, "finish_reason": finish});
                self.wrap("text_completion", choices.enumerate().map(choice).collect())
            }
            Api::Query => {
                let (text, finish) = choices.next().unwrap_or(("", None));
                json!({"id": self.id, "model": self.model, "answer": text, "finish_reason": finish})
            }
        };
        whole["usage"] = usage.json();
        whole
    }
}
