//! `POST /v1/completions`.

use tidegate_common::contract::ApiError;

use super::{Ask, Body, Input, Prompts, check, openai::openai_request};
use crate::http::shape::{Completion, Head};

/// Most tokens told beside each.
const LOGPROBS_MAX: i64 = 20;

openai_request! {
    /// A text completion.
    CompletionRequest {
        /// What to go on from: a text, several, or their tokens.
        #[schema(required)]
        prompt: Option<Prompts>,
        /// Whether the answer begins with the prompt; then `max_tokens` may be 0.
        #[schema(example = true)]
        echo: Option<bool>,
        /// How many of the likeliest tokens to tell with each.
        #[schema(minimum = 0, maximum = 20, example = 2)]
        logprobs: Option<i64>,
        /// Accepted as long as it does not ask for more answers than `n`.
        #[schema(minimum = 1, example = 1)]
        best_of: Option<i64>,
        /// Not supported: refused.
        #[schema(ignore)]
        suffix: Option<String>,
    }
}

impl Body for CompletionRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn ask(mut self, head: Head) -> Result<Ask, ApiError> {
        let prompts = self.prompt.take().ok_or_else(|| check::missing("prompt"))?;
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(check::unsupported(
                "suffix",
                "these models write on from a prompt's end and cannot fill a gap",
            ));
        }
        if check::whole("best_of", self.best_of, 1..=i64::MAX, 1)? > self.n.unwrap_or(1).max(1) {
            return Err(check::unsupported("best_of", "ask for n answers and choose among them"));
        }
        let logprobs = match self.logprobs {
            None => None,
            asked => Some(check::whole("logprobs", asked, 0..=LOGPROBS_MAX, 0)? as usize),
        };
        Ok(Ask {
            input: Input::Prompts(prompts),
            knobs: self.knobs(),
            stream: self.stream.unwrap_or(false),
            held: self.held()?,
            tools: None,
            logprobs,
            echo: self.echo.unwrap_or(false),
            resume: self.tidegate_resume.take(),
            shape: Box::new(Completion::new(head, self.include_usage())),
        })
    }
}
