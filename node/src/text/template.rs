//! Chat templates: Jinja programs that come with a model, and so are not trusted. They run with bounded fuel and see only the messages.

use minijinja::{Environment, ErrorKind, Value, context, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::{
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
    begin: String,
    end: String,
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
        let environment = match checkpoint.text("tokenizer.chat_template") {
            Some(source) => Some(
                compile(source).map_err(|e| checkpoint.broken(format!("its chat template does not compile: {e:#}")))?,
            ),
            None => None,
        };
        Ok(Self { environment, begin, end })
    }

    /// The prompt that asks for the next answer.
    ///
    /// # Errors
    /// When there is no template, or it refuses the messages.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        let environment = self.environment.as_ref().ok_or(TemplateError::Missing)?;
        let template = environment.get_template("chat").map_err(|e| TemplateError::Refused(e.to_string()))?;
        let variables = context! {
            messages => Value::from(Serde(messages)),
            bos_token => self.begin.as_str(),
            eos_token => self.end.as_str(),
            add_generation_prompt => true,
        };
        template.render(variables).map_err(|e| match e.kind() {
            ErrorKind::OutOfFuel => TemplateError::Endless,
            _ => TemplateError::Refused(e.to_string()),
        })
    }
}

fn compile(source: &str) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    // the settings that Hugging Face renders chat templates with
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
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
        ChatTemplate { environment: Some(compile(source).unwrap()), begin: "<s>".into(), end: "</s>".into() }
    }

    fn user(text: &str) -> Vec<Message> {
        vec![serde_json::from_value(serde_json::json!({"role": "user", "content": text})).unwrap()]
    }

    #[test]
    fn a_template_sees_messages_and_python_methods() {
        let t = template(
            "{{ bos_token }}{% for m in messages %}\n[{{ m['role'].upper() }}] {{ m.content.strip() }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
        );
        assert_eq!(t.render(&user("  hi ")).unwrap(), "<s>[USER] hi>");
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let t = template("{% for a in range(10000) %}{% for b in range(10000) %}{{ a * b }}{% endfor %}{% endfor %}");
        assert!(matches!(t.render(&user("hi")), Err(TemplateError::Endless)));
    }

    #[test]
    fn a_template_that_refuses_says_why() {
        let error = template("{{ raise_exception('roles must alternate') }}").render(&user("hi")).unwrap_err();
        assert!(error.to_string().contains("roles must alternate"), "{error}");
    }

    #[test]
    fn content_may_be_parts_but_only_of_text() {
        let parts = serde_json::json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        assert_eq!(serde_json::from_value::<Message>(parts).unwrap().content, "ab");
        let image = serde_json::json!({"role": "user", "content": [{"type": "image_url"}]});
        assert!(serde_json::from_value::<Message>(image).unwrap_err().to_string().contains("image_url"));
    }
}
