//! How much each may have: who is over is told so, in the headers that clients know, and nobody else notices.

use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
};

use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tidegate_common::contract::{EventId, event};

use crate::support::{Act, CHAT, House, chat, end, raw, texts, tokens};

/// A file of two keys, `one` of alice and `two` of bob, which has limits of its own.
fn keys() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let key = |id, sha256, owner| format!("[[keys]]\nid = \"{id}\"\nsha256 = \"{sha256}\"\nowner = \"{owner}\"\n");
    let one = key("k1", "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed", "alice");
    let two = key("k2", "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3", "bob");
    std::fs::write(file.path(), format!("{one}{two}[keys.limits]\nrequests_per_second = 0.01\nburst = 4\n")).unwrap();
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o600)).unwrap();
    file
}

/// An answer as far as limits go.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) status: u16,
    headers: reqwest::header::HeaderMap,
    body: String,
}

impl Told {
    async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, body: response.text().await.unwrap() }
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn number(&self, name: &str) -> i64 {
        self.header(name).parse().unwrap_or_else(|_| panic!("{name} in {self:?}"))
    }

    pub(crate) fn code(&self) -> String {
        let body: Value = serde_json::from_str(&self.body).unwrap();
        body["error"]["code"].as_str().unwrap().to_owned()
    }
}

pub(crate) async fn ask(house: &House, key: &str, body: &Value) -> Told {
    let request = house.client.post(house.url(CHAT)).bearer_auth(key).body(body.to_string());
    Told::of(request.send().await.unwrap()).await
}

/// An answer to a prompt of 300 tokens, of three tokens itself.
pub(crate) fn long_prompt() -> Vec<Act> {
    let mut prompt = Vec::new();
    event::write(&mut prompt, Some(&EventId::Prompt(300)), None, None);
    vec![Act::Head, Act::Send(prompt), tokens(0, &[1, 2, 3], "abc"), end("[DONE]"), Act::Finish]
}

#[tokio::test]
async fn a_key_that_asks_too_often_is_told_when_to_come_again_and_others_are_served() {
    let keys = keys();
    let limits = "[balancer.limits.per_key]\nrequests_per_second = 0.01\nburst = 2";
    let mut house = House::with(1, &format!("[balancer.auth]\nkeys_file = {:?}\n{limits}", keys.path())).await;
    for left in [1, 0] {
        let told = ask(&house, "one", &chat(false)).await;
        assert_eq!((told.status, told.number("x-ratelimit-remaining-requests")), (200, left), "{told:?}");
        assert_eq!(told.header("x-ratelimit-limit-requests"), "2");
        assert!(told.header("x-ratelimit-reset-requests").ends_with('s'), "{told:?}");
        house.asked().await;
    }
    let told = ask(&house, "one", &chat(false)).await;
    assert_eq!((told.status, told.code().as_str()), (429, "requests_limit_exceeded"));
    assert!(told.body.contains("balancer.limits.per_key.requests_per_second"), "{told:?}");
    assert!((90..=100).contains(&told.number("retry-after")), "{told:?}");
    assert_eq!(told.number("x-ratelimit-remaining-requests"), 0);
    assert!(house.news.try_recv().is_err(), "a node saw it");
    for left in [3, 2, 1, 0] {
        let told = ask(&house, "two", &chat(true)).await;
        assert_eq!((told.status, told.number("x-ratelimit-remaining-requests")), (200, left), "{told:?}");
    }
    assert!(ask(&house, "two", &chat(true)).await.body.contains("of the key itself"));
    assert_eq!(house.client.get(house.url("/health")).send().await.unwrap().status(), 200);
    let metrics = house.metrics().await;
    assert!(metrics.contains("tidegate_rate_limited_total{kind=\"requests\",scope=\"key\"} 2"), "{metrics}");
    assert!(metrics.contains("tidegate_rate_limit_entries 2"), "{metrics}");
}

#[tokio::test]
async fn guessing_keys_is_slow_because_an_address_is_asked_first() {
    let keys = keys();
    let limits = "[balancer.limits.per_address]\nrequests_per_second = 0.01\nburst = 3";
    let house = House::with(1, &format!("[balancer.auth]\nkeys_file = {:?}\n{limits}", keys.path())).await;
    for _ in 0..3 {
        assert_eq!(ask(&house, "guess", &chat(false)).await.status, 401);
    }
    let told = ask(&house, "one", &chat(false)).await;
    assert_eq!(told.status, 429);
    assert!(told.body.contains("per_address"), "{told:?}");
}

#[tokio::test]
async fn tokens_are_reserved_and_settled_by_what_really_passed() {
    let house = House::with(1, "[balancer.limits.per_address]\ntokens_per_minute = 600").await;
    let mut body = chat(true);
    body["max_tokens"] = 100.into();
    house.nodes[0].script(long_prompt());
    let told = ask(&house, "", &body).await;
    assert_eq!((told.status, told.number("x-ratelimit-limit-tokens")), (200, 600));
    // a prompt of some twenty tokens by its bytes, and a hundred for the answer
    assert!((450..=500).contains(&told.number("x-ratelimit-remaining-tokens")), "{told:?}");
    assert_eq!(texts(&told.body).0, "abc");
    // 303 were used, so after another reservation less than 300 are left
    house.nodes[0].script(long_prompt());
    let told = ask(&house, "", &body).await;
    assert_eq!(told.status, 200);
    assert!((150..=220).contains(&told.number("x-ratelimit-remaining-tokens")), "{told:?}");
    let told = ask(&house, "", &body).await;
    assert_eq!((told.status, told.code().as_str()), (429, "tokens_limit_exceeded"), "{told:?}");
    assert!(told.body.contains("balancer.limits.per_address.tokens_per_minute"), "{told:?}");
    assert!(told.number("retry-after") >= 1 && !told.header("x-ratelimit-reset-tokens").is_empty());
}

