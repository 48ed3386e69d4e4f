//! An HTTP client that tells apart what an operator must: refused, failed before an answer began, broken in its middle, whole.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::StreamExt;
use reqwest::header::AUTHORIZATION;
use serde_json::{Value, json};
use tidegate_common::tls::install_provider;
use tokio::task::JoinSet;

use super::MODEL;

/// Longer than any request of these tests takes when all is well.
const PATIENCE: Duration = Duration::from_secs(90);

/// Which node answered.
const NODE: &str = "x-tidegate-node";

/// A client with connections of its own.
#[derive(Clone)]
pub(crate) struct Client(reqwest::Client);

/// A whole answer that is no stream; `body` is null when it is not JSON.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) node: Option<String>,
    pub(crate) body: Value,
}

/// A stream, as far as it came.
#[derive(Debug, Default)]
pub(crate) struct Streamed {
    pub(crate) status: u16,
    pub(crate) node: Option<String>,
    pub(crate) text: String,
    /// Events with data, `[DONE]` not counted.
    pub(crate) events: usize,
    /// Tokens by the answer's own count.
    pub(crate) tokens: u64,
    /// Whether `[DONE]` came.
    pub(crate) is_whole: bool,
    /// What went wrong.
    pub(crate) fault: Option<String>,
}

/// An answer as it came, with its times.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) status: u16,
    /// When its head was there.
    pub(crate) begun: Option<Instant>,
    pub(crate) text: String,
    /// The longest time between two of its parts, comments not counted.
    pub(crate) pause: Option<Duration>,
    /// Why there is no more of it.
    pub(crate) fault: Option<String>,
}

/// A whole answer with its tokens.
#[derive(Debug, PartialEq)]
pub(crate) struct Wire {
    /// Of each choice.
    pub(crate) tokens: BTreeMap<u32, Vec<u32>>,
    pub(crate) body: Value,
}

/// How one request of a load ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    Whole,
    /// After the client had some of it.
    Broken,
    /// Before the client had anything.
    Failed,
}

impl Client {
    /// A new client.
    pub(crate) fn new() -> Self {
        install_provider();
        Self(reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap())
    }

    /// A client that trusts one authority, shows a key, and sees within a second that the other side's machine is gone.
    pub(crate) fn trusting(ca: &[u8], key: &str) -> Self {
        install_provider();
        let (ca, second) = (reqwest::Certificate::from_pem(ca).unwrap(), Duration::from_secs(1));
        let headers = [(AUTHORIZATION, format!("Bearer {key}").parse().unwrap())].into_iter().collect();
        let client =
            reqwest::Client::builder().no_proxy().timeout(PATIENCE).tls_certs_only([ca]).default_headers(headers);
        let client = client.connect_timeout(second / 2).tcp_keepalive(second).tcp_keepalive_interval(second);
        Self(client.build().unwrap())
    }

    /// GET.
    pub(crate) async fn get(&self, url: &str) -> reqwest::Result<Answer> {
        Answer::read(self.0.get(url).send().await?).await
    }

    /// GET of any text.
    pub(crate) async fn text(&self, url: &str) -> String {
        self.0.get(url).send().await.unwrap().text().await.unwrap()
    }

    /// The sum of a metric over its labels, from the text that `/metrics` gives.
    pub(crate) async fn metric(&self, admin: &str, name: &str) -> f64 {
        let text = self.text(&format!("{admin}/metrics")).await;
        let of_this = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        text.lines()
            .filter(of_this)
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .fold(0.0, |a, b| a + b)
    }

    /// POST of JSON.
    pub(crate) async fn post(&self, url: &str, body: &Value) -> reqwest::Result<Answer> {
        Answer::read(self.0.post(url).json(body).send().await?).await
    }

    /// POST of any bytes as JSON.
    pub(crate) async fn post_raw(&self, url: &str, body: Vec<u8>) -> reqwest::Result<Answer> {
        let request = self.0.post(url).header("content-type", "application/json").body(body);
        Answer::read(request.send().await?).await
    }

