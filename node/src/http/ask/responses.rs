//! `POST /v1/responses`. Nothing is stored here, so a conversation is always sent whole.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tidegate_common::contract::{ApiError, Resume};

use super::{
    Ask, Body, Input, Knobs, check,
    held::Held,
    tools::{Function, ToolChoice, Tools, Use},
};
use crate::{
    guide::Grammar,
    http::shape::{Head, Responses},
    text::Message,
};

/// A response.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(in crate::http) struct ResponsesRequest {
    /// A text, or the conversation so far as items: messages, calls of functions and their outputs.
    #[schema(required)]
    input: Option<Items>,
    /// A system message that stands before the input.
    #[schema(example = "Answer in one sentence.")]
    instructions: Option<String>,
    /// The model's name, as `GET /v1/models` lists it.
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
    max_output_tokens: Option<i64>,
    /// Functions that the model may call.
    #[schema(example = json!([{"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}]))]
    tools: Option<Vec<FlatTool>>,
    /// `none`, `auto`, `required`, or one function by its name.
    tool_choice: Option<ToolChoice>,
    /// Whether one answer may make several calls.
    #[schema(example = true)]
    parallel_tool_calls: Option<bool>,
    /// What the answer's text must be.
    text: Option<TextForm>,
    /// Whether the answer comes as events.
    #[schema(example = false)]
    stream: Option<bool>,
    /// Given back as it is.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    /// Who asks; accepted, and not looked at.
    #[schema(example = "someone")]
    #[serde(rename = "user")]
    _user: Option<String>,
    /// Nothing is stored: `true` is refused.
    #[schema(example = false)]
    store: Option<bool>,
    /// Not supported: refused.
    #[schema(ignore)]
    previous_response_id: Option<String>,
    /// Not supported: refused.
    #[schema(ignore)]
    conversation: Option<Value>,
    /// Not supported: refused.
    #[schema(ignore)]
    background: Option<bool>,
    /// Not supported: refused.
    #[schema(ignore)]
    top_logprobs: Option<i64>,
    /// Between balancer and node.
    #[schema(ignore)]
    tidegate_resume: Option<Resume>,
}

/// `input`
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(untagged, expecting = "input must be a string or a list of items")]
pub(super) enum Items {
    /// What the user says.
    Text(String),
    /// The conversation so far.
    Items(Vec<Value>),
}

/// A tool, as this API writes it.
#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
pub(super) struct FlatTool {
    /// `function`
    #[serde(rename = "type")]
    kind: String,
    /// Letters, digits and `_-.:`.
    name: Option<String>,
    /// What it is for.
    description: Option<String>,
    /// JSON schema of its arguments.
    #[schema(value_type = Object)]
    parameters: Option<Value>,
}

/// `text`
#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
pub(super) struct TextForm {
    /// `{"type": "text"}`, `{"type": "json_object"}`, or `json_schema` with `name` and `schema`.
    format: Option<TextFormat>,
}

#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
pub(super) struct TextFormat {
    /// `text`, `json_object` or `json_schema`.
    r#type: String,
    /// A name for the schema.
    name: Option<String>,
    /// A JSON schema.
    #[schema(value_type = Object)]
    schema: Option<Value>,
    /// Accepted; schemas are always kept strictly.
    strict: Option<bool>,
}

impl Body for ResponsesRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn ask(mut self, head: Head) -> Result<Ask, ApiError> {
        self.refuse_unsupported()?;
        let echoed = self.echoed();
        let mut messages = conversation(self.input.take().ok_or_else(|| check::missing("input"))?)?;
        if let Some(instructions) = self.instructions.take() {
            messages.insert(0, message("system", instructions));
        }
        let usage = self.tool_choice.take().map_or(Ok(Use::Auto), ToolChoice::usage)?;
        let tools = Tools::new(functions(self.tools.take())?, usage, self.parallel_tool_calls.unwrap_or(true))?;
        let knobs = Knobs {
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
            tokens_max: self.max_output_tokens.map(|most| ("max_output_tokens", most)),
            ..Knobs::default()
        };
        Ok(Ask {
            input: Input::Conversation { field: "input", messages, variables: None },
            knobs,
            stream: self.stream.unwrap_or(false),
            held: self.text.and_then(|text| text.format).map_or(Ok(None), held)?,
            tools,
            logprobs: None,
            echo: false,
            resume: self.tidegate_resume,
            shape: Box::new(Responses::new(head, echoed)),
        })
    }
}

