//! Below HTTP's meaning: who may connect, TLS versions, HTTP/1.1 and HTTP/2 to clients, mutual TLS to nodes.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    sync::Arc,
};

use bytes::BytesMut;
use pingora::{
    connectors::{ConnectorOptions, http::Connector},
    http::RequestHeader,
    listeners::ALPN,
    protocols::http::client::HttpSession,
    upstreams::peer::HttpPeer,
};
use rustls::{ClientConnection, SupportedProtocolVersion, version};
use tidegate_common::tls::{self, Clients, Identity, MinVersion};

use crate::support::{Act, CHAT, House, chat, raw, ready, texts, tokens};

/// A certificate for `localhost` that signs itself.
pub(crate) struct Certificate {
    _directory: tempfile::TempDir,
    cert: PathBuf,
    key: PathBuf,
}

impl Certificate {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        let (cert, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        Self { _directory: directory, cert, key }
    }

    pub(crate) fn section(&self, more: &str) -> String {
        format!("[balancer.tls]\ncert = {:?}\nkey = {:?}\n{more}", self.cert, self.key)
    }

    async fn open(&self, address: SocketAddr, alpn: ALPN) -> HttpSession {
        let mut options = ConnectorOptions::new(4);
        options.ca_file = Some(self.cert.display().to_string());
        let mut peer = HttpPeer::new(address, true, "localhost".into());
        peer.options.alpn = alpn;
        Connector::new(Some(options)).get_http_session(&peer).await.unwrap().0
    }

    /// A client that speaks HTTP/2 alone.
    pub(crate) fn h2_client(&self) -> rustls::ClientConfig {
        let roots = tls::read_roots(&self.cert).unwrap();
        let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }

    /// Which version a handshake ends with, if it ends.
    fn handshake(&self, address: SocketAddr, version: &'static SupportedProtocolVersion) -> Result<(), String> {
        let roots = tls::read_roots(&self.cert).unwrap();
        let config = rustls::ClientConfig::builder_with_protocol_versions(&[version])
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tls = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        let mut tcp = TcpStream::connect(address).unwrap();
        let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").map_err(|e| e.to_string())?;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        if answer.starts_with(b"HTTP/1.1 200") { Ok(()) } else { Err("no answer".into()) }
    }
}

async fn exchange(session: &mut HttpSession, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut head = RequestHeader::build(method, path.as_bytes(), None).unwrap();
    head.insert_header("host", "localhost").unwrap();
    if !body.is_empty() {
        head.insert_header("content-length", body.len().to_string()).unwrap();
    }
    session.write_request_header(Box::new(head)).await.unwrap();
    session.write_request_body(body.to_owned().into(), true).await.unwrap();
    session.finish_request_body().await.unwrap();
    session.read_response_header().await.unwrap();
    let status = session.response_header().unwrap().status.as_u16();
    let mut answer = BytesMut::new();
    while let Some(part) = session.read_response_body().await.unwrap() {
        answer.extend_from_slice(&part);
    }
    (status, String::from_utf8(answer.to_vec()).unwrap())
}

