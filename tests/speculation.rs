//! Goal: speculative decoding changes no byte of an answer, greedy or seeded, and takes fewer steps where a text repeats itself. Method:
//! the same requests, as streams and whole, to a node that never guesses, to one that always does, with and without a draft model, and to
//! one as it comes; bytes compared, steps counted by the nodes' own metrics, so that no figure depends on how busy this machine is.

use serde_json::{Value, json};

use crate::support::{
    client::{Client, Wire},
    cluster::{NodePlan, lone_node},
};

const CHAT: &str = "/v1/chat/completions";

const ALWAYS: &str = "speculative = \"always\"";

/// The model as its own draft: no faster, but right about everything, if all is in order.
const DRAFTED: &str = "speculative = \"always\"\ndraft_model = \"smollm2-135m\"";

const NOTICE: &str = "The harbour office opens at eight and closes at five. Boats longer than twelve metres must ask for a berth \
    two days before they come. The fee is nine crowns a night, and water and power are part of it. Dogs are kept on a leash.";

const LIST: &str =
    r#"[{"name": "Ada", "city": "London", "active": true}, {"name": "Emil", "city": "Bergen", "active": true}]"#;

/// What each is, and the request; those that repeat much first.
fn requests() -> Vec<(&'static str, Value)> {
    let user = |text: String| json!([{"role": "user", "content": text}]);
    vec![
        ("quote", json!({"messages": user(format!("Repeat this text word for word:\n\n{NOTICE}")), "temperature": 0})),
        ("summary", json!({"messages": user(format!("Summarize this text:\n\n{NOTICE}")), "temperature": 0})),
        (
            "json",
            json!({"messages": user(format!("Write this JSON list again, with three people more:\n\n{LIST}")), "temperature": 0}),
        ),
        ("story", json!({"messages": user("Tell me a story of a lighthouse.".into()), "temperature": 0})),
        (
            "seeded",
            json!({"messages": user(format!("Rewrite this text:\n\n{NOTICE}")), "temperature": 0.8, "seed": 5, "logprobs": true}),
        ),
        (
            "penalized",
            json!({"messages": user(format!("Repeat this text:\n\n{NOTICE}")), "temperature": 0.6, "seed": 3,
            "frequency_penalty": 0.2, "repetition_penalty": 1.05, "logit_bias": {"253": -2}}),
        ),
        (
            "grammar",
            json!({"messages": user(format!("Write this JSON list again:\n\n{LIST}")), "temperature": 0,
            "response_format": {"type": "json_object"}}),
        ),
        (
            "stopped",
            json!({"messages": user(format!("Repeat this text word for word:\n\n{NOTICE}")), "temperature": 0,
            "stop": ["leash", "\n\n\n"], "max_tokens": 90}),
        ),
        (
            "several",
            json!({"messages": user("Count from one to thirty.".into()), "temperature": 0.7, "seed": 8, "n": 3}),
        ),
    ]
}

/// All of one request's answers but what names it, and the steps that they took.
#[derive(Debug, PartialEq)]
struct Said {
    tokens: Vec<Vec<u32>>,
    choices: Value,
    usage: Value,
    /// As it came over the wire.
    stream: String,
}

async fn ask(client: &Client, base: &str, body: &Value) -> (Said, f64) {
    let (url, mut body) = (format!("{base}{CHAT}"), body.clone());
    if body.get("max_tokens").is_none() {
        body["max_tokens"] = 48.into();
    }
    let before = client.metric(base, "tidegate_node_steps_total").await;
    let Wire { tokens, body: whole } = client.wire(&url, &body).await;
    let steps = client.metric(base, "tidegate_node_steps_total").await - before;
    body["stream"] = true.into();
    // which choice's token comes first is nobody's business
    let stream = if body.get("n").is_none() { client.raw(&url, "same", &body, |_| {}).await } else { String::new() };
    let (choices, usage) = (whole["choices"].clone(), whole["usage"].clone());
    (Said { tokens: tokens.into_values().collect(), choices, usage, stream: without_times(&stream) }, steps)
}

/// A stream without the second in which it was made.
fn without_times(stream: &str) -> String {
    let mut parts = stream.split("\"created\":");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |all, part| all + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}

async fn answers(client: &Client, lines: &'static str) -> (Vec<(Said, f64)>, f64, f64) {
    let (_node, base, _folder) = lone_node(NodePlan { lines, ..NodePlan::named("n1") }).await;
    let mut all = Vec::new();
    for (_, body) in requests() {
        all.push(ask(client, &base, &body).await);
    }
    let guessed = client.metric(&base, "vllm:spec_decode_num_draft_tokens_total").await;
    (all, guessed, client.metric(&base, "vllm:spec_decode_num_accepted_tokens_total").await)
}

#[tokio::test]
async fn speculation_changes_no_byte_and_saves_steps() {
    let client = Client::new();
    let (expected, none, _) = answers(&client, "speculative = \"off\"").await;
    assert_eq!(none, 0.0, "a node that is told not to guesses");
    for lines in [ALWAYS, DRAFTED, ""] {
        let (found, guessed, right) = answers(&client, lines).await;
        println!("with '{lines}': {guessed} guesses, {right} right");
        for (((what, _), (expected, off)), (found, on)) in requests().iter().zip(&expected).zip(&found) {
            assert_eq!(expected, found, "'{what}' changed with '{lines}'");
            println!("{what}: {} tokens in {off} steps, with guesses in {on}", expected.usage["completion_tokens"]);
        }
        assert!(right <= guessed);
        // what pays depends on how busy the machine is, so only the node that always guesses must
        let steps = |all: &[(Said, f64)], count: usize| all.iter().take(count).map(|(_, steps)| steps).sum::<f64>();
        match lines {
            ALWAYS => assert!(steps(&found, 3) < 0.75 * steps(&expected, 3), "{right} right of {guessed}"),
            // drawn from the same logits with the same numbers, also where the text does not repeat itself
            DRAFTED => assert!(steps(&found, 5) < 0.4 * steps(&expected, 5), "{right} right of {guessed}"),
            _ => {}
        }
    }
}
