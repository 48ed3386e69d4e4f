//! `text_completion`.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Event, Head, Said, Scored, Shape, Step, Usage, finish_reason, finite};
use crate::output::Piece;

const ID: &str = "cmpl-";
const OBJECT: &str = "text_completion";

/// One choice of a chunk, or of a whole answer.
#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Value,
    finish_reason: Option<&'static str>,
}

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
        let choice = Choice { index: step.choice, text: &text, logprobs, finish_reason: finish };
        out.push(Event::of(&self.head.wrap(ID, OBJECT, [choice])));
    }

    fn tail(&mut self, _: &[&Said], usage: Usage, out: &mut Vec<Event>) {
        if self.include_usage {
            out.push(Event::of(&self.head.wrap(ID, OBJECT, [(); 0]).with(usage)));
        }
        out.push(Event::done());
    }

    fn whole(&self, said: &[&Said], usage: Usage) -> Value {
        let choices = (0..).zip(said).map(|(index, said)| {
            let (logprobs, finish_reason) = (logprobs(said.scored.as_deref()), finish_reason(said.ended.as_ref()));
            Choice { index, text: &said.text, logprobs, finish_reason }
        });
        let choices: Vec<Choice<'_>> = choices.collect();
        json!(self.head.wrap(ID, OBJECT, choices).with(usage))
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
