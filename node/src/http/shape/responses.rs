//! `response` objects, and their named events in the order that OpenAI's clients expect. There is one choice, and so one line of output
//! items: thoughts, words, calls.

use serde_json::{Value, json};

use super::{Event, Head, Said, Shape, Step, Usage};
use crate::{http::choice::Why, output::Piece};

/// Responses.
pub(in crate::http) struct Responses {
    head: Head,
    /// Fields of the request that the answer repeats.
    echoed: Value,
    sequence: u64,
    /// Items that are whole.
    done: Vec<Value>,
    open: Option<Item>,
    calls: usize,
}

/// The item that is being written.
struct Item {
    kind: Kind,
    id: String,
    text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    Call { call_id: String, name: String },
}

impl Item {
    fn json(&self, is_whole: bool) -> Value {
        let status = if is_whole { "completed" } else { "in_progress" };
        match &self.kind {
            Kind::Reasoning => {
                let content = if is_whole { json!([self.part()]) } else { json!([]) };
                json!({"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content})
            }
            Kind::Message => {
                let content = if is_whole { json!([self.part()]) } else { json!([]) };
                json!({"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content})
            }
            Kind::Call { call_id, name } => {
                json!({"id": self.id, "type": "function_call", "status": status, "call_id": call_id, "name": name, "arguments": self.text})
            }
        }
    }

    fn part(&self) -> Value {
        match self.kind {
            Kind::Reasoning => json!({"type": "reasoning_text", "text": self.text}),
            _ => json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}),
        }
    }
}

impl Responses {
    pub(in crate::http) fn new(head: Head, echoed: Value) -> Self {
        Self { head, echoed, sequence: 0, done: Vec::new(), open: None, calls: 0 }
    }

    fn response(&self, status: &str, output: &[Value], incomplete: Option<&str>, usage: Option<Usage>) -> Value {
        let mut response = json!({
            "id": self.head.id("resp_"), "object": "response", "created_at": self.head.created, "status": status, "background": false,
            "error": null, "incomplete_details": incomplete.map(|reason| json!({"reason": reason})), "model": self.head.model, "output": output,
        });
        if let (Some(response), Some(echoed)) = (response.as_object_mut(), self.echoed.as_object()) {
            response.extend(echoed.clone());
        }
        // what is found in a cache differs from node to node; the answer does not
        response["usage"] = usage.map_or(Value::Null, |usage| {
            json!({
                "input_tokens": usage.prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning}, "total_tokens": usage.prompt + usage.completion,
            })
        });
        response
    }

    fn say(&mut self, name: &'static str, fields: Value, out: &mut Vec<Event>) {
        let mut data = json!({"type": name, "sequence_number": self.sequence});
        if let (Some(data), Value::Object(fields)) = (data.as_object_mut(), fields) {
            data.extend(fields);
        }
        self.sequence += 1;
        out.push(Event { name: Some(name), data: data.to_string() });
    }

    /// The item that a piece belongs to is open after this.
    fn switch(&mut self, kind: Kind, out: &mut Vec<Event>) {
        if self.open.as_ref().is_some_and(|item| item.kind == kind) {
            return;
        }
        self.close(out);
        let prefix = match kind {
            Kind::Reasoning => "rs_",
            Kind::Message => "msg_",
            Kind::Call { .. } => "fc_",
        };
        let id = self.head.part_id(prefix, &format!("item/{}", self.done.len()), 32);
        let item = Item { kind, id, text: String::new() };
        let at = self.done.len();
        self.say("response.output_item.added", json!({"output_index": at, "item": item.json(false)}), out);
        if !matches!(item.kind, Kind::Call { .. }) {
            let fields = json!({"item_id": item.id, "output_index": at, "content_index": 0, "part": item.part()});
            self.say("response.content_part.added", fields, out);
        }
        self.open = Some(item);
    }

    fn close(&mut self, out: &mut Vec<Event>) {
        let Some(item) = self.open.take() else { return };
        let (at, id, text) = (self.done.len(), &item.id, &item.text);
        match &item.kind {
            Kind::Call { name, .. } => {
                let fields = json!({"item_id": id, "output_index": at, "name": name, "arguments": text});
                self.say("response.function_call_arguments.done", fields, out);
            }
            kind => {
                let mut fields = json!({"item_id": id, "output_index": at, "content_index": 0, "text": text});
                let name = if *kind == Kind::Reasoning {
                    "response.reasoning_text.done"
                } else {
                    fields["logprobs"] = json!([]);
                    "response.output_text.done"
                };
                self.say(name, fields, out);
                let fields = json!({"item_id": id, "output_index": at, "content_index": 0, "part": item.part()});
                self.say("response.content_part.done", fields, out);
            }
        }
        let whole = item.json(true);
        self.say("response.output_item.done", json!({"output_index": at, "item": whole}), out);
        self.done.push(whole);
    }

    /// More of the open item.
    fn grow(&mut self, text: &str, out: &mut Vec<Event>) {
        let at = self.done.len();
        let Some(item) = &mut self.open else { return };
        item.text.push_str(text);
        let mut fields = json!({"item_id": item.id, "output_index": at, "delta": text});
        let name = match item.kind {
            Kind::Call { .. } => "response.function_call_arguments.delta",
            Kind::Reasoning => {
                fields["content_index"] = 0.into();
                "response.reasoning_text.delta"
            }
            Kind::Message => {
                fields["content_index"] = 0.into();
                fields["logprobs"] = json!([]);
                "response.output_text.delta"
            }
        };
        self.say(name, fields, out);
    }

    fn piece(&mut self, piece: &Piece, out: &mut Vec<Event>) {
        match piece {
            Piece::Text(text) => {
                self.switch(Kind::Message, out);
                self.grow(text, out);
            }
            Piece::Reasoning(text) => {
                self.switch(Kind::Reasoning, out);
                self.grow(text, out);
            }
            Piece::Call { index, name } => {
                self.calls = index + 1;
                let call_id = self.head.call_id(0, *index);
                self.switch(Kind::Call { call_id, name: name.clone() }, out);
            }
            Piece::Arguments { json, .. } => self.grow(json, out),
        }
    }

    /// Adds the items of a whole answer.
    fn items(&self, said: &Said) -> Vec<Value> {
        let mut items: Vec<Value> = Vec::new();
        let mut add = |kind: Kind, prefix: &str, text: &str| {
            let id = self.head.part_id(prefix, &format!("item/{}", items.len()), 32);
            items.push(Item { kind, id, text: text.to_owned() }.json(true));
        };
        if !said.reasoning.is_empty() {
            add(Kind::Reasoning, "rs_", &said.reasoning);
        }
        if !said.text.is_empty() || said.calls.is_empty() {
            add(Kind::Message, "msg_", &said.text);
        }
        for (i, (name, arguments)) in said.calls.iter().enumerate() {
            add(Kind::Call { call_id: self.head.call_id(0, i), name: name.clone() }, "fc_", arguments);
        }
        items
    }
}

/// Status, and why it is not whole.
fn status(said: &[&Said]) -> (&'static str, Option<&'static str>) {
    match said.first().and_then(|said| said.ended.as_ref()) {
        Some(Why::Length) => ("incomplete", Some("max_output_tokens")),
        _ => ("completed", None),
    }
}

impl Shape for Responses {
    fn step(&mut self, step: &Step, out: &mut Vec<Event>) {
        if step.opens {
            let response = self.response("in_progress", &[], None, None);
            self.say("response.created", json!({"response": response}), out);
            self.say("response.in_progress", json!({"response": response}), out);
        }
        step.pieces.iter().for_each(|piece| self.piece(piece, out));
        if step.ended.is_some() {
            if self.done.is_empty() && self.open.is_none() {
                self.switch(Kind::Message, out);
            }
            self.close(out);
        }
    }

    fn tail(&mut self, said: &[&Said], usage: Usage, out: &mut Vec<Event>) {
        let (status, reason) = status(said);
        let response = self.response(status, &self.done, reason, Some(usage));
        let name = if reason.is_some() { "response.incomplete" } else { "response.completed" };
        self.say(name, json!({"response": response}), out);
    }

    fn whole(&self, said: &[&Said], usage: Usage) -> Value {
        let (status, reason) = status(said);
        let items = said.first().map_or_else(Vec::new, |said| self.items(said));
        self.response(status, &items, reason, Some(usage))
    }
}
