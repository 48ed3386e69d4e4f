//! What the edge answers by itself, and what it refuses, in the OpenAI error shape.

use serde_json::{Value, json};

use crate::support::{CHAT, House, MODEL, chat, raw};

pub(crate) fn error(body: &str) -> (String, Option<String>) {
    let body: Value = serde_json::from_str(body).unwrap();
    assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string(), "{body}");
    (body["error"]["code"].as_str().unwrap().into(), body["error"]["param"].as_str().map(Into::into))
}

#[tokio::test]
async fn health_and_models_are_answered_at_the_edge() {
    let house = House::with_nodes(2).await;
    let response = house.client.get(house.url("/health")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.headers().contains_key("x-request-id"));
    let health: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
    assert_eq!((health["status"].as_str(), health["ready"].as_u64()), (Some("healthy"), Some(2)));
    let response = house.client.head(house.url("/health")).send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.text().await.unwrap().as_str()), (200, ""));
    let models: Value =
        serde_json::from_str(&house.client.get(house.url("/v1/models")).send().await.unwrap().text().await.unwrap())
            .unwrap();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
    assert_eq!(models["data"][0]["id"], MODEL);
}

#[tokio::test]
async fn without_members_the_edge_says_so() {
    let house = House::with_nodes(0).await;
    let response = house.client.get(house.url("/health")).send().await.unwrap();
    assert_eq!(response.status(), 503);
    let response = house.post(CHAT, &chat(false)).await;
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "1");
    assert_eq!(error(&response.text().await.unwrap()).0, "no_ready_node");
    let ready = house.client.get(format!("http://{}/readyz", house.admin)).send().await.unwrap();
    assert_eq!(ready.status(), 503);
}

#[tokio::test]
async fn what_is_not_public_does_not_exist() {
    let house = House::with_nodes(1).await;
    for path in ["/metrics", "/members", "/v1/models/x", "/"] {
        let response = house.client.get(house.url(path)).send().await.unwrap();
        assert_eq!(response.status(), 404, "{path}");
        assert_eq!(error(&response.text().await.unwrap()).0, "unknown_path");
    }
    let response = house.client.get(house.url(CHAT)).send().await.unwrap();
    assert_eq!(response.status(), 405);
    assert_eq!(response.headers()["allow"], "POST");
    assert_eq!(error(&response.text().await.unwrap()).0, "method_not_allowed");
}

#[tokio::test]
async fn bad_bodies_are_refused_before_any_node_sees_them() {
    let mut house = House::with_nodes(1).await;
    for (body, param) in [
        (&b"{\"model\": "[..], None),
        (b"[1]", None),
        (b"{\"model\":\"tiny\",\"x\":\"\xff\xfe\"}", None),
        (b"{\"model\": 7}", Some("model")),
        (b"{\"model\":\"tiny\",\"stream\":1}", Some("stream")),
    ] {
        let response = house.client.post(house.url(CHAT)).body(body.to_vec()).send().await.unwrap();
        assert_eq!(response.status(), 400);
        assert_eq!(error(&response.text().await.unwrap()).1.as_deref(), param);
    }
    let (status, body) = house.ask(&json!({"model": "huge"})).await;
    assert_eq!((status, error(&body).0.as_str()), (404, "model_not_found"));
    assert!(house.news.try_recv().is_err());
}

#[tokio::test]
async fn a_model_is_optional_while_only_one_is_served() {
    let mut house = House::with_nodes(1).await;
    assert_eq!(house.ask(&json!({"query": "hi"})).await.0, 200);
    assert_eq!(house.asked().await.json(), json!({"query": "hi"}));
}

#[tokio::test]
async fn large_bodies_pass_and_larger_ones_are_refused() {
    let mut house = House::with(1, "[balancer.limits]\nmax_body = \"1MiB\"").await;
    let mut body = chat(false);
    body["messages"][0]["content"] = "x".repeat(300_000).into();
    assert_eq!(house.ask(&body).await.0, 200);
    assert_eq!(house.asked().await.json(), body);
    body["messages"][0]["content"] = "x".repeat(20 << 20).into();
    let (status, text) = house.ask(&body).await;
    assert_eq!((status, error(&text).0.as_str()), (413, "body_too_large"));
    // without a declared length it is found out while reading
    let mut chunked = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n").into_bytes();
    for _ in 0..40 {
        chunked.extend_from_slice(b"10000\r\n");
        chunked.extend_from_slice(&[b' '; 0x10000]);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    let answer = raw(house.address, &chunked).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[tokio::test]
async fn slow_heads_and_bodies_end_at_their_deadline() {
    let house = House::with(1, "[balancer.limits]\nheader_timeout = \"150ms\"\nbody_timeout = \"150ms\"").await;
    assert!(raw(house.address, b"GET /health HT").await.starts_with("HTTP/1.1 408"));
    let answer =
        raw(house.address, format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{{").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("body_timeout"), "{answer}");
}

#[tokio::test]
async fn two_lengths_of_one_body_are_refused_and_the_connection_closes() {
    let mut house = House::with_nodes(1).await;
    let smuggled = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n\
         POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}"
    );
    let answer = raw(house.address, smuggled.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("ambiguous_framing"), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    assert!(answer.to_ascii_lowercase().contains("connection: close"), "{answer}");
    assert!(raw(house.address, b"GET / HTTP/1.1\r\nbad header\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    let many = format!("GET /health HTTP/1.1\r\nhost: x\r\n{}\r\n", "a: b\r\n".repeat(120));
    assert!(raw(house.address, many.as_bytes()).await.contains("too_many_headers"));
    assert!(house.news.try_recv().is_err());
}

#[tokio::test]
async fn a_connection_carries_several_requests() {
    let house = House::with_nodes(1).await;
    let body = chat(false).to_string();
    let one = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let health = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    // sent at once, so the second and third are pipelined
    let answer = raw(house.address, format!("{one}{one}{health}").as_bytes()).await;
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 3, "{answer}");
    assert_eq!(answer.matches("chat.completion").count(), 2, "{answer}");
}

#[tokio::test]
async fn over_the_limit_a_request_is_told_to_come_again() {
    let mut house = House::with(1, "[balancer.limits]\nmax_concurrent_requests = 1").await;
    house.nodes[0].script(vec![crate::support::Act::Head, crate::support::Act::AwaitClose]);
    let held = house.client.post(house.url(CHAT)).body(chat(true).to_string()).send();
    let held = tokio::spawn(held);
    house.asked().await;
    let response = house.post(CHAT, &chat(false)).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (503, "1"));
    assert_eq!(house.client.get(house.url("/health")).send().await.unwrap().status(), 200);
    held.abort();
    house.closed().await;
    while house.ask(&chat(false)).await.0 != 200 {
        tokio::task::yield_now().await;
    }
}
