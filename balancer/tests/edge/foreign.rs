//! Upstreams that are none of ours: what they are sent, how their answers pass, and what happens when they are lost.

use std::{os::unix::fs::PermissionsExt, time::Duration};

use serde_json::{Value, json};

use crate::support::{Act, CHAT, House, MODEL, chat, end, piece, ready, texts, tokens};

/// One node and some upstreams; in a fresh pool `f0` is asked first, since it sorts before `n0`.
async fn both(foreign: usize) -> House {
    House::with_foreign(1, foreign, "", "").await
}

fn last_code(text: &str) -> Value {
    let last = text.lines().filter_map(|l| l.strip_prefix("data: ")).next_back().unwrap();
    serde_json::from_str::<Value>(last).map_or(Value::Null, |last| last["error"]["code"].clone())
}

#[tokio::test]
async fn it_gets_the_body_and_its_own_key_and_nothing_else_of_the_clients() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "sk-theirs\n").unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut house = House::with_foreign(0, 1, &format!("api_key_file = {key:?}"), "").await;
    for stream in [true, false] {
        let request = house.client.post(house.url(CHAT)).header("authorization", "Bearer sk-mine");
        let request = request.header("x-api-key", "sk-mine").header("cookie", "c=1").header("x-request-id", "mine-1");
        let response = request.header("openai-organization", "o").body(chat(stream).to_string()).send().await.unwrap();
        assert_eq!((response.status().as_u16(), response.headers()["x-tidegate-node"].to_str().unwrap()), (200, "f0"));
        let text = response.text().await.unwrap();
        match stream {
            true => assert_eq!(texts(&text), ("xy".into(), true)),
            false => assert_eq!(text, r#"{"object":"abroad"}"#),
        }
        let seen = house.asked().await;
        assert_eq!(
            (seen.path.as_str(), seen.body.as_slice()),
            ("/base/chat/completions", chat(stream).to_string().as_bytes())
        );
        assert_eq!(seen.header("authorization"), Some("Bearer sk-theirs"));
        assert_eq!(seen.header("host"), Some(house.nodes[0].record.address.as_str()));
        for name in ["x-api-key", "cookie", "x-request-id", "openai-organization", "x-tidegate-stream"] {
            assert_eq!(seen.header(name), None, "{name}");
        }
        assert!(!seen.head.contains("mine") && !seen.head.to_lowercase().contains("x-tidegate"), "{}", seen.head);
    }
    let shown = house.client.get(format!("http://{}/members", house.admin)).send().await.unwrap().text().await.unwrap();
    assert!(!shown.contains("sk-theirs"));
}

#[tokio::test]
async fn it_gets_its_own_name_of_the_model_also_from_who_names_none() {
    let mut house = House::with_foreign(0, 1, "models = [\"small=org/small\"]", "").await;
    for body in [json!({"model": "small", "x": 1.5}), json!({"x": 1.5})] {
        assert_eq!(house.ask(&body).await.0, 200);
        let seen = house.asked().await.json();
        assert_eq!((&seen["model"], &seen["x"]), (&json!("org/small"), &json!(1.5)));
    }
    assert_eq!(house.ask(&json!({"model": "org/small"})).await.0, 404);
}

#[tokio::test]
async fn nodes_and_upstreams_share_the_requests_of_a_model() {
    let mut house = both(1).await;
    let mut counts = std::collections::BTreeMap::new();
    for i in 0..40 {
        assert_eq!(house.ask(&chat(i % 4 < 2)).await.0, 200);
        *counts.entry(house.asked().await.node).or_insert(0) += 1;
    }
    assert_eq!(counts, [("f0".to_owned(), 20), ("n0".to_owned(), 20)].into());
}

#[tokio::test]
async fn what_goes_wrong_before_the_first_byte_moves_to_another_member() {
    for fault in [
        vec![Act::Kill],
        vec![Act::Whole(500, "", "{}")],
        vec![Act::Whole(503, "", "{}")],
        vec![Act::Whole(429, "retry-after: 9\r\n", "{}")],
        vec![Act::Whole(401, "", "{\"error\":{\"message\":\"wrong key sk-the***\"}}")],
        vec![Act::Whole(302, "location: http://elsewhere\r\n", "")],
        vec![Act::Head, Act::Kill],
        vec![Act::Head, Act::Finish],
        vec![Act::Head, Act::Send(b": ping\n\ndata: half".to_vec()), Act::Kill],
    ] {
        let mut house = both(1).await;
        house.node("f0").script(fault.clone());
        let (status, text) = house.ask(&chat(true)).await;
        assert_eq!((status, texts(&text)), (200, ("ab".into(), true)), "{fault:?} {text}");
        let (lost, taken) = (house.asked().await, house.asked().await);
        assert_eq!((lost.node.as_str(), taken.node.as_str()), ("f0", "n0"));
        assert_eq!(taken.json().get("tidegate_resume"), None);
    }
    // and from a node to it
    let house = both(1).await;
    house.ask(&chat(true)).await;
    house.node("n0").script(vec![Act::Head, Act::Kill]);
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!((status, texts(&text)), (200, ("xy".into(), true)));
}

#[tokio::test]
async fn one_that_cannot_be_reached_costs_no_request_and_comes_back() {
    let house = both(1).await;
    house.node("f0").kill();
    for i in 0..20 {
        assert_eq!(house.ask(&chat(i % 2 == 0)).await.0, 200);
    }
    house.until(|members| ready(members) == ["n0"]).await;
    house.node("f0").restart().await;
    house.until(|members| ready(members).len() == 2).await;
    house.node("f0").say("broken");
    house.until(|members| ready(members) == ["n0"]).await;
}

