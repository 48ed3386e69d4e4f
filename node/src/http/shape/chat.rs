//! `chat.completion` and its chunks.

use serde::Serialize;
use serde_json::{Value, json};

use super::{Event, Head, Said, Scored, Shape, Spelled, Step, Usage, Wrapped, finish_reason, finite};
use crate::output::Piece;

const ID: &str = "chatcmpl-";

/// One choice of a chunk.
#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Value,
    finish_reason: Option<&'static str>,
}

/// What a step adds to a message.
#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
}

/// Chat completions.
pub(in crate::http) struct Chat {
    head: Head,
    include_usage: bool,
}

impl Chat {
    pub(in crate::http) fn new(head: Head, include_usage: bool) -> Self {
        Self { head, include_usage }
    }

    fn chunk<C>(&self, choices: C) -> Wrapped<'_, C> {
        self.head.wrap(ID, "chat.completion.chunk", choices)
    }

    fn delta<'a>(&self, step: &'a Step) -> Delta<'a> {
        let mut delta = Delta::default();
        if step.opens {
            delta = Delta { role: Some("assistant"), content: Some(""), ..delta };
        }
        let calls = &mut delta.tool_calls;
        for piece in &step.pieces {
            match piece {
                Piece::Text(text) => delta.content = Some(text),
                Piece::Reasoning(text) => delta.reasoning_content = Some(text),
                Piece::Call { index, name } => calls.push(self.call(step.choice, *index, name, "", true)),
                Piece::Arguments { index, json } => match calls.last_mut().filter(|call| call["index"] == *index) {
                    Some(call) => call["function"]["arguments"] = json.as_str().into(),
                    None => calls.push(json!({"index": index, "function": {"arguments": json}})),
                },
            }
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
            let (delta, finish_reason) = (self.delta(step), finish_reason(step.ended.as_ref()));
            let logprobs = logprobs(step.scored.as_deref());
            out.push(Event::of(&self.chunk([Choice { index: step.choice, delta, logprobs, finish_reason }])));
        }
    }

    fn tail(&mut self, _: &[&Said], usage: Usage, out: &mut Vec<Event>) {
        if self.include_usage {
            out.push(Event::of(&self.chunk([(); 0]).with(usage)));
        }
        out.push(Event::done());
    }

    fn whole(&self, said: &[&Said], usage: Usage) -> Value {
        let choice = |(i, said): (u32, &&Said)| {
            let (message, finish) = (self.message(i, said), finish_reason(said.ended.as_ref()));
            json!({"index": i, "message": message, "logprobs": logprobs(said.scored.as_deref()), "finish_reason": finish})
        };
        let choices: Vec<Value> = (0..).zip(said).map(choice).collect();
        json!(self.head.wrap(ID, "chat.completion", choices).with(usage))
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
