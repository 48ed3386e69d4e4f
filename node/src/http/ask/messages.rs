//! `POST /v1/messages`, as Anthropic's clients send it.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tidegate_common::contract::{ApiError, Resume};

use super::{
    Ask, Body, Input, Knobs, check,
    tools::{Function, Tools, Use},
};
use crate::{
    http::shape::{Head, Messages},
    text::Message,
};

/// A message.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(in crate::http) struct MessagesRequest {
    /// The model's name, as `GET /v1/models` lists it.
    #[schema(example = "smollm2-135m")]
    model: Option<String>,
    /// The conversation so far: `role` and `content`, a text or blocks of `text`, `tool_use`, `tool_result` and `thinking`.
    #[schema(value_type = Vec<Object>, required, example = json!([{"role": "user", "content": "Hello!"}]))]
    messages: Option<Vec<Turn>>,
    /// Most tokens of the answer.
    #[schema(required, minimum = 1, example = 16)]
    max_tokens: Option<i64>,
    /// What stands before the conversation: a text, or blocks of text.
    #[schema(value_type = Option<String>, example = "Answer in one sentence.")]
    system: Option<Value>,
    /// 0 always takes the likeliest token.
    #[schema(minimum = 0, maximum = 2, example = 0.7)]
    temperature: Option<f64>,
    /// Smallest set of tokens whose probability reaches this.
    #[schema(minimum = 0, maximum = 1, example = 0.9)]
    top_p: Option<f64>,
    /// Most tokens to choose from; 0 or -1 for all.
    #[schema(minimum = -1, maximum = 1000000, example = 40)]
    top_k: Option<i64>,
    /// Texts that end the answer and are not part of it: up to 16.
    #[schema(example = json!(["\n\n"]))]
    stop_sequences: Option<Vec<String>>,
    /// Tools that the model may use.
    #[schema(example = json!([{"name": "now", "input_schema": {"type": "object", "properties": {}}}]))]
    tools: Option<Vec<NamedTool>>,
    /// `{"type": "auto" | "any" | "tool" | "none"}`, with `name` and `disable_parallel_tool_use`.
    tool_choice: Option<Choice>,
    /// Whether a model that can think does: `{"type": "enabled" | "disabled"}`.
    thinking: Option<Thinking>,
    /// Whether the answer comes as events.
    #[schema(example = false)]
    stream: Option<bool>,
    /// Accepted, and not looked at.
    #[schema(value_type = Option<Object>)]
    #[serde(rename = "metadata")]
    _metadata: Option<Map<String, Value>>,
    /// Between balancer and node.
    #[schema(ignore)]
    tidegate_resume: Option<Resume>,
}

#[derive(Debug, Deserialize)]
struct Turn {
    role: String,
    content: Content,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "content must be a string or a list of blocks")]
enum Content {
    Text(String),
    Blocks(Vec<Value>),
}

/// A tool, as this API writes it.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct NamedTool {
    /// Letters, digits and `_-.:`.
    name: String,
    /// What it is for.
    description: Option<String>,
    /// JSON schema of its input.
    #[schema(value_type = Object)]
    input_schema: Option<Value>,
    /// `custom`; the tools that run at their maker's are not there.
    r#type: Option<String>,
}

/// Which tools are to be used.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct Choice {
    /// `auto`, `any`, `tool` or `none`.
    r#type: String,
    /// With `tool`: which.
    name: Option<String>,
    /// At most one.
    disable_parallel_tool_use: Option<bool>,
}

/// Whether to think.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct Thinking {
    /// `enabled`, `adaptive` or `disabled`.
    r#type: String,
}

