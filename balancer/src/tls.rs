//! One connection between `accept` and HTTP: its place among those of its address, and TLS with our own rustls configuration.
//!
//! Pingora's own TLS listener always offers TLS 1.2 as well, so its listener runs plain here and the handshake is made on top.

use std::{net::IpAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use pingora::{
    apps::ServerApp,
    listeners::tls::Acceptor,
    protocols::{GetSocketDigest, Stream, l4::stream::Stream as TcpStream},
    server::ShutdownWatch,
};
use prometheus::IntCounter;
use rustls::ServerConfig;
use tokio::time::timeout;
use tracing::debug;

use crate::accept::Connections;

/// An HTTP application behind connection limits and, when configured, TLS.
pub(crate) struct Secured<A> {
    inner: Arc<A>,
    acceptor: Option<Acceptor>,
    connections: Arc<Connections>,
    handshake_timeout: Duration,
    refused: Refused,
}

/// Counters of connections that never came to a request.
pub(crate) struct Refused {
    pub(crate) per_address: IntCounter,
    pub(crate) handshake: IntCounter,
}

impl<A> Secured<A> {
    pub(crate) fn new(
        inner: Arc<A>,
        tls: Option<Arc<ServerConfig>>,
        connections: Arc<Connections>,
        handshake_timeout: Duration,
        refused: Refused,
    ) -> Self {
        Self { inner, acceptor: tls.map(Acceptor::from_server_config), connections, handshake_timeout, refused }
    }

    async fn secure(&self, stream: Box<TcpStream>) -> Option<Stream> {
        let Some(acceptor) = &self.acceptor else { return Some(stream) };
        match timeout(self.handshake_timeout, acceptor.tls_handshake(*stream)).await {
            Ok(Ok(stream)) => return Some(Box::new(stream)),
            Ok(Err(e)) => debug!(error = %e, "handshake failed"),
            Err(_) => debug!("handshake took too long"),
        }
        self.refused.handshake.inc();
        None
    }
}

fn ip_of(stream: &TcpStream) -> Option<IpAddr> {
    Some(stream.get_socket_digest()?.peer_addr()?.as_inet()?.ip().to_canonical())
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Secured<A> {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let stream = stream.into_any().downcast::<TcpStream>().ok()?;
        let Some(_permit) = self.connections.enter(ip_of(&stream)?) else {
            self.refused.per_address.inc();
            return None;
        };
        let stream = self.secure(stream).await?;
        self.inner.process_new(stream, shutdown).await
    }
}
