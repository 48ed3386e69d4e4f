//! `message` objects and their events, as Anthropic's clients expect them. There is one choice, and so one line of content blocks.

use serde_json::{Value, json};

use super::{Event, Head, Said, Shape, Step, Usage};
use crate::{http::choice::Why, output::Piece};

const ID: &str = "msg_";

/// Messages.
pub(in crate::http) struct Messages {
    head: Head,
    /// Tokens of the prompt, told with the first event.
    prompt_tokens: usize,
    blocks: usize,
    open: Option<Kind>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    ToolUse,
}

impl Messages {
    pub(in crate::http) fn new(head: Head) -> Self {
        Self { head, prompt_tokens: 0, blocks: 0, open: None }
    }

    fn message(&self, content: Value, said: Option<&Said>, usage: Value) -> Value {
        let (reason, sequence) = ended(said);
        json!({
            "id": self.head.id(ID), "type": "message", "role": "assistant", "model": self.head.model, "content": content,
            "stop_reason": reason, "stop_sequence": sequence, "usage": usage,
        })
    }

    fn say(name: &'static str, mut fields: Value, out: &mut Vec<Event>) {
        fields["type"] = name.into();
        out.push(Event { name: Some(name), data: fields.to_string() });
    }

    fn open(&mut self, kind: Kind, block: &Value, out: &mut Vec<Event>) {
        self.close(out);
        Self::say("content_block_start", json!({"index": self.blocks, "content_block": block}), out);
        self.open = Some(kind);
    }

    fn close(&mut self, out: &mut Vec<Event>) {
        if self.open.take().is_some() {
            Self::say("content_block_stop", json!({"index": self.blocks}), out);
            self.blocks += 1;
        }
    }

    fn grow(&self, delta: &Value, out: &mut Vec<Event>) {
        Self::say("content_block_delta", json!({"index": self.blocks, "delta": delta}), out);
    }

    fn piece(&mut self, piece: &Piece, out: &mut Vec<Event>) {
        match piece {
            Piece::Text(text) => {
                if self.open != Some(Kind::Text) {
                    self.open(Kind::Text, &json!({"type": "text", "text": ""}), out);
                }
                self.grow(&json!({"type": "text_delta", "text": text}), out);
            }
            Piece::Reasoning(text) => {
                if self.open != Some(Kind::Thinking) {
                    self.open(Kind::Thinking, &json!({"type": "thinking", "thinking": "", "signature": ""}), out);
                }
                self.grow(&json!({"type": "thinking_delta", "thinking": text}), out);
            }
            Piece::Call { index, name } => {
                let id = self.head.call_id(0, *index);
                self.open(Kind::ToolUse, &json!({"type": "tool_use", "id": id, "name": name, "input": {}}), out);
            }
            Piece::Arguments { json, .. } => self.grow(&json!({"type": "input_json_delta", "partial_json": json}), out),
        }
    }
}

/// Why it ended, in Anthropic's words, and the stop string that did it.
fn ended(said: Option<&Said>) -> (Option<&'static str>, Option<&str>) {
    match said.and_then(|said| said.ended.as_ref()) {
        None => (None, None),
        Some(Why::Stop) => (Some("end_turn"), None),
        Some(Why::StopString(stop)) => (Some("stop_sequence"), Some(stop)),
        Some(Why::Length) => (Some("max_tokens"), None),
        Some(Why::ToolCalls) => (Some("tool_use"), None),
    }
}

impl Shape for Messages {
    fn begin(&mut self, prompt_tokens: usize) {
        self.prompt_tokens = prompt_tokens;
    }

    fn step(&mut self, step: &Step, out: &mut Vec<Event>) {
        if step.opens {
            let usage = json!({"input_tokens": self.prompt_tokens, "output_tokens": 0});
            Self::say("message_start", json!({"message": self.message(json!([]), None, usage)}), out);
        }
        step.pieces.iter().for_each(|piece| self.piece(piece, out));
        if step.ended.is_some() {
            self.close(out);
        }
    }

    fn tail(&mut self, said: &[&Said], usage: Usage, out: &mut Vec<Event>) {
        let (reason, sequence) = ended(said.first().copied());
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        let usage = json!({"input_tokens": usage.prompt, "output_tokens": usage.completion});
        Self::say("message_delta", json!({"delta": delta, "usage": usage}), out);
        Self::say("message_stop", json!({}), out);
    }

    fn whole(&self, said: &[&Said], usage: Usage) -> Value {
        let said = said.first().copied();
        let mut content: Vec<Value> = Vec::new();
        if let Some(said) = said {
            if !said.reasoning.is_empty() {
                content.push(json!({"type": "thinking", "thinking": said.reasoning, "signature": ""}));
            }
            if !said.text.is_empty() {
                content.push(json!({"type": "text", "text": said.text}));
            }
            for (i, (name, arguments)) in said.calls.iter().enumerate() {
                // arguments that broke off are no JSON; the client gets none rather than half of them
                let input: Value = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
                content.push(json!({"type": "tool_use", "id": self.head.call_id(0, i), "name": name, "input": input}));
            }
        }
        let usage = json!({"input_tokens": usage.prompt, "output_tokens": usage.completion});
        self.message(content.into(), said, usage)
    }
}