#[tokio::test]
async fn a_reservation_that_came_to_nothing_is_given_back() {
    let house = House::with(1, "[balancer.limits.total]\ntokens_per_minute = 200").await;
    let mut body = chat(false);
    body["max_tokens"] = 150.into();
    for _ in 0..5 {
        house.nodes[0].script(vec![Act::Whole(400, "", r#"{"error":{"code":"x"}}"#)]);
        let told = ask(&house, "", &body).await;
        assert_eq!(told.status, 400, "{told:?}");
        assert_eq!(told.header("x-ratelimit-limit-tokens"), "", "what all have used is nobody's business");
    }
    body["max_tokens"] = 1_000_000.into();
    assert_eq!(ask(&house, "", &body).await.status, 200, "more than there is waits for all there is");
}

#[tokio::test]
async fn a_foreign_upstreams_tokens_are_its_own_count_or_its_events() {
    let mut house = House::with_foreign(0, 1, "", "[balancer.limits.per_address]\ntokens_per_minute = 10000").await;
    let usage = r#"{"usage":{"prompt_tokens":4000,"completion_tokens":1000,"total_tokens":5000}}"#;
    house.nodes[0].script(vec![Act::Whole(200, "", usage)]);
    let body = json!({"model": "tiny", "messages": [], "max_tokens": 1});
    assert_eq!(ask(&house, "", &body).await.status, 200);
    house.asked().await;
    let told = ask(&house, "", &body).await;
    assert!((4900..=5300).contains(&told.number("x-ratelimit-remaining-tokens")), "{told:?}");
}

#[tokio::test]
async fn streams_at_once_are_counted_until_their_last_byte() {
    let mut house = House::with(1, "[balancer.limits.per_address]\nconcurrent_streams = 1").await;
    house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::AwaitClose]);
    let held = tokio::spawn(house.client.post(house.url(CHAT)).body(chat(true).to_string()).send());
    house.asked().await;
    let told = ask(&house, "", &chat(true)).await;
    assert_eq!((told.status, told.code().as_str(), told.header("retry-after")), (429, "streams_limit_exceeded", "1"));
    drop(held.await.unwrap());
    assert_eq!(house.closed().await, "n0");
    while ask(&house, "", &chat(true)).await.status != 200 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_reload_changes_the_limits_and_forgets_nothing() {
    let sections = |burst| format!("[balancer.limits.per_address]\nrequests_per_second = 0.01\nburst = {burst}");
    let house = House::with(1, &sections(2)).await;
    assert_eq!(ask(&house, "", &chat(false)).await.status, 200);
    assert_eq!(ask(&house, "", &chat(false)).await.status, 200);
    assert_eq!(ask(&house, "", &chat(false)).await.status, 429);
    house.reload(&sections(3)).await;
    assert_eq!(ask(&house, "", &chat(false)).await.status, 200);
    assert_eq!(ask(&house, "", &chat(false)).await.status, 429, "the two before the reload count");
    house.reload("").await;
    assert!(ask(&house, "", &chat(false)).await.headers.get("x-ratelimit-limit-requests").is_none());
}

#[tokio::test]
async fn balancers_share_what_the_configuration_grants() {
    let sections =
        "[balancer.limits.per_address]\nrequests_per_second = 0.03\nburst = 6\n[balancer.limits.shared]\nbalancers = 3";
    let house = House::with(1, sections).await;
    for left in [1, 0] {
        assert_eq!(ask(&house, "", &chat(false)).await.number("x-ratelimit-remaining-requests"), left);
    }
    assert_eq!(ask(&house, "", &chat(false)).await.status, 429);
}

/// A request that leaves its connection open.
const HEALTH: &[u8] = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n";

/// A connection that has been served once.
fn held(house: &House) -> TcpStream {
    let mut stream = TcpStream::connect(house.address).unwrap();
    stream.write_all(HEALTH).unwrap();
    stream.read_exact(&mut [0; 12]).unwrap();
    stream
}

#[tokio::test]
async fn connections_are_bounded_over_all_addresses() {
    let house = House::with(1, "[balancer.limits]\nmax_connections = 2").await;
    let (first, _second) = (held(&house), held(&house));
    assert_eq!(raw(house.address, HEALTH).await, "");
    assert!(house.metrics().await.contains("tidegate_connections_refused_total{reason=\"max_connections\"} 1"));
    drop(first);
    let closing = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    while !raw(house.address, closing).await.starts_with("HTTP/1.1 200") {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_address_may_not_open_connections_too_fast() {
    let house = House::with(1, "[balancer.limits]\nnew_connections_per_second_per_address = 0.01").await;
    let mut open = held(&house);
    assert_eq!(raw(house.address, HEALTH).await, "");
    assert!(house.metrics().await.contains("reason=\"new_connections\"} 1"));
    open.write_all(HEALTH).unwrap();
    assert_ne!(open.read(&mut [0; 9]).unwrap(), 0, "the one that is open is served on");
}

#[tokio::test]
async fn who_does_not_read_its_stream_loses_it() {
    let house = House::with(1, "[balancer.limits]\nwrite_timeout = \"200ms\"").await;
    let large = "x".repeat(1 << 20);
    let pieces = (0..64).map(|i| tokens(i, &[i], &large));
    house.nodes[0].script([Act::Head].into_iter().chain(pieces).collect());
    let mut stream = TcpStream::connect(house.address).unwrap();
    let body = chat(true).to_string();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    while !house.metrics().await.contains("reason=\"client_gone\",status=\"200\"} 1") {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(house.metrics().await.contains("tidegate_open_streams 0"));
}