    /// POST as a balancer sends it, so that the tokens of each choice are seen; the body must not ask for a stream.
    ///
    /// # Panics
    /// When it is refused, or ends before its time.
    pub(crate) async fn wire(&self, url: &str, body: &Value) -> Wire {
        let response = self.0.post(url).header("x-tidegate-stream", "1").json(body).send().await.unwrap();
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert_eq!(status, 200, "{body}\n{text}");
        Wire::read(&text).unwrap_or_else(|| panic!("{body}\nends early:\n{text}"))
    }

    /// POST under a request id; the answer as it comes. `note` hears how many bytes there are so far.
    pub(crate) async fn raw(&self, url: &str, id: &str, body: &Value, mut note: impl FnMut(usize)) -> String {
        let response = self.0.post(url).header("x-request-id", id).json(body).send().await.unwrap();
        let (mut chunks, mut all) = (response.bytes_stream(), Vec::new());
        while let Some(chunk) = chunks.next().await {
            all.extend_from_slice(&chunk.unwrap());
            note(all.len());
        }
        String::from_utf8(all).unwrap()
    }

    /// POST under a request id; whatever comes of it.
    pub(crate) async fn hear(&self, url: &str, id: &str, body: &Value) -> Heard {
        let mut heard = Heard::default();
        if let Err(error) = self.listen(url, id, body, &mut heard).await {
            heard.fault = Some(format!("{error:?}"));
        }
        heard
    }

    async fn listen(&self, url: &str, id: &str, body: &Value, into: &mut Heard) -> reqwest::Result<()> {
        let response = self.0.post(url).header("x-request-id", id).json(body).send().await?;
        (into.status, into.begun) = (response.status().as_u16(), Some(Instant::now()));
        let (mut chunks, mut all, mut last) = (response.bytes_stream(), Vec::new(), None);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.inspect_err(|_| into.text = String::from_utf8_lossy(&all).into_owned())?;
            all.extend_from_slice(&chunk);
            if !chunk.starts_with(b":") {
                let since = last.replace(Instant::now()).map(|last: Instant| last.elapsed());
                into.pause = into.pause.max(since);
            }
        }
        into.text = String::from_utf8_lossy(&all).into_owned();
        Ok(())
    }

    /// POST whose answer is a stream of events, read to its end; `event` is called at each event's data.
    pub(crate) async fn stream(&self, url: &str, body: &Value, mut event: impl FnMut(&Value)) -> Streamed {
        let mut streamed = Streamed::default();
        if let Err(error) = self.read_stream(url, body, &mut streamed, &mut event).await {
            streamed.fault = Some(format!("{error:?}"));
        }
        streamed
    }

    async fn read_stream(
        &self,
        url: &str,
        body: &Value,
        into: &mut Streamed,
        event: &mut impl FnMut(&Value),
    ) -> reqwest::Result<()> {
        let response = self.0.post(url).json(body).send().await?;
        into.status = response.status().as_u16();
        into.node = node_of(&response);
        if into.status != 200 {
            into.fault = Some(response.text().await?);
            return Ok(());
        }
        let (mut chunks, mut rest) = (response.bytes_stream(), Vec::new());
        while let Some(chunk) = chunks.next().await {
            rest.extend_from_slice(&chunk?);
            while let Some(end) = rest.windows(2).position(|pair| pair == b"\n\n") {
                let whole: Vec<u8> = rest.drain(..end + 2).collect();
                into.take(&String::from_utf8_lossy(&whole), event);
            }
        }
        Ok(())
    }
}

impl Wire {
    /// Reads the events that a node sends to a balancer; none when the last one is missing.
    fn read(text: &str) -> Option<Self> {
        let (mut tokens, mut has_ended) = (BTreeMap::<u32, Vec<u32>>::new(), false);
        for id in text.lines().filter_map(|line| line.strip_prefix("id: ")) {
            let mut parts = id.split(':');
            match (parts.next()?, parts.next(), parts.next()) {
                ("end", ..) => has_ended = true,
                ("by" | "prompt", ..) => {}
                (choice, Some(_), Some(ids)) => {
                    let ids = ids.split(',').map(str::parse).collect::<Result<Vec<u32>, _>>().ok()?;
                    tokens.entry(choice.parse().ok()?).or_default().extend(ids);
                }
                _ => return None,
            }
        }
        let body = text.lines().rev().find_map(|line| line.strip_prefix("data: "))?;
        let body: Value = serde_json::from_str(body).ok()?;
        (has_ended && body["choices"].is_array()).then_some(Self { tokens, body })
    }
}

