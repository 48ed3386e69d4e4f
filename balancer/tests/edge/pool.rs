//! Who takes requests: the spread, the way out and the way back, the registry's silence, the end.

use std::{collections::BTreeMap, time::Duration};

use tidegate_common::registry::Registry;

use crate::support::{Act, CHAT, House, chat, end, ready, texts, tokens};

#[tokio::test]
async fn three_equals_share_three_hundred_requests_within_five_percent() {
    let mut house = House::with_nodes(3).await;
    let body = chat(false);
    let requests = futures::future::join_all((0..300).map(|_| house.ask(&body))).await;
    assert!(requests.iter().all(|(status, _)| *status == 200));
    let mut counts = BTreeMap::new();
    for _ in 0..300 {
        *counts.entry(house.asked().await.node).or_insert(0u32) += 1;
    }
    assert!(counts.values().all(|n| (95..=105).contains(n)), "{counts:?}");
}

#[tokio::test]
async fn a_killed_node_is_out_and_a_restarted_one_back_within_seconds() {
    let house = House::with(2, "").await;
    house.nodes[0].kill();
    let out = house.until(|members| ready(members) == ["n1"]).await;
    house.nodes[0].restart().await;
    let back = house.until(|members| ready(members).len() == 2).await;
    assert!(out < Duration::from_secs(4) && back < Duration::from_secs(4), "{out:?} {back:?}");
}

#[tokio::test]
async fn what_a_node_says_of_itself_is_honoured() {
    let house = House::with_nodes(2).await;
    for word in ["loading", "stalled", "draining"] {
        house.nodes[0].say(word);
        house.until(|members| ready(members) == ["n1"]).await;
        house.nodes[0].say("healthy");
        house.until(|members| ready(members).len() == 2).await;
    }
}

#[tokio::test]
async fn a_registry_that_forgets_everyone_changes_nothing() {
    let house = House::with_nodes(2).await;
    for node in &house.nodes {
        house.registry.withdraw(&node.record.id).await;
    }
    house.until(|members| members.members.iter().all(|m| !m.listed)).await;
    for _ in 0..10 {
        assert_eq!(house.ask(&chat(true)).await.0, 200);
    }
    house.nodes[0].say("draining");
    house.until(|members| members.members.len() == 1).await;
    house.nodes[1].kill();
    house.until(|members| members.members.is_empty()).await;
}

#[tokio::test]
async fn the_private_listener_shows_members_and_their_load() {
    let house = House::with_nodes(1).await;
    let member = &house.members().await.members[0];
    assert_eq!((member.running, member.kv_blocks_total, member.step), (Some(2), Some(4), Some(5)));
    for (path, status) in [("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/v1/models", 404)] {
        let response = house.client.get(format!("http://{}{path}", house.admin)).send().await.unwrap();
        assert_eq!(response.status(), status, "{path}");
    }
    assert!(house.metrics().await.contains("tidegate_members{model=\"tiny\",state=\"ready\"} 1"));
}

#[tokio::test]
async fn the_end_waits_for_open_streams_and_for_nothing_else() {
    let mut house = House::with_nodes(2).await;
    house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::AwaitClose]);
    house.nodes[1].script(vec![Act::Head, tokens(1, &[2], "b"), end("[DONE]"), Act::Finish]);
    let response = house.client.post(house.url(CHAT)).body(chat(true).to_string()).send().await.unwrap();
    house.fire();
    let ready = format!("http://{}/readyz", house.admin);
    while house.client.get(&ready).send().await.unwrap().status() == 200 {
        tokio::task::yield_now().await;
    }
    // nobody new is let in, and the open stream goes on, here even to another node
    while tokio::net::TcpStream::connect(house.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    house.node("n0").kill();
    assert_eq!(texts(&response.text().await.unwrap()), ("ab".into(), true));
    let began = std::time::Instant::now();
    house.ended().await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn the_end_is_bounded() {
    let mut house = House::with(1, "drain_grace = \"200ms\"\n").await;
    house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::AwaitClose]);
    let _held = house.client.post(house.url(CHAT)).body(chat(true).to_string()).send().await.unwrap();
    let began = std::time::Instant::now();
    house.fire();
    house.ended().await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}
