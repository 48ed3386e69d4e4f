//! Requests for a generation: each API's body becomes one [`Ask`], and an ask is checked once into a [`ValidRequest`]: a value of that
//! type can be run as it stands.
//!
//! Unknown fields pass, wrong types do not. A field that would change the answer and is not supported is refused, never ignored.

mod chat;
mod completion;
mod held;
mod messages;
mod openai;
mod query;
mod responses;
mod sampling;
mod tools;

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};
use tidegate_common::contract::{ApiError, Resume};
use tokio::sync::oneshot;

use super::{
    App, check,
    choice::{Choice, Plan},
    frame::Frame,
    grammar,
    shape::{Head, Shape},
};
use crate::{
    config::{Defaults, ReasoningParser, ToolParser},
    engine::{Generation, Wants},
    guide::Grammar,
    output::ToolFormat,
    sample::{Logprobs, Sampling},
    served::Loaded,
    stop::StopRule,
    text::{Conversation, Message, fallback},
};

pub(super) use chat::ChatRequest;
pub(super) use completion::CompletionRequest;
pub(super) use messages::MessagesRequest;
pub(super) use query::QueryRequest;
pub(super) use responses::ResponsesRequest;

use held::Held;
use sampling::Knobs;
pub(super) use tools::{Tool, Tools, Use};

/// Who may speak in a conversation.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// The body of one API.
pub(super) trait Body: serde::de::DeserializeOwned + Send + 'static {
    /// The model it names.
    fn model(&self) -> Option<&str>;

    /// What it asks for.
    ///
    /// # Errors
    /// The first thing that is wrong, as far as it can be told without the model.
    fn ask(self, head: Head) -> Result<Ask, ApiError>;
}

/// What any API asks for.
pub(super) struct Ask {
    input: Input,
    knobs: Knobs,
    stream: bool,
    held: Option<Held>,
    tools: Option<Tools>,
    /// How many of the likeliest tokens are told with each.
    logprobs: Option<usize>,
    echo: bool,
    resume: Option<Resume>,
    shape: Box<dyn Shape>,
}

/// Where the prompt comes from, with the field that holds it.
enum Input {
    Conversation { field: &'static str, messages: Vec<Message>, variables: Option<Map<String, Value>> },
    Prompts(Prompts),
}

#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(
    untagged,
    expecting = "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
)]
pub(super) enum Prompts {
    /// A text.
    Text(String),
    /// Several texts; each gets `n` answers.
    Texts(Vec<String>),
    /// A text as tokens.
    Tokens(Vec<u32>),
    /// Several texts as tokens.
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(untagged, expecting = "stop must be a string or a list of strings")]
pub(super) enum OneOrMany {
    /// One text.
    One(String),
    /// Several.
    Many(Vec<String>),
}

#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub(super) struct StreamOptions {
    /// Whether an event with the usage comes last.
    pub(super) include_usage: Option<bool>,
}

/// A request that can be run.
pub(super) struct ValidRequest {
    pub(super) stream: bool,
    /// Tokens of all prompts together.
    pub(super) prompt_tokens: usize,
    pub(super) choices: Vec<ValidChoice>,
    pub(super) shape: Box<dyn Shape>,
}

/// One choice, brought to where the client has it.
pub(super) struct ValidChoice {
    pub(super) choice: Choice,
    /// What the engine is to do for it, if anything.
    pub(super) generation: Option<Generation>,
    /// Log-probabilities of the given tokens, when they are needed.
    pub(super) scores: Option<oneshot::Receiver<Vec<Logprobs>>>,
}

/// Prompts as tokens, with the field that holds them.
struct Prompted {
    field: &'static str,
    prompts: Vec<Vec<u32>>,
    /// Whether the model thinks, and whether the prompt ends within its thoughts.
    thoughts: Option<bool>,
}

/// Checked fields.
struct Checked {
    n: usize,
    sampling: Sampling,
    stops: Vec<String>,
}

