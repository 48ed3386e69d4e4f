//! Goal: a request gives the same tokens and the same log-probabilities wherever and however it is computed. Method: twelve requests,
//! greedy and seeded, that use all that can change a choice; asked of a node each alone with a cold and with a warm prefix cache and
//! then among others, of a node with one thread whose steps cut prompts into small pieces, and of one that has too little KV memory
//! and must preempt. Answers are compared as tokens and as whole JSON choices, numbers included.

use futures::future::{join, join_all};
use serde_json::{Value, json};

use crate::support::{
    client::{Client, Wire},
    cluster::{NodePlan, lone_node},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

/// With the twelve, a whole batch.
const OTHERS: usize = 20;

/// About 23 KB a token: 34 blocks, room for the longest request and little more.
const TIGHT: &str = "threads = 2\nmax_context = 400\nkv_cache_memory = \"12MiB\"";

const SMALL_STEPS: &str = "threads = 1\nmax_batch_size = 32\nmax_batch_tokens = 37";

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn requests() -> Vec<(&'static str, Value)> {
    let long = "The gate opens when the tide turns, and the boats that waited go up with the water. ".repeat(12);
    let schema = json!({
        "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": false,
    });
    vec![
        (CHAT, json!({"messages": user("Name a colour."), "temperature": 0, "logprobs": true, "top_logprobs": 5})),
        (
            CHAT,
            json!({"messages": user("Tell me of the sea."), "temperature": 1.0, "top_p": 1.0, "seed": 7, "logprobs": true}),
        ),
        (
            CHAT,
            json!({"messages": user("Tell me of bread."), "temperature": 1.2, "top_k": 20, "min_p": 0.02, "seed": -3, "n": 2}),
        ),
        (
            CHAT,
            json!({"messages": user("List ten words."), "temperature": 0, "frequency_penalty": 0.8, "presence_penalty": 0.4}),
        ),
        (
            CHAT,
            json!({"messages": user("Say it again and again."), "temperature": 0.9, "top_p": 0.9, "seed": 11, "repetition_penalty": 1.3,
            "logprobs": true, "top_logprobs": 2}),
        ),
        (
            COMPLETION,
            json!({"prompt": "Once upon a time", "temperature": 0, "logit_bias": {"253": -100, "28": 5}, "logprobs": 3}),
        ),
        (COMPLETION, json!({"prompt": long, "temperature": 0, "logprobs": 0, "max_tokens": 40})),
        (
            COMPLETION,
            json!({"prompt": format!("A song: {long}"), "temperature": 0.7, "top_p": 0.92, "seed": 5, "max_tokens": 40}),
        ),
        (COMPLETION, json!({"prompt": format!("In short: {long}"), "echo": true, "logprobs": 2, "max_tokens": 0})),
        (
            COMPLETION,
            json!({"prompt": ["The sky is", "The sea is"], "temperature": 0, "stop": [" and", "\n"], "logprobs": 1}),
        ),
        (
            CHAT,
            json!({"messages": user("Invent a person."), "temperature": 0.8, "seed": 2, "max_tokens": 60,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "strict": true, "schema": schema}}}),
        ),
        (
            CHAT,
            json!({"messages": user("A time of day?"), "temperature": 1.0, "seed": 9, "guided_regex": "[01][0-9]:[0-5][0-9]", "logprobs": true}),
        ),
    ]
}

/// All of an answer but what names the request.
#[derive(Debug, PartialEq)]
struct Said {
    tokens: Vec<Vec<u32>>,
    choices: Value,
    usage: Value,
}

async fn ask(client: &Client, base: &str, (path, body): &(&str, Value)) -> Said {
    let mut body = body.clone();
    if body.get("max_tokens").is_none() {
        body["max_tokens"] = 24.into();
    }
    let Wire { tokens, body } = client.wire(&format!("{base}{path}"), &body).await;
    Said { tokens: tokens.into_values().collect(), choices: body["choices"].clone(), usage: body["usage"].clone() }
}

