//! A request's body, parsed once into a [`ValidRequest`]: a value of that type can be run as it stands.
//!
//! Unknown fields pass, wrong types do not. A field that would change the answer and is not supported is refused, never ignored.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use tidegate_common::contract::{ApiError, ErrorKind, Resume};

use super::{Api, App};
use crate::{
    engine::{Generation, Wants},
    sample::{Penalties, Sampling},
    served::Loaded,
    stop::StopRule,
    text::Message,
};

/// Most stop strings of a request.
const STOPS_MAX: usize = 16;

/// Longest stop string, in bytes.
const STOP_BYTES_MAX: usize = 1024;
/// Who may speak in a conversation.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// The body as it comes. One type for all paths: each path needs its own one of `messages`, `prompt` and `query`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Body {
    pub(super) model: Option<String>,
    messages: Option<Vec<Message>>,
    prompt: Option<Prompt>,
    query: Option<String>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<i64>,
    min_p: Option<f64>,
    seed: Option<i64>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    n: Option<i64>,
    stop: Option<OneOrMany>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    logit_bias: Option<Value>,
    logprobs: Option<Value>,
    top_logprobs: Option<Value>,
    ignore_eos: Option<bool>,
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<i64>,
    response_format: Option<Value>,
    tools: Option<Value>,
    tool_choice: Option<Value>,
    guided_json: Option<Value>,
    guided_regex: Option<Value>,
    guided_choice: Option<Value>,
    guided_grammar: Option<Value>,
    tidegate_resume: Option<Resume>,
}

#[derive(Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "stop must be a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// A request that can be run.
#[derive(Debug)]
pub(super) struct ValidRequest {
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) stops: Vec<String>,
    /// Tokens of all prompts together.
    pub(super) prompt_tokens: usize,
    /// One for each choice: its generation without the tokens had, and those tokens.
    pub(super) choices: Vec<(Generation, Vec<u32>)>,
}

/// Reads a body.
///
/// # Errors
/// When it is not JSON, or a field has the wrong type; the field is named.
pub(super) fn parse(bytes: &[u8]) -> Result<Body, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let body = serde_path_to_error::deserialize::<_, Body>(&mut deserializer).map_err(|e| {
        let (path, inner) = (e.path().to_string(), e.into_inner());
        match inner.classify() {
            serde_json::error::Category::Data if path != "." => {
                ApiError::invalid(path.clone(), format!("{path}: {inner}"))
            }
            serde_json::error::Category::Data => ApiError::new(
                ErrorKind::InvalidRequest,
                "invalid_body",
                format!("the body must be a JSON object: {inner}"),
            ),
            _ => {
                ApiError::new(ErrorKind::InvalidRequest, "invalid_json", format!("the body is not valid JSON: {inner}"))
            }
        }
    })?;
    deserializer.end().map_err(|e| {
        ApiError::new(ErrorKind::InvalidRequest, "invalid_json", format!("the body is not valid JSON: {e}"))
    })?;
    Ok(body)
}

