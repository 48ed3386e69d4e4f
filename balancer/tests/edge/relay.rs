//! Streams and what happens to them when nodes are lost.

use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};
use tidegate_common::{
    contract::{Refusal, event},
    ids::Fingerprint,
};

use crate::support::{Act, CHAT, House, MODEL, News, Seen, chat, end, good, raw, silent, texts, tokens};

fn resume(seen: &Seen) -> Value {
    seen.json().get("tidegate_resume").cloned().unwrap_or(Value::Null)
}

/// Scripts whichever node is asked first: both get the faulty script, and the one that is asked second drops it unused.
fn first(house: &House, acts: Vec<Act>) {
    // round-robin begins with the first member of a fresh pool
    house.nodes[0].script(acts);
}

#[tokio::test]
async fn a_stream_passes_without_its_ids() {
    let mut house = House::with_nodes(1).await;
    let request =
        house.client.post(house.url(CHAT)).header("x-request-id", "mine-1").header("x-tidegate-tenant", "evil");
    let response = request.body(chat(true).to_string()).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], event::CONTENT_TYPE);
    assert_eq!(response.headers()["x-request-id"], "mine-1");
    assert_eq!(response.headers()["x-tidegate-node"], "n0");
    let text = response.text().await.unwrap();
    assert!(!text.contains("id:"), "{text}");
    assert_eq!(texts(&text), ("ab".into(), true));
    let seen = house.asked().await;
    assert_eq!(seen.json(), chat(true));
    assert_eq!(seen.header("x-tidegate-stream"), Some("1"));
    assert_eq!(seen.header("x-request-id"), Some("mine-1"));
    assert_eq!(seen.header("x-tidegate-tenant"), Some("127.0.0.1"), "without keys, who pays is an address");
    assert!(seen.header("x-tidegate-seed").unwrap().parse::<u64>().is_ok());
    assert!(seen.header("x-tidegate-created").unwrap().parse::<u64>().unwrap() > 1_700_000_000);
    assert!(seen.header("x-tidegate-deadline-ms").unwrap().parse::<u64>().unwrap() <= 300_000);
}