impl Ask {
    /// Checks everything, and turns the words into tokens. Takes milliseconds: not for a thread that serves others.
    ///
    /// # Errors
    /// The first thing that is wrong, with its field, its limit, and the config key that moves the limit.
    pub(super) fn validate(mut self, app: &App, loaded: &Loaded, frame: &Frame) -> Result<ValidRequest, ApiError> {
        let vocab = loaded.tokenizer.vocab();
        let Checked { n, sampling, stops } = self.check(&app.config.defaults, &loaded.sampling, frame.seed, vocab)?;
        self.check_choices(n, app)?;
        let format = tool_format(app, loaded);
        let Prompted { field, prompts, thoughts } = self.prompts(app, loaded, frame)?;
        let had = self.had(prompts.len() * n, loaded)?;
        let tools = self.tools.as_ref().filter(|t| t.usage != Use::None);
        let token_of = |mark: &str| control_token(mark, loaded);
        let held = self.held.as_ref();
        let composed = match tools {
            Some(tools) if held.is_some() || tools.is_forced() => {
                grammar::compose(held.map(|h| &h.grammar), Some(&tools.calls(format)), thoughts, &token_of)
            }
            _ => held.and_then(|h| grammar::compose(Some(&h.grammar), None, thoughts, &token_of)),
        };
        let guide = composed.map(|grammar| compile(held.map_or("tools", |h| h.field), &grammar, loaded)).transpose()?;
        let looks_for = tools.map(|tools| tools.parser(format));
        let marks = looks_for.iter().flat_map(|t| t.format.open().into_iter().chain(t.format.close()));
        let marks = marks.chain(thoughts.iter().flat_map(|_| ["<think>", "</think>"]));
        let marks = marks.filter_map(|mark| Some((control_token(mark, loaded)?, mark))).collect();
        let end_tokens: Arc<[u32]> =
            if self.knobs.ignore_eos == Some(true) { [].into() } else { loaded.end_tokens.clone() };
        let plan = Arc::new(Plan {
            tokenizer: loaded.tokenizer.clone(),
            end_tokens: end_tokens.clone(),
            stops,
            marks,
            thoughts,
            tools: looks_for,
            scores: self.logprobs.is_some(),
            keeps_scores: !self.stream,
            echo: self.echo,
        });
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        self.shape.begin(prompt_tokens);
        let mut choices = Vec::with_capacity(had.len());
        for (i, had) in had.into_iter().enumerate() {
            let prompt = &prompts[i / n];
            let tokens_max = self.knobs.tokens_max(prompt.len(), self.echo, app, loaded)?;
            let stop = StopRule { end_tokens: end_tokens.clone(), tokens_max };
            check::fits(field, prompt, tokens_max.min(1), loaded)?;
            let generation = Generation {
                tokens: prompt.clone(),
                prompt_len: prompt.len(),
                choice: i as u32,
                sampling: sampling.clone(),
                stop,
                guide: guide.clone(),
                logprobs: self.logprobs,
                is_moved: frame.moved,
                wants: Wants::default(),
            };
            choices.push(self.choice(&plan, generation, had));
        }
        Ok(ValidRequest { stream: self.stream, prompt_tokens, choices, shape: self.shape })
    }

    /// What can be told without the model's text.
    fn check(
        &self,
        defaults: &Defaults,
        recommended: &crate::weights::Recommended,
        seed: u64,
        vocab: usize,
    ) -> Result<Checked, ApiError> {
        let n = check::whole("n", self.knobs.n, 1..=128, 1)? as usize;
        self.knobs.check_exclusive(self.held.as_ref(), self.tools.as_ref())?;
        self.knobs.tokens_asked(self.echo)?;
        Ok(Checked {
            n,
            sampling: self.knobs.sampling(defaults, recommended, seed, vocab)?,
            stops: self.knobs.stops()?,
        })
    }