#[tokio::test]
async fn a_refused_address_sees_a_closed_connection_and_nothing_else() {
    let certificate = Certificate::new();
    let refused = House::with(1, &format!("allow = \"10.0.0.0/8\"\n{}", certificate.section(""))).await;
    let hello = [0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0];
    assert_eq!(raw(refused.address, &hello).await, "");
    assert!(refused.metrics().await.contains("tidegate_connections_refused_total{reason=\"allowlist\"} 1"));
    let denied = House::with(1, "allow = [\"127.0.0.0/8\"]\ndeny = [\"127.0.0.1\"]\n").await;
    assert_eq!(raw(denied.address, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await, "");
}

#[tokio::test]
async fn connections_per_address_are_bounded() {
    let house = House::with(1, "[balancer.limits]\nmax_connections_per_address = 1").await;
    let mut held = TcpStream::connect(house.address).unwrap();
    held.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    held.read_exact(&mut [0; 12]).unwrap();
    assert_eq!(raw(house.address, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await, "");
    assert!(house.metrics().await.contains("reason=\"per_address\"} 1"));
}

#[tokio::test]
async fn tls_is_1_3_unless_the_config_says_otherwise() {
    let certificate = Arc::new(Certificate::new());
    for (more, tls12) in [("", false), ("min_version = \"1.2\"", true)] {
        let house = House::with(1, &certificate.section(more)).await;
        let (address, certificate) = (house.address, Arc::clone(&certificate));
        let outcome = tokio::task::spawn_blocking(move || {
            (certificate.handshake(address, &version::TLS13), certificate.handshake(address, &version::TLS12))
        });
        let (with_13, with_12) = outcome.await.unwrap();
        assert_eq!(with_13, Ok(()));
        assert_eq!(with_12.is_ok(), tls12, "{with_12:?}");
    }
}

#[tokio::test]
async fn http_1_and_http_2_are_served_alike() {
    let certificate = Certificate::new();
    let house = House::with(1, &certificate.section("")).await;
    for alpn in [ALPN::H1, ALPN::H2] {
        let open = || certificate.open(house.address, alpn.clone());
        assert_eq!(matches!(open().await, HttpSession::H2(_)), alpn == ALPN::H2);
        assert_eq!(exchange(&mut open().await, "GET", "/health", "").await.0, 200);
        let (status, text) = exchange(&mut open().await, "POST", CHAT, &chat(true).to_string()).await;
        assert_eq!((status, texts(&text)), (200, ("ab".into(), true)));
        let (status, text) = exchange(&mut open().await, "POST", CHAT, &chat(false).to_string()).await;
        assert_eq!((status, text.as_str()), (200, r#"{"object":"chat.completion"}"#));
        assert_eq!(exchange(&mut open().await, "GET", "/nowhere", "").await.0, 404);
        assert_eq!(exchange(&mut open().await, "HEAD", "/health", "").await, (200, String::new()));
    }
}

#[tokio::test]
async fn an_http_2_client_that_leaves_frees_its_node_too() {
    let certificate = Certificate::new();
    let mut house = House::with(1, &certificate.section("")).await;
    house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::AwaitClose]);
    let mut session = certificate.open(house.address, ALPN::H2).await;
    let mut head = RequestHeader::build("POST", CHAT.as_bytes(), None).unwrap();
    head.insert_header("host", "localhost").unwrap();
    session.write_request_header(Box::new(head)).await.unwrap();
    session.write_request_body(chat(true).to_string().into(), true).await.unwrap();
    session.read_response_header().await.unwrap();
    assert!(session.read_response_body().await.unwrap().unwrap().starts_with(b"data:"));
    session.shutdown().await;
    drop(session);
    let left = std::time::Instant::now();
    assert_eq!(house.closed().await, "n0");
    assert!(left.elapsed() < std::time::Duration::from_secs(1));
}

#[tokio::test]
async fn nodes_are_reached_by_mutual_tls_and_strangers_are_not() {
    tls::install_provider();
    let (known, stranger) = (Certificate::new(), Certificate::new());
    let nodes = |certificate: &Certificate| {
        let identity = Identity::read(&certificate.cert, &certificate.key).unwrap();
        Arc::new(
            tls::server_config(identity.resolver().unwrap(), MinVersion::Tls13, Some(&Clients::of(&known.cert)))
                .unwrap(),
        )
    };
    let upstream = |shown: &Certificate| {
        format!("[balancer.upstream_tls]\nca = {:?}\ncert = {:?}\nkey = {:?}", known.cert, shown.cert, shown.key)
    };
    let house = House::with_tls_nodes(1, &upstream(&known), nodes(&known)).await;
    house.until(|members| ready(members).len() == 1).await;
    assert_eq!(texts(&house.ask(&chat(true)).await.1), ("ab".into(), true));
    // a node of another CA, an edge that shows another CA's certificate, an edge that trusts nobody
    for (extra, node) in [(upstream(&known), &stranger), (upstream(&stranger), &known), (String::new(), &known)] {
        let extra = format!("{extra}\n[balancer.relay]\nqueue_wait = \"100ms\"");
        let house = House::with_tls_nodes(1, &extra, nodes(node)).await;
        house.until(|members| members.members.iter().any(|m| m.last_probe_error.is_some())).await;
        assert!(ready(&house.members().await).is_empty());
        assert_eq!(house.ask(&chat(true)).await.0, 503);
    }
}

#[tokio::test]
async fn a_foreign_upstream_is_verified_by_its_own_ca_or_the_systems() {
    tls::install_provider();
    let (known, stranger) = (Certificate::new(), Certificate::new());
    let server = || {
        let identity = Identity::read(&known.cert, &known.key).unwrap();
        Arc::new(tls::server_config(identity.resolver().unwrap(), MinVersion::Tls13, None).unwrap())
    };
    let house = House::with_foreign_tls(&format!("ca = {:?}", known.cert), server()).await;
    house.until(|members| ready(members).len() == 1).await;
    assert_eq!(texts(&house.ask(&chat(true)).await.1), ("xy".into(), true));
    for roots in [format!("ca = {:?}", stranger.cert), String::new()] {
        let house = House::with_foreign_tls(&roots, server()).await;
        house.until(|members| members.members.iter().any(|m| m.last_probe_error.is_some())).await;
        assert!(ready(&house.members().await).is_empty());
    }
}
