//! Who takes requests: the spread, the way out and the way back, the registry's silence, the end.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tidegate_common::registry::Registry;

use crate::support::{Act, CHAT, House, chat, end, good, ready, texts, tokens};

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

/// How many of the next requests each node gets.
async fn spread(house: &mut House, requests: usize) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..requests {
        assert_eq!(house.ask(&chat(false)).await.0, 200);
        *counts.entry(house.asked().await.node).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn a_node_that_comes_back_gets_little_at_first_and_its_share_in_time() {
    const SLOW_START: Duration = Duration::from_secs(2);
    let mut house = House::with(3, "[balancer.health]\nslow_start = \"2s\"").await;
    assert_eq!(spread(&mut house, 30).await["n2"], 10, "all are equally new");
    tokio::time::sleep(SLOW_START).await;
    house.nodes[2].say("loading");
    house.until(|members| ready(members).len() == 2).await;
    house.nodes[2].say("healthy");
    house.until(|members| ready(members).len() == 3).await;
    let back = Instant::now();
    let early = spread(&mut house, 30).await;
    assert!(back.elapsed() > SLOW_START / 2 || early.get("n2").copied().unwrap_or_default() < 7, "{early:?}");
    tokio::time::sleep(SLOW_START).await;
    assert_eq!(spread(&mut house, 30).await["n2"], 10);
}

#[tokio::test]
async fn a_clients_errors_eject_nobody() {
    let house = House::with_nodes(2).await;
    for status in [400, 404, 422, 429] {
        for node in &house.nodes {
            (0..8).for_each(|_| node.script(vec![Act::Whole(status, "", "{}")]));
        }
        for _ in 0..8 {
            assert_eq!(house.ask(&chat(false)).await.0, status);
            assert_eq!(ready(&house.members().await).len(), 2);
        }
        while house.ask(&chat(false)).await.0 != 200 {}
    }
    assert!(house.metrics().await.contains("tidegate_pool_panic{model=\"tiny\"} 0"));
}

#[tokio::test]
async fn the_only_node_is_asked_even_when_its_probes_fail() {
    let house = House::with_nodes(1).await;
    house.nodes[0].say("broken");
    house.until(|members| ready(members).is_empty()).await;
    for stream in [true, false] {
        assert_eq!(house.ask(&chat(stream)).await.0, 200);
    }
    assert!(house.metrics().await.contains("tidegate_pool_panic{model=\"tiny\"} 1"));
    house.nodes[0].say("healthy");
    house.until(|members| ready(members).len() == 1).await;
    assert!(house.metrics().await.contains("tidegate_pool_panic{model=\"tiny\"} 0"));
}

#[tokio::test]
async fn without_a_threshold_failed_nodes_are_left_alone() {
    let off = "[balancer.health]\npanic_threshold = 0\n[balancer.relay]\nqueue_wait = \"100ms\"";
    let mut house = House::with(1, off).await;
    house.nodes[0].say("broken");
    house.until(|members| ready(members).is_empty()).await;
    assert_eq!(house.ask(&chat(true)).await.0, 503);
    assert!(house.news.try_recv().is_err());
}

#[tokio::test]
async fn in_a_panic_failed_nodes_are_asked_after_the_ready_ones() {
    let mut house = House::with_nodes(4).await;
    house.nodes[1..].iter().for_each(|node| node.say("broken"));
    house.until(|members| ready(members) == ["n0"]).await;
    assert_eq!(spread(&mut house, 20).await, [("n0".to_owned(), 20)].into());
    house.nodes[0].script(vec![Act::Whole(429, "", "{}")]);
    for node in &house.nodes[1..] {
        node.script(vec![Act::Kill]);
        node.script(good(true));
    }
    house.node("n3").kill();
    // three suspects fail in their ways, which is not held against the request: it waits for the one that is full
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!((status, texts(&text)), (200, ("ab".into(), true)));
    let asked =
        [house.asked().await.node, house.asked().await.node, house.asked().await.node, house.asked().await.node];
    assert_eq!((&*asked[0], &*asked[3]), ("n0", "n0"), "{asked:?}");
    assert_ne!(asked[1], asked[2]);
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