#[tokio::test]
async fn a_stream_that_is_cut_ends_with_a_typed_error_and_never_with_done() {
    for cut in [Act::Kill, Act::Finish, Act::Send(b"data: {\"half".to_vec())] {
        let mut house = both(1).await;
        house.node("f0").script(vec![Act::Head, piece("x"), cut.clone(), Act::Kill]);
        let (status, text) = house.ask(&chat(true)).await;
        assert_eq!((status, last_code(&text)), (200, json!("node_lost")), "{cut:?} {text}");
        assert!(text.contains("\"x\"") && !text.contains("[DONE]") && !text.contains("half"), "{text}");
        assert_eq!(house.asked().await.node, "f0");
        assert!(house.news.try_recv().is_err(), "nobody knows its tokens, so nobody was asked to go on");
    }
}

#[tokio::test]
async fn one_that_falls_silent_is_left() {
    let house = House::with_foreign(0, 1, "stall_timeout = \"200ms\"", "").await;
    // a whole answer is silent until it is there
    house.nodes[0].script(vec![Act::Pause(Duration::from_millis(600)), Act::Whole(200, "", "{}")]);
    assert_eq!(house.ask(&chat(false)).await, (200, "{}".into()));
    house.nodes[0].script(vec![Act::Head, piece("x"), Act::AwaitClose]);
    let (_, text) = house.ask(&chat(true)).await;
    assert_eq!(last_code(&text), json!("node_stalled"), "{text}");
}

#[tokio::test]
async fn a_nodes_stream_goes_on_at_nodes_alone() {
    let mut house = both(2).await;
    for _ in 0..2 {
        house.ask(&chat(true)).await;
        house.asked().await;
    }
    house.node("n0").script(vec![Act::Head, tokens(0, &[1], "a"), Act::Kill]);
    house.node("n0").script(vec![Act::Head, tokens(1, &[2], "b"), end("[DONE]"), Act::Finish]);
    let (_, text) = house.ask(&chat(true)).await;
    assert_eq!(texts(&text), ("ab".into(), true));
    let (lost, taken) = (house.asked().await, house.asked().await);
    assert_eq!((lost.node.as_str(), taken.node.as_str()), ("n0", "n0"));
    assert_eq!(taken.json()["tidegate_resume"], json!({"tokens": [[1]]}));
}

#[tokio::test]
async fn a_refusal_passes_and_nothing_is_tried_again() {
    let mut house = both(1).await;
    house.node("f0").script(vec![Act::Whole(400, "", "{\"error\":{\"code\":\"theirs\"}}")]);
    assert_eq!(house.ask(&chat(true)).await, (400, "{\"error\":{\"code\":\"theirs\"}}".into()));
    house.asked().await;
    assert!(house.news.try_recv().is_err());
    assert_eq!(ready(&house.members().await).len(), 2);
}

#[tokio::test]
async fn when_all_are_full_their_own_words_pass() {
    let house = House::with_foreign(0, 2, "", "").await;
    for node in &house.nodes {
        node.script(vec![Act::Whole(429, "retry-after: 9\r\n", "{\"error\":{\"code\":\"slow\"}}")]);
    }
    let response = house.post(CHAT, &chat(true)).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (429, "9"));
    assert!(response.text().await.unwrap().contains("slow"));
}

#[tokio::test]
async fn each_api_has_its_own_last_event() {
    for (path, last) in [
        ("/v1/responses", "event: response.completed\ndata: {\"type\":\"response.completed\"}\n\n"),
        ("/v1/messages", "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"),
        ("/v1/completions", "data: [DONE]\n\n"),
    ] {
        let mut house = House::with_foreign(0, 1, "", "").await;
        let begun = || Act::Send(b"event: begun\ndata: {}\n\n".to_vec());
        house.nodes[0].script(vec![Act::Head, begun(), Act::Send(last.into()), Act::AwaitClose]);
        let text = house.post(path, &chat(true)).await.text().await.unwrap();
        assert_eq!(text, format!("event: begun\ndata: {{}}\n\n{last}"), "{path}");
        assert_eq!(house.asked().await.path, path.replace("/v1", "/base"));
        house.nodes[0].script(vec![Act::Head, begun(), Act::Finish]);
        let text = house.post(path, &chat(true)).await.text().await.unwrap();
        assert!(text.contains("node_lost"), "{path}: {text}");
    }
}

#[tokio::test]
async fn what_only_tidegate_has_is_asked_of_nodes_alone() {
    let mut house = both(1).await;
    for _ in 0..4 {
        assert_eq!(house.post("/v1/chat", &chat(false)).await.status(), 200);
        assert_eq!(house.asked().await.node, "n0");
    }
    let house = House::with_foreign(0, 1, "", "").await;
    for path in ["/v1/chat", "/tokenize"] {
        let response = house.post(path, &json!({"model": MODEL})).await;
        assert_eq!(response.status(), 404, "{path}");
        assert!(response.text().await.unwrap().contains("upstreams that do not have"), "{path}");
    }
    let models = house.client.get(house.url("/v1/models")).send().await.unwrap().text().await.unwrap();
    assert!(models.contains("\"tiny\""), "{models}");
}
