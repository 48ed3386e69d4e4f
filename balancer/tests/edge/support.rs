//! Fake nodes, a running edge, and clients.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use pingora::listeners::tls::Acceptor;
use serde_json::{Value, json};
use tidegate_balancer::{Balancer, BalancerConfig, Reloads, admin::Members};
use tidegate_common::{
    config::{ClusterConfig, Raw},
    contract::{EventId, NodeRecord, event},
    registry::{MemoryRegistry, Registry},
    shutdown::{self, Trigger},
    tls,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::AbortHandle,
};

pub(crate) const MODEL: &str = "tiny";
pub(crate) const CHAT: &str = "/v1/chat/completions";
/// Longer than anything here takes when it works.
pub(crate) const PATIENCE: Duration = Duration::from_secs(8);

/// What a node does with one generation, step by step.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// Begins a stream.
    Head,
    /// Writes these bytes of a stream.
    Send(Vec<u8>),
    /// Ends the stream as HTTP wants it.
    Finish,
    /// Closes the connection on the spot.
    Kill,
    /// Waits until the edge closes the connection, and tells.
    AwaitClose,
    /// Says nothing for so long.
    Pause(Duration),
    /// Answers whole: status, more header lines, body.
    Whole(u16, &'static str, &'static str),
}

/// A request as the node got it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) node: String,
    pub(crate) path: String,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().filter_map(|l| l.split_once(": ")).find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v)
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// What nodes tell the test.
#[derive(Debug)]
pub(crate) enum News {
    Asked(Seen),
    Closed(String),
}

#[derive(Debug)]
struct Behaviour {
    id: String,
    /// Whether it is a server of the OpenAI API that knows nothing of Tidegate.
    is_foreign: bool,
    script: Mutex<VecDeque<Vec<Act>>>,
    health: Mutex<&'static str>,
    news: mpsc::UnboundedSender<News>,
}

/// A fake node.
pub(crate) struct Node {
    pub(crate) record: NodeRecord,
    behaviour: Arc<Behaviour>,
    tls: Option<Arc<rustls::ServerConfig>>,
    server: Mutex<Option<AbortHandle>>,
}

impl Node {
    async fn start(
        id: &str,
        is_foreign: bool,
        tls: Option<Arc<rustls::ServerConfig>>,
        news: mpsc::UnboundedSender<News>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut record = NodeRecord::new(id.parse().unwrap(), address.to_string(), MODEL.into());
        record.tls = tls.is_some();
        let behaviour =
            Behaviour { id: id.into(), is_foreign, script: Mutex::default(), health: Mutex::new("healthy"), news };
        let node = Self { record, behaviour: Arc::new(behaviour), tls, server: Mutex::default() };
        node.listen(listener);
        node
    }