    /// A choice after the tokens that the client has had.
    fn choice(&mut self, plan: &Arc<Plan>, mut generation: Generation, had: Vec<u32>) -> ValidChoice {
        let mut choice = Choice::new(generation.choice, plan.clone(), &generation.tokens);
        let rule = generation.stop.clone();
        if rule.tokens_max == 0 {
            choice.end_empty();
        }
        for (i, token) in had.iter().enumerate() {
            let step = choice.take(*token, None, rule.after(*token, i + 1));
            if self.stream {
                self.shape.step(&step, &mut Vec::new());
            }
        }
        let wants_scores =
            self.logprobs.filter(|_| (self.echo && had.is_empty()) || (!self.stream && (self.echo || !had.is_empty())));
        let scores = wants_scores.map(|top| {
            let (sender, receiver) = oneshot::channel();
            generation.wants.prompt_logprobs = Some((top, sender));
            receiver
        });
        let is_ended = choice.ended().is_some();
        if is_ended {
            generation.stop.tokens_max = 0;
        }
        generation.tokens.extend(&had);
        choice.remember(had);
        let generation = (!is_ended || scores.is_some()).then_some(generation);
        ValidChoice { choice, generation, scores }
    }

    fn check_choices(&self, n: usize, app: &App) -> Result<(), ApiError> {
        let choices_max = app.config.request.choices_max;
        let prompts = match &self.input {
            Input::Conversation { .. } => 1,
            Input::Prompts(prompts) => prompts.count(),
        };
        if prompts * n <= choices_max {
            return Ok(());
        }
        let message = format!(
            "{prompts} prompts with n = {n} make more than the {choices_max} answers that node.max_choices allows"
        );
        Err(ApiError::invalid("n", message))
    }

    /// The prompts.
    fn prompts(&mut self, app: &App, loaded: &Loaded, frame: &Frame) -> Result<Prompted, ApiError> {
        match &mut self.input {
            Input::Prompts(prompts) => {
                let prompts = prompts.tokens("prompt", loaded)?;
                if prompts.is_empty() {
                    return Err(ApiError::invalid("prompt", "'prompt' is empty"));
                }
                Ok(Prompted { field: "prompt", prompts, thoughts: None })
            }
            Input::Conversation { field, messages, variables } => {
                let field = *field;
                let messages = std::mem::take(messages);
                let prompt = render(field, messages, self.tools.as_ref(), variables.as_ref(), frame, loaded)?;
                let template = &loaded.template;
                let thinks = match app.config.reasoning_parser {
                    ReasoningParser::Auto => template.thinks(),
                    ReasoningParser::Think => true,
                    ReasoningParser::None => false,
                };
                let thoughts = thinks.then(|| prompt.trim_end().ends_with("<think>"));
                Ok(Prompted { field, prompts: vec![check::encode(field, &prompt, false, loaded)?], thoughts })
            }
        }
    }

    /// What the client has had, one list for each choice.
    fn had(&mut self, choices: usize, loaded: &Loaded) -> Result<Vec<Vec<u32>>, ApiError> {
        let mut had = self.resume.take().map(|r| r.tokens).unwrap_or_default();
        if had.len() > choices {
            return Err(ApiError::invalid(Resume::FIELD, "more choices to resume than the request asks for"));
        }
        had.resize(choices, Vec::new());
        had.into_iter().map(|tokens| check::known(Resume::FIELD, tokens, loaded)).collect()
    }
}

impl OneOrMany {
    fn texts(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

impl Prompts {
    pub(super) fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::TokenLists(lists) => lists.len(),
        }
    }

    pub(super) fn tokens(&self, field: &str, loaded: &Loaded) -> Result<Vec<Vec<u32>>, ApiError> {
        match self {
            Self::Text(text) => Ok(vec![check::encode(field, text, true, loaded)?]),
            Self::Texts(texts) => texts.iter().map(|text| check::encode(field, text, true, loaded)).collect(),
            Self::Tokens(tokens) => check::known(field, tokens.clone(), loaded).map(|tokens| vec![tokens]),
            Self::TokenLists(lists) => lists.iter().map(|list| check::known(field, list.clone(), loaded)).collect(),
        }
    }
}

