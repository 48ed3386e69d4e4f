//! Chat templates: Jinja programs that come with a model, and so are not trusted. They run with bounded fuel and see only the conversation.

use std::panic::{AssertUnwindSafe, catch_unwind};

use minijinja::{Environment, ErrorKind, Value, context, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json, json};

use super::python;
use crate::{
    output::ToolFormat,
    text::Tokenizer,
    weights::{Checkpoint, LoadError},
};

/// Instructions that one rendering may take; a conversation of a thousand messages needs well under a tenth.
const FUEL: u64 = 5_000_000;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, ...
    pub role: String,
    /// Its text.
    #[serde(default, deserialize_with = "content")]
    pub content: String,
    /// Whatever else the message has, for the template.
    #[serde(flatten)]
    pub extra: Map<String, Json>,
}

/// A text, null, or a list of text parts, as the OpenAI API writes it.
fn content<'de, D: serde::Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "content must be a string, null, or a list of parts")]
    enum Content {
        Text(Option<String>),
        Parts(Vec<Part>),
    }
    #[derive(Deserialize)]
    struct Part {
        r#type: String,
        text: Option<String>,
    }
    match Content::deserialize(d)? {
        Content::Text(text) => Ok(text.unwrap_or_default()),
        Content::Parts(parts) => {
            let text = |p: Part| match (p.r#type.as_str(), p.text) {
                ("text", Some(text)) => Ok(text),
                (other, _) => Err(serde::de::Error::custom(format!(
                    "content parts of type '{other}' are not supported; only text is"
                ))),
            };
            parts.into_iter().map(text).collect()
        }
    }
}

/// Why a conversation could not be rendered; always the request's or the model's fault.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model has none.
    #[error("this model has no chat template; use /v1/completions")]
    Missing,
    /// The template refused the messages, or failed.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// It ran out of fuel.
    #[error("the model's chat template did not come to an end")]
    Endless,
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Option<Environment<'static>>,
    source: String,
    begin: String,
    end: String,
}

/// What a conversation's prompt is made of.
#[derive(Debug, Default)]
pub struct Conversation<'a> {
    /// What was said.
    pub messages: &'a [Message],
    /// The tools that the model may call, as the OpenAI API writes them.
    pub tools: Option<&'a [Json]>,
    /// More variables for the template, such as `enable_thinking`.
    pub variables: Option<&'a Map<String, Json>>,
    /// The time that the template sees, in seconds of Unix time: that of the request, so that another node renders the same.
    pub now: u64,
}

