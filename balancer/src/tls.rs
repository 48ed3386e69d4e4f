//! One connection between `accept` and HTTP: its place among those of its address, and TLS with our own rustls configuration.
//!
//! Pingora's own TLS listener always offers TLS 1.2 as well, so its listener runs plain here and the handshake is made on top.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use async_trait::async_trait;
use pingora::{
    apps::ServerApp,
    protocols::{GetSocketDigest, Stream, l4::stream::Stream as TcpStream, tls::server::handshake_with_callback},
    server::ShutdownWatch,
};
use prometheus::{IntCounter, IntCounterVec};
use tokio::time::timeout;
use tracing::debug;

use crate::{
    accept::Connections,
    auth::ReadCertificate,
    drain::OpenRequests,
    limits::Doors,
    live::{Current, Live},
    proxied,
};

/// An HTTP application behind connection limits and, when configured, TLS.
pub(crate) struct Secured<A> {
    inner: Arc<A>,
    live: Current,
    connections: Arc<Connections>,
    doors: Arc<Doors>,
    open: Arc<OpenRequests>,
    refused: Refused,
}

/// Counters of connections that never came to a request.
pub(crate) struct Refused {
    pub(crate) address: IntCounter,
    pub(crate) per_address: IntCounter,
    pub(crate) handshake: IntCounter,
    /// By the word for why.
    pub(crate) doors: IntCounterVec,
}

impl<A> Secured<A> {
    pub(crate) fn new(
        inner: Arc<A>,
        live: Current,
        doors: Arc<Doors>,
        open: Arc<OpenRequests>,
        refused: Refused,
    ) -> Self {
        Self { inner, live, connections: Arc::default(), doors, open, refused }
    }

    async fn secure(&self, live: &Live, stream: Box<TcpStream>) -> Option<Stream> {
        let Some(acceptor) = &live.acceptor else { return Some(stream) };
        let handshake = handshake_with_callback(acceptor, *stream, &ReadCertificate);
        match timeout(live.config.limits.header_timeout, handshake).await {
            Ok(Ok(stream)) => return Some(Box::new(stream)),
            Ok(Err(e)) => debug!(error = %e, "handshake failed"),
            Err(_) => debug!("handshake took too long"),
        }
        self.refused.handshake.inc();
        None
    }
}

fn peer_of(stream: &TcpStream) -> Option<SocketAddr> {
    Some(*stream.get_socket_digest()?.peer_addr()?.as_inet()?)
}

fn ip_of(stream: &TcpStream) -> Option<IpAddr> {
    Some(peer_of(stream)?.ip().to_canonical())
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Secured<A> {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let mut stream = stream.into_any().downcast::<TcpStream>().ok()?;
        // a request is on its way, as the end must know
        let coming = self.open.enter();
        let live = self.live.load_full();
        if proxied::admit(&live.config, &mut stream).await.is_none() {
            self.refused.address.inc();
            return None;
        }
        let per_address_max = live.config.limits.connections_per_address_max;
        let Some(_permit) = self.connections.enter(ip_of(&stream)?, per_address_max) else {
            self.refused.per_address.inc();
            return None;
        };
        let inhabitant = self.doors.enter(peer_of(&stream)?, &live.config.limits.doors);
        let inhabitant = inhabitant.map_err(|why| self.refused.doors.with_label_values(&[why.as_str()]).inc()).ok()?;
        let stream = self.secure(&live, stream).await?;
        drop((coming, live)); // each request has its own
        tokio::select! {
            kept = self.inner.process_new(stream, shutdown) => kept,
            () = inhabitant.cut() => None,
        }
    }
}