impl Body {
    /// Checks everything, and turns the words into tokens.
    ///
    /// # Errors
    /// The first thing that is wrong, with its field, its limit, and the config key that moves the limit.
    pub(super) fn validate(self, api: Api, app: &App, loaded: &Loaded, seed: u64) -> Result<ValidRequest, ApiError> {
        self.refuse_unsupported()?;
        let sampling = self.sampling(app, seed)?;
        let stops = self.stops()?;
        let n = in_range("n", self.n, 1..=128, 1)? as usize;
        if api == Api::Query && n > 1 {
            return Err(ApiError::invalid("n", "n must be 1 here; /v1/chat/completions gives several answers"));
        }
        let choices_max = app.config.request.choices_max;
        let prompts_given = self.prompt.as_ref().filter(|_| api == Api::Completion).map_or(1, Prompt::count);
        if prompts_given * n > choices_max {
            let message = format!(
                "{prompts_given} prompts with n = {n} make more than the {choices_max} answers that node.max_choices allows"
            );
            return Err(ApiError::invalid("n", message));
        }
        let prompts = self.prompts(api, loaded)?;
        let mut had = self.tidegate_resume.as_ref().map(|r| r.tokens.clone()).unwrap_or_default();
        if had.len() > prompts.len() * n {
            return Err(ApiError::invalid(Resume::FIELD, "more choices to resume than the request asks for"));
        }
        had.resize(prompts.len() * n, Vec::new());
        let end_tokens = if self.ignore_eos == Some(true) { [].into() } else { loaded.end_tokens.clone() };
        let mut choices = Vec::with_capacity(had.len());
        for (i, had) in had.into_iter().enumerate() {
            let had = known(Resume::FIELD, &had, loaded)?;
            let prompt = &prompts[i / n];
            let tokens_max = self.tokens_max(prompt.len(), app, loaded)?;
            let stop = StopRule { end_tokens: end_tokens.clone(), tokens_max };
            choices.push((
                Generation {
                    tokens: prompt.clone(),
                    prompt_len: prompt.len(),
                    choice: i as u32,
                    sampling: sampling.clone(),
                    stop,
                    guide: None,
                    logprobs: None,
                    wants: Wants::default(),
                },
                had,
            ));
        }
        let include_usage = self.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false);
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        Ok(ValidRequest { stream: self.stream.unwrap_or(false), include_usage, stops, prompt_tokens, choices })
    }

    fn sampling(&self, app: &App, seed: u64) -> Result<Sampling, ApiError> {
        let defaults = &app.config.defaults;
        Ok(Sampling {
            temperature: real_in_range("temperature", self.temperature, 0.0..=2.0)?.unwrap_or(defaults.temperature),
            top_p: real_in_range("top_p", self.top_p, 0.0..=1.0)?.unwrap_or(defaults.top_p),
            // -1 means all, as in vLLM
            top_k: in_range("top_k", self.top_k, -1..=1_000_000, 0)?.max(0) as usize,
            min_p: real_in_range("min_p", self.min_p, 0.0..=1.0)?.unwrap_or(0.0),
            seed: self.seed.map_or(seed, i64::cast_unsigned),
            penalties: Penalties::default(),
            bias: Arc::default(),
        })
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop.clone()],
            Some(OneOrMany::Many(stops)) => stops.clone(),
        };
        if stops.len() > STOPS_MAX {
            return Err(ApiError::invalid(
                "stop",
                format!("{} stop strings are more than the {STOPS_MAX} allowed", stops.len()),
            ));
        }
        if stops.iter().any(|s| s.is_empty() || s.len() > STOP_BYTES_MAX) {
            return Err(ApiError::invalid("stop", format!("a stop string must have 1 to {STOP_BYTES_MAX} bytes")));
        }
        Ok(stops)
    }

    fn prompts(&self, api: Api, loaded: &Loaded) -> Result<Vec<Vec<u32>>, ApiError> {
        let missing = |field: &str| ApiError::invalid(field, format!("'{field}' is missing"));
        let prompts = match api {
            Api::Chat => {
                let messages = self.messages.as_deref().ok_or_else(|| missing("messages"))?;
                check_roles(messages)?;
                vec![render(messages, loaded)?]
            }
            Api::Query => {
                let query = self.query.clone().ok_or_else(|| missing("query"))?;
                vec![render(&[Message { role: "user".into(), content: query, extra: serde_json::Map::new() }], loaded)?]
            }
            Api::Completion => self.prompt.as_ref().ok_or_else(|| missing("prompt"))?.tokens(loaded)?,
        };
        if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
            return Err(ApiError::invalid(api.prompt_field(), format!("'{}' is empty", api.prompt_field())));
        }
        for prompt in &prompts {
            check_length(prompt, api, loaded)?;
        }
        Ok(prompts)
    }

    fn tokens_max(&self, prompt_len: usize, app: &App, loaded: &Loaded) -> Result<usize, ApiError> {
        let room = loaded.context - prompt_len;
        let (field, asked) = match self.max_completion_tokens {
            Some(n) => ("max_completion_tokens", Some(n)),
            None => ("max_tokens", self.max_tokens),
        };
        let Some(asked) = asked else { return Ok(app.config.defaults.tokens_max.min(room)) };
        let asked = in_range(field, Some(asked), 1..=i64::MAX, 1)? as usize;
        if asked > room {
            let message = format!(
                "{field} = {asked} with a prompt of {prompt_len} tokens is more than the context of {} tokens; node.max_context sets it, up to what the model was made for",
                loaded.context
            );
            return Err(ApiError::invalid(field, message));
        }
        Ok(asked)
    }

    /// Fields that change the answer, and are not supported yet.
    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let given = |v: &Option<Value>| {
            v.as_ref().is_some_and(|v| {
                !v.is_null() && *v != Value::Bool(false) && *v != serde_json::json!({}) && *v != serde_json::json!([])
            })
        };
        let is_text_format =
            self.response_format.as_ref().is_some_and(|f| f.get("type").and_then(Value::as_str) == Some("text"));
        let no_tools = self.tool_choice.as_ref().and_then(Value::as_str) == Some("none");
        let fields = [
            ("presence_penalty", self.presence_penalty.is_some_and(|p| p != 0.0)),
            ("frequency_penalty", self.frequency_penalty.is_some_and(|p| p != 0.0)),
            ("repetition_penalty", self.repetition_penalty.is_some_and(|p| p != 1.0)),
            ("logit_bias", given(&self.logit_bias)),
            ("logprobs", given(&self.logprobs)),
            ("top_logprobs", given(&self.top_logprobs) && self.top_logprobs != Some(Value::from(0))),
            ("echo", self.echo == Some(true)),
            ("suffix", self.suffix.is_some()),
            ("best_of", self.best_of.is_some_and(|b| b > 1)),
            ("response_format", given(&self.response_format) && !is_text_format),
            ("tools", given(&self.tools) && !no_tools),
            ("guided_json", given(&self.guided_json)),
            ("guided_regex", given(&self.guided_regex)),
            ("guided_choice", given(&self.guided_choice)),
            ("guided_grammar", given(&self.guided_grammar)),
        ];
        match fields.iter().find(|(_, asked)| *asked) {
            Some((field, _)) => Err(ApiError::new(
                ErrorKind::InvalidRequest,
                "unsupported",
                format!("'{field}' is not supported yet; leave it out"),
            )
            .with_param(*field)),
            None => Ok(()),
        }
    }
}

