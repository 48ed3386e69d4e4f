//! The shortest answers: an `answer` and nothing that one must dig for.

use serde::Serialize;
use serde_json::{Value, json};

use super::{Event, Head, Said, Shape, Step, Usage, finish_reason};
use crate::output::Piece;

const ID: &str = "chat-";

/// More of an answer.
#[derive(Serialize)]
struct Chunk<'a> {
    id: String,
    answer: &'a str,
    finish_reason: Option<&'static str>,
}

/// Answers to queries.
pub(in crate::http) struct Query {
    head: Head,
    include_usage: bool,
}

impl Query {
    pub(in crate::http) fn new(head: Head, include_usage: bool) -> Self {
        Self { head, include_usage }
    }
}

impl Shape for Query {
    fn step(&mut self, step: &Step, out: &mut Vec<Event>) {
        let texts = step
            .pieces
            .iter()
            .filter_map(|piece| if let Piece::Text(text) = piece { Some(text.as_str()) } else { None });
        let text = texts.collect::<String>();
        if !text.is_empty() || step.ended.is_some() {
            let finish_reason = finish_reason(step.ended.as_ref());
            out.push(Event::of(&Chunk { id: self.head.id(ID), answer: &text, finish_reason }));
        }
    }

    fn tail(&mut self, _: &[&Said], usage: Usage, out: &mut Vec<Event>) {
        if self.include_usage {
            out.push(Event::of(&json!({"id": self.head.id(ID), "answer": "", "usage": usage.json()})));
        }
        out.push(Event::done());
    }

    fn whole(&self, said: &[&Said], usage: Usage) -> Value {
        let (text, why) = said.first().map_or(("", None), |said| (said.text.as_str(), said.ended.as_ref()));
        json!({"id": self.head.id(ID), "model": self.head.model, "answer": text, "finish_reason": finish_reason(why), "usage": usage.json()})
    }
}