#[tokio::test]
async fn a_client_that_wants_one_body_gets_the_last_event() {
    let mut house = House::with_nodes(1).await;
    let mut body = chat(false);
    body["seed"] = 7.into();
    let response = house.post(CHAT, &body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    let text = response.text().await.unwrap();
    assert_eq!(text, r#"{"object":"chat.completion"}"#);
    let seen = house.asked().await;
    assert_eq!(seen.header("x-tidegate-stream"), Some("1"));
    assert_eq!(seen.header("x-tidegate-seed"), None, "the client's own seed stands in the body");
}

#[tokio::test]
async fn what_goes_wrong_before_the_first_byte_moves_to_another_node() {
    for fault in [
        vec![Act::Kill],
        vec![Act::Whole(500, "", "{}")],
        vec![Act::Whole(503, "", "{}")],
        vec![Act::Head, Act::Kill],
        vec![Act::Head, Act::Finish],
        vec![Act::Head, Act::Send(event::HANDOVER.to_vec())],
        vec![Act::Head, Act::Send(b"id: 0:0:1\ndata: half".to_vec()), Act::Kill],
    ] {
        for stream in [true, false] {
            let mut house = House::with_nodes(2).await;
            first(&house, fault.clone());
            let (status, text) = house.ask(&chat(stream)).await;
            assert_eq!(status, 200, "{fault:?} {text}");
            let (lost, taken) = (house.asked().await, house.asked().await);
            assert_ne!(lost.node, taken.node);
            assert_eq!(lost.body, taken.body, "nothing had passed, so nothing is resumed");
            assert_eq!(lost.header("x-tidegate-seed"), taken.header("x-tidegate-seed"));
            assert_eq!(lost.header("x-request-id"), taken.header("x-request-id"));
        }
    }
}

#[tokio::test]
async fn a_killed_node_fails_no_request() {
    let house = House::with_nodes(3).await;
    house.nodes[1].kill();
    for i in 0..60 {
        let (status, text) = house.ask(&chat(i % 2 == 0)).await;
        assert_eq!(status, 200, "{text}");
    }
    house.until(|members| crate::support::ready(members) == ["n0", "n2"]).await;
}

#[tokio::test]
async fn a_stream_goes_on_where_its_node_was_lost() {
    for loss in [
        vec![Act::Kill],
        vec![Act::Finish],
        vec![Act::Send(event::HANDOVER.to_vec())],
        vec![Act::Send(b"id: 0:3:8\ndata: {\"half".to_vec()), Act::Kill],
        vec![Act::Send(b"id: 0:9:8\ndata: {}\n\n".to_vec())], // a node that has lost count
    ] {
        let mut house = House::with_nodes(2).await;
        let mut acts = vec![Act::Head, tokens(0, &[11], "a"), silent(1, &[12]), tokens(2, &[13], "b")];
        acts.extend(loss.clone());
        first(&house, acts);
        house.nodes[1].script(vec![Act::Head, tokens(3, &[14], "c"), end("[DONE]"), Act::Finish]);
        let (status, text) = house.ask(&chat(true)).await;
        assert_eq!((status, texts(&text)), (200, ("abc".into(), true)), "{loss:?}");
        let (before, after) = (house.asked().await, house.asked().await);
        assert_eq!(resume(&before), Value::Null);
        assert_eq!(resume(&after), json!({"tokens": [[11, 12, 13]]}));
        for header in ["x-tidegate-seed", "x-tidegate-created", "x-request-id"] {
            assert_eq!(before.header(header), after.header(header));
        }
        let metrics = house.metrics().await;
        assert!(metrics.lines().any(|l| l.starts_with("tidegate_resumes_total") && l.ends_with(" 1")), "{metrics}");
    }
}

#[tokio::test]
async fn an_answer_of_one_body_is_resumed_too() {
    let mut house = House::with_nodes(2).await;
    first(&house, vec![Act::Head, silent(0, &[1, 2]), Act::Kill]);
    house.nodes[1].script(vec![Act::Head, silent(2, &[3]), end("{\"all\":3}"), Act::Finish]);
    let (status, text) = house.ask(&json!({"model": MODEL, "n": 2})).await;
    assert_eq!((status, text.as_str()), (200, "{\"all\":3}"));
    house.asked().await;
    assert_eq!(resume(&house.asked().await), json!({"tokens": [[1, 2], []]}));
}

#[tokio::test]
async fn a_node_that_falls_silent_is_left() {
    let mut house = House::with(2, "[balancer.relay]\nstall_timeout = \"200ms\"").await;
    first(&house, vec![Act::Head, tokens(0, &[1], "a"), Act::AwaitClose]);
    house.nodes[1].script(vec![Act::Head, tokens(1, &[2], "b"), end("[DONE]"), Act::Finish]);
    let (_, text) = house.ask(&chat(true)).await;
    assert_eq!(texts(&text), ("ab".into(), true));
    assert_eq!(house.closed().await, "n0");
}

#[tokio::test]
async fn a_node_that_must_load_the_model_first_gets_its_time() {
    let mut house = House::with(2, "[balancer.relay]\nstall_timeout = \"200ms\"").await;
    let loading = [Act::Send(event::WAIT.to_vec()), Act::Pause(Duration::from_millis(120))];
    for node in &house.nodes {
        node.say("cold");
        let answer = [tokens(0, &[1], "a"), end("[DONE]"), Act::Finish];
        node.script([Act::Head].into_iter().chain(loading.iter().cloned().cycle().take(10)).chain(answer).collect());
    }
    let (_, text) = house.ask(&chat(true)).await;
    assert_eq!(texts(&text), ("a".into(), true));
    house.asked().await;
    assert!(house.news.try_recv().is_err(), "the other node was not made to load as well");
}

fn refused(status: u16, retry_after_s: Option<u64>) -> Act {
    let mut out = Vec::new();
    let body = json!({"error": {"message": "m", "type": "t", "param": null, "code": "why"}});
    event::write_refusal(&mut out, &Refusal { status, retry_after_s, body });
    Act::Send(out)
}

/// Fingerprints as nodes' health says them.
const BY: [&str; 2] = ["by 000000000000000a", "by 000000000000000b"];

fn by(word: &str) -> Act {
    Act::Send(format!("id: {}\n\n", word.replace(' ', ":")).into_bytes())
}

/// Waits until the edge has heard what each node says.
async fn say(house: &House, words: &[&'static str]) {
    house.nodes.iter().zip(words).for_each(|(node, word)| node.say(word));
    house
        .until(|members| {
            let said = |m: &tidegate_balancer::admin::MemberReport| m.models.first().and_then(|m| m.fingerprint);
            members
                .members
                .iter()
                .map(said)
                .eq(words.iter().map(|word| word.strip_prefix("by ").unwrap().parse::<Fingerprint>().ok()))
        })
        .await;
}

#[tokio::test]
async fn a_stream_goes_on_only_where_it_would_have_been_the_same() {
    let begin = || vec![Act::Head, by(BY[0]), tokens(0, &[1], "a"), Act::Kill];
    let mut house = House::with_nodes(3).await;
    say(&house, &[BY[0], BY[1], BY[0]]).await;
    first(&house, begin());
    house.nodes[2].script(vec![Act::Head, by(BY[0]), tokens(1, &[2], "b"), end("[DONE]"), Act::Finish]);
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!((status, texts(&text)), (200, ("ab".into(), true)), "{text}");
    let (begun, after) = (house.asked().await, house.asked().await);
    let fingerprint = |seen: &Seen| seen.header("x-tidegate-fingerprint").map(str::to_owned);
    assert_eq!((begun.node.as_str(), fingerprint(&begun)), ("n0", None));
    assert_eq!((after.node.as_str(), fingerprint(&after).as_deref()), ("n2", BY[0].strip_prefix("by ")));

    let mut house = House::with(2, "[balancer.relay]\nqueue_wait = \"300ms\"").await;
    say(&house, &BY).await;
    first(&house, begin());
    // it is there again at once, and answers otherwise
    for _ in 0..500 {
        house.nodes[0].script(vec![Act::Whole(412, "", "{}")]);
    }
    let (status, text) = house.ask(&chat(true)).await;
    assert!(status == 200 && text.ends_with("\"code\":\"nodes_differ\"}}\n\n"), "{text}");
    while let Ok(News::Asked(seen)) = house.news.try_recv() {
        assert_eq!(seen.node, "n0");
    }
}

#[tokio::test]
async fn a_node_that_says_that_it_would_go_on_otherwise_is_believed() {
    let mut house = House::with(2, "[balancer.relay]\nqueue_wait = \"300ms\"").await;
    first(&house, vec![Act::Head, by(BY[0]), tokens(0, &[1], "a"), Act::Kill]);
    for node in &house.nodes {
        for _ in 0..500 {
            node.script(vec![Act::Whole(412, "", "{}")]);
        }
    }
    let (status, text) = house.ask(&chat(true)).await;
    assert!(status == 200 && text.ends_with("\"code\":\"nodes_differ\"}}\n\n"), "{text}");
    house.asked().await;
    assert_eq!(house.asked().await.header("x-tidegate-fingerprint"), BY[0].strip_prefix("by "));
    let more = std::iter::from_fn(|| house.news.try_recv().ok()).count();
    assert!(more < 60, "asked {more} times in a third of a second");
}

#[tokio::test]
async fn a_refusal_that_comes_late_is_an_answer_as_long_as_the_client_has_none() {
    let late = |status| vec![Act::Head, silent(0, &[1]), refused(status, None)];
    let mut house = House::with_nodes(2).await;
    first(&house, late(504));
    let response = house.post(CHAT, &chat(false)).await;
    assert_eq!((response.status().as_u16(), response.text().await.unwrap().contains("\"why\"")), (504, true));
    house.asked().await;

    // a stream has begun with a comment, or with more
    for begun in [Act::Send(event::WAIT.to_vec()), tokens(0, &[1], "a")] {
        let house = House::with_nodes(1).await;
        house.nodes[0].script(vec![Act::Head, begun.clone(), refused(504, None)]);
        let (status, text) = house.ask(&chat(true)).await;
        assert!(status == 200 && text.ends_with("\"code\":\"why\"}}\n\n") && !text.contains("event:"), "{text}");

        house.nodes[0].script(vec![Act::Head, begun, refused(504, None)]);
        let answer = house.post("/v1/responses", &json!({"model": MODEL, "stream": true, "input": "x"})).await;
        let text = answer.text().await.unwrap();
        assert!(
            text.ends_with(
                "event: error\ndata: {\"type\":\"error\",\"code\":\"why\",\"message\":\"m\",\"param\":null}\n\n"
            ),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_refusal_that_comes_late_moves_a_request_as_one_at_once_would() {
    for fault in [refused(503, None), refused(429, Some(7)), refused(500, None)] {
        for stream in [true, false] {
            let mut house = House::with_nodes(2).await;
            first(&house, vec![Act::Head, Act::Send(event::WAIT.to_vec()), fault.clone()]);
            let (status, text) = house.ask(&chat(stream)).await;
            assert_eq!(status, 200, "{text}");
            assert!(text.contains("[DONE]") || !stream, "{text}");
            assert_ne!(house.asked().await.node, house.asked().await.node);
        }
    }
    let house = House::with_nodes(1).await;
    house.nodes[0].script(vec![Act::Head, refused(429, Some(7))]);
    let response = house.post(CHAT, &chat(true)).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (429, "7"));
}

#[tokio::test]
async fn waiting_is_not_silence() {
    let house = House::with(1, "[balancer.relay]\nstall_timeout = \"2s\"").await;
    let wait = || Act::Send(event::WAIT.to_vec());
    house.nodes[0].script(vec![Act::Head, wait(), wait(), tokens(0, &[1], "a"), end("[DONE]"), Act::Finish]);
    let (_, text) = house.ask(&chat(true)).await;
    assert!(text.starts_with(": wait\n\n: wait\n\ndata:"), "{text}");
}

#[tokio::test]
async fn when_nobody_can_go_on_the_stream_ends_with_an_error_event() {
    let mut house = House::with(1, "[balancer.relay]\nmax_resumes = 2").await;
    house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::Kill]);
    for _ in 0..2 {
        house.nodes[0].script(vec![Act::Head, Act::Kill]);
    }
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!(status, 200);
    let last: Value =
        serde_json::from_str(text.lines().filter_map(|l| l.strip_prefix("data: ")).next_back().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "node_lost", "{text}");
    for _ in 0..3 {
        house.asked().await;
    }
    assert!(house.news.try_recv().is_err(), "one beginning and two resumes, no more");
}

#[tokio::test]
async fn a_stream_too_long_to_be_remembered_goes_on_but_not_elsewhere() {
    const TOKENS_MAX: usize = 262_144;
    let long = || vec![Act::Head, silent(0, &vec![7; TOKENS_MAX]), tokens(TOKENS_MAX as u32, &[8], "a")];
    for (last, expected) in [(end("[DONE]"), "[DONE]"), (Act::Kill, "\"code\":\"stream_too_long\"}}")] {
        let mut house = House::with_nodes(2).await;
        first(&house, [long(), vec![last, Act::Finish]].concat());
        let (status, text) = house.ask(&chat(true)).await;
        assert!(status == 200 && text.trim_end().ends_with(expected), "{text}");
        house.asked().await;
        assert!(house.news.try_recv().is_err(), "the other node was not asked");
    }
}

#[tokio::test]
async fn after_an_error_event_the_connection_serves_the_next_request() {
    let house = House::with(1, "[balancer.relay]\nmax_resumes = 0").await;
    house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::Kill]);
    let body = chat(true).to_string();
    let request =
        |more: &str| format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\n{more}content-length: {}\r\n\r\n{body}", body.len());
    let both = request("") + &request("connection: close\r\n");
    let answers = raw(house.address, both.as_bytes()).await;
    let (failed, whole) =
        answers.split_once("\r\n0\r\n\r\nHTTP/1.1 200").expect("the first body ends, another answer follows");
    assert!(failed.contains("node_lost") && !failed.contains("[DONE]"), "{failed}");
    assert!(!failed.to_ascii_lowercase().contains("connection: close"), "{failed}");
    assert!(whole.contains("[DONE]") && whole.ends_with("0\r\n\r\n"), "{whole}");
}

#[tokio::test]
async fn a_refusal_passes_and_nothing_is_tried_again() {
    let mut house = House::with_nodes(2).await;
    first(&house, vec![Act::Whole(400, "", "{\"error\":{\"code\":\"wrong\"}}")]);
    let response = house.post(CHAT, &chat(true)).await;
    assert_eq!(response.status(), 400);
    assert_eq!(response.text().await.unwrap(), "{\"error\":{\"code\":\"wrong\"}}");
    house.asked().await;
    assert!(house.news.try_recv().is_err());
}

const FULL: Act = Act::Whole(429, "retry-after: 7\r\n", "{\"error\":{\"code\":\"full\"}}");

#[tokio::test]
async fn a_full_node_says_nothing_about_the_next_and_when_all_are_full_their_words_pass() {
    let mut house = House::with_nodes(2).await;
    first(&house, vec![FULL]);
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!((status, texts(&text)), (200, ("ab".into(), true)));
    assert_ne!(house.asked().await.node, house.asked().await.node);
    for node in &house.nodes {
        node.script(vec![FULL]);
    }
    let asked = Instant::now();
    let response = house.post(CHAT, &chat(true)).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (429, "7"));
    assert!(response.text().await.unwrap().contains("full"));
    assert!(asked.elapsed() < Duration::from_secs(5), "a client can come again, so it is told at once");
}