impl Body for MessagesRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn ask(self, head: Head) -> Result<Ask, ApiError> {
        let turns = self.messages.ok_or_else(|| check::missing("messages"))?;
        let tokens_max = self.max_tokens.ok_or_else(|| check::missing("max_tokens"))?;
        let mut messages = Vec::new();
        if let Some(system) = self.system.filter(|system| !system.is_null()) {
            messages.push(message("system", text_of(&system, "system")?));
        }
        for (i, turn) in turns.into_iter().enumerate() {
            add(&mut messages, turn, &format!("messages[{i}]"))?;
        }
        let (usage, parallel) = self.tool_choice.map_or(Ok((Use::Auto, true)), Choice::usage)?;
        let tools = Tools::new(functions(self.tools)?, usage, parallel)?;
        let variables = self
            .thinking
            .map(|thinking| Map::from_iter([("enable_thinking".into(), (thinking.r#type != "disabled").into())]));
        let knobs = Knobs {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            stops: self.stop_sequences.map(|stops| ("stop_sequences", stops)),
            tokens_max: Some(("max_tokens", tokens_max)),
            ..Knobs::default()
        };
        Ok(Ask {
            input: Input::Conversation { field: "messages", messages, variables },
            knobs,
            stream: self.stream.unwrap_or(false),
            held: None,
            tools,
            logprobs: None,
            echo: false,
            resume: self.tidegate_resume,
            shape: Box::new(Messages::new(head)),
        })
    }
}

impl Choice {
    fn usage(self) -> Result<(Use, bool), ApiError> {
        let usage = match (self.r#type.as_str(), self.name) {
            ("auto", _) => Use::Auto,
            ("any", _) => Use::Required,
            ("none", _) => Use::None,
            ("tool", Some(name)) => Use::Named(name),
            ("tool", None) => return Err(check::missing("tool_choice.name")),
            _ => return Err(ApiError::invalid("tool_choice.type", "tool_choice.type must be auto, any, tool or none")),
        };
        Ok((usage, self.disable_parallel_tool_use != Some(true)))
    }
}

fn functions(tools: Option<Vec<NamedTool>>) -> Result<Vec<Function>, ApiError> {
    let function = |(i, tool): (usize, NamedTool)| {
        if tool.r#type.is_some_and(|kind| kind != "custom") {
            return Err(ApiError::invalid(format!("tools[{i}].type"), "only tools of type 'custom' are supported"));
        }
        Ok(Function { name: tool.name, description: tool.description, parameters: tool.input_schema })
    };
    tools.unwrap_or_default().into_iter().enumerate().map(function).collect()
}

fn message(role: &str, content: String) -> Message {
    Message { role: role.into(), content, extra: Map::new() }
}

/// The messages that a turn makes: results of tools are messages of their own.
fn add(messages: &mut Vec<Message>, turn: Turn, at: &str) -> Result<(), ApiError> {
    if !["user", "assistant"].contains(&turn.role.as_str()) {
        return Err(ApiError::invalid(
            format!("{at}.role"),
            "a role must be user or assistant; 'system' is a field of its own",
        ));
    }
    let blocks = match turn.content {
        Content::Text(text) => {
            messages.push(message(&turn.role, text));
            return Ok(());
        }
        Content::Blocks(blocks) => blocks,
    };
    let (mut text, mut calls) = (String::new(), Vec::new());
    for (k, block) in blocks.iter().enumerate() {
        let at = format!("{at}.content[{k}]");
        let field = |key: &str| {
            let found = block[key].as_str().map(str::to_owned);
            found.ok_or_else(|| ApiError::invalid(format!("{at}.{key}"), format!("{at}.{key} must be a string")))
        };
        match block["type"].as_str() {
            Some("text") => text += &field("text")?,
            Some("tool_use") => calls.push(json!({"id": field("id")?, "type": "function", "function": {"name": field("name")?, "arguments": block["input"]}})),
            Some("tool_result") => {
                let mut result = message("tool", text_of(&block["content"], &at)?);
                result.extra.insert("tool_call_id".into(), field("tool_use_id")?.into());
                messages.push(result);
            }
            // what the model thought before is not shown to it again
            Some("thinking" | "redacted_thinking") => {}
            _ => {
                let message = "only blocks of type text, tool_use, tool_result and thinking are supported";
                return Err(ApiError::invalid(format!("{at}.type"), message));
            }
        }
    }
    if !text.is_empty() || !calls.is_empty() {
        let mut said = message(&turn.role, text);
        if !calls.is_empty() {
            said.extra.insert("tool_calls".into(), calls.into());
        }
        messages.push(said);
    }
    Ok(())
}

/// A text, or blocks of text.
fn text_of(content: &Value, at: &str) -> Result<String, ApiError> {
    let wrong = || ApiError::invalid(at, format!("{at} must be a string or a list of text blocks"));
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(blocks) => blocks.iter().map(|block| block["text"].as_str().ok_or_else(wrong)).collect(),
        _ => Err(wrong()),
    }
}
