//! `POST /tokenize` and `POST /detokenize`, in the shapes that vLLM gives them.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tidegate_common::contract::ApiError;

use super::{
    App,
    ask::{Tool, Tools, Use, render},
    check,
    frame::Frame,
    once::{Begun, Question},
};
use crate::{served::Loaded, text::Message};

/// Text to cut into tokens: a prompt or a conversation.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct TokenizeRequest {
    /// A text.
    #[schema(example = "the sea")]
    prompt: Option<String>,
    /// A conversation, in place of the text; it is rendered as for chat completions.
    #[schema(value_type = Option<Vec<Object>>, example = json!([{"role": "user", "content": "Hello!"}]))]
    messages: Option<Vec<Message>>,
    /// The model's name, as `GET /v1/models` lists it.
    #[schema(example = "smollm2-135m")]
    model: Option<String>,
    /// With a text: whether the model's begin token goes first, if it has one.
    #[schema(example = true)]
    add_special_tokens: Option<bool>,
    /// Whether to tell each token's text too.
    #[schema(example = true)]
    return_token_strs: Option<bool>,
    /// With a conversation: functions that the model may call.
    #[schema(example = json!([{"type": "function", "function": {"name": "now"}}]))]
    tools: Option<Vec<Tool>>,
    /// With a conversation: more variables for the chat template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// Tokens to join to a text.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct DetokenizeRequest {
    /// Token ids.
    #[schema(required, example = json!([28, 29]))]
    tokens: Option<Vec<u32>>,
    /// The model's name, as `GET /v1/models` lists it.
    #[schema(example = "smollm2-135m")]
    model: Option<String>,
}

impl Question for TokenizeRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn begin(self, _: &App, loaded: &Arc<Loaded>, frame: &Frame) -> Result<Begun, ApiError> {
        let tokens = match (self.prompt, self.messages) {
            (Some(prompt), None) => check::encode("prompt", &prompt, self.add_special_tokens != Some(false), loaded)?,
            (None, Some(messages)) => {
                let tools = Tools::new(Tool::functions(self.tools.unwrap_or_default())?, Use::Auto, true)?;
                let variables = self.chat_template_kwargs.as_ref();
                let text = render("messages", messages, tools.as_ref(), variables, frame, loaded)?;
                check::encode("messages", &text, false, loaded)?
            }
            (Some(_), Some(_)) => {
                return Err(ApiError::invalid("messages", "'messages' and 'prompt' cannot be given together"));
            }
            (None, None) => return Err(check::missing("prompt")),
        };
        let text = |token: &u32| {
            let bytes = loaded.tokenizer.token_bytes(*token);
            if bytes.is_empty() {
                loaded.tokenizer.spelled(*token).unwrap_or_default()
            } else {
                String::from_utf8_lossy(bytes).into_owned()
            }
        };
        let texts = (self.return_token_strs == Some(true)).then(|| tokens.iter().map(text).collect::<Vec<_>>());
        let value =
            json!({"count": tokens.len(), "max_model_len": loaded.context, "tokens": tokens, "token_strs": texts});
        Ok(Begun::done(tokens.len(), value))
    }
}

impl Question for DetokenizeRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn begin(self, _: &App, loaded: &Arc<Loaded>, _: &Frame) -> Result<Begun, ApiError> {
        let tokens = check::known("tokens", self.tokens.ok_or_else(|| check::missing("tokens"))?, loaded)?;
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| loaded.tokenizer.token_bytes(*token)).copied().collect();
        Ok(Begun::done(tokens.len(), json!({"prompt": String::from_utf8_lossy(&bytes)})))
    }
}