#[tokio::test]
async fn a_stream_that_has_begun_waits_for_room() {
    let mut house = House::with_nodes(2).await;
    first(&house, vec![Act::Head, tokens(0, &[1], "a"), Act::Kill]);
    house.nodes[0].script(vec![FULL]);
    for _ in 0..3 {
        house.nodes[1].script(vec![FULL]);
        house.nodes[0].script(vec![FULL]);
    }
    for node in &house.nodes {
        node.script(vec![Act::Head, tokens(1, &[2], "b"), end("[DONE]"), Act::Finish]);
    }
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!((status, texts(&text)), (200, ("ab".into(), true)), "{text}");
    house.asked().await;
    for _ in 0..4 {
        assert_eq!(resume(&house.asked().await), json!({"tokens": [[1]]}));
    }
}

#[tokio::test]
async fn nodes_that_let_go_after_work_are_followed_as_long_as_it_takes() {
    let house = House::with_nodes(2).await;
    let handover = || Act::Send(event::HANDOVER.to_vec());
    for i in (0..12).step_by(2) {
        house.nodes[0].script(vec![Act::Head, tokens(i, &[1], "a"), handover()]);
        house.nodes[1].script(vec![Act::Head, tokens(i + 1, &[1], "a"), handover()]);
    }
    house.nodes[0].script(vec![Act::Head, tokens(12, &[1], "b"), end("[DONE]"), Act::Finish]);
    let (_, text) = house.ask(&chat(true)).await;
    assert_eq!(texts(&text), ("aaaaaaaaaaaab".into(), true));
}