    fn listen(&self, listener: TcpListener) {
        let (behaviour, tls) = (Arc::clone(&self.behaviour), self.tls.clone());
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let behaviour = Arc::clone(&behaviour);
                match tls.clone().map(Acceptor::from_server_config) {
                    None => connections.spawn(serve(stream, behaviour)),
                    Some(acceptor) => connections.spawn(async move {
                        if let Ok(stream) =
                            acceptor.tls_handshake(pingora::protocols::l4::stream::Stream::from(stream)).await
                        {
                            serve(stream, behaviour).await;
                        }
                    }),
                };
            }
        });
        *self.server.lock().unwrap() = Some(server.abort_handle());
    }

    /// What the next generation meets, in order; without a script a node answers well.
    pub(crate) fn script(&self, acts: Vec<Act>) {
        self.behaviour.script.lock().unwrap().push_back(acts);
    }

    /// Drops what is left of its script.
    pub(crate) fn forget(&self) {
        self.behaviour.script.lock().unwrap().clear();
    }

    /// What its `/health` says from now on: a status, `cold` (healthy, its model not in memory), `by` and a
    /// fingerprint (healthy), or `broken` (nothing that can be read).
    pub(crate) fn say(&self, health: &'static str) {
        *self.behaviour.health.lock().unwrap() = health;
    }

    /// Closes the listener and every connection, as a kill does.
    pub(crate) fn kill(&self) {
        if let Some(server) = self.server.lock().unwrap().take() {
            server.abort();
        }
    }

    pub(crate) async fn restart(&self) {
        let listener = loop {
            if let Ok(listener) = TcpListener::bind(&self.record.address).await {
                break listener;
            }
            tokio::task::yield_now().await;
        };
        self.listen(listener);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One event of tokens, each with its text.
pub(crate) fn tokens(offset: u32, ids: &[u32], text: &str) -> Act {
    let mut out = Vec::new();
    let id = EventId::Tokens { choice: 0, offset, tokens: ids.to_vec() };
    let data = json!({"choices": [{"delta": {"content": text}}]}).to_string();
    event::write(&mut out, Some(&id), None, Some(data.as_bytes()));
    Act::Send(out)
}

/// One event of tokens without text.
pub(crate) fn silent(offset: u32, ids: &[u32]) -> Act {
    let mut out = Vec::new();
    event::write(&mut out, Some(&EventId::Tokens { choice: 0, offset, tokens: ids.to_vec() }), None, None);
    Act::Send(out)
}

/// The last event.
pub(crate) fn end(data: &str) -> Act {
    let mut out = Vec::new();
    event::write(&mut out, Some(&EventId::End), None, Some(data.as_bytes()));
    Act::Send(out)
}

pub(crate) fn good(stream: bool) -> Vec<Act> {
    if stream {
        vec![Act::Head, tokens(0, &[1], "a"), tokens(1, &[2, 3], "b"), end("[DONE]"), Act::Finish]
    } else {
        vec![Act::Head, silent(0, &[1]), silent(1, &[2]), end(r#"{"object":"chat.completion"}"#), Act::Finish]
    }
}

/// A piece of a foreign stream.
pub(crate) fn piece(text: &str) -> Act {
    Act::Send(format!("data: {}\n\n", json!({"choices": [{"delta": {"content": text}}]})).into_bytes())
}

/// The end of a foreign stream.
pub(crate) fn done() -> Act {
    Act::Send(b"data: [DONE]\n\n".to_vec())
}

fn good_abroad(stream: bool) -> Vec<Act> {
    if stream {
        vec![Act::Head, piece("x"), piece("y"), done(), Act::Finish]
    } else {
        vec![Act::Whole(200, "", r#"{"object":"abroad"}"#)]
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(stream: S, behaviour: Arc<Behaviour>) {
    let mut stream = BufReader::new(stream);
    while let Some(seen) = read_request(&mut stream, &behaviour.id).await {
        if seen.path == if behaviour.is_foreign { "/base/models" } else { "/health" } {
            answer_health(&mut stream, &behaviour).await;
            continue;
        }
        let scripted = behaviour.script.lock().unwrap().pop_front();
        let wants_stream = seen.json().get("stream") == Some(&Value::Bool(true));
        let _ = behaviour.news.send(News::Asked(seen));
        let good = || if behaviour.is_foreign { good_abroad(wants_stream) } else { good(wants_stream) };
        if !perform(&mut stream, scripted.unwrap_or_else(good), &behaviour).await {
            return;
        }
    }
}

async fn read_request<S: AsyncRead + Unpin>(stream: &mut BufReader<S>, node: &str) -> Option<Seen> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let path = head.split(' ').nth(1)?.to_owned();
    let mut seen = Seen { node: node.into(), path, head, body: Vec::new() };
    let length = seen.header("content-length").map_or(0, |v| v.parse().unwrap());
    seen.body.resize(length, 0);
    stream.read_exact(&mut seen.body).await.ok()?;
    Some(seen)
}

async fn answer_health<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut BufReader<S>, behaviour: &Behaviour) {
    let word = *behaviour.health.lock().unwrap();
    if word == "broken" {
        let _ = stream.write_all(b"HTTP/1.1 500 X\r\ncontent-length: 1\r\n\r\n?").await;
        let _ = stream.flush().await;
        return;
    }
    // "cold" is healthy, with the model not in memory
    let status = if word == "cold" || word.starts_with("by ") { "healthy" } else { word };
    let mut body = json!({"status": status, "uptime": 1, "node": behaviour.id, "model": MODEL, "version": "1", "color": "blue",
        "site": "local", "build": "t", "device": "fake", "context": 100, "running": 2, "waiting": 1, "kv_blocks_free": 3,
        "kv_blocks_total": 4, "step": 5});
    if let Some(fingerprint) = word.strip_prefix("by ") {
        let model = json!({"name": MODEL, "state": "ready", "running": 0, "waiting": 0, "kv_blocks_free": 0, "kv_blocks_total": 0,
            "fingerprint": fingerprint});
        body["models"] = json!([model]);
    }
    if word == "cold" {
        let model = json!({"name": MODEL, "state": "unloaded", "running": 0, "waiting": 0, "kv_blocks_free": 0, "kv_blocks_total": 0});
        body["models"] = json!([model]);
    }
    let body = body.to_string();
    let code = if status == "healthy" { 200 } else { 503 };
    let head = format!("HTTP/1.1 {code} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    let _ = stream.flush().await;
}

async fn perform<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut BufReader<S>,
    acts: Vec<Act>,
    behaviour: &Behaviour,
) -> bool {
    for act in acts {
        let written = match act {
            Act::Head => {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
                stream.write_all(head.as_bytes()).await
            }
            Act::Send(bytes) => {
                let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
                chunk.extend_from_slice(&bytes);
                chunk.extend_from_slice(b"\r\n");
                stream.write_all(&chunk).await
            }
            Act::Finish => stream.write_all(b"0\r\n\r\n").await,
            Act::Kill => return false,
            Act::Pause(time) => {
                tokio::time::sleep(time).await;
                Ok(())
            }
            Act::AwaitClose => {
                let mut byte = [0];
                let _ = stream.read(&mut byte).await;
                let _ = behaviour.news.send(News::Closed(behaviour.id.clone()));
                return false;
            }
            Act::Whole(status, headers, body) => {
                let head =
                    format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: ");
                stream.write_all(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes()).await
            }
        };
        if written.is_err() || stream.flush().await.is_err() {
            return false;
        }
    }
    true
}

/// A running edge with its nodes.
pub(crate) struct House {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    /// Nodes, and after them the foreign upstreams.
    pub(crate) nodes: Vec<Node>,
    pub(crate) registry: Arc<MemoryRegistry>,
    pub(crate) news: mpsc::UnboundedReceiver<News>,
    pub(crate) client: reqwest::Client,
    /// Gives it new readings of its configuration.
    pub(crate) reloads: Reloads,
    trigger: Option<Trigger>,
    thread: Option<JoinHandle<()>>,
}

/// Where the edge listens.
const LISTEN: &str = "listen = \"127.0.0.1:0\"";

/// Fast probes and short bounds; tests add sections behind it.
const BASE: &str = "[balancer]\nlisten = \"127.0.0.1:0\"\nthreads = 2\n\
    [balancer.admin]\nlisten = \"127.0.0.1:0\"\n[balancer.health]\ninterval = \"50ms\"\n";

impl House {
    pub(crate) async fn with_nodes(count: usize) -> Self {
        Self::with(count, "").await
    }

    /// `extra` is TOML: more sections (`[balancer.health]` only as the first), or with lines before its first section more keys of
    /// `[balancer]`.
    pub(crate) async fn with(count: usize, extra: &str) -> Self {
        Self::with_foreign(count, 0, "", extra).await
    }

    /// With other lines in the place of `listen`.
    pub(crate) async fn with_listeners(count: usize, listen: &str, extra: &str) -> Self {
        let house = Self::build_at(listen, count, None, extra, None).await;
        house.until(|members| ready(members).len() == count).await;
        house
    }

    /// With upstreams `f0`, `f1`, ... that are none of ours; `more` are more lines of each.
    pub(crate) async fn with_foreign(count: usize, foreign: usize, more: &str, extra: &str) -> Self {
        let house = Self::build(count, Some((foreign, more)), extra, None).await;
        house.until(|members| ready(members).len() == count + foreign).await;
        house
    }

    /// With nodes that speak TLS.
    pub(crate) async fn with_tls_nodes(count: usize, extra: &str, tls: Arc<rustls::ServerConfig>) -> Self {
        Self::build(count, None, extra, Some(tls)).await
    }

    /// One foreign upstream that is asked over TLS.
    pub(crate) async fn with_foreign_tls(more: &str, tls: Arc<rustls::ServerConfig>) -> Self {
        Self::build(0, Some((1, more)), "", Some(tls)).await
    }

    async fn build(
        count: usize,
        foreign: Option<(usize, &str)>,
        extra: &str,
        node_tls: Option<Arc<rustls::ServerConfig>>,
    ) -> Self {
        Self::build_at(LISTEN, count, foreign, extra, node_tls).await
    }

    async fn build_at(
        listen: &str,
        count: usize,
        foreign: Option<(usize, &str)>,
        extra: &str,
        node_tls: Option<Arc<rustls::ServerConfig>>,
    ) -> Self {
        tls::install_provider();
        let (tell, news) = mpsc::unbounded_channel();
        let (mut upstreams, mut entries) = (Vec::new(), String::new());
        let (foreign, more) = foreign.unwrap_or_default();
        for i in 0..foreign {
            let node = Node::start(&format!("f{i}"), true, node_tls.clone(), tell.clone()).await;
            let scheme = if node.record.tls { "https" } else { "http" };
            let base_url = format!("{scheme}://{}/base/", node.record.address);
            entries += &format!(
                "[[balancer.upstreams]]\nid = \"f{i}\"\nbase_url = \"{base_url}\"\nhealth_interval = \"50ms\"\n"
            );
            entries += if more.contains("models") { "" } else { "models = [\"tiny\"]\n" };
            entries += &format!("{more}\n");
            upstreams.push(node);
        }
        let sections_at = if extra.starts_with('[') { 0 } else { extra.find("\n[").map_or(extra.len(), |at| at + 1) };
        let (keys, sections) = extra.split_at(sections_at);
        // the base ends within this section
        let sections = sections.strip_prefix("[balancer.health]\n").unwrap_or(sections);
        let text = format!(
            "{}\n{sections}\n{entries}",
            BASE.replacen("threads = 2\n", &format!("threads = 2\n{keys}"), 1).replacen(LISTEN, listen, 1)
        );
        let raw = Raw::from_toml(&text, "test").unwrap();
        let (config, cluster) = raw.check(|r| (BalancerConfig::read(r), ClusterConfig::read(r))).unwrap();
        let registry = Arc::new(MemoryRegistry::default());
        let mut nodes = Vec::new();
        for i in 0..count {
            let node = Node::start(&format!("n{i}"), false, node_tls.clone(), tell.clone()).await;
            registry.announce(node.record.clone()).await;
            nodes.push(node);
        }
        nodes.extend(upstreams);
        let balancer = Balancer::bind(config).unwrap();
        let (address, admin) = (balancer.listen_addresses()[0], balancer.admin_address().unwrap());
        let reloads = balancer.reloads();
        let (trigger, stop) = shutdown::channel();
        let store: Arc<dyn Registry> = Arc::clone(&registry) as _;
        let thread = std::thread::spawn(move || balancer.run(&cluster, store, stop).unwrap());
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { address, admin, nodes, registry, news, client, reloads, trigger: Some(trigger), thread: Some(thread) }
    }

    /// Puts `sections` in force behind what every house has.
    pub(crate) async fn reload(&self, sections: &str) {
        let raw = Raw::from_toml(&format!("{BASE}{sections}"), "t").unwrap();
        let before = self.metrics().await;
        self.reloads.give(raw.check(BalancerConfig::read), Vec::new()).await;
        while self.metrics().await == before {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) async fn members(&self) -> Members {
        let response = self.client.get(format!("http://{}/members", self.admin)).send().await.unwrap();
        serde_json::from_slice(&response.bytes().await.unwrap()).unwrap()
    }

    /// Asks for the members until they are as wanted; says how long that took.
    pub(crate) async fn until(&self, wanted: impl Fn(&Members) -> bool) -> Duration {
        let began = Instant::now();
        loop {
            let members = self.members().await;
            if wanted(&members) {
                return began.elapsed();
            }
            assert!(began.elapsed() < PATIENCE, "members stay {members:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.client.post(self.url(path)).body(body.to_string()).send().await.unwrap()
    }

    /// Status and body of a POST.
    pub(crate) async fn ask(&self, body: &Value) -> (u16, String) {
        let response = self.post(CHAT, body).await;
        (response.status().as_u16(), response.text().await.unwrap())
    }

    pub(crate) async fn metrics(&self) -> String {
        self.client.get(format!("http://{}/metrics", self.admin)).send().await.unwrap().text().await.unwrap()
    }

    /// The next request that any node got.
    pub(crate) async fn asked(&mut self) -> Seen {
        loop {
            match tokio::time::timeout(PATIENCE, self.news.recv()).await.unwrap().unwrap() {
                News::Asked(seen) => return seen,
                News::Closed(_) => {}
            }
        }
    }

    /// The node whose connection the edge closed.
    pub(crate) async fn closed(&mut self) -> String {
        loop {
            match tokio::time::timeout(PATIENCE, self.news.recv()).await.unwrap().unwrap() {
                News::Closed(node) => return node,
                News::Asked(_) => {}
            }
        }
    }

    pub(crate) fn node(&self, id: &str) -> &Node {
        self.nodes.iter().find(|n| n.record.id.as_str() == id).unwrap()
    }

    pub(crate) fn fire(&mut self) {
        drop(self.trigger.take());
    }

    /// Waits for the end of `run`.
    pub(crate) async fn ended(&mut self) {
        let thread = self.thread.take().unwrap();
        tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
    }
}

pub(crate) fn ready(members: &Members) -> Vec<String> {
    let ready = members.members.iter().filter(|m| m.state.as_str() == "ready");
    ready.map(|m| m.node.to_string()).collect()
}

pub(crate) fn chat(stream: bool) -> Value {
    json!({"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": "hi"}]})
}

/// The texts of a streamed answer, and whether it ended with `[DONE]`.
pub(crate) fn texts(stream: &str) -> (String, bool) {
    let mut out = String::new();
    for data in stream.lines().filter_map(|l| l.strip_prefix("data: ")) {
        if data == "[DONE]" {
            return (out, true);
        }
        let event: Value = serde_json::from_str(data).unwrap();
        out.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or("?"));
    }
    (out, false)
}

/// Writes raw bytes on a new connection and reads all that comes back.
pub(crate) async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection stays open");
    String::from_utf8_lossy(&answer).into_owned()
}
