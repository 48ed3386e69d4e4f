//! What an answer is held to: `response_format`, as OpenAI writes it, or `guided_*` and `structured_outputs`, as vLLM does.

use serde::Deserialize;
use serde_json::Value;
use tidegate_common::contract::ApiError;

use crate::guide::Grammar;

/// A grammar, and the field that asks for it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Held {
    pub(super) field: &'static str,
    pub(super) grammar: Grammar,
}

/// `response_format`
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    r#type: String,
    /// With `json_schema`: `name`, `schema` and `strict`. The answer is always held to the schema.
    json_schema: Option<JsonSchema>,
}

#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct JsonSchema {
    /// A name for the schema.
    #[serde(rename = "name")]
    _name: Option<String>,
    /// A JSON schema.
    #[schema(value_type = Object)]
    schema: Option<Value>,
    /// Accepted; schemas are always kept strictly.
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

/// `structured_outputs`: exactly one of these.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
pub(super) struct StructuredOutputs {
    /// A JSON schema.
    #[schema(value_type = Object)]
    json: Option<Value>,
    /// Any JSON object.
    json_object: Option<bool>,
    /// A regular expression for the whole answer.
    regex: Option<String>,
    /// The answer is one of these.
    choice: Option<Vec<String>>,
    /// A grammar in Lark's notation.
    grammar: Option<String>,
}

/// All fields of a body that hold its answer to something.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    pub(super) response_format: Option<ResponseFormat>,
    pub(super) guided_json: Option<Value>,
    pub(super) guided_regex: Option<String>,
    pub(super) guided_choice: Option<Vec<String>>,
    pub(super) guided_grammar: Option<String>,
    pub(super) structured_outputs: Option<StructuredOutputs>,
}

impl Held {
    /// Whether a JSON value is asked for.
    pub(super) fn is_json(&self) -> bool {
        matches!(self.grammar, Grammar::JsonObject | Grammar::JsonSchema(_))
    }

    /// JSON of a schema.
    ///
    /// # Errors
    /// When it is no schema.
    pub(super) fn schema(field: &'static str, schema: Value) -> Result<Self, ApiError> {
        Ok(Self { field, grammar: Grammar::JsonSchema(schema_of(field, schema)?) })
    }
}

impl Wishes {
    /// The one thing asked for.
    ///
    /// # Errors
    /// When there are several, or one is malformed.
    pub(super) fn held(self) -> Result<Option<Held>, ApiError> {
        let mut found = Vec::new();
        if let Some(format) = self.response_format {
            found.extend(format.held()?);
        }
        let guided = StructuredOutputs {
            json: self.guided_json.filter(|json| !json.is_null()),
            regex: self.guided_regex,
            choice: self.guided_choice,
            grammar: self.guided_grammar,
            json_object: None,
        };
        guided.held(["guided_json", "", "guided_regex", "guided_choice", "guided_grammar"], &mut found)?;
        if let Some(outputs) = self.structured_outputs {
            let fields = [
                "structured_outputs.json",
                "structured_outputs.json_object",
                "structured_outputs.regex",
                "structured_outputs.choice",
                "structured_outputs.grammar",
            ];
            let before = found.len();
            outputs.held(fields, &mut found)?;
            if found.len() == before {
                let message = "structured_outputs must hold one of json, json_object, regex, choice and grammar";
                return Err(ApiError::invalid("structured_outputs", message));
            }
        }
        match found.len() {
            0 | 1 => Ok(found.pop()),
            _ => {
                let message = format!(
                    "'{}' and '{}' cannot be given together: each says what the answer must be",
                    found[0].field, found[1].field
                );
                Err(ApiError::invalid(found[1].field, message))
            }
        }
    }
}

impl ResponseFormat {
    fn held(self) -> Result<Option<Held>, ApiError> {
        let grammar = match (self.r#type.as_str(), self.json_schema.and_then(|s| s.schema)) {
            ("text", _) => return Ok(None),
            ("json_object", _) => Grammar::JsonObject,
            ("json_schema", Some(schema)) => {
                Grammar::JsonSchema(schema_of("response_format.json_schema.schema", schema)?)
            }
            ("json_schema", None) => {
                let message = "response_format of type json_schema needs json_schema.schema";
                return Err(ApiError::invalid("response_format.json_schema.schema", message));
            }
            _ => {
                let message = "response_format.type must be text, json_object or json_schema";
                return Err(ApiError::invalid("response_format.type", message));
            }
        };
        Ok(Some(Held { field: "response_format", grammar }))
    }
}

impl StructuredOutputs {
    /// `fields` names json, json_object, regex, choice and grammar.
    fn held(self, fields: [&'static str; 5], out: &mut Vec<Held>) -> Result<(), ApiError> {
        let [json, json_object, regex, choice, grammar] = fields;
        if let Some(schema) = self.json {
            out.push(Held::schema(json, schema)?);
        }
        if self.json_object == Some(true) {
            out.push(Held { field: json_object, grammar: Grammar::JsonObject });
        }
        if let Some(text) = self.regex {
            out.push(Held { field: regex, grammar: Grammar::Regex(text) });
        }
        if let Some(choices) = self.choice {
            if choices.is_empty() || choices.iter().any(String::is_empty) {
                return Err(ApiError::invalid(choice, format!("{choice} must list texts, none of them empty")));
            }
            out.push(Held { field: choice, grammar: Grammar::Choice(choices) });
        }
        if let Some(text) = self.grammar {
            out.push(Held { field: grammar, grammar: Grammar::Lark(text) });
        }
        Ok(())
    }
}

/// A schema as an object, or as the text of one.
fn schema_of(field: &str, schema: Value) -> Result<Value, ApiError> {
    let schema = match schema {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|e| ApiError::invalid(field, format!("{field} is not valid JSON: {e}")))?,
        schema => schema,
    };
    if !schema.is_object() && !schema.is_boolean() {
        return Err(ApiError::invalid(field, format!("{field} must be a JSON schema: an object")));
    }
    Ok(schema)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn wishes(response_format: Value, structured: Value) -> Wishes {
        Wishes {
            response_format: serde_json::from_value(response_format).unwrap(),
            structured_outputs: serde_json::from_value(structured).unwrap(),
            ..Wishes::default()
        }
    }

    #[test]
    fn one_wish_makes_one_grammar() {
        let schema = json!({"type": "object"});
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}});
        let held = wishes(format, Value::Null).held().unwrap().unwrap();
        assert_eq!((held.field, held.grammar), ("response_format", Grammar::JsonSchema(schema)));
        assert_eq!(wishes(json!({"type": "text"}), Value::Null).held(), Ok(None));
        let held = wishes(Value::Null, json!({"json": "{\"type\": \"null\"}"})).held().unwrap().unwrap();
        assert_eq!(held.grammar, Grammar::JsonSchema(json!({"type": "null"})));
    }

    #[test]
    fn two_wishes_and_malformed_ones_name_their_field() {
        for (format, structured, field) in [
            (json!({"type": "json_object"}), json!({"regex": "a"}), "structured_outputs.regex"),
            (json!({"type": "yaml"}), Value::Null, "response_format.type"),
            (json!({"type": "json_schema"}), Value::Null, "response_format.json_schema.schema"),
            (Value::Null, json!({}), "structured_outputs"),
            (Value::Null, json!({"choice": []}), "structured_outputs.choice"),
            (Value::Null, json!({"json": 7}), "structured_outputs.json"),
        ] {
            assert_eq!(wishes(format, structured).held().unwrap_err().param.as_deref(), Some(field));
        }
    }
}
