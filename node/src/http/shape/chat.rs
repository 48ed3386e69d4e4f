//! `chat.completion` and its chunks.

use serde_json::{Map, Value, json};

use super::{Event, Head, Said, Scored, Shape, Spelled, Step, Usage, finish_reason, finite};
use crate::output::Piece;

const ID: &str = "chatcmpl-";

/// Chat completions.
pub(in crate::http) struct Chat {
    head: Head,
    include_usage: bool,
}

impl Chat {
    pub(in crate::http) fn new(head: Head, include_usage: bool) -> Self {
        Self { head, include_usage }
    }

    fn chunk(&self, choices: Value) -> Value {
        self.head.wrap(ID, "chat.completion.chunk", choices)
    }

    fn delta(&self, step: &Step) -> Map<String, Value> {
        let mut delta = Map::new();
        if step.opens {
            delta.insert("role".into(), "assistant".into());
            delta.insert("content".into(), "".into());
        }
        let mut calls: Vec<Value> = Vec::new();
        for piece in &step.pieces {
            match piece {
                Piece::Text(text) => {
                    delta.insert("content".into(), text.as_str().into());
                }
                Piece::Reasoning(text) => {
                    delta.insert("reasoning_content".into(), text.as_str().into());
                }
                Piece::Call { index, name } => calls.push(self.call(step.choice, *index, name, "", true)),
                Piece::Arguments { index, json } => match calls.last_mut().filter(|call| call["index"] == *index) {
                    Some(call) => call["function"]["arguments"] = json.as_str().into(),
                    None => calls.push(json!({"index": index, "function": {"arguments": json}})),
                },
            }
        }
        if !calls.is_empty() {
            delta.insert("tool_calls".into(), calls.into());
        }
        delta
    }

    fn call(&self, choice: u32, index: usize, name: &str, arguments: &str, is_delta: bool) -> Value {
        let id = self.head.call_id(choice, index);
        let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        if !is_delta {
            return call;
        }
        let mut delta = json!({"index": index});
        if let (Some(delta), Value::Object(call)) = (delta.as_object_mut(), call) {
            delta.extend(call);
        }
        delta
    }

    fn message(&self, choice: u32, said: &Said) -> Value {
        let content = if said.text.is_empty() && !said.calls.is_empty() { None } else { Some(&said.text) };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !said.reasoning.is_empty() {
            message["reasoning_content"] = said.reasoning.as_str().into();
        }
        if !said.calls.is_empty() {
            let calls = said.calls.iter().enumerate();
            let calls = calls.map(|(i, (name, arguments))| self.call(choice, i, name, arguments, false));
            message["tool_calls"] = calls.collect();
        }
        message
    }
}

impl Shape for Chat {
    fn step(&mut self, step: &Step, out: &mut Vec<Event>) {
        let says = step.opens || !step.pieces.is_empty() || step.ended.is_some() || step.scored.is_some();
        if says {
            let (delta, finish) = (self.delta(step), finish_reason(step.ended.as_ref()));
            let logprobs = logprobs(step.scored.as_deref());
            let choice = json!({"index": step.choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
            out.push(Event::of(&self.chunk(json!([choice]))));
        }
    }

    fn tail(&mut self, _: &[&Said], usage: Usage, out: &mut Vec<Event>) {
        if self.include_usage {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage.json();
            out.push(Event::of(&chunk));
        }
        out.push(Event::done());
    }

    fn whole(&self, said: &[&Said], usage: Usage) -> Value {
        let choice = |(i, said): (u32, &&Said)| {
            let (message, finish) = (self.message(i, said), finish_reason(said.ended.as_ref()));
            json!({"index": i, "message": message, "logprobs": logprobs(said.scored.as_deref()), "finish_reason": finish})
        };
        let mut whole = self.head.wrap(ID, "chat.completion", (0..).zip(said).map(choice).collect());
        whole["usage"] = usage.json();
        whole
    }
}

fn logprobs(scored: Option<&[Scored]>) -> Value {
    scored
        .map_or(Value::Null, |scored| json!({"content": scored.iter().map(entry).collect::<Vec<_>>(), "refusal": null}))
}

fn entry(scored: &Scored) -> Value {
    let one =
        |token: &Spelled, logprob: f32| json!({"token": token.text, "logprob": finite(logprob), "bytes": token.bytes});
    let mut entry = one(&scored.token, scored.logprob.unwrap_or_default());
    entry["top_logprobs"] = scored.top.iter().map(|(token, logprob)| one(token, *logprob)).collect();
    entry
}
