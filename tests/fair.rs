//! Goal: on a real node, a tenant that floods it neither keeps another from its tokens nor fills the queue, and who waits too long or
//! comes too many is told so with a time that means something. Method: requests with the headers that the edge would set.

use std::time::{Duration, Instant};

use reqwest::{RequestBuilder, Response, header::RETRY_AFTER};
use serde_json::{Value, json};
use tidegate_common::tls::install_provider;
use tokio::task::JoinSet;

use crate::support::{
    MODEL,
    cluster::{NodePlan, lone_node},
};

/// How many times its idle time to the first token a calm tenant may see beside a flood.
const SLOWDOWN_MAX: f64 = 2.0;

#[tokio::test]
async fn a_flood_does_not_double_another_tenants_time_to_the_first_token() {
    let lines = "max_batch_size = 8\nmax_batch_tokens = 128\nmax_queue = 64";
    let (_node, base, _folder) = lone_node(NodePlan { lines, ..NodePlan::named("n1") }).await;
    let url = format!("{base}/v1/chat/completions");
    let calm = Asker::new(&url, "calm");

    let mut idle = Vec::new();
    for i in 0..7 {
        idle.push(calm.first_token(i).await);
    }
    let mut flood = JoinSet::new();
    for worker in 0..24 {
        flood.spawn(flood_on(Asker::new(&url, "flood"), worker));
    }
    tokio::time::sleep(Duration::from_secs(6)).await;
    let mut beside = Vec::new();
    for i in 7..18 {
        beside.push(calm.first_token(i).await);
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    flood.abort_all();
    while flood.join_next().await.is_some() {}
    for i in 18..25 {
        idle.push(calm.first_token(i).await);
    }

    let (idle, beside) = (median(idle), median(beside));
    let ratio = beside.as_secs_f64() / idle.as_secs_f64();
    println!("time to the first token: idle {idle:?}, beside a flood of 24 {beside:?}: {ratio:.2} times (medians)");
    assert!(ratio <= SLOWDOWN_MAX, "{ratio:.2} times the idle time");
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back_and_leaves_room_for_other_tenants() {
    let lines =
        "max_batch_size = 1\nmax_queue = 4\nmax_queue_per_tenant = 2\nmax_choices = 1\nmax_concurrent_requests = 6";
    let (_node, base, _folder) = lone_node(NodePlan { lines, ..NodePlan::named("n1") }).await;
    let url = format!("{base}/v1/chat/completions");
    let (flood, calm) = (Asker::new(&url, "flood"), Asker::new(&url, "calm"));

    // one runs, two wait, and the fourth of the same tenant is one too many
    let mut held = Vec::new();
    for i in 0..3 {
        let mut response = flood.ask(&long(i)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        if i == 0 {
            response.chunk().await.unwrap();
        }
        held.push(response);
    }
    settle().await;
    let refused = flood.ask(&long(3)).send().await.unwrap();
    let after = retry_after(&refused);
    assert_eq!((refused.status().as_u16(), code(refused).await.as_str()), (429, "queue_full"));
    // three answers of 1500 tokens are ahead
    assert!((2..=3600).contains(&after), "Retry-After: {after}");

    // another tenant still finds a place in the queue, and its deadline finds it there
    let start = Instant::now();
    let late = calm.ask(&short(9)).header("x-tidegate-deadline-ms", "1500").send().await.unwrap();
    assert_eq!((late.status().as_u16(), code(late).await.as_str()), (504, "queue_timeout"));
    let took = start.elapsed();
    assert!((Duration::from_millis(1400)..Duration::from_millis(3000)).contains(&took), "{took:?}");

    // with less ahead of it, the time to come back is shorter
    held.truncate(1);
    settle().await;
    for i in 4..6 {
        held.push(flood.ask(&short(i)).send().await.unwrap());
    }
    settle().await;
    let sooner = retry_after(&flood.ask(&long(6)).send().await.unwrap());
    println!("Retry-After: {after} s with three long answers ahead, {sooner} s with one and two short ones");
    assert!(sooner < after, "{sooner} s is not less than {after} s");
}

/// Until the engine has seen, with its next step, who has come and who has left.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(500)).await;
}

async fn flood_on(asker: Asker, worker: usize) {
    for turn in 0.. {
        let body = chat(worker * 1000 + turn, 300, 250, true);
        let Ok(mut response) = asker.ask(&body).send().await else { return };
        while let Ok(Some(_)) = response.chunk().await {}
    }
}

/// A client of one tenant.
struct Asker {
    client: reqwest::Client,
    url: String,
    tenant: &'static str,
}

impl Asker {
    fn new(url: &str, tenant: &'static str) -> Self {
        install_provider();
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(120)).build().unwrap();
        Self { client, url: url.to_owned(), tenant }
    }

    fn ask(&self, body: &Value) -> RequestBuilder {
        self.client.post(&self.url).header("x-tidegate-tenant", self.tenant).json(body)
    }

    /// How long a prompt of some hundred tokens takes to its first one.
    async fn first_token(&self, i: usize) -> Duration {
        let start = Instant::now();
        let mut response = self.ask(&chat(900_000 + i, 450, 1, true)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.chunk().await.unwrap().unwrap();
        let took = start.elapsed();
        while response.chunk().await.unwrap().is_some() {}
        took
    }
}

/// A request whose prompt is like no other's, so that nothing of it is in the prefix cache.
fn chat(i: usize, words: usize, tokens_max: u32, stream: bool) -> Value {
    const WORDS: [&str; 8] = ["sea", "bread", "winter", "train", "moon", "garden", "river", "stone"];
    let text: Vec<&str> = (0..words).map(|k| WORDS[(i * 7919 + k * k + k / 3) % 8]).collect();
    json!({
        "model": MODEL, "messages": [{"role": "user", "content": format!("{i}: {}", text.join(" "))}],
        "max_tokens": tokens_max, "temperature": 0, "ignore_eos": true, "stream": stream,
    })
}

fn long(i: usize) -> Value {
    chat(i, 5, 1500, true)
}

fn short(i: usize) -> Value {
    chat(i, 5, 3, i != 9)
}

fn retry_after(response: &Response) -> u64 {
    response.headers()[RETRY_AFTER].to_str().unwrap().parse().unwrap()
}

async fn code(response: Response) -> String {
    let body: Value = response.json().await.unwrap();
    body["error"]["code"].as_str().unwrap_or_default().to_owned()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
