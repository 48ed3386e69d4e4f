//! Goal: every API gives what it promises on a real model, and all of it outlives the loss of its node byte for byte. Method: one balancer
//! and two nodes; answers held to schemas and forced calls are checked, streams compared with whole answers, and each kind of answer is
//! asked for twice at once, so that each node has one, before one node is killed.

use futures::{future::join_all, join};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{
    LOADING, MODEL,
    client::Client,
    cluster::{Cluster, NodePlan, Plan, Registry},
    until,
};

const CHAT: &str = "/v1/chat/completions";

async fn two_nodes() -> Cluster {
    let nodes = ["n1", "n2"].map(|id| NodePlan { lines: "threads = 1", ..NodePlan::named(id) });
    Cluster::start(Plan::new(Registry::Static, &nodes)).await
}

fn chat(prompt: &str, more: Value) -> Value {
    let mut body =
        json!({"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 120, "seed": 5});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn person() -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    })
}

fn long_list() -> Value {
    let words = json!({"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 60});
    json!({"type": "object", "properties": {"words": words}, "required": ["words"], "additionalProperties": false})
}

fn tool(name: &str, parameters: &Value) -> Value {
    json!({"type": "function", "function": {"name": name, "description": "Notes something down.", "parameters": parameters}})
}

#[tokio::test]
async fn answers_keep_to_schemas_calls_and_counts() {
    let cluster = two_nodes().await;
    let (client, edge) = (Client::new(), cluster.edge());
    let url = format!("{edge}{CHAT}");
    for seed in 0..4 {
        let format =
            json!({"type": "json_schema", "json_schema": {"name": "person", "schema": person(), "strict": true}});
        let body = chat("Invent a person.", json!({"response_format": format, "seed": seed, "temperature": 1.0}));
        let answer = client.post(&url, &body).await.unwrap().body;
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        let found: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert!(found["name"].is_string() && found["age"].as_u64().is_some_and(|age| age <= 120), "{found}");

        let tools = json!([tool("note_person", &person())]);
        let body = chat(
            "Note Anna, who is 30.",
            json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false, "seed": seed, "temperature": 1.0}),
        );
        let answer = client.post(&url, &body).await.unwrap().body;
        let choice = &answer["choices"][0];
        let call = &choice["message"]["tool_calls"][0]["function"];
        assert_eq!(
            (&choice["finish_reason"], &call["name"]),
            (&json!("tool_calls"), &json!("note_person")),
            "{answer}"
        );
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        assert!(arguments["age"].as_u64().is_some_and(|age| age <= 120), "{arguments}");
    }
}

#[tokio::test]
async fn logprobs_are_the_same_in_a_stream_and_for_each_of_several_choices() {
    let cluster = two_nodes().await;
    let (client, url) = (Client::new(), format!("{}{CHAT}", cluster.edge()));
    let wishes = json!({"logprobs": true, "top_logprobs": 3, "n": 3, "max_tokens": 24, "temperature": 1.0});
    let whole = client.post(&url, &chat("Tell me of the sea.", wishes.clone())).await.unwrap().body;
    let mut streamed: Vec<Vec<Value>> = vec![Vec::new(); 3];
    let mut body = chat("Tell me of the sea.", wishes);
    body["stream"] = true.into();
    let stream = client.stream(&url, &body, |event| {
        let choice = &event["choices"][0];
        let entries = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        streamed[choice["index"].as_u64().unwrap() as usize].extend(entries);
    });
    assert!(stream.await.is_whole);
    for (i, entries) in streamed.iter().enumerate() {
        let choice = &whole["choices"][i];
        assert_eq!(&json!(entries), &choice["logprobs"]["content"], "choice {i}");
        // a token may be a part of a character
        let bytes = entries.iter().flat_map(|entry| serde_json::from_value::<Vec<u8>>(entry["bytes"].clone()).unwrap());
        let joined = String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned();
        assert_eq!(joined, choice["message"]["content"].as_str().unwrap(), "choice {i}");
        assert!(entries.iter().all(|entry| entry["top_logprobs"].as_array().unwrap().len() == 3));
    }
    assert_ne!(streamed[0], streamed[1], "choices draw their own numbers");
}

#[tokio::test]
async fn vectors_and_tokens_come_through_the_edge() {
    let cluster = two_nodes().await;
    let (client, edge) = (Client::new(), cluster.edge());
    let texts: Vec<String> =
        (0..20).map(|i| format!("text number {i} about {}", ["the sea", "a train"][i % 2])).collect();
    let url = format!("{edge}/v1/embeddings");
    let many = client.post(&url, &json!({"input": texts, "model": MODEL})).await.unwrap().body;
    let one = client.post(&url, &json!({"input": texts[7]})).await.unwrap().body;
    assert_eq!(many["data"].as_array().unwrap().len(), 20);
    assert_eq!(many["data"][7]["embedding"], one["data"][0]["embedding"]);
    let vector: Vec<f64> = serde_json::from_value(one["data"][0]["embedding"].clone()).unwrap();
    let length: f64 = vector.iter().map(|x| x * x).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");
    let cut = client.post(&url, &json!({"input": texts[7], "dimensions": 64})).await.unwrap().body;
    assert_eq!(cut["data"][0]["embedding"].as_array().unwrap().len(), 64);
    let refused = client.post(&url, &json!({"input": texts[7], "dimensions": 100_000})).await.unwrap();
    assert_eq!((refused.status, &refused.body["error"]["param"]), (400, &json!("dimensions")));

    let tokens = client.post(&format!("{edge}/tokenize"), &json!({"prompt": "the sea, süß"})).await.unwrap().body;
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    let text = client.post(&format!("{edge}/detokenize"), &json!({"tokens": tokens["tokens"]})).await.unwrap().body;
    assert_eq!(text["prompt"], "the sea, süß");
    let said =
        client.post(&format!("{edge}/tokenize"), &json!({"messages": [{"role": "user", "content": "hi"}]})).await;
    assert!(said.unwrap().body["count"].as_u64().unwrap() > 5);
    for path in ["/openapi.json", "/docs"] {
        let (at_edge, at_node) =
            (client.text(&format!("{edge}{path}")).await, client.text(&format!("{}{path}", cluster.node("n1"))).await);
        assert!(at_edge.contains("/v1/chat/completions") && at_edge == at_node, "{path}");
    }
}

/// What is asked for, each in another shape.
fn kinds() -> Vec<(&'static str, &'static str, Value)> {
    let format = json!({"type": "json_schema", "json_schema": {"name": "words", "schema": long_list()}});
    let tools = json!([tool("note_words", &long_list())]);
    let flat = json!([{"type": "function", "name": "note_words", "parameters": long_list()}]);
    let named = json!([{"name": "note_words", "input_schema": long_list()}]);
    let said = json!([{"role": "user", "content": "List words of the sea."}]);
    let ask = "List words of the sea.";
    vec![
        (
            "schema and logprobs, streamed",
            CHAT,
            chat(ask, json!({"stream": true, "response_format": format, "logprobs": true, "top_logprobs": 2})),
        ),
        ("logprobs of two choices, whole", CHAT, chat(ask, json!({"logprobs": true, "n": 2}))),
        (
            "a forced call, streamed",
            CHAT,
            chat(
                ask,
                json!({"stream": true, "tools": tools, "tool_choice": "required", "stream_options": {"include_usage": true}}),
            ),
        ),
        ("a forced call, whole", CHAT, chat(ask, json!({"tools": tools, "tool_choice": "required"}))),
        (
            "echo and logprobs, streamed",
            "/v1/completions",
            json!({"prompt": "The sea", "echo": true, "logprobs": 1, "stream": true, "max_tokens": 120, "seed": 5, "frequency_penalty": 0.5}),
        ),
        (
            "echo and logprobs, whole",
            "/v1/completions",
            json!({"prompt": "The sea", "echo": true, "logprobs": 1, "max_tokens": 120, "seed": 5, "repetition_penalty": 1.2}),
        ),
        (
            "a response, streamed",
            "/v1/responses",
            json!({"input": ask, "stream": true, "max_output_tokens": 120, "temperature": 0}),
        ),
        (
            "a response that calls, streamed",
            "/v1/responses",
            json!({"input": ask, "stream": true, "max_output_tokens": 120, "temperature": 0, "tools": flat, "tool_choice": "required"}),
        ),
        (
            "a message, streamed",
            "/v1/messages",
            json!({"messages": said, "stream": true, "max_tokens": 120, "temperature": 0}),
        ),
        (
            "a message that calls, streamed",
            "/v1/messages",
            json!({"messages": said, "stream": true, "max_tokens": 120, "temperature": 0, "tools": named, "tool_choice": {"type": "any"}}),
        ),
    ]
}

/// Without what is another each time: the time of the request, and signs of life.
fn timeless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let text = text.replace(": wait\n\n", "");
    let mut rest = text.as_str();
    while let Some(at) = rest.find("\"created") {
        let colon = at + rest[at..].find(':').unwrap() + 1;
        out += &rest[..colon];
        rest = rest[colon..].trim_start_matches(|c: char| c.is_ascii_digit());
    }
    out + rest
}

#[tokio::test]
async fn every_kind_of_answer_outlives_its_node_byte_for_byte() {
    let mut cluster = two_nodes().await;
    let (client, edge) = (Client::new(), cluster.edge());
    let kinds = kinds();
    let mut quiet = Vec::new();
    for (i, (_, path, body)) in kinds.iter().enumerate() {
        quiet.push(timeless(&client.raw(&format!("{edge}{path}"), &format!("same-{i}"), body, |_| {}).await));
    }
    let begun = AtomicUsize::new(0);
    let streams_total = 2 * kinds.iter().filter(|(_, _, body)| body["stream"] == true).count();
    let ask = |i: usize| {
        let ((_, path, body), client, begun) = (&kinds[i / 2], client.clone(), &begun);
        let url = format!("{edge}{path}");
        async move {
            let mut has_begun = false;
            let note = |so_far: usize| {
                if so_far > 2000 && !std::mem::replace(&mut has_begun, true) {
                    begun.fetch_add(1, Ordering::Relaxed);
                }
            };
            timeless(&client.raw(&url, &format!("same-{}", i / 2), body, note).await)
        }
    };
    let strike = async {
        until("all streams have begun", LOADING, || async { begun.load(Ordering::Relaxed) == streams_total }).await;
        cluster.kill_node("n2");
    };
    let (answers, ()) = join!(join_all((0..2 * kinds.len()).map(ask)), strike);
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer, &quiet[i / 2], "{}: changed", kinds[i / 2].0);
    }
    let resumed = client.metric(&cluster.admin(), "tidegate_resumes_total").await;
    println!("{resumed} of {} answers moved to another node", 2 * kinds.len());
    assert!(resumed >= kinds.len() as f64 / 2.0, "too few were on the node: {resumed}");
}
