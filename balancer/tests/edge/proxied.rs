//! Behind proxies: whose address counts, and who is believed about it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
};

use crate::support::{CHAT, House, PATIENCE, chat};

/// What comes back to these bytes from this address of loopback.
async fn from(source: [u8; 4], to: SocketAddr, bytes: &[u8]) -> String {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((IpAddr::from(source), 0).into()).unwrap();
    let mut answer = Vec::new();
    if let Ok(mut stream) = socket.connect(to).await {
        let _ = stream.write_all(bytes).await;
        let _ =
            tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection stays open");
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn request(headers: &str) -> Vec<u8> {
    let body = chat(false).to_string();
    format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\n{headers}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

const OK: &str = "HTTP/1.1 200";
const FORBIDDEN: &str = "HTTP/1.1 403";
const PROXY: [u8; 4] = [127, 0, 0, 7];
const CLIENT: [u8; 4] = [127, 0, 0, 1];

#[tokio::test]
async fn forwarded_addresses_are_believed_of_named_proxies_alone() {
    let mut house = House::with(
        1,
        "trusted_proxies = [\"127.0.0.7\"]\nallow = [\"127.0.0.1\", \"192.0.2.0/24\"]\ndeny = [\"192.0.2.66\"]\n",
    )
    .await;
    let edge = house.address;
    assert!(from(PROXY, edge, &request("x-forwarded-for: 198.51.100.1, 192.0.2.1\r\n")).await.starts_with(OK));
    assert_eq!(house.asked().await.header("x-tidegate-tenant"), Some("192.0.2.1"));
    for lines in ["x-forwarded-for: 192.0.2.66\r\n", "x-forwarded-for: 192.0.2.1, 198.51.100.1\r\n", ""] {
        let answer = from(PROXY, edge, &request(lines)).await;
        assert!(answer.starts_with(FORBIDDEN) && answer.contains("address_not_allowed"), "{lines}: {answer}");
    }
    let look = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    assert!(from(PROXY, edge, look).await.starts_with(OK), "a proxy of ours may look whether anybody is here");
    // from anybody else the header is nothing
    assert!(from(CLIENT, edge, &request("x-forwarded-for: 192.0.2.66\r\n")).await.starts_with(OK));
    assert_eq!(house.asked().await.header("x-tidegate-tenant"), Some("127.0.0.1"));
    assert_eq!(
        from([127, 0, 0, 8], edge, &request("x-forwarded-for: 192.0.2.1\r\n")).await,
        "",
        "closed before a request"
    );
}

#[tokio::test]
async fn a_listener_behind_the_proxy_protocol_takes_it_from_named_proxies_and_judges_who_is_behind() {
    let port = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let rules = format!(
        "trusted_proxies = [\"127.0.0.7\"]\ndeny = [\"192.0.2.66\"]\n\
         [[balancer.listeners]]\nlisten = \"127.0.0.1:{port}\"\nproxy_protocol = true\nallow = [\"192.0.2.0/24\"]\n"
    );
    let mut house =
        House::with_listeners(1, &format!("listen = [\"127.0.0.1:0\", \"127.0.0.1:{port}\"]"), &rules).await;
    let edge = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let proxied = |header: &[u8]| [header, &request("x-forwarded-for: 203.0.113.5\r\n")].concat();
    let v1 = |client: &str| proxied(format!("PROXY TCP4 {client} 127.0.0.1 4711 443\r\n").as_bytes());
    let v2 = |client: [u8; 4]| {
        let head =
            [b"\r\n\r\n\0\r\nQUIT\n".as_slice(), &[0x21, 0x11, 0, 12], &client, &[127, 0, 0, 1, 0x12, 0x67, 1, 187]]
                .concat();
        proxied(&head)
    };
    for bytes in [v1("192.0.2.1"), v2([192, 0, 2, 1])] {
        assert!(from(PROXY, edge, &bytes).await.starts_with(OK));
        // the client's own header is nothing, since it is no proxy of ours
        assert_eq!(house.asked().await.header("x-tidegate-tenant"), Some("192.0.2.1"));
    }
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    assert!(from(PROXY, edge, local).await.starts_with(OK), "a proxy asks for itself");
    let local = [&b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"[..], &request("")].concat();
    assert!(
        from(PROXY, edge, &local).await.starts_with(FORBIDDEN),
        "and for nothing else, since it is not on the list"
    );
    for (source, bytes) in
        [(PROXY, v1("192.0.2.66")), (PROXY, v2([198, 51, 100, 1])), (PROXY, request("")), (CLIENT, v1("192.0.2.1"))]
    {
        assert_eq!(from(source, edge, &bytes).await, "", "closed without a word");
    }
    assert!(from(CLIENT, house.address, &request("")).await.starts_with(OK), "the other listener is as it was");
    assert!(house.metrics().await.contains("tidegate_connections_refused_total{reason=\"allowlist\"} 4"));
}
