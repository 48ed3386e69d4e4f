//! The API as an OpenAPI document and as a page for people, both made from the table of routes and the types that requests are read into.

use serde_json::{Value, json};
use tidegate_common::contract::event;
use utoipa::{
    ToSchema,
    openapi::{RefOr, Schema},
};

/// Examples by a field's type or, for plain objects, its name: utoipa keeps none beside either.
const EXAMPLES: [(&str, &str); 14] = [
    ("chat_template_kwargs", r#"{"enable_thinking": false}"#),
    ("guided_json", r#"{"type": "object"}"#),
    ("logit_bias", r#"{"42": -1.5}"#),
    ("metadata", r#"{"topic": "sky"}"#),
    ("Choice", r#"{"type": "auto"}"#),
    ("Items", r#""Why is the sky blue?""#),
    ("OneOrMany", r#"["\n\n"]"#),
    ("Prompts", r#""Once upon a time""#),
    ("ResponseFormat", r#"{"type": "json_object"}"#),
    ("StreamOptions", r#"{"include_usage": true}"#),
    ("StructuredOutputs", r#"{"regex": "[0-9]{1,3}"}"#),
    ("TextForm", r#"{"format": {"type": "text"}}"#),
    ("Thinking", r#"{"type": "disabled"}"#),
    ("ToolChoice", r#""auto""#),
];

/// What a route says of itself.
pub(super) struct Described {
    pub(super) path: &'static str,
    pub(super) method: &'static str,
    pub(super) summary: &'static str,
    pub(super) body: Option<RequestBody>,
    /// Whether `stream` makes it a stream of events.
    pub(super) streams: bool,
}

/// The type of a request's body.
pub(super) struct RequestBody {
    name: String,
    schemas: Vec<(String, RefOr<Schema>)>,
}

impl RequestBody {
    pub(super) fn of<T: ToSchema>() -> Self {
        let mut schemas = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut schemas);
        Self { name: T::name().into_owned(), schemas }
    }
}

/// The document.
pub(super) fn document(routes: &[Described]) -> Value {
    let mut paths = serde_json::Map::new();
    let mut schemas = serde_json::Map::new();
    for route in routes {
        paths.insert(route.path.into(), json!({route.method: operation(route)}));
        for (name, schema) in route.body.iter().flat_map(|body| &body.schemas) {
            schemas.insert(name.clone(), json!(schema));
        }
    }
    let fields = schemas.values_mut().filter_map(|schema| schema.get_mut("properties")?.as_object_mut());
    fields.flat_map(|fields| fields.iter_mut()).for_each(|(name, field)| complete(name, field));
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Tidegate", "version": env!("CARGO_PKG_VERSION"), "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

/// Says of a field that refers to a type what a plain field says of itself.
fn complete(name: &str, field: &mut Value) {
    if field.get("example").is_some() {
        return;
    }
    let found = field["oneOf"].as_array().into_iter().flatten().find(|one| one.get("$ref").is_some());
    let reference = found.cloned().unwrap_or_else(|| field.clone());
    let of_type = reference["$ref"].as_str().and_then(|name| name.rsplit('/').next());
    if let Some(about) = reference.get("description") {
        field["description"] = about.clone();
    }
    let example = EXAMPLES.iter().find(|(of, _)| *of == of_type.unwrap_or(name));
    if let Some(example) = example.and_then(|(_, json)| serde_json::from_str(json).ok()) {
        field["example"] = example;
    }
}

fn operation(route: &Described) -> Value {
    let mut content = json!({"application/json": {"schema": {"type": "object"}}});
    if route.streams {
        content[event::CONTENT_TYPE] = json!({"schema": {"type": "string"}});
    }
    let error = json!({"description": "a refusal: its message names the field and the limit", "content": {"application/json": {"schema": {"type": "object"}}}});
    let mut operation = json!({"summary": route.summary, "responses": {"200": {"description": "the answer", "content": content}, "default": error}});
    if let Some(body) = &route.body {
        let schema = json!({"$ref": format!("#/components/schemas/{}", body.name)});
        operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
    }
    operation
}

/// The page, made from the document.
pub(super) fn page(document: &Value) -> String {
    let mut out = String::from(HEAD);
    for (path, operations) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in operations.as_object().into_iter().flatten() {
            out += &format!("<h2>{} <code>{}</code></h2>", method.to_uppercase(), escaped(path));
            out += &format!("<p>{}</p>", escaped(operation["summary"].as_str().unwrap_or_default()));
            if let Some(name) = body_name(operation) {
                out += &fields(&document["components"]["schemas"][name]);
            }
        }
    }
    out + "</body></html>"
}

const HEAD: &str = "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Tidegate API</title>\
<meta name=\"viewport\" content=\"width=device-width\"><style>body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;\
padding:0 1rem}table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #8884;padding:.3rem .6rem;text-align:left;\
vertical-align:top}code{font-size:.95em}</style></head><body><h1>Tidegate API</h1>\
<p>The same as a document for programs: <a href=\"/openapi.json\">/openapi.json</a>.</p>";

fn body_name(operation: &Value) -> Option<&str> {
    let reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str()?;
    reference.rsplit('/').next()
}

fn fields(schema: &Value) -> String {
    let required = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name));
    let row = |(name, field): (&String, &Value)| {
        let need = if required(name) { " (required)" } else { "" };
        let bounds = ["minimum", "maximum"].map(|key| field.get(key).map_or(String::new(), |v| format!("{key} {v}. ")));
        let example = field
            .get("example")
            .map_or(String::new(), |example| format!("<code>{}</code>", escaped(&example.to_string())));
        let about = escaped(field["description"].as_str().unwrap_or_default());
        format!(
            "<tr><td><code>{}</code>{need}</td><td>{about} {}</td><td>{example}</td></tr>",
            escaped(name),
            bounds.concat()
        )
    };
    let rows: String = schema["properties"].as_object().into_iter().flatten().map(row).collect();
    format!("<table><tr><th>Field</th><th></th><th>Example</th></tr>{rows}</table>")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_escapes_what_it_shows() {
        let document = json!({"paths": {"/a<b": {"post": {"summary": "1 & 2"}}}});
        let page = page(&document);
        assert!(page.contains("POST <code>/a&lt;b</code>") && page.contains("1 &amp; 2"), "{page}");
    }
}
