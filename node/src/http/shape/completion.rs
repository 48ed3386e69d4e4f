//! `text_completion`.

use serde_json::{Map, Value, json};

use super::{Event, Head, Said, Scored, Shape, Step, Usage, finish_reason, finite};
use crate::output::Piece;

const ID: &str = "cmpl-";
const OBJECT: &str = "text_completion";

/// Text completions.
pub(in crate::http) struct Completion {
    head: Head,
    include_usage: bool,
}

impl Completion {
    pub(in crate::http) fn new(head: Head, include_usage: bool) -> Self {
        Self { head, include_usage }
    }
}

impl Shape for Completion {
    fn step(&mut self, step: &Step, out: &mut Vec<Event>) {
        if step.pieces.is_empty() && step.ended.is_none() && step.scored.is_none() {
            return;
        }
        let texts = step
            .pieces
            .iter()
            .filter_map(|piece| if let Piece::Text(text) = piece { Some(text.as_str()) } else { None });
        let (text, logprobs) = (texts.collect::<String>(), logprobs(step.scored.as_deref()));
        let finish = finish_reason(step.ended.as_ref());
        let choice = json!({"index": step.choice, "text": text, "logprobs": logprobs, "finish_reason": finish});
        out.push(Event::of(&self.head.wrap(ID, OBJECT, json!([choice]))));
    }

    fn tail(&mut self, _: &[&Said], usage: Usage, out: &mut Vec<Event>) {
        if self.include_usage {
            let mut chunk = self.head.wrap(ID, OBJECT, json!([]));
            chunk["usage"] = usage.json();
            out.push(Event::of(&chunk));
        }
        out.push(Event::done());
    }

    fn whole(&self, said: &[&Said], usage: Usage) -> Value {
        let choice = |(i, said): (usize, &&Said)| {
            let (logprobs, finish) = (logprobs(said.scored.as_deref()), finish_reason(said.ended.as_ref()));
            json!({"index": i, "text": said.text, "logprobs": logprobs, "finish_reason": finish})
        };
        let mut whole = self.head.wrap(ID, OBJECT, said.iter().enumerate().map(choice).collect());
        whole["usage"] = usage.json();
        whole
    }
}

fn logprobs(scored: Option<&[Scored]>) -> Value {
    let Some(scored) = scored else { return Value::Null };
    // the token itself is told too when it is none of the likeliest
    let top = |scored: &Scored| {
        let chosen = scored.logprob?;
        let mut top: Map<String, Value> = Map::new();
        for (token, logprob) in
            scored.top.iter().map(|(token, logprob)| (token, *logprob)).chain([(&scored.token, chosen)])
        {
            top.entry(token.text.as_str()).or_insert(finite(logprob).into());
        }
        Some(top)
    };
    json!({
        "tokens": scored.iter().map(|s| s.token.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": scored.iter().map(|s| s.logprob.map(finite)).collect::<Vec<_>>(),
        "top_logprobs": scored.iter().map(top).collect::<Vec<_>>(),
        "text_offset": scored.iter().map(|s| s.offset).collect::<Vec<_>>(),
    })
}
