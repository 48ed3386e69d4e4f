//! Goal: what the OpenAPI document says of a request is what is accepted. Method: each documented field is sent with its example, with a
//! wrong type, and at and beyond its documented limits.

use serde_json::{Map, Value, json};

use super::*;
use crate::http::{openapi, shape::Head};

/// Reads and checks a body as far as it can be without a model.
fn accept<B: Body>(body: &Value) -> Result<(), ApiError> {
    let head = Head { request: "r".into(), created: 0, model: "m".into(), fingerprint: "f".into() };
    let ask = check::parse::<B>(body.to_string().as_bytes())?.ask(head)?;
    let defaults = crate::config::Defaults { temperature: None, top_p: None, tokens_max: 16 };
    ask.check(&defaults, &crate::weights::Recommended::default(), 0, 49_152).map(drop)
}

/// Reads a body that needs a model to be checked further.
fn read<B: serde::de::DeserializeOwned>(body: &Value) -> Result<(), ApiError> {
    check::parse::<B>(body.to_string().as_bytes()).map(drop)
}

type Accept = fn(&Value) -> Result<(), ApiError>;

fn requests() -> Vec<(&'static str, Accept)> {
    vec![
        ("ChatRequest", accept::<ChatRequest>),
        ("CompletionRequest", accept::<CompletionRequest>),
        ("QueryRequest", accept::<QueryRequest>),
        ("ResponsesRequest", accept::<ResponsesRequest>),
        ("MessagesRequest", accept::<MessagesRequest>),
        ("EmbeddingsRequest", read::<crate::http::embed::EmbeddingsRequest>),
        ("TokenizeRequest", read::<crate::http::tokens::TokenizeRequest>),
        ("DetokenizeRequest", read::<crate::http::tokens::DetokenizeRequest>),
    ]
}

fn properties(schema: &Value) -> &Map<String, Value> {
    schema["properties"].as_object().expect("a request is an object")
}

/// A body with what must be there.
fn base(schema: &Value) -> Value {
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut body: Map<String, Value> =
        required.map(|name| (name.to_owned(), properties(schema)[name]["example"].clone())).collect();
    // one field needs another beside it
    if properties(schema).contains_key("top_logprobs") {
        body.insert("logprobs".into(), true.into());
    }
    body.into()
}

fn with(base: &Value, name: &str, value: Value) -> Value {
    let mut body = base.clone();
    body[name] = value;
    body
}

fn is_number(field: &Value) -> bool {
    let kinds = field["type"].to_string();
    kinds.contains("number") || kinds.contains("integer")
}

#[test]
fn every_documented_field_is_accepted_and_of_a_wrong_type_refused() {
    let document = openapi::document(&crate::http::described());
    for (name, accept) in requests() {
        let schema = &document["components"]["schemas"][name];
        let base = base(schema);
        accept(&base).unwrap_or_else(|e| panic!("{name}: {base}: {e}"));
        for (field, about) in properties(schema) {
            assert!(about["description"].is_string(), "{name}.{field} is not described");
            let example = about.get("example").unwrap_or_else(|| panic!("{name}.{field} has no example")).clone();
            let body = with(&base, field, example);
            accept(&body).unwrap_or_else(|e| panic!("{name}.{field}: {body}: {e}"));
            let wrong = if is_number(about) { json!("x") } else { json!(7.5) };
            let refused =
                accept(&with(&base, field, wrong)).err().unwrap_or_else(|| panic!("{name}.{field} takes anything"));
            assert!(
                refused.param.as_deref().is_some_and(|param| param.starts_with(field.as_str())),
                "{name}.{field}: {refused:?}"
            );
        }
        accept(&with(&base, "a_field_of_tomorrow", json!({"x": 1}))).unwrap();
    }
}

#[test]
fn documented_limits_are_the_real_ones() {
    let document = openapi::document(&crate::http::described());
    let mut seen = 0;
    for (name, accept) in &requests()[..5] {
        let schema = &document["components"]["schemas"][*name];
        let base = base(schema);
        for (field, about) in properties(schema) {
            for (limit, beyond) in [("minimum", -1.0), ("maximum", 1.0)] {
                let Some(bound) = about.get(limit).and_then(Value::as_f64) else { continue };
                let number =
                    |x: f64| if about["type"].to_string().contains("integer") { json!(x as i64) } else { json!(x) };
                seen += 1;
                accept(&with(&base, field, number(bound))).unwrap_or_else(|e| panic!("{name}.{field} = {bound}: {e}"));
                let refused = accept(&with(&base, field, number(bound + beyond)));
                assert_eq!(
                    refused.err().and_then(|e| e.param).as_deref(),
                    Some(field.as_str()),
                    "{name}: beyond {bound}"
                );
            }
        }
    }
    assert!(seen > 40, "only {seen} limits are documented");
}

#[test]
fn what_cannot_be_is_refused_by_its_field() {
    let user = json!([{"role": "user", "content": "hi"}]);
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    let chat = |more: Value| {
        let mut body = json!({"messages": user});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        accept::<ChatRequest>(&body).err().and_then(|e| e.param)
    };
    let schema = json!({"type": "json_object"});
    for (more, param) in [
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
        (json!({"response_format": schema, "ignore_eos": true}), "ignore_eos"),
        (json!({"response_format": schema, "tools": tool, "tool_choice": "required"}), "response_format"),
        (json!({"guided_regex": "a", "tools": tool}), "guided_regex"),
        (json!({"tools": tool, "tool_choice": {"type": "function", "function": {"name": "g"}}}), "tool_choice"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].name"),
        (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
    ] {
        assert_eq!(chat(more.clone()).as_deref(), Some(param), "{more}");
    }
    assert_eq!(chat(json!({"response_format": schema, "tools": tool})), None);
    let param = |error: Result<(), ApiError>| error.err().and_then(|e| e.param).unwrap_or_default();
    assert_eq!(param(accept::<CompletionRequest>(&json!({"prompt": "a", "suffix": "b"}))), "suffix");
    assert_eq!(param(accept::<CompletionRequest>(&json!({"prompt": "a", "best_of": 2}))), "best_of");
    accept::<CompletionRequest>(&json!({"prompt": "a", "echo": true, "max_tokens": 0})).unwrap();
    for field in ["previous_response_id", "conversation"] {
        assert_eq!(param(accept::<ResponsesRequest>(&json!({"input": "a", field: "b"}))), field);
    }
    assert_eq!(param(accept::<ResponsesRequest>(&json!({"input": "a", "store": true}))), "store");
    assert_eq!(param(accept::<MessagesRequest>(&json!({"messages": user}))), "max_tokens");
}
