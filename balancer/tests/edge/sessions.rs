//! Dialogues: what was said before goes with the next question, to the node that answered it, and to nobody else's.

use serde_json::{Value, json};

use crate::{
    auth::keys,
    support::{Act, House},
};

const PATH: &str = "/api/v1/chat";

/// A node's answer with this text, whole.
fn says(text: &str) -> Vec<Act> {
    let body = json!({"id": "x", "answer": text}).to_string();
    vec![Act::Head, Act::Send(format!("id: 0:0:1\n\nid: end\ndata: {body}\n\n").into_bytes()), Act::Finish]
}

async fn ask(house: &House, key: &str, session: Option<&str>, query: &str) -> Value {
    let mut body = json!({"query": query});
    if let Some(id) = session {
        body["session_id"] = id.into();
    }
    let response = house.client.post(house.url(PATH)).bearer_auth(key).body(body.to_string()).send().await.unwrap();
    assert_eq!(response.status(), 200);
    serde_json::from_str(&response.text().await.unwrap()).unwrap()
}

#[tokio::test]
async fn what_was_said_goes_with_the_next_question_to_the_same_node() {
    let keys = keys(&["owner = \"alice\"", "owner = \"bob\""]);
    let mut house = House::with(2, &format!("[balancer.auth]\nkeys_file = {:?}", keys.path())).await;
    let script = |house: &House, text: &str| ["n0", "n1"].iter().for_each(|id| house.node(id).script(says(text)));
    script(&house, "Blue.");
    assert_eq!(ask(&house, "one", Some("s"), "Which colour?").await["answer"], "Blue.");
    let first = house.asked().await;
    assert!(first.json().get("history").is_none());
    for n in 0..4 {
        house.node(&first.node).script(says("Scattering."));
        ask(&house, "one", Some("s"), "Why?").await;
        let next = house.asked().await;
        assert_eq!(next.node, first.node, "it has the beginning in its cache");
        let history = next.json()["history"].as_array().unwrap().clone();
        assert_eq!(history.len(), 2 + 2 * n);
        assert_eq!(history[0], json!({"role": "user", "content": "Which colour?"}));
        assert_eq!(history[1], json!({"role": "assistant", "content": "Blue."}));
    }
    for (key, session) in [("two", Some("s")), ("one", Some("other")), ("one", None)] {
        ["n0", "n1"].iter().for_each(|id| house.node(id).script(says("No idea.")));
        ask(&house, key, session, "Why?").await;
        assert!(house.asked().await.json().get("history").is_none(), "{key} {session:?}");
    }
    assert!(house.metrics().await.contains("tidegate_sessions 3"));
}

#[tokio::test]
async fn a_stream_is_remembered_when_it_has_ended_well_and_not_before() {
    let mut house = House::with(1, "[balancer.sessions]\nttl = \"1m\"\n[balancer.relay]\nmax_resumes = 0").await;
    let event = |n: u32, text: &str| {
        Act::Send(
            format!("id: 0:{n}:{n}\ndata: {}\n\n", json!({"id": "x", "answer": text, "finish_reason": null}))
                .into_bytes(),
        )
    };
    let done = Act::Send(b"id: end\ndata: [DONE]\n\n".to_vec());
    house.node("n0").script(vec![Act::Head, event(0, "Bl"), event(1, "ue."), done, Act::Finish]);
    let body = json!({"query": "Which colour?", "session_id": "s", "stream": true});
    let answer = house.post(PATH, &body).await.text().await.unwrap();
    assert!(answer.ends_with("data: [DONE]\n\n"), "{answer}");
    house.asked().await;
    // broken off in the middle
    house.node("n0").script(vec![Act::Head, event(0, "Be"), Act::Kill]);
    let body = json!({"query": "Why?", "session_id": "s", "stream": true});
    house.post(PATH, &body).await.text().await.unwrap();
    let history = house.asked().await.json()["history"].clone();
    assert_eq!(history[1], json!({"role": "assistant", "content": "Blue."}));
    house.until(|members| members.members[0].state.as_str() == "ready").await;
    house.node("n0").script(says("Scattering."));
    ask(&house, "", Some("s"), "Why?").await;
    assert_eq!(house.asked().await.json()["history"], history, "the question without an answer is not in it");
    let foreign = json!({"model": "tiny", "messages": [], "session_id": 7});
    assert_eq!(
        house.post("/v1/chat/completions", &foreign).await.status(),
        200,
        "elsewhere the field is nobody's business"
    );
    let response = house.post(PATH, &json!({"query": "a", "session_id": 7})).await;
    assert!(response.status() == 400 && response.text().await.unwrap().contains("session_id"));
    let response = house.post(PATH, &json!({"query": "a", "session_id": ""})).await;
    assert!(response.status() == 400 && response.text().await.unwrap().contains("session_id"));
}
