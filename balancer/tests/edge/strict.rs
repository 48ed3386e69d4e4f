//! What could be read in two ways, sent over raw sockets: each is refused, its connection closed, and no node sees any of it.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConnection, StreamOwned};

use crate::{
    support::{Act, CHAT, House, chat, raw, tokens},
    transport::Certificate,
};

/// Comes behind each malformed request: nobody may answer it.
const NEXT: &str = "GET /health HTTP/1.1\r\nhost: x\r\n\r\n";

/// A POST with these lines and this body.
fn post(lines: &str, body: &str) -> String {
    format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\n{lines}\r\n{body}")
}

/// Lines of a head, and what comes behind it.
fn bodies() -> Vec<(&'static str, String)> {
    let chunked = |body: &str| post("transfer-encoding: chunked\r\n", body);
    vec![
        ("doubled length", post("content-length: 2\r\ncontent-length: 2\r\n", "{}")),
        ("conflicting lengths", post("content-length: 2\r\ncontent-length: 40\r\n", "{}")),
        ("list of lengths", post("content-length: 2, 2\r\n", "{}")),
        ("signed length", post("content-length: +2\r\n", "{}")),
        ("hexadecimal length", post("content-length: 0x2\r\n", "{}")),
        ("negative length", post("content-length: -2\r\n", "{}")),
        ("length beyond numbers", post("content-length: 184467440737095516170\r\n", "{}")),
        ("length and encoding", post("content-length: 2\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n")),
        ("encoding and length", post("transfer-encoding: chunked\r\ncontent-length: 2\r\n", "0\r\n\r\n")),
        ("doubled encoding", post("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n")),
        ("list of encodings", post("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n")),
        ("unknown encoding", post("transfer-encoding: xchunked\r\n", "0\r\n\r\n")),
        ("identity encoding", post("transfer-encoding: identity\r\n", "{}")),
        ("chunked first", post("transfer-encoding: chunked, identity\r\n", "0\r\n\r\n")),
        ("quoted encoding", post("transfer-encoding: \"chunked\"\r\n", "0\r\n\r\n")),
        ("hidden encoding", post("transfer-encoding : chunked\r\n", "0\r\n\r\n")),
        ("folded encoding", post("transfer-encoding:\r\n chunked\r\n", "0\r\n\r\n")),
        ("chunked in HTTP/1.0", chunked("0\r\n\r\n").replace("HTTP/1.1", "HTTP/1.0")),
        ("chunk size of no number", chunked("zz\r\n{}\r\n0\r\n\r\n")),
        ("signed chunk size", chunked("+2\r\n{}\r\n0\r\n\r\n")),
        ("negative chunk size", chunked("-2\r\n{}\r\n0\r\n\r\n")),
        ("prefixed chunk size", chunked("0x2\r\n{}\r\n0\r\n\r\n")),
        ("chunk size beyond numbers", chunked("fffffffffffffffff2\r\n{}\r\n0\r\n\r\n")),
        ("empty chunk size", chunked("\r\n{}\r\n0\r\n\r\n")),
        ("chunk longer than said", chunked("2\r\n{}xxxx\r\n0\r\n\r\n")),
        ("chunk size ends in a bare line feed", chunked("2\n{}\r\n0\r\n\r\n")),
        ("chunk ends in a bare line feed", chunked("2\r\n{}\n0\r\n\r\n")),
        ("chunk extension without end", chunked(&format!("2;{}", "x".repeat(200_000)))),
    ]
}