async fn each_alone(client: &Client, base: &str, requests: &[(&'static str, Value)]) -> Vec<Said> {
    let mut all = Vec::new();
    for request in requests {
        all.push(ask(client, base, request).await);
    }
    all
}

async fn together(client: &Client, base: &str, requests: &[(&'static str, Value)]) -> Vec<Said> {
    join_all(requests.iter().map(|request| ask(client, base, request))).await
}

async fn among_others(client: &Client, base: &str, requests: &[(&'static str, Value)]) -> Vec<Said> {
    let other = |i: usize| {
        let prompt = format!("Guest {i} speaks of {}", "wind and water ".repeat(i));
        let sampling = if i.is_multiple_of(2) { json!(0) } else { json!(1.1) };
        let body =
            json!({"prompt": prompt, "max_tokens": 6 + i, "temperature": sampling, "seed": i, "ignore_eos": true});
        async move { ask(client, base, &(COMPLETION, body)).await }
    };
    join(together(client, base, requests), join_all((0..OTHERS).map(other))).await.0
}

/// Beside three answers that outgrow the pool together, so that someone must be preempted, whoever comes first.
async fn beside_growing(client: &Client, base: &str, requests: &[(&'static str, Value)]) -> Vec<Said> {
    let growing = |i: usize| {
        let body = json!({"prompt": format!("Volume {i}"), "max_tokens": 300, "temperature": 0, "ignore_eos": true});
        async move { ask(client, base, &(COMPLETION, body)).await }
    };
    join(join_all((0..3).map(growing)), together(client, base, requests)).await.1
}

fn compare(how: &str, expected: &[Said], found: &[Said]) {
    for (i, (expected, found)) in expected.iter().zip(found).enumerate() {
        assert_eq!(expected, found, "request {i} changed {how}");
    }
    println!("{} answers are the same {how}", found.len());
}

#[tokio::test]
async fn answers_do_not_depend_on_how_they_are_computed() {
    let (client, requests) = (Client::new(), requests());
    let (expected, base) = {
        let (_node, base, _folder) = lone_node(NodePlan { lines: "threads = 2", ..NodePlan::named("wide") }).await;
        let expected = each_alone(&client, &base, &requests).await;
        assert!(expected.iter().flat_map(|said| &said.tokens).any(|tokens| tokens.len() > 8), "{expected:?}");
        assert!(client.metric(&base, "vllm:prefix_cache_hits_total").await < 1000.0);
        compare("with a warm prefix cache", &expected, &each_alone(&client, &base, &requests).await);
        assert!(client.metric(&base, "vllm:prefix_cache_hits_total").await > 300.0, "the cache was not used");
        compare("among 20 others", &expected, &among_others(&client, &base, &requests).await);
        (expected, base)
    };
    assert!(client.get(&base).await.is_err(), "the first node is gone, and its memory with it");
    {
        let (_node, base, _folder) = lone_node(NodePlan { lines: SMALL_STEPS, ..NodePlan::named("narrow") }).await;
        compare("in small steps of one thread", &expected, &among_others(&client, &base, &requests).await);
    }
    let (_node, base, _folder) = lone_node(NodePlan { lines: TIGHT, ..NodePlan::named("tight") }).await;
    compare("with little KV memory", &expected, &beside_growing(&client, &base, &requests).await);
    let preemptions = client.metric(&base, "vllm:num_preemptions_total").await;
    assert!(preemptions > 0.0, "no sequence was preempted");
    println!("{preemptions} preemptions");
}

/// The same law where keys and values are kept in fewer bits, which is a device class of its own.
#[tokio::test]
async fn answers_from_an_int8_cache_do_not_depend_on_company_either() {
    let (client, requests) = (Client::new(), requests());
    let lines = "threads = 2\nkv_cache_dtype = \"int8\"";
    let (_node, base, _folder) = lone_node(NodePlan { lines, ..NodePlan::named("int8") }).await;
    let device = client.get(&format!("{base}/health")).await.unwrap().body["device"].clone();
    assert!(device.as_str().unwrap().ends_with("-kv-int8"), "{device}");
    let expected = each_alone(&client, &base, &requests).await;
    compare("among 20 others, in int8", &expected, &among_others(&client, &base, &requests).await);
}
