//! Goal: whatever a client sends, it gets the OpenAI error shape with the right status, and others never notice. Method: a table of bad
//! requests, sent to a node and through the balancer while a stream runs on each; the stream must come out as in quiet.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    MODEL,
    client::{Client, End, chat, chat_stream},
    cluster::{Cluster, NodePlan, Plan, Registry},
};

/// One bad request: what is wrong, where it goes, its body, the status it must get and the field that must be named.
struct Bad(&'static str, &'static str, Vec<u8>, u16, Option<&'static str>);

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A chat request with one field changed.
fn with(field: &'static str, value: Value) -> Vec<u8> {
    let mut body = chat("Hello.", 4);
    body[field] = value;
    body.to_string().into_bytes()
}

fn table() -> Vec<Bad> {
    let bad = |what, field: &'static str, value| Bad(what, CHAT, with(field, value), 400, Some(field));
    let stops = vec!["x"; 100_000];
    vec![
        Bad("no body", CHAT, vec![], 400, None),
        Bad("broken JSON", CHAT, b"{\"model\": \"smollm2-135m\", ".to_vec(), 400, None),
        Bad("JSON that is no object", CHAT, b"[1, 2]".to_vec(), 400, None),
        Bad("deep nesting", CHAT, [b"[".repeat(100_000), b"]".repeat(100_000)].concat(), 400, None),
        Bad(
            "broken UTF-8",
            CHAT,
            b"{\"model\":\"smollm2-135m\",\"messages\":[{\"role\":\"user\",\"content\":\"\xff\xfe\"}]}".to_vec(),
            400,
            None,
        ),
        Bad("no messages", CHAT, json!({"model": MODEL}).to_string().into_bytes(), 400, None),
        bad("messages of the wrong type", "messages", json!("hello")),
        bad("no message at all", "messages", json!([])),
        Bad("a message of the wrong type", CHAT, with("messages", json!([42])), 400, None),
        bad("an unknown role", "messages", json!([{"role": "emperor", "content": "hi"}])),
        bad("tokens outside the vocabulary", "tidegate_resume", json!({"tokens": [[4_000_000_000u32]]})),
        bad("more choices resumed than asked for", "tidegate_resume", json!({"tokens": [[1], [2]]})),
        bad("temperature as text", "temperature", json!("hot")),
        bad("an absurd temperature", "temperature", json!(1e308)),
        bad("a negative temperature", "temperature", json!(-1)),
        bad("negative max_tokens", "max_tokens", json!(-1)),
        bad("fractional max_tokens", "max_tokens", json!(1.5)),
        bad("a billion choices", "n", json!(1_000_000_000)),
        bad("no choices", "n", json!(0)),
        bad("top_p of 7", "top_p", json!(7)),
        bad("a huge stop list", "stop", json!(stops)),
        bad("stop of the wrong type", "stop", json!({"a": 1})),
        bad("stream of the wrong type", "stream", json!("maybe")),
        Bad("an unknown model", CHAT, with("model", json!("gpt-17")), 404, Some("model")),
        Bad(
            "a prompt longer than the context",
            CHAT,
            with("messages", json!([{"role": "user", "content": "word ".repeat(60_000)}])),
            400,
            None,
        ),
        Bad("a completion without a prompt", COMPLETIONS, json!({"model": MODEL}).to_string().into_bytes(), 400, None),
        Bad(
            "a prompt of the wrong type",
            COMPLETIONS,
            json!({"model": MODEL, "prompt": {"a": 1}}).to_string().into_bytes(),
            400,
            None,
        ),
        Bad(
            "a body of 20 MB",
            CHAT,
            with("messages", json!([{"role": "user", "content": "x".repeat(20_000_000)}])),
            413,
            None,
        ),
    ]
}

#[tokio::test]
async fn bad_requests_are_refused_and_others_go_on() {
    // one thread: a busy machine that takes one of two away makes each step wait for it
    let nodes = [NodePlan { lines: "threads = 1", ..NodePlan::named("n1") }];
    let mut cluster = Cluster::start(Plan::new(Registry::Static, &nodes)).await;
    let client = Client::new();
    let mut faults = Vec::new();
    for (way, base) in [("node", cluster.node("n1")), ("balancer", cluster.edge())] {
        let url = format!("{base}{CHAT}");
        let quiet = client.stream(&url, &chat_stream("Tell me of the sea.", 200), |_| {}).await;
        assert_eq!(quiet.end(), End::Whole, "{:?}", quiet.fault);
        let beside = {
            let (client, url) = (client.clone(), url.clone());
            tokio::spawn(async move { client.stream(&url, &chat_stream("Tell me of the sea.", 200), |_| {}).await })
        };
        for bad in table() {
            faults.extend(check(&client, &base, &bad).await.map(|fault| format!("{way}: {}: {fault}", bad.0)));
        }
        nonsense(&base).await;
        let beside = beside.await.unwrap();
        assert_eq!(beside.end(), End::Whole, "{way}: {:?}", beside.fault);
        assert_eq!(beside.text, quiet.text, "{way}: the stream beside them changed");
        let after = client.post(&url, &chat("Hello.", 4)).await.unwrap();
        assert_eq!(after.status, 200, "{way}: {}", after.body);
    }
    for process in [cluster.process("n1").output(), cluster.balancer().output()] {
        assert!(!process.contains("panicked"), "something panicked:\n{process}");
    }
    assert!(faults.is_empty(), "{} of these:\n{}", faults.len(), faults.join("\n"));
}

/// What is not as it should be about the answer.
async fn check(client: &Client, base: &str, Bad(_, path, body, status, param): &Bad) -> Option<String> {
    let answer = match client.post_raw(&format!("{base}{path}"), body.clone()).await {
        Ok(answer) => answer,
        Err(error) => return Some(format!("no answer: {error:?}")),
    };
    let error = &answer.body["error"];
    let shape = error["message"].as_str().is_some_and(|m| !m.is_empty())
        && error["type"].is_string()
        && error.get("param").is_some()
        && error.get("code").is_some();
    let named = param.is_none_or(|param| error["param"].as_str().is_some_and(|p| p.starts_with(param)));
    let right = answer.status == *status && shape && named;
    (!right).then(|| format!("wanted {status} naming {param:?}, got {} {}", answer.status, answer.body))
}

/// What is not even HTTP must end the connection, and nothing else.
async fn nonsense(base: &str) {
    let address = base.strip_prefix("http://").unwrap();
    let cases: [&[u8]; 5] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: banana\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
    ];
    for case in cases {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(case).await.unwrap();
        // the client has said all it will, so that half a head is not waited for
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let ended = timeout(Duration::from_secs(15), stream.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "{address} holds on to {:?}", String::from_utf8_lossy(case));
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{:?} was accepted", String::from_utf8_lossy(case));
    }
}
