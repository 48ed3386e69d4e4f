//! `POST /v1/chat/completions`, and its short form `POST /v1/chat`.

use serde_json::{Map, Value};
use tidegate_common::contract::ApiError;

use super::{
    Ask, Body, Input, check,
    openai::openai_request,
    tools::{Tool, ToolChoice, Tools, Use},
};
use crate::{
    http::shape::{Chat, Head},
    text::Message,
};

/// Most tokens told beside each.
const TOP_LOGPROBS_MAX: i64 = 20;

openai_request! {
    /// A chat completion.
    ChatRequest {
        /// The conversation so far.
        #[schema(value_type = Vec<Object>, required, example = json!([{"role": "user", "content": "Hello!"}]))]
        messages: Option<Vec<Message>>,
        /// Most tokens of the answer; the newer name of `max_tokens`.
        #[schema(minimum = 1, example = 16)]
        max_completion_tokens: Option<i64>,
        /// Whether to tell how likely each token was.
        #[schema(example = true)]
        logprobs: Option<bool>,
        /// How many of the likeliest tokens to tell with each; needs `logprobs`.
        #[schema(minimum = 0, maximum = 20, example = 2)]
        top_logprobs: Option<i64>,
        /// Functions that the model may call.
        #[schema(example = json!([{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]))]
        tools: Option<Vec<Tool>>,
        /// `none`, `auto`, `required`, or one function by its name.
        tool_choice: Option<ToolChoice>,
        /// Whether one answer may make several calls.
        #[schema(example = true)]
        parallel_tool_calls: Option<bool>,
        /// More variables for the model's chat template, such as `enable_thinking`.
        #[schema(value_type = Option<Object>)]
        chat_template_kwargs: Option<Map<String, Value>>,
    }
}

impl Body for ChatRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn ask(mut self, head: Head) -> Result<Ask, ApiError> {
        let messages = self.messages.take().ok_or_else(|| check::missing("messages"))?;
        let mut knobs = self.knobs();
        knobs.tokens_max = self.max_completion_tokens.map(|most| ("max_completion_tokens", most)).or(knobs.tokens_max);
        let usage = self.tool_choice.take().map_or(Ok(Use::Auto), ToolChoice::usage)?;
        let functions = Tool::functions(self.tools.take().unwrap_or_default())?;
        let tools = Tools::new(functions, usage, self.parallel_tool_calls.unwrap_or(true))?;
        Ok(Ask {
            input: Input::Conversation { field: "messages", messages, variables: self.chat_template_kwargs.take() },
            knobs,
            stream: self.stream.unwrap_or(false),
            held: self.held()?,
            tools,
            logprobs: self.logprobs()?,
            echo: false,
            resume: self.tidegate_resume.take(),
            shape: Box::new(Chat::new(head, self.include_usage())),
        })
    }
}

impl ChatRequest {
    fn logprobs(&self) -> Result<Option<usize>, ApiError> {
        let top = check::whole("top_logprobs", self.top_logprobs, 0..=TOP_LOGPROBS_MAX, 0)? as usize;
        if top > 0 && self.logprobs != Some(true) {
            return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs = true"));
        }
        Ok((self.logprobs == Some(true)).then_some(top))
    }
}