#[tokio::test]
async fn a_request_that_ends_every_node_does_not_meet_them_all() {
    let mut house = House::with(6, "[balancer.relay]\nmax_resumes = 2").await;
    for node in &house.nodes {
        node.script(vec![Act::Kill]);
    }
    let (status, _) = house.ask(&chat(true)).await;
    assert_eq!(status, 502);
    for _ in 0..3 {
        house.asked().await;
    }
    assert!(house.news.try_recv().is_err());
}

const BUSY: Act = Act::Whole(503, "retry-after: 3\r\n", "{\"error\":{\"code\":\"loading\"}}");

#[tokio::test]
async fn when_all_are_busy_for_too_long_their_own_words_pass() {
    let house = House::with(2, "[balancer.relay]\nqueue_wait = \"0s\"").await;
    for node in &house.nodes {
        node.script(vec![BUSY]);
    }
    let response = house.post(CHAT, &chat(false)).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (503, "3"));
    assert!(response.text().await.unwrap().contains("loading"));
}

#[tokio::test]
async fn a_request_waits_for_a_node_that_can_serve_it() {
    let house = House::with_nodes(1).await;
    house.nodes[0].script(vec![BUSY]);
    house.nodes[0].script(vec![BUSY]);
    assert_eq!(house.ask(&chat(true)).await.0, 200, "busy twice, then not");

    house.nodes[0].kill();
    house.until(|members| crate::support::ready(members).is_empty()).await;
    let body = chat(true);
    let (answer, ()) = tokio::join!(house.ask(&body), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        house.nodes[0].restart().await;
    });
    assert_eq!((answer.0, texts(&answer.1)), (200, ("ab".into(), true)));
}