impl ChatTemplate {
    /// The template in the file; a file without one makes a template that refuses.
    ///
    /// # Errors
    /// When the template does not compile.
    pub fn from_checkpoint(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Self, LoadError> {
        let spelled =
            |key: &str| checkpoint.number(key).and_then(|id| tokenizer.spelled(id as u32)).unwrap_or_default();
        let (begin, end) = (spelled("tokenizer.ggml.bos_token_id"), spelled("tokenizer.ggml.eos_token_id"));
        let source = checkpoint.text("tokenizer.chat_template");
        Self::new(source, begin, end)
            .map_err(|e| checkpoint.broken(format!("its chat template does not compile: {e:#}")))
    }

    /// A template by its source; without one it refuses. `begin` and `end` are the tokens that it may name.
    ///
    /// # Errors
    /// When the template does not compile.
    pub fn new(source: Option<&str>, begin: String, end: String) -> Result<Self, minijinja::Error> {
        let environment = source.map(compile).transpose()?;
        Ok(Self { environment, source: source.unwrap_or_default().to_owned(), begin, end })
    }

    /// Whether the template itself tells the model of tools.
    pub fn knows_tools(&self) -> bool {
        self.source.contains("tools")
    }

    /// How the model writes its calls, as far as its template shows it; without any sign of tools, as [`fallback`] asks for it.
    pub fn tool_format(&self) -> ToolFormat {
        let has = |mark: &str| self.source.contains(mark);
        match () {
            () if has("<tool_call>[") => ToolFormat::HermesList,
            () if has("<tool_call>") || !self.knows_tools() => ToolFormat::Hermes,
            () if has("[TOOL_CALLS]") => ToolFormat::Mistral,
            () if has("<|python_tag|>") || has("\"parameters\"") => ToolFormat::Llama3,
            () => ToolFormat::Json,
        }
    }

    /// Whether the model thinks between `<think>` and `</think>`, as far as its template shows it.
    pub fn thinks(&self) -> bool {
        self.source.contains("<think>")
    }

    /// The prompt that asks for the next answer.
    ///
    /// # Errors
    /// When there is no template, or it refuses the messages.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        let environment = self.environment.as_ref().ok_or(TemplateError::Missing)?;
        let template = environment.get_template("chat").map_err(|e| TemplateError::Refused(e.to_string()))?;
        let now = conversation.now;
        let own = context! {
            messages => Value::from(Serde(conversation.messages)),
            tools => conversation.tools.map(|tools| Value::from(Serde(tools))),
            bos_token => self.begin.as_str(),
            eos_token => self.end.as_str(),
            strftime_now => Value::from_function(move |format: &str| python::strftime(now, format)),
        };
        let given = conversation.variables.map_or_else(|| context! {}, |variables| Value::from(Serde(variables)));
        let variables = context! { ..own, ..given, ..context! { add_generation_prompt => true } };
        // minijinja 3.0.5 panics where a template slices an empty list backwards
        let rendered = catch_unwind(AssertUnwindSafe(|| template.render(variables)));
        let rendered = rendered.map_err(|_| TemplateError::Refused("it fails on them".into()))?;
        rendered.map_err(|e| match e.kind() {
            ErrorKind::OutOfFuel => TemplateError::Endless,
            _ => TemplateError::Refused(e.to_string()),
        })
    }
}

/// A conversation for a template that knows nothing of tools: a system text lists them and asks for Hermes' form of calls; calls and
/// results in earlier messages become texts of that form.
pub fn fallback(messages: &[Message], tools: &[Json]) -> Vec<Message> {
    let listed: String =
        tools.iter().filter_map(|tool| python::dumps(tool, None).ok()).map(|tool| tool + "\n").collect();
    let rule = format!(
        "You may call functions to answer. These are available, one JSON object a line:\n<tools>\n{listed}</tools>\n\
         To call one, write a JSON object with its name and arguments within tags:\n\
         <tool_call>\n{{\"name\": \"the function's name\", \"arguments\": {{...}}}}\n</tool_call>"
    );
    let mut plain: Vec<Message> = messages.iter().map(without_tools).collect();
    match plain.first_mut().filter(|first| matches!(first.role.as_str(), "system" | "developer")) {
        Some(first) => first.content = format!("{}\n\n{rule}", first.content),
        None => plain.insert(0, Message { role: "system".into(), content: rule, extra: Map::new() }),
    }
    plain
}

fn without_tools(message: &Message) -> Message {
    let mut plain = message.clone();
    if message.role == "tool" {
        plain.role = "user".into();
        plain.content = format!("<tool_response>\n{}\n</tool_response>", message.content);
    }
    for call in plain.extra.shift_remove("tool_calls").as_ref().and_then(Json::as_array).into_iter().flatten() {
        let call = json!({"name": call["function"]["name"], "arguments": call["function"]["arguments"]});
        let text = python::dumps(&call, None).unwrap_or_default();
        let gap = if plain.content.is_empty() { "" } else { "\n" };
        plain.content += &format!("{gap}<tool_call>\n{text}\n</tool_call>");
    }
    plain
}