impl Streamed {
    fn take(&mut self, text: &str, event: &mut impl FnMut(&Value)) {
        for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
            if data == "[DONE]" {
                self.is_whole = true;
                continue;
            }
            let data: Value = serde_json::from_str(data).unwrap_or(Value::Null);
            if data.get("error").is_some() {
                self.fault = Some(data.to_string());
                continue;
            }
            self.events += 1;
            let choice = &data["choices"][0];
            self.text += choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            self.tokens = data["usage"]["completion_tokens"].as_u64().unwrap_or(self.tokens);
            event(&data);
        }
    }

    /// How it ended.
    pub(crate) fn end(&self) -> End {
        match (self.is_whole && self.fault.is_none(), self.events) {
            (true, _) => End::Whole,
            (false, 0) => End::Failed,
            (false, _) => End::Broken,
        }
    }
}

impl Answer {
    async fn read(response: reqwest::Response) -> reqwest::Result<Self> {
        let (status, node) = (response.status().as_u16(), node_of(&response));
        let body = serde_json::from_slice(&response.bytes().await?).unwrap_or(Value::Null);
        Ok(Self { status, node, body })
    }
}

fn node_of(response: &reqwest::Response) -> Option<String> {
    response.headers().get(NODE).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// The body of a greedy chat request.
pub(crate) fn chat(prompt: &str, tokens_max: u32) -> Value {
    json!({
        "model": MODEL, "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens_max, "temperature": 0,
    })
}

/// The same as a stream that ends with its usage.
pub(crate) fn chat_stream(prompt: &str, tokens_max: u32) -> Value {
    let mut body = chat(prompt, tokens_max);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    body
}

/// Requests that go on until they are told to stop, half of them streams.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    workers: JoinSet<Tally>,
}

/// What a load has come to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) ends: BTreeMap<End, usize>,
    pub(crate) faults: Vec<String>,
    pub(crate) slowest: Duration,
}

impl Load {
    /// Starts `workers` clients, each with one request at a time.
    pub(crate) fn start(edge: &str, workers: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut set = JoinSet::new();
        for worker in 0..workers {
            set.spawn(work(format!("{edge}/v1/chat/completions"), worker, Arc::clone(&stop)));
        }
        Self { stop, workers: set }
    }

    /// Lets each client finish what it has, and counts.
    pub(crate) async fn stop(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut tally = Tally::default();
        for part in self.workers.join_all().await {
            part.ends.into_iter().for_each(|(end, n)| *tally.ends.entry(end).or_default() += n);
            tally.faults.extend(part.faults);
            tally.slowest = tally.slowest.max(part.slowest);
        }
        tally
    }
}

async fn work(url: String, worker: usize, stop: Arc<AtomicBool>) -> Tally {
    let (client, mut tally) = (Client::new(), Tally::default());
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let prompt = format!("Worker {worker} asks for the {turn}th time: name a colour.");
        let start = Instant::now();
        let (end, fault) = if (worker + turn).is_multiple_of(2) {
            let streamed = client.stream(&url, &chat_stream(&prompt, 8), |_| {}).await;
            (streamed.end(), streamed.fault)
        } else {
            whole(client.post(&url, &chat(&prompt, 8)).await)
        };
        tally.slowest = tally.slowest.max(start.elapsed());
        *tally.ends.entry(end).or_default() += 1;
        tally.faults.extend(fault);
    }
    tally
}

fn whole(answer: reqwest::Result<Answer>) -> (End, Option<String>) {
    match answer {
        Ok(answer) if answer.status == 200 && answer.body["choices"].is_array() => (End::Whole, None),
        Ok(answer) => (End::Failed, Some(format!("{} {}", answer.status, answer.body))),
        Err(error) => (End::Failed, Some(format!("{error:?}"))),
    }
}

impl Tally {
    /// How many requests ended so.
    pub(crate) fn count(&self, end: End) -> usize {
        self.ends.get(&end).copied().unwrap_or_default()
    }
}
