//! Goal: a refused address sees its connection closed and never a handshake, and an allowed one is served. Method: two addresses of
//! loopback as the clients', one on the list and one not; the refused one speaks first, as TLS clients do, and counts what comes back.

use std::{net::Ipv4Addr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::support::{
    certs,
    cluster::{Cluster, Plan, Registry},
    until,
};

/// The beginning of a ClientHello, RFC 8446 section 5.1: enough for a server that listens to answer with an alert at least.
const HELLO: &[u8] = b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00";

async fn connect(from: Ipv4Addr, port: u16) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    socket.connect((Ipv4Addr::LOCALHOST, port).into()).await
}

/// How many bytes come back before the connection is closed.
async fn answered(from: Ipv4Addr, port: u16) -> std::io::Result<usize> {
    let mut stream = connect(from, port).await?;
    // the other side may have closed already
    let _ = stream.write_all(HELLO).await;
    let mut answer = Vec::new();
    let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.expect("the connection is closed");
    Ok(answer.len())
}

#[tokio::test]
async fn a_refused_address_never_sees_a_handshake() {
    let mut plan = Plan::new(Registry::Static, &[]);
    certs::write(plan.folder.path());
    let folder = plan.folder.path().display().to_string();
    let lines = format!(
        "allow = [\"127.0.0.1/32\"]\n[balancer.tls]\ncert = \"{folder}/edge.pem\"\nkey = \"{folder}/edge.key\""
    );
    plan.balancer = &lines;
    plan.ghosts = &[("ghost", "ghost")];
    plan.tls = true;
    let cluster = Cluster::start(plan).await;
    let port = cluster.edge().rsplit_once(':').unwrap().1.parse().unwrap();

    until("the balancer listens", Duration::from_secs(10), || async {
        answered(Ipv4Addr::LOCALHOST, port).await.is_ok_and(|bytes| bytes > 0)
    })
    .await;
    for _ in 0..5 {
        let bytes = answered(Ipv4Addr::new(127, 0, 0, 2), port).await.unwrap();
        assert_eq!(bytes, 0, "a refused address was answered");
    }
    assert!(answered(Ipv4Addr::LOCALHOST, port).await.unwrap() > 0, "the allowed address is still served");
}