#[tokio::test]
async fn waiting_ends_with_queue_wait_and_at_once_for_a_model_nobody_has() {
    let house = House::with(1, "[balancer.relay]\nqueue_wait = \"300ms\"").await;
    let (status, text) = house.ask(&json!({"model": "other"})).await;
    assert_eq!(status, 404, "{text}");
    house.nodes[0].kill();
    house.until(|members| crate::support::ready(members).is_empty()).await;
    let asked = Instant::now();
    let response = house.post(CHAT, &chat(true)).await;
    assert!(asked.elapsed() >= Duration::from_millis(300));
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert!(response.text().await.unwrap().contains("node_unavailable"), "it was tried, to no avail");
}

#[tokio::test]
async fn when_all_are_broken_the_answer_is_a_bad_gateway() {
    let house = House::with_nodes(2).await;
    for node in &house.nodes {
        node.script(vec![Act::Whole(500, "", "{}")]);
    }
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!(status, 502);
    assert!(text.contains("\"error\""), "{text}");
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_node_at_once() {
    for stream in [true, false] {
        let mut house = House::with_nodes(1).await;
        house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::AwaitClose]);
        let request = tokio::spawn(house.client.post(house.url(CHAT)).body(chat(stream).to_string()).send());
        house.asked().await;
        if stream {
            let mut body = request.await.unwrap().unwrap().bytes_stream();
            assert!(body.next().await.unwrap().unwrap().starts_with(b"data:"));
        } else {
            request.abort();
        }
        let left = Instant::now();
        assert_eq!(house.closed().await, "n0");
        assert!(left.elapsed() < Duration::from_secs(1));
        while !house.metrics().await.contains("reason=\"client_gone\"") {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_request_ends_at_its_deadline() {
    let house = House::with(1, "[balancer.relay]\nrequest_timeout = \"150ms\"").await;
    house.nodes[0].script(vec![Act::Head, Act::AwaitClose]);
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!(status, 504, "{text}");
}

#[tokio::test]
async fn connections_to_nodes_are_used_again() {
    let house = House::with_nodes(1).await;
    for i in 0..20 {
        house.nodes[0].script(good(i % 2 == 0));
        assert_eq!(house.ask(&chat(i % 2 == 0)).await.0, 200);
    }
}

#[tokio::test]
async fn a_request_that_only_waited_begins_anew_elsewhere() {
    let mut house = House::with_nodes(2).await;
    first(&house, vec![Act::Head, Act::Send(event::WAIT.to_vec()), Act::Kill]);
    let (_, text) = house.ask(&chat(true)).await;
    assert_eq!(texts(&text), ("ab".into(), true));
    assert_eq!(house.asked().await.body, house.asked().await.body);
}

#[tokio::test]
async fn a_node_that_refuses_to_go_on_ends_the_stream() {
    let mut house = House::with_nodes(2).await;
    first(&house, vec![Act::Head, tokens(0, &[1], "a"), Act::Kill]);
    house.nodes[1].script(vec![Act::Whole(400, "", "{\"error\":{}}")]);
    let (status, text) = house.ask(&chat(true)).await;
    assert_eq!(status, 200);
    assert!(text.ends_with("}}\n\n") && text.contains("node_lost") && !text.contains("[DONE]"), "{text}");
    house.asked().await;
    house.asked().await;
    assert!(house.news.try_recv().is_err());
}
