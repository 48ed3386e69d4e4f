//! What is asked: every shape of request, greedy and seeded, long streams most.

use serde_json::{Value, json};

use crate::support::MODEL;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

/// One request of the load.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Its `x-request-id`, so that ids made of it are the same each time.
    pub(crate) id: String,
    pub(crate) path: &'static str,
    pub(crate) body: Value,
}

impl Request {
    pub(crate) fn is_stream(&self) -> bool {
        self.body["stream"] == true
    }
}

/// All of them; the long ones make `long` tokens.
pub(crate) fn all(long: u32) -> Vec<Request> {
    let mut all = Vec::new();
    for i in 0..4 {
        all.extend([greedy(i, long), seeded(i, long)]);
    }
    all.extend([penalized(long), completion(long), scored(true), scored(false), many(true), many(false)]);
    all.extend([person(true), person(false), tool(true), tool(false), clock(), prompts(), whole(long)]);
    all.extend([response(true), response(false), message(true), message(false)]);
    let of = |(i, (path, mut body)): (usize, (&'static str, Value))| {
        body["model"] = MODEL.into();
        Request { id: format!("faults-{i:02}"), path, body }
    };
    all.into_iter().enumerate().map(of).collect()
}

type Asked = (&'static str, Value);

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// `body` with more fields.
fn with(mut body: Value, more: &Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn greedy(i: u32, long: u32) -> Asked {
    let messages = user(&format!("Tell story number {i} of a lighthouse."));
    let body = json!({"messages": messages, "temperature": 0, "max_tokens": long, "ignore_eos": true});
    (CHAT, with(body, &json!({"stream": true, "stream_options": {"include_usage": true}})))
}

fn seeded(i: u32, long: u32) -> Asked {
    let messages = user(&format!("Tell story number {i} of a harbour."));
    let body = json!({"messages": messages, "temperature": 1.1, "seed": i, "max_tokens": long, "ignore_eos": true});
    (CHAT, with(body, &json!({"top_p": 0.95, "stream": true, "stream_options": {"include_usage": true}})))
}

/// What is penalized depends on every token before.
fn penalized(long: u32) -> Asked {
    let body = json!({"messages": user("List all the winds."), "temperature": 0.8, "seed": 3, "stream": true});
    let more =
        json!({"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.1, "max_tokens": long});
    (CHAT, with(body, &more))
}

fn completion(long: u32) -> Asked {
    let body = json!({"prompt": "It was a dark and stormy night", "temperature": 0.9, "top_k": 30, "min_p": 0.02});
    (COMPLETIONS, with(body, &json!({"seed": 8, "stream": true, "max_tokens": long, "ignore_eos": true})))
}

fn whole(long: u32) -> Asked {
    (CHAT, json!({"messages": user("Explain the tides."), "temperature": 0, "max_tokens": long, "ignore_eos": true}))
}

fn scored(stream: bool) -> Asked {
    let body = json!({"messages": user("Describe the sea."), "temperature": 1.0, "seed": 7, "max_tokens": 60});
    (CHAT, with(body, &json!({"logprobs": true, "top_logprobs": 3, "stream": stream})))
}

fn many(stream: bool) -> Asked {
    let body = json!({"messages": user("Name a ship."), "temperature": 1.2, "seed": -4, "n": 3, "max_tokens": 40});
    (CHAT, with(body, &json!({"stream": stream, "ignore_eos": true})))
}

fn person(stream: bool) -> Asked {
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "story"],
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "story": {"type": "string", "minLength": 80}},
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "person", "strict": true, "schema": schema}});
    let body = json!({"messages": user("Invent a sailor."), "temperature": 0.8, "seed": 2, "max_tokens": 120});
    (CHAT, with(body, &json!({"response_format": format, "stream": stream})))
}

fn tool(stream: bool) -> Asked {
    let parameters = json!({
        "type": "object", "required": ["place", "why"], "additionalProperties": false,
        "properties": {"place": {"type": "string"}, "why": {"type": "string", "minLength": 40}},
    });
    let function = json!({"name": "get_tide", "description": "The next high tide.", "parameters": parameters});
    let body = json!({"messages": user("When is high tide?"), "temperature": 0.9, "seed": 5, "max_tokens": 120});
    let tools = json!([{"type": "function", "function": function}]);
    (CHAT, with(body, &json!({"tools": tools, "tool_choice": "required", "stream": stream})))
}

fn clock() -> Asked {
    let body = json!({"messages": user("A row of times?"), "temperature": 1.0, "seed": 9, "stream": true});
    (CHAT, with(body, &json!({"guided_regex": "([01][0-9]:[0-5][0-9], ){12}end", "max_tokens": 120})))
}

fn prompts() -> Asked {
    let body = json!({"prompt": ["The sky is", "The sea is"], "temperature": 0, "stop": [" and", "\n"], "logprobs": 1});
    (COMPLETIONS, with(body, &json!({"max_tokens": 60, "echo": true})))
}

fn response(stream: bool) -> Asked {
    (RESPONSES, json!({"input": "Sing of the sea.", "temperature": 0, "max_output_tokens": 80, "stream": stream}))
}

fn message(stream: bool) -> Asked {
    let body = json!({"messages": user("Praise the moon."), "temperature": 0.0, "max_tokens": 80});
    (MESSAGES, with(body, &json!({"stream": stream})))
}