fn heads() -> Vec<(&'static str, String)> {
    let get = |target: &str, lines: &str| format!("GET {target} HTTP/1.1\r\n{lines}\r\n");
    let health = |lines: &str| get("/health", lines);
    vec![
        ("no host", health("")),
        ("two hosts", health("host: x\r\nhost: x\r\n")),
        ("two different hosts", health("host: x\r\nHost: y\r\n")),
        ("empty host", health("host: \r\n")),
        ("host with a path", health("host: x/y\r\n")),
        ("host with a user", health("host: a@x\r\n")),
        ("list of hosts", health("host: x, y\r\n")),
        ("folded line", health("host: x\r\nx-a: 1\r\n folded\r\n")),
        ("line folded by a tab", health("host: x\r\nx-a: 1\r\n\tfolded\r\n")),
        ("first line folded", health(" host: x\r\n")),
        ("space before a colon", health("host: x\r\nx-a : 1\r\n")),
        ("tab before a colon", health("host: x\r\nx-a\t: 1\r\n")),
        ("no name", health("host: x\r\n: 1\r\n")),
        ("no colon", health("host: x\r\nx-a\r\n")),
        ("space in a name", health("host: x\r\nx a: 1\r\n")),
        ("NUL in a value", health("host: x\r\nx-a: 1\0\r\n")),
        ("NUL in a name", health("host: x\r\nx\0a: 1\r\n")),
        ("bell in a value", health("host: x\r\nx-a: \x07\r\n")),
        ("delete in a value", health("host: x\r\nx-a: \x7f\r\n")),
        ("bare carriage return in a value", health("host: x\r\nx-a: 1\rx-b: 2\r\n")),
        ("bare line feeds", "GET /health HTTP/1.1\nhost: x\n\n".into()),
        ("one bare line feed", "GET /health HTTP/1.1\r\nhost: x\nx-a: 1\r\n\r\n".into()),
        ("bare line feed at the end", "GET /health HTTP/1.1\r\nhost: x\r\n\n".into()),
        ("bare line feed before all", "\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n".into()),
        ("URL of another host", get("http://y/health", "host: x\r\n")),
        ("URL with a user", get("http://a@x/health", "host: x\r\n")),
        ("URL of another scheme", get("ftp://x/health", "host: x\r\n")),
        ("URL with one slash", get("http:/x/health", "host: x\r\n")),
        ("URL without a host", get("http:///health", "host: x\r\n")),
        ("URL with a backslash", get("http:\\\\x/health", "host: x\r\n")),
        ("target of no form", get("health", "host: x\r\n")),
        ("asterisk", get("*", "host: x\r\n")),
        ("encoded slash", get("/v1%2fmodels", "host: x\r\n")),
        ("encoded NUL", get("/health%00", "host: x\r\n")),
        ("encoded line end", get("/health%0d%0ahost:%20y", "host: x\r\n")),
        ("broken code", get("/health%4", "host: x\r\n")),
        ("path above the root", get("/../health", "host: x\r\n")),
        ("backslash", get("/v1\\models", "host: x\r\n")),
        ("CONNECT", "CONNECT x:443 HTTP/1.1\r\nhost: x:443\r\n\r\n".into()),
        ("TRACE", "TRACE /health HTTP/1.1\r\nhost: x\r\n\r\n".into()),
        ("later version", "GET /health HTTP/2.0\r\nhost: x\r\n\r\n".into()),
        ("version of another case", "GET /health http/1.1\r\nhost: x\r\n\r\n".into()),
        ("no version", "GET /health\r\nhost: x\r\n\r\n".into()),
        ("HTTP/2 in the clear", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
        ("method of no token", "G@T /health HTTP/1.1\r\nhost: x\r\n\r\n".into()),
        ("too many lines", health(&format!("host: x\r\n{}", "a: b\r\n".repeat(300)))),
    ]
}

#[tokio::test]
async fn what_could_be_read_in_two_ways_is_refused_and_closed_and_no_node_sees_it() {
    let mut house = House::with(1, "[balancer.limits]\nbody_timeout = \"500ms\"").await;
    let mut wrong = Vec::new();
    for (name, request) in heads().into_iter().chain(bodies()) {
        let sent = format!("{request}{NEXT}");
        let answer = tokio::time::timeout(Duration::from_secs(3), raw(house.address, sent.as_bytes())).await;
        let answer = answer.unwrap_or_else(|_| "the connection stays open".into());
        let is_refused = answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 405");
        if !is_refused || answer.matches("HTTP/1.1").count() != 1 {
            wrong.push(format!("{name}: {answer:?}"));
        }
        while let Ok(news) = house.news.try_recv() {
            wrong.push(format!("{name}: {news:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(raw(house.address, b"GET /health HTTP/1.0\r\n\r\n").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn behind_a_chunked_body_nothing_is_read() {
    let mut house = House::with_nodes(1).await;
    for extension in ["", ";a", ";a\nb", ";a=\"\r", "  "] {
        let request = post("transfer-encoding: chunked\r\n", &format!("2{extension}\r\n{{}}\r\n0\r\n\r\n{NEXT}"));
        let answer = raw(house.address, request.as_bytes()).await;
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{extension:?}: {answer}");
        if answer.starts_with("HTTP/1.1 200") {
            assert_eq!(house.asked().await.header("content-length"), Some("2"));
        }
    }
}

#[tokio::test]
async fn a_path_has_one_name_whoever_writes_it_how() {
    let mut house = House::with_nodes(1).await;
    let body = chat(false).to_string();
    let ask = |target: &str| {
        let length = body.len();
        format!("POST {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
    };
    for target in [
        "/v1//chat/completions",
        "//v1/chat/completions",
        "/v1/%63hat/completions",
        "/v1/./chat/completions",
        "/v1/x/../chat/completions",
        "/v1/chat/completions?a=%2f",
        "http://x/v1/chat/completions",
    ] {
        let answer = raw(house.address, ask(target).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{target}: {answer}");
        assert_eq!(house.asked().await.path, CHAT, "{target}");
    }
    for target in ["/v1/../nowhere", "/%6eowhere", "/V1/chat/completions", "/v1/chat/completions/", "/v1/%20chat"] {
        let answer = raw(house.address, ask(target).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{target}: {answer}");
    }
    assert!(house.metrics().await.contains("path=\"/v1/chat/completions\",reason=\"ok\",status=\"200\"} 7"));
    assert!(house.news.try_recv().is_err());
}

#[tokio::test]
async fn headers_of_the_connection_and_of_our_own_end_at_the_edge() {
    let mut house = House::with_nodes(1).await;
    let body = chat(false).to_string();
    let lines = "connection: close, x-secret\r\nx-secret: 1\r\nkeep-alive: 9\r\nproxy-connection: keep-alive\r\nte: trailers\r\n\
                 upgrade: h2c\r\nproxy-authorization: Basic eA==\r\ncookie: a=b\r\nauthorization: Bearer key\r\nx-forwarded-for: 9.9.9.9\r\n\
                 x-tidegate-tenant: root\r\nx-tidegate-priority: high\r\nX-Tidegate-Moved: 1\r\nx-tidegate-deadline-ms: 1\r\n\
                 x-tidegate-fingerprint: 7\r\nx-tidegate-seed: 7\r\nx_tidegate_tenant: root\r\n";
    let request = post(&format!("{lines}content-length: {}\r\n", body.len()), &body);
    assert!(raw(house.address, request.as_bytes()).await.starts_with("HTTP/1.1 200"));
    let seen = house.asked().await;
    let mut names: Vec<&str> = seen.head.lines().skip(1).filter_map(|l| Some(l.split_once(':')?.0)).collect();
    names.sort_unstable_by_key(|name| name.to_ascii_lowercase());
    let ours = [
        "accept",
        "content-length",
        "content-type",
        "host",
        "x-request-id",
        "x-tidegate-created",
        "x-tidegate-deadline-ms",
        "x-tidegate-seed",
        "x-tidegate-stream",
        "x-tidegate-tenant",
    ];
    assert!(names.iter().map(|name| name.to_ascii_lowercase()).eq(ours), "{names:?}");
    assert_eq!(seen.header("x-tidegate-tenant"), Some("127.0.0.1"));
    assert_ne!(seen.header("x-tidegate-seed"), Some("7"));
    assert!(seen.header("x-tidegate-deadline-ms").unwrap().parse::<u64>().unwrap() > 1000);
}

#[tokio::test]
async fn errors_tell_nothing_of_the_inside() {
    let house = House::with(2, "[balancer.relay]\nmax_resumes = 1\nqueue_wait = \"100ms\"").await;
    let broken = [
        vec![Act::Whole(500, "", "panicked at /root/node/src/main.rs")],
        vec![Act::Kill],
        vec![Act::Head, Act::Send(b"id: nonsense\ndata: x\n\n".to_vec()), Act::Kill],
        vec![Act::Whole(302, "location: http://10.0.0.1/\r\n", "")],
    ];
    let inside: Vec<String> = house.nodes.iter().map(|node| node.record.address.clone()).collect();
    let mut answers = Vec::new();
    for acts in broken {
        house.nodes.iter().for_each(|node| (0..3).for_each(|_| node.script(acts.clone())));
        let response = house.post(CHAT, &chat(true)).await;
        answers.push(format!("{:?} {}", response.headers().clone(), response.text().await.unwrap()));
        house.nodes.iter().for_each(crate::support::Node::forget);
    }
    house.nodes.iter().for_each(crate::support::Node::kill);
    for path in ["/health", "/v1/models", "/etc/passwd", "/%2e%2e/etc"] {
        let response = house.client.get(house.url(path)).send().await.unwrap();
        answers.push(response.text().await.unwrap());
    }
    answers.push(house.ask(&chat(false)).await.1);
    for answer in answers {
        let leaks =
            inside.iter().map(String::as_str).chain(["127.0.0.1", "10.0.0.1", "/root", ".rs", "pingora", "panicked"]);
        for leak in leaks {
            assert!(!answer.contains(leak), "{leak} in {answer}");
        }
    }
}

/// An HTTP/2 connection of frames written by hand.
struct Frames(StreamOwned<ClientConnection, TcpStream>);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

impl Frames {
    fn open(certificate: &Certificate, address: SocketAddr) -> Self {
        let tcp = TcpStream::connect(address).unwrap();
        tcp.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let tls = ClientConnection::new(Arc::new(certificate.h2_client()), "localhost".try_into().unwrap()).unwrap();
        let mut frames = Self(StreamOwned::new(tls, tcp));
        frames.0.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        frames.write(4, 0, 0, &[]);
        frames
    }

    fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        // the other end may have closed, which the next read finds
        let _ = self.0.write_all(&frame).and_then(|()| self.0.flush());
    }

    fn read(&mut self) -> Option<(u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).ok()?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        self.0.read_exact(&mut payload).ok()?;
        Some((head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload))
    }

    /// What becomes of a request: `200`, or how it was refused.
    fn outcome(&mut self) -> &'static str {
        loop {
            match self.read() {
                None => return "closed",
                Some((RST_STREAM, ..)) => return "reset",
                Some((GOAWAY, ..)) => return "connection refused",
                // 0x88 is ":status: 200" in the static table of RFC 7541
                Some((HEADERS, _, block)) => return if block[0] == 0x88 { "200" } else { "refused" },
                Some(_) => {}
            }
        }
    }
}

/// A header block of literals that no table remembers (RFC 7541, section 6.2.2).
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.extend([0, name.len() as u8]);
        block.extend(name.as_bytes());
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    }
    block
}

#[tokio::test(flavor = "multi_thread")]
async fn http_2_is_no_softer() {
    let certificate = Arc::new(Certificate::new());
    let mut house = House::with(1, &certificate.section("")).await;
    let base = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", CHAT)];
    let with = |more: &[(&'static str, &'static str)]| [&base[..], more].concat();
    let but = |name: &str, value: Option<&'static str>| -> Vec<(&'static str, &'static str)> {
        let changed =
            base.iter().map(|field| if field.0 == name { (field.0, value.unwrap_or_default()) } else { *field });
        changed.filter(|field| field.0 != name || value.is_some()).collect()
    };
    let body = chat(false).to_string();
    let cases: Vec<(&str, Vec<(&str, &str)>)> = vec![
        ("connection", with(&[("connection", "close")])),
        ("keep-alive", with(&[("keep-alive", "9")])),
        ("proxy-connection", with(&[("proxy-connection", "close")])),
        ("transfer-encoding", with(&[("transfer-encoding", "chunked")])),
        ("upgrade", with(&[("upgrade", "h2c")])),
        ("te", with(&[("te", "gzip")])),
        ("name in capitals", with(&[("X-A", "1")])),
        ("NUL in a value", with(&[("x-a", "1\0")])),
        ("line end in a value", with(&[("x-a", "1\r\nx-b: 2")])),
        ("space in a name", with(&[("x a", "1")])),
        ("doubled path", with(&[(":path", "/health")])),
        ("doubled method", with(&[(":method", "GET")])),
        ("unknown pseudo-header", with(&[(":x", "1")])),
        ("pseudo-header of an answer", with(&[(":status", "200")])),
        ("pseudo-header behind a header", [&[("x-a", "1")][..], &base].concat()),
        ("no path", but(":path", None)),
        ("no method", but(":method", None)),
        ("no scheme", but(":scheme", None)),
        ("empty path", but(":path", Some(""))),
        ("path of no form", but(":path", Some("v1/models"))),
        ("URL as a path", but(":path", Some("http://y/health"))),
        ("encoded slash", but(":path", Some("/v1%2fmodels"))),
        ("authority with a user", but(":authority", Some("a@localhost"))),
        ("another host", with(&[("host", "y")])),
        ("CONNECT", vec![(":method", "CONNECT"), (":authority", "localhost:443")]),
        ("TRACE", but(":method", Some("TRACE"))),
        ("doubled length", with(&[("content-length", "2"), ("content-length", "3")])),
        ("length of no number", with(&[("content-length", "two")])),
        ("length longer than the body", with(&[("content-length", "9999")])),
        ("length shorter than the body", with(&[("content-length", "1")])),
    ];
    let address = house.address;
    let task = tokio::task::spawn_blocking(move || {
        let ask = |fields: &[(&str, &str)]| {
            let mut frames = Frames::open(&certificate, address);
            frames.write(HEADERS, END_HEADERS, 1, &block(fields));
            frames.write(DATA, END_STREAM, 1, body.as_bytes());
            frames.outcome()
        };
        let wrong: Vec<&str> = cases.iter().filter(|(_, fields)| ask(fields) == "200").map(|(name, _)| *name).collect();
        (wrong, ask(&base))
    });
    let (wrong, control) = task.await.unwrap();
    assert!(wrong.is_empty(), "{wrong:?}");
    assert_eq!(control, "200", "the frames themselves are right");
    assert_eq!(house.asked().await.path, CHAT);
    assert!(house.news.try_recv().is_err(), "a node saw a malformed one");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_back_its_requests_all_the_time_is_cut_off() {
    let certificate = Arc::new(Certificate::new());
    let limits = "[balancer.limits]\nmax_resets_per_connection = 5\nmax_streams_per_connection = 7\n";
    let mut house = House::with(1, &format!("{limits}{}", certificate.section(""))).await;
    (0..20).for_each(|_| house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::AwaitClose]));
    let address = house.address;
    let task = tokio::task::spawn_blocking(move || {
        let body = chat(true).to_string();
        let mut frames = Frames::open(&certificate, address);
        let (mut taken_back, mut streams_max) = (0, None);
        let ask = |frames: &mut Frames, stream| {
            let head = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", CHAT)];
            frames.write(HEADERS, END_HEADERS, stream, &block(&head));
            frames.write(DATA, END_STREAM, stream, body.as_bytes());
        };
        ask(&mut frames, 1);
        while let Some((kind, stream, payload)) = frames.read() {
            match kind {
                SETTINGS => streams_max = streams_max.or_else(|| setting(&payload, MAX_CONCURRENT_STREAMS)),
                HEADERS => {
                    frames.write(RST_STREAM, 0, stream, &8u32.to_be_bytes()); // CANCEL
                    taken_back += 1;
                    ask(&mut frames, stream + 2);
                }
                GOAWAY => break,
                _ => {}
            }
        }
        (taken_back, streams_max)
    });
    let (taken_back, streams_max) = task.await.unwrap();
    assert_eq!(streams_max, Some(7));
    assert!((5..=7).contains(&taken_back), "{taken_back} were taken back");
    while !house.metrics().await.contains("tidegate_connections_refused_total{reason=\"resets\"}") {
        tokio::task::yield_now().await;
    }
    house.nodes[0].forget();
    for _ in 0..taken_back {
        assert_eq!(house.closed().await, "n0");
    }
}

const SETTINGS: u8 = 4;
const MAX_CONCURRENT_STREAMS: u16 = 3;

/// A value of a SETTINGS frame.
fn setting(payload: &[u8], id: u16) -> Option<u32> {
    let found = payload.chunks_exact(6).find(|entry| entry[..2] == id.to_be_bytes())?;
    Some(u32::from_be_bytes([found[2], found[3], found[4], found[5]]))
}