fn compile(source: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    // the settings that Hugging Face renders chat templates with
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", python::tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_template_owned("chat", source.to_owned())?;
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(Some(source), "<s>".into(), "</s>".into()).unwrap()
    }

    fn render(template: &ChatTemplate, messages: &[Message]) -> Result<String, TemplateError> {
        template.render(&Conversation { messages, ..Conversation::default() })
    }

    fn user(text: &str) -> Vec<Message> {
        vec![serde_json::from_value(serde_json::json!({"role": "user", "content": text})).unwrap()]
    }

    #[test]
    fn a_template_sees_messages_and_python_methods() {
        let t = template(
            "{{ bos_token }}{% for m in messages %}\n[{{ m['role'].upper() }}] {{ m.content.strip() }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
        );
        assert_eq!(render(&t, &user("  hi ")).unwrap(), "<s>[USER] hi>");
    }

    #[test]
    fn a_fault_of_the_renderer_is_a_refusal() {
        let backwards = template("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}");
        assert_eq!(render(&backwards, &user("hi")).unwrap(), "hi");
        assert!(matches!(render(&backwards, &[]), Err(TemplateError::Refused(_))));
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let t = template("{% for a in range(10000) %}{% for b in range(10000) %}{{ a * b }}{% endfor %}{% endfor %}");
        assert!(matches!(render(&t, &user("hi")), Err(TemplateError::Endless)));
    }

    #[test]
    fn a_template_that_refuses_says_why() {
        let error = render(&template("{{ raise_exception('roles must alternate') }}"), &user("hi")).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn content_may_be_parts_but_only_of_text() {
        let parts = serde_json::json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        assert_eq!(serde_json::from_value::<Message>(parts).unwrap().content, "ab");
        let image = serde_json::json!({"role": "user", "content": [{"type": "image_url"}]});
        assert!(serde_json::from_value::<Message>(image).unwrap_err().to_string().contains("image_url"));
    }

    #[test]
    fn a_template_sees_tools_variables_and_the_requests_time() {
        let t = template(
            "{% for tool in tools %}{{ tool | tojson }}{% endfor %}|{{ enable_thinking }}|{{ strftime_now('%Y-%m-%d') }}|{{ tools | tojson(indent=2) | length > 30 }}",
        );
        let tools = [json!({"type": "function", "function": {"name": "f"}})];
        let variables = json!({"enable_thinking": false, "messages": "no"});
        let conversation = Conversation {
            messages: &user("hi"),
            tools: Some(&tools),
            variables: variables.as_object(),
            now: 1_700_000_000,
        };
        let expected = r#"{"type": "function", "function": {"name": "f"}}|False|2023-11-14|True"#;
        assert_eq!(t.render(&conversation).unwrap(), expected);
    }

    #[test]
    fn the_form_of_calls_shows_in_the_template() {
        for (source, format) in [
            ("{% if tools %}<tool_call>\n{{ tool_call.name }}{% endif %}", ToolFormat::Hermes),
            ("{% if tools %}<tool_call>[{{ x }}]{% endif %}", ToolFormat::HermesList),
            ("{% if tools %}[TOOL_CALLS]{% endif %}", ToolFormat::Mistral),
            ("{% if tools %}{\"name\": x, \"parameters\": y}{% endif %}", ToolFormat::Llama3),
            ("{{ tools }}", ToolFormat::Json),
            ("{{ messages }}", ToolFormat::Hermes),
        ] {
            assert_eq!(template(source).tool_format(), format, "{source}");
        }
    }

    #[test]
    fn a_template_without_tools_is_told_of_them_in_words() {
        let messages: Vec<Message> = serde_json::from_value(json!([
            {"role": "user", "content": "time?"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "time", "arguments": {"tz": "CET"}}}]},
            {"role": "tool", "tool_call_id": "c", "content": "12:00"},
        ]))
        .unwrap();
        let plain = fallback(&messages, &[json!({"type": "function", "function": {"name": "time"}})]);
        let said: Vec<(&str, &str)> = plain.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        assert!(said[0].0 == "system" && said[0].1.contains(r#"{"name": "time"}"#), "{said:?}");
        assert_eq!(said[2].1, "<tool_call>\n{\"name\": \"time\", \"arguments\": {\"tz\": \"CET\"}}\n</tool_call>");
        assert_eq!(said[3], ("user", "<tool_response>\n12:00\n</tool_response>"));
    }
}
