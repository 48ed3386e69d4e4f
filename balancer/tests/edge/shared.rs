//! Limits over several balancers: together by Redis while it answers, and each its share when it does not.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Instant,
};

use crate::{
    limits::{ask, long_prompt},
    support::{Act, CHAT, House, PATIENCE, chat, tokens},
};

/// A Redis of this test's own.
struct Redis {
    port: u16,
    server: Child,
    folder: tempfile::TempDir,
}

impl Redis {
    /// None where Redis is not installed, which the test then says.
    fn start() -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = tempfile::tempdir().unwrap();
        match spawn(port, &folder) {
            Ok(server) => Some(Self { port, server, folder }),
            Err(error) => {
                eprintln!("skipped: redis-server cannot be started ({error}); deploy/setup.sh test installs it");
                None
            }
        }
    }

    fn sections(&self, limits: &str) -> String {
        let shared = format!("redis = \"redis://127.0.0.1:{}/0\"\nbalancers = 2\ntimeout = \"250ms\"", self.port);
        format!("{limits}\n[balancer.limits.shared]\n{shared}")
    }

    fn stop(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.server = spawn(self.port, &self.folder).unwrap();
    }

    /// Holds its process where it stands: connections stay open and nothing answers.
    fn pause(&self, paused: bool) {
        let signal = if paused { "-STOP" } else { "-CONT" };
        assert!(Command::new("kill").args([signal, &self.server.id().to_string()]).status().unwrap().success());
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn spawn(port: u16, folder: &tempfile::TempDir) -> std::io::Result<Child> {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"])
        .arg(folder.path())
        .stdout(Stdio::null())
        .spawn()
}

/// Two balancers, each with a node, once they count together.
async fn pair(redis: &Redis, limits: &str) -> [House; 2] {
    let sections = redis.sections(limits);
    let houses = [House::with(1, &sections).await, House::with(1, &sections).await];
    for house in &houses {
        until_together(house, true).await;
    }
    houses
}

/// Asks, for something that no limit refuses, until limits are counted together, or are not.
async fn until_together(house: &House, together: bool) {
    let began = Instant::now();
    let up = format!("tidegate_shared_limits_up {}", u8::from(together));
    let has_said = |text: &str| text.contains("tidegate_shared_limits_total") && text.contains(&up);
    while !has_said(&house.metrics().await) {
        assert!(began.elapsed() < PATIENCE, "{}", house.metrics().await);
        assert_eq!(house.client.get(house.url("/v1/models")).send().await.unwrap().status(), 200);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn balancers_that_share_a_redis_grant_one_limit_together() {
    let Some(redis) = Redis::start() else { return };
    let [a, b] = pair(&redis, "[balancer.limits.per_address]\ntokens_per_minute = 1000\n").await;
    let mut body = chat(true);
    body["max_tokens"] = 100.into();
    a.nodes[0].script(long_prompt());
    b.nodes[0].script(long_prompt());
    let first = ask(&a, "", &body).await.number("x-ratelimit-remaining-tokens");
    assert!((850..=900).contains(&first), "{first}");
    // 303 were used at the one, which the other must know, at the latest when the settlement has come
    let began = Instant::now();
    let second = loop {
        let second = ask(&b, "", &body).await.number("x-ratelimit-remaining-tokens");
        b.nodes[0].forget();
        if second <= 700 || began.elapsed() > PATIENCE {
            break second;
        }
    };
    assert!((400..=700).contains(&second), "{second}");
    let metrics = a.metrics().await;
    assert!(metrics.contains("tidegate_shared_limits_total{outcome=\"granted\"}"), "{metrics}");
}

#[tokio::test]
async fn requests_are_counted_over_both_and_shares_hold_while_redis_is_gone() {
    let Some(mut redis) = Redis::start() else { return };
    let limits = "[balancer.limits.per_address]\nrequests_per_second = 0.01\nburst = 100\n";
    let [a, b] = pair(&redis, limits).await;
    let left = |told: crate::limits::Told| told.number("x-ratelimit-remaining-requests");
    let before = left(ask(&a, "", &chat(false)).await);
    assert_eq!(left(ask(&b, "", &chat(false)).await), before - 1);
    assert_eq!(left(ask(&a, "", &chat(false)).await), before - 2);
    redis.stop();
    let began = Instant::now();
    let told = ask(&a, "", &chat(false)).await;
    assert_eq!(told.status, 200, "an outage fails no request: {told:?}");
    until_together(&a, false).await;
    let told = ask(&a, "", &chat(false)).await;
    assert_eq!(told.header("x-ratelimit-limit-requests"), "50", "half of it is this balancer's: {told:?}");
    assert!(told.number("x-ratelimit-remaining-requests") < 50, "its own count goes on: {told:?}");
    assert!(began.elapsed() < PATIENCE);
    redis.start_again();
    until_together(&a, true).await;
    assert_eq!(ask(&a, "", &chat(false)).await.header("x-ratelimit-limit-requests"), "100");
}

#[tokio::test]
async fn a_redis_that_falls_silent_costs_a_few_requests_its_timeout_and_the_others_nothing() {
    let Some(redis) = Redis::start() else { return };
    let [a, _b] = pair(&redis, "[balancer.limits.per_address]\nrequests_per_second = 1000\n").await;
    redis.pause(true);
    let mut slow = 0;
    for _ in 0..30 {
        let began = Instant::now();
        assert_eq!(ask(&a, "", &chat(false)).await.status, 200);
        slow += usize::from(began.elapsed().as_millis() >= 250);
    }
    redis.pause(false);
    assert!((3..=4).contains(&slow), "{slow} requests waited");
    until_together(&a, true).await;
}

#[tokio::test]
async fn streams_are_counted_over_both_until_they_end() {
    let Some(redis) = Redis::start() else { return };
    let [mut a, b] = pair(&redis, "[balancer.limits.per_address]\nconcurrent_streams = 1\n").await;
    a.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::AwaitClose]);
    let held = tokio::spawn(a.client.post(a.url(CHAT)).body(chat(true).to_string()).send());
    a.asked().await;
    let told = ask(&b, "", &chat(true)).await;
    assert_eq!((told.status, told.code().as_str()), (429, "streams_limit_exceeded"));
    assert!(b.metrics().await.contains("tidegate_rate_limited_total{kind=\"streams\",scope=\"address\"}"));
    drop(held.await.unwrap());
    assert_eq!(a.closed().await, "n0");
    let began = Instant::now();
    while ask(&b, "", &chat(true)).await.status != 200 {
        assert!(began.elapsed() < PATIENCE);
    }
}