impl Prompt {
    fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::TokenLists(lists) => lists.len(),
        }
    }

    fn tokens(&self, loaded: &Loaded) -> Result<Vec<Vec<u32>>, ApiError> {
        match self {
            Self::Text(text) => Ok(vec![encode(text, true, loaded)?]),
            Self::Texts(texts) => texts.iter().map(|text| encode(text, true, loaded)).collect(),
            Self::Tokens(tokens) => known("prompt", tokens, loaded).map(|tokens| vec![tokens]),
            Self::TokenLists(lists) => lists.iter().map(|tokens| known("prompt", tokens, loaded)).collect(),
        }
    }
}

fn known(field: &str, tokens: &[u32], loaded: &Loaded) -> Result<Vec<u32>, ApiError> {
    let vocab = loaded.tokenizer.vocab();
    match tokens.iter().find(|t| **t as usize >= vocab) {
        Some(token) => Err(ApiError::invalid(field, format!("token id {token} is outside the vocabulary of {vocab}"))),
        None => Ok(tokens.to_vec()),
    }
}

fn render(messages: &[Message], loaded: &Loaded) -> Result<Vec<u32>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "'messages' is empty"));
    }
    let prompt = loaded.template.render(messages).map_err(|e| ApiError::invalid("messages", e.to_string()))?;
    encode(&prompt, false, loaded)
}

/// Text that cannot fit the context, however it is cut into tokens, is refused before it costs time.
fn encode(text: &str, bare: bool, loaded: &Loaded) -> Result<Vec<u32>, ApiError> {
    let bytes_max = loaded.context.saturating_mul(loaded.tokenizer.token_bytes_max());
    if text.len() > bytes_max {
        let message = format!(
            "the prompt has {} bytes, more than {} tokens can spell; node.max_context sets the context",
            text.len(),
            loaded.context
        );
        return Err(ApiError {
            code: "context_length_exceeded",
            ..ApiError::invalid(if bare { "prompt" } else { "messages" }, message)
        });
    }
    loaded
        .tokenizer
        .encode(text, bare)
        .map_err(|e| ApiError::invalid("prompt", format!("the tokenizer refuses this text: {e}")))
}

/// A template writes the role as it is, so one of the client's making could speak the template's own language.
fn check_roles(messages: &[Message]) -> Result<(), ApiError> {
    match messages.iter().position(|message| !ROLES.contains(&message.role.as_str())) {
        None => Ok(()),
        Some(i) => {
            let known = ROLES.join(", ");
            Err(ApiError::invalid(format!("messages[{i}].role"), format!("a role must be one of {known}")))
        }
    }
}

fn check_length(prompt: &[u32], api: Api, loaded: &Loaded) -> Result<(), ApiError> {
    if prompt.len() < loaded.context {
        return Ok(());
    }
    let message = format!(
        "the prompt has {} tokens, and the context of {} must hold at least one more; node.max_context sets it, up to what the model was made for",
        prompt.len(),
        loaded.context
    );
    Err(ApiError { code: "context_length_exceeded", ..ApiError::invalid(api.prompt_field(), message) })
}

fn in_range(
    field: &str,
    value: Option<i64>,
    range: std::ops::RangeInclusive<i64>,
    default: i64,
) -> Result<i64, ApiError> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(&value) => Ok(value),
        Some(value) if *range.end() == i64::MAX => {
            Err(ApiError::invalid(field, format!("{field} = {value} must be at least {}", range.start())))
        }
        Some(value) => Err(ApiError::invalid(
            field,
            format!("{field} = {value} must be from {} to {}", range.start(), range.end()),
        )),
    }
}

fn real_in_range(
    field: &str,
    value: Option<f64>,
    range: std::ops::RangeInclusive<f64>,
) -> Result<Option<f32>, ApiError> {
    match value {
        Some(value) if !range.contains(&value) => Err(ApiError::invalid(
            field,
            format!("{field} = {value} must be from {} to {}", range.start(), range.end()),
        )),
        value => Ok(value.map(|v| v as f32)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_type_names_its_field_and_broken_json_its_place() {
        let error = parse(br#"{"messages": [{"role": 7}]}"#).unwrap_err();
        assert_eq!((error.status(), error.param.as_deref()), (400, Some("messages[0].role")));
        for broken in [&b"{"[..], b"{} x", b"\xff\xfe", b"", b"{\"temperature\": 1e999}"] {
            assert_eq!(parse(broken).unwrap_err().code, "invalid_json", "{broken:?}");
        }
        assert_eq!(parse(b"[1]").unwrap_err().status(), 400);
        assert!(parse(br#"{"later_field": {"a": 1}}"#).is_ok());
    }
}