/// A conversation as the model's prompt.
///
/// # Errors
/// When a message is malformed, or the model's template refuses them.
pub(super) fn render(
    field: &str,
    mut messages: Vec<Message>,
    tools: Option<&Tools>,
    variables: Option<&Map<String, Value>>,
    frame: &Frame,
    loaded: &Loaded,
) -> Result<String, ApiError> {
    prepare(field, &mut messages)?;
    let listed = tools.map(Tools::listed).filter(|tools| !tools.is_empty());
    let told = listed.as_ref().filter(|_| !loaded.template.knows_tools());
    let rewritten = told.map(|tools| fallback(&messages, tools));
    let conversation = Conversation {
        messages: rewritten.as_deref().unwrap_or(&messages),
        tools: listed.as_deref().filter(|_| told.is_none()),
        variables,
        now: frame.created,
    };
    loaded.template.render(&conversation).map_err(|e| ApiError::invalid(field, e.to_string()))
}

/// The token of a mark that has no bytes of its own, and so does not show in the text.
fn control_token(mark: &str, loaded: &Loaded) -> Option<u32> {
    loaded.tokenizer.id(mark).filter(|token| loaded.tokenizer.token_bytes(*token).is_empty())
}

fn tool_format(app: &App, loaded: &Loaded) -> ToolFormat {
    match app.config.tool_parser {
        ToolParser::Auto => loaded.template.tool_format(),
        ToolParser::Fixed(format) => format,
    }
}

fn compile(field: &str, grammar: &Grammar, loaded: &Loaded) -> Result<crate::guide::Guide, ApiError> {
    loaded.guides.compile(grammar).map_err(|e| ApiError::invalid(field, format!("{field}: {e}")))
}

/// Checks roles, since a template writes them as they are and one of the client's making could speak the template's own language; and
/// opens the arguments of earlier calls, which clients send as JSON text and templates expect as objects.
fn prepare(field: &str, messages: &mut [Message]) -> Result<(), ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid(field, format!("'{field}' is empty")));
    }
    for (i, message) in messages.iter_mut().enumerate() {
        if !ROLES.contains(&message.role.as_str()) {
            let known = ROLES.join(", ");
            return Err(ApiError::invalid(format!("{field}[{i}].role"), format!("a role must be one of {known}")));
        }
        let Some(calls) = message.extra.get_mut("tool_calls") else { continue };
        if calls.is_null() {
            message.extra.shift_remove("tool_calls");
            continue;
        }
        let at = format!("{field}[{i}].tool_calls");
        let Some(calls) = calls.as_array_mut() else {
            return Err(ApiError::invalid(at, "tool_calls must be a list"));
        };
        for (k, call) in calls.iter_mut().enumerate() {
            open_arguments(&format!("{at}[{k}].function"), call)?;
        }
    }
    Ok(())
}

fn open_arguments(at: &str, call: &mut Value) -> Result<(), ApiError> {
    let function = call.get_mut("function").filter(|function| function["name"].is_string());
    let function =
        function.ok_or_else(|| ApiError::invalid(format!("{at}.name"), "a call needs the function's name"))?;
    let arguments = match &function["arguments"] {
        Value::Null => Value::Object(Map::new()),
        Value::String(text) if text.trim().is_empty() => Value::Object(Map::new()),
        Value::String(text) => serde_json::from_str(text).map_err(|e| {
            ApiError::invalid(format!("{at}.arguments"), format!("the arguments are not valid JSON: {e}"))
        })?,
        other => other.clone(),
    };
    function["arguments"] = arguments;
    Ok(())
}

#[cfg(test)]
mod tests;
