//! `POST /api/v1/chat`: a query in, an answer out.

use serde::Deserialize;
use serde_json::Map;
use tidegate_common::contract::{ApiError, Resume};

use super::{Ask, Body, Input, Knobs, check};
use crate::{
    http::shape::{Head, Query},
    text::Message,
};

/// A question.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub(in crate::http) struct QueryRequest {
    /// What is asked.
    #[schema(required, example = "Why is the sky blue?")]
    query: Option<String>,
    /// What was said before, the oldest first; a balancer adds it where a `session_id` names a dialogue that it remembers.
    #[schema(value_type = Option<Vec<Object>>, example = json!([{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]))]
    history: Option<Vec<Message>>,
    /// The dialogue that the question goes on with: a balancer remembers it for a while, a node by itself does not.
    #[serde(default, rename = "session_id")]
    #[schema(example = "alice-1")]
    _session_id: Option<String>,
    /// The model's name; not needed where there is only one.
    #[schema(example = "smollm2-135m")]
    model: Option<String>,
    /// 0 always takes the likeliest token.
    #[schema(minimum = 0, maximum = 2, example = 0.7)]
    temperature: Option<f64>,
    /// Smallest set of tokens whose probability reaches this.
    #[schema(minimum = 0, maximum = 1, example = 0.9)]
    top_p: Option<f64>,
    /// The same seed gives the same answer.
    #[schema(example = 7)]
    seed: Option<i64>,
    /// Most tokens of the answer.
    #[schema(minimum = 1, example = 16)]
    max_tokens: Option<i64>,
    /// Always one; accepted so that a wrong number is told.
    #[schema(minimum = 1, maximum = 1, example = 1)]
    n: Option<i64>,
    /// Whether the answer comes as events.
    #[schema(example = false)]
    stream: Option<bool>,
    /// Details of the stream.
    stream_options: Option<super::StreamOptions>,
    /// Between balancer and node.
    #[schema(ignore)]
    tidegate_resume: Option<Resume>,
}

impl Body for QueryRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn ask(self, head: Head) -> Result<Ask, ApiError> {
        let query = self.query.ok_or_else(|| check::missing("query"))?;
        if self.n.is_some_and(|n| n != 1) {
            return Err(ApiError::invalid("n", "n must be 1 here; /v1/chat/completions gives several answers"));
        }
        let mut messages = self.history.unwrap_or_default();
        messages.push(Message { role: "user".into(), content: query, extra: Map::new() });
        let knobs = Knobs {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
            tokens_max: self.max_tokens.map(|most| ("max_tokens", most)),
            ..Knobs::default()
        };
        let include_usage = self.stream_options.and_then(|options| options.include_usage).unwrap_or(false);
        Ok(Ask {
            input: Input::Conversation { field: "query", messages, variables: None },
            knobs,
            stream: self.stream.unwrap_or(false),
            held: None,
            tools: None,
            logprobs: None,
            echo: false,
            resume: self.tidegate_resume,
            shape: Box::new(Query::new(head, include_usage)),
        })
    }
}
