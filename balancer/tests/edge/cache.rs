//! Answers that would be the same again come from the cache; all others are asked for.

use serde_json::{Value, json};

use crate::support::{Act, CHAT, House, MODEL, texts, tokens};

fn asking(temperature: f64, stream: bool, content: &str) -> Value {
    json!({"model": MODEL, "temperature": temperature, "stream": stream, "messages": [{"role": "user", "content": content}]})
}

/// A node whose answers all nodes of this fingerprint would give.
async fn house() -> House {
    let house = House::with(1, "[balancer.cache]\nmemory = \"1MiB\"\n").await;
    house.node("n0").say("by 00000000000000aa");
    house.until(|members| members.members[0].models.iter().any(|model| model.fingerprint.is_some())).await;
    house
}

/// What the cache had, and the answer.
async fn ask(house: &House, body: &Value, control: &str) -> (String, String) {
    let request = house.client.post(house.url(CHAT)).header("cache-control", control).body(body.to_string());
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    let cache = response.headers()["x-cache"].to_str().unwrap().to_owned();
    (cache, response.text().await.unwrap())
}

#[tokio::test]
async fn the_same_greedy_request_is_answered_once() {
    let house = house().await;
    for stream in [false, true] {
        let (cache, first) = ask(&house, &asking(0.0, stream, "hi"), "").await;
        assert_eq!(cache, "miss");
        let (cache, again) = ask(&house, &asking(0.0, stream, "hi"), "").await;
        assert_eq!((cache.as_str(), &again), ("hit", &first));
    }
    assert_eq!(ask(&house, &asking(0.0, false, "ho"), "").await.0, "miss", "another question");
    assert_eq!(ask(&house, &asking(0.7, false, "hi"), "").await.0, "bypass", "it would be drawn anew");
    assert_eq!(ask(&house, &asking(0.0, false, "hi"), "no-cache").await.0, "miss", "as the client wants it");
    assert_eq!(ask(&house, &asking(0.0, false, "hi"), "no-store").await.0, "bypass");
    let figures = house.metrics().await;
    for line in [
        "cache_requests_total{outcome=\"hit\"} 2",
        "cache_requests_total{outcome=\"bypass\"} 2",
        "tidegate_cache_answers 3",
    ] {
        assert!(figures.contains(line), "{line} not in {figures}");
    }
}

#[tokio::test]
async fn an_answer_that_was_not_whole_is_not_kept() {
    let house = house().await;
    let mut script = vec![Act::Head];
    script.extend([tokens(0, &[1], "a"), Act::Kill]);
    for _ in 0..4 {
        house.node("n0").script(script.clone());
    }
    let body = asking(0.0, true, "hi");
    let response = house.post(CHAT, &body).await;
    assert!(!texts(&response.text().await.unwrap()).1, "the stream is broken off");
    house.until(|members| members.members[0].state.as_str() == "ready").await;
    assert_eq!(ask(&house, &body, "").await.0, "miss");
}

#[tokio::test]
async fn without_the_section_nothing_is_kept_or_said() {
    let house = House::with_nodes(1).await;
    let response = house.post(CHAT, &asking(0.0, false, "hi")).await;
    assert!(!response.headers().contains_key("x-cache"));
}