impl ResponsesRequest {
    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let stored = "nothing is stored here; send the whole conversation as 'input'";
        let fields = [
            ("store", self.store == Some(true), "nothing is stored here; leave it out or send false"),
            ("previous_response_id", self.previous_response_id.is_some(), stored),
            ("conversation", self.conversation.as_ref().is_some_and(|c| !c.is_null()), stored),
            ("background", self.background == Some(true), stored),
            ("top_logprobs", self.top_logprobs.is_some_and(|n| n > 0), "/v1/chat/completions tells log-probabilities"),
        ];
        let asked = fields.into_iter().find(|(_, asked, _)| *asked);
        asked.map_or(Ok(()), |(field, _, instead)| Err(check::unsupported(field, instead)))
    }

    /// What the answer repeats of the request.
    fn echoed(&self) -> Value {
        let tool = |t: &FlatTool| json!({"type": "function", "name": t.name, "description": t.description, "parameters": t.parameters, "strict": false});
        let format = self.text.as_ref().and_then(|text| text.format.as_ref()).map_or_else(
            || json!({"type": "text"}),
            |format| match format.r#type.as_str() {
                "json_schema" => json!({"type": "json_schema", "name": format.name, "schema": format.schema, "strict": format.strict}),
                other => json!({"type": other}),
            },
        );
        let choice = match &self.tool_choice {
            None => "auto".into(),
            Some(ToolChoice::Word(word)) => Value::from(word.as_str()),
            Some(ToolChoice::Named { function, name, .. }) => {
                json!({"type": "function", "name": function.as_ref().map(|f| &f.name).or(name.as_ref())})
            }
        };
        json!({
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata.clone().unwrap_or_default(),
            "parallel_tool_calls": self.parallel_tool_calls.unwrap_or(true),
            "previous_response_id": null,
            "store": false,
            "temperature": self.temperature,
            "text": {"format": format},
            "tool_choice": choice,
            "tools": self.tools.iter().flatten().map(tool).collect::<Vec<_>>(),
            "top_p": self.top_p,
            "truncation": "disabled",
        })
    }
}

fn functions(tools: Option<Vec<FlatTool>>) -> Result<Vec<Function>, ApiError> {
    let function = |(i, tool): (usize, FlatTool)| {
        if tool.kind != "function" {
            let message = format!("only tools of type 'function' are supported, not '{}'", tool.kind);
            return Err(ApiError::invalid(format!("tools[{i}].type"), message));
        }
        let name = tool.name.ok_or_else(|| check::missing(&format!("tools[{i}].name")))?;
        Ok(Function { name, description: tool.description, parameters: tool.parameters })
    };
    tools.unwrap_or_default().into_iter().enumerate().map(function).collect()
}

fn held(format: TextFormat) -> Result<Option<Held>, ApiError> {
    match (format.r#type.as_str(), format.schema) {
        ("text", _) => Ok(None),
        ("json_object", _) => Ok(Some(Held { field: "text.format", grammar: Grammar::JsonObject })),
        ("json_schema", Some(schema)) => Held::schema("text.format.schema", schema).map(Some),
        ("json_schema", None) => Err(check::missing("text.format.schema")),
        _ => Err(ApiError::invalid("text.format.type", "text.format.type must be text, json_object or json_schema")),
    }
}

fn message(role: &str, content: String) -> Message {
    Message { role: role.into(), content, extra: Map::new() }
}

/// The messages that the input's items make.
fn conversation(input: Items) -> Result<Vec<Message>, ApiError> {
    let items = match input {
        Items::Text(text) => return Ok(vec![message("user", text)]),
        Items::Items(items) => items,
    };
    let mut messages: Vec<Message> = Vec::with_capacity(items.len());
    for (i, item) in items.into_iter().enumerate() {
        add(&mut messages, &item, &format!("input[{i}]"))?;
    }
    Ok(messages)
}

fn add(messages: &mut Vec<Message>, item: &Value, at: &str) -> Result<(), ApiError> {
    let text = |key: &str| {
        let found = item[key].as_str().map(str::to_owned);
        found.ok_or_else(|| ApiError::invalid(format!("{at}.{key}"), format!("{at}.{key} must be a string")))
    };
    match item["type"].as_str().unwrap_or("message") {
        "message" => messages.push(message(&text("role")?, content(&item["content"], at)?)),
        "function_call" => {
            let call = json!({"id": text("call_id")?, "type": "function", "function": {"name": text("name")?, "arguments": text("arguments")?}});
            let last = messages.last_mut().filter(|m| m.role == "assistant");
            let last = match last {
                Some(last) => last,
                None => {
                    messages.push(message("assistant", String::new()));
                    messages.last_mut().expect("one was just added")
                }
            };
            let calls = last.extra.entry("tool_calls").or_insert_with(|| json!([]));
            if let Some(calls) = calls.as_array_mut() {
                calls.push(call);
            }
        }
        "function_call_output" => {
            let mut said = message("tool", content(&item["output"], at)?);
            said.extra.insert("tool_call_id".into(), text("call_id")?.into());
            messages.push(said);
        }
        // what the model thought before is not shown to it again
        "reasoning" => {}
        other => {
            let other: String = other.chars().take(40).collect();
            let message = format!(
                "items of type '{other}' are not supported; message, function_call, function_call_output and reasoning are"
            );
            return Err(ApiError::invalid(format!("{at}.type"), message));
        }
    }
    Ok(())
}

fn content(content: &Value, at: &str) -> Result<String, ApiError> {
    let wrong = || ApiError::invalid(format!("{at}.content"), "content must be a string or a list of parts of text");
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Null => Ok(String::new()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("input_text" | "output_text" | "text"), Some(text)) => Ok(text),
                _ => Err(wrong()),
            })
            .collect(),
        _ => Err(wrong()),
    }
}
