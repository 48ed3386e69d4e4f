//! Who really asks, behind proxies of ours: by the PROXY protocol before TLS, or by `X-Forwarded-For`. Neither is believed of anybody who is not
//! named in `balancer.trusted_proxies`.
//!
//! # Source
//! The PROXY protocol, versions 1 and 2: haproxy.org, doc/proxy-protocol.txt.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

use http::HeaderMap;
use pingora::protocols::{GetSocketDigest, SocketDigest, l4::stream::Stream as TcpStream};
use ppp::{HeaderResult, PartialResult, v1, v2};
use tidegate_common::config::Reader;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::timeout,
};
use tracing::debug;

use crate::{
    accept::{Allowlist, Network},
    config::BalancerConfig,
};

/// What a header of version 2 begins with.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Longest header of version 1, its end included.
const V1_BYTES_MAX: usize = 107;
/// Longest rest of a header of version 2: addresses take 216 bytes at most, the others describe the connection.
const V2_REST_BYTES_MAX: usize = 4096;
/// Addresses of `X-Forwarded-For` that are looked at.
const HOPS_MAX: usize = 64;

/// Proxies whose word counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trusted(Vec<Network>);

impl Trusted {
    /// Reads `trusted_proxies`.
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        Self(r.parse_list("trusted_proxies").unwrap_or_default())
    }

    /// Whether `ip` is one of them.
    pub(crate) fn contains(&self, ip: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(ip))
    }

    /// Who asks: the last address of `X-Forwarded-For` that is no proxy of ours, where the connection comes from one; else who is connected.
    pub(crate) fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        if self.0.is_empty() || !self.contains(peer) {
            return peer;
        }
        let lines: Vec<_> = headers.get_all("x-forwarded-for").iter().filter_map(|line| line.to_str().ok()).collect();
        let hops = lines.iter().rev().flat_map(|line| line.rsplit(',')).take(HOPS_MAX);
        let mut client = peer;
        for hop in hops {
            // what stands before something that is no address was written by nobody we know
            let Some(address) = address_of(hop.trim()) else { break };
            client = address;
            if !self.contains(address) {
                break;
            }
        }
        client
    }
}

/// `192.0.2.1`, `192.0.2.1:4711`, `2001:db8::1` or `[2001:db8::1]:4711`.
fn address_of(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']')).unwrap_or(hop);
    let address = bare.parse().ok().or_else(|| hop.parse::<SocketAddr>().ok().map(|address| address.ip()));
    address.map(|address: IpAddr| address.to_canonical())
}

/// What holds for one of `balancer.listen` beyond what holds for all.
#[derive(Debug, Clone)]
pub(crate) struct Listener {
    listen: SocketAddr,
    allowlist: Allowlist,
    /// Whether each connection begins with a header of the PROXY protocol.
    pub(crate) is_proxied: bool,
}

impl Listener {
    /// Reads each `[[balancer.listeners]]`.
    pub(crate) fn read_all(r: &Reader<'_>, listen: &[SocketAddr]) -> Vec<Self> {
        let sections = r.sections("listeners");
        let listeners: Vec<_> = sections.iter().filter_map(Self::read).collect();
        for (i, listener) in listeners.iter().enumerate() {
            if !listen.contains(&listener.listen) {
                let message = format!("{} is none of balancer.listen", listener.listen);
                r.problem(
                    &format!("listeners[{i}].listen"),
                    message,
                    "name an address of balancer.listen as it stands there",
                );
            }
        }
        listeners
    }

    fn read(r: &Reader<'_>) -> Option<Self> {
        if !r.has("listen") {
            r.problem("listen", "is missing", "name an address of balancer.listen");
        }
        let (allowlist, is_proxied) = (Allowlist::read(r), r.get_or("proxy_protocol", false));
        Some(Self { listen: r.parse("listen")?, allowlist, is_proxied })
    }

    /// Whether a connection to `local` is one of its own.
    pub(crate) fn is_at(&self, local: SocketAddr) -> bool {
        let (own, local) = (self.listen, SocketAddr::new(local.ip().to_canonical(), local.port()));
        own.port() == local.port() && (own.ip().is_unspecified() || own.ip().to_canonical() == local.ip())
    }

    /// Whether `ip` may connect to it.
    pub(crate) fn permits(&self, ip: IpAddr) -> bool {
        self.allowlist.permits(ip)
    }
}

/// Judges a new connection by its listener and, where a proxy of ours says who is behind it, by that address, which is its client's from here on.
/// None when it may not come in.
pub(crate) async fn admit(config: &BalancerConfig, stream: &mut TcpStream) -> Option<()> {
    let digest = stream.get_socket_digest()?;
    let (peer, local) = (*digest.peer_addr()?.as_inet()?, *digest.local_addr()?.as_inet()?);
    let listener = config.listeners.iter().find(|listener| listener.is_at(local));
    let is_trusted = config.trusted.contains(peer.ip());
    if !listener.is_some_and(|listener| listener.is_proxied) {
        // whom a proxy of ours forwards, each request says
        let may_enter = is_trusted || config.permits(Some(local), peer.ip());
        return may_enter.then_some(());
    }
    if !is_trusted {
        debug!(%peer, "a connection that is to begin with the PROXY protocol comes from none of balancer.trusted_proxies");
        return None;
    }
    let said = match timeout(config.limits.header_timeout, read_header(stream)).await {
        Ok(Ok(said)) => said,
        Ok(Err(error)) => {
            debug!(%peer, %error, "no header of the PROXY protocol");
            return None;
        }
        Err(_) => return None,
    };
    // a proxy that asks for itself looks whether anybody is here; what else it asks is judged by its own address
    let Said::Client(client) = said else { return Some(()) };
    let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
    // it is new, so nobody has set it
    let _ = digest.peer_addr.set(Some(client.into()));
    stream.set_socket_digest(digest);
    config.permits(Some(local), client.ip()).then_some(())
}

/// What a header of the PROXY protocol says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// The client is somebody else.
    Client(SocketAddr),
    /// The proxy asks for itself, or does not know.
    Nothing,
}

/// A connection that does not begin with a header of the PROXY protocol.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoHeader {
    /// It ended.
    #[error("the connection ended: {0}")]
    Ended(#[from] std::io::Error),
    /// It begins with something else.
    #[error("the connection does not begin with a header of the PROXY protocol")]
    Malformed,
}

/// Reads exactly one header, version 1 or 2, and nothing behind it.
pub(crate) async fn read_header(stream: &mut (impl AsyncRead + Unpin)) -> Result<Said, NoHeader> {
    let mut header = vec![0; SIGNATURE.len()];
    stream.read_exact(&mut header).await?;
    if header == SIGNATURE {
        header.resize(16, 0);
        stream.read_exact(&mut header[12..]).await?;
        let rest = usize::from(u16::from_be_bytes([header[14], header[15]]));
        if rest > V2_REST_BYTES_MAX {
            return Err(NoHeader::Malformed);
        }
        header.resize(16 + rest, 0);
        stream.read_exact(&mut header[16..]).await?;
    } else {
        if !header.starts_with(b"PROXY ") {
            return Err(NoHeader::Malformed);
        }
        while !header.ends_with(b"\r\n") {
            if header.len() == V1_BYTES_MAX {
                return Err(NoHeader::Malformed);
            }
            header.push(stream.read_u8().await?);
        }
    }
    parse(&header).ok_or(NoHeader::Malformed)
}

/// What a whole header says; none when it is no good.
pub(crate) fn parse(header: &[u8]) -> Option<Said> {
    match HeaderResult::parse(header) {
        result if result.is_incomplete() => None,
        HeaderResult::V1(Ok(header)) => Some(match header.addresses {
            v1::Addresses::Tcp4(to) => Said::Client((to.source_address, to.source_port).into()),
            v1::Addresses::Tcp6(to) => Said::Client((to.source_address, to.source_port).into()),
            v1::Addresses::Unknown => Said::Nothing,
        }),
        HeaderResult::V2(Ok(header)) => Some(match (header.command, header.addresses) {
            (v2::Command::Local, _) => Said::Nothing,
            (v2::Command::Proxy, v2::Addresses::IPv4(to)) => Said::Client((to.source_address, to.source_port).into()),
            (v2::Command::Proxy, v2::Addresses::IPv6(to)) => Said::Client((to.source_address, to.source_port).into()),
            (v2::Command::Proxy, _) => Said::Nothing,
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn trusted() -> Trusted {
        Trusted(["10.0.0.0/8", "2001:db8::/32"].iter().map(|text| text.parse().unwrap()).collect())
    }

    fn client(peer: &str, lines: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append("x-forwarded-for", line.parse().unwrap());
        }
        trusted().client(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn forwarded_addresses_count_from_proxies_of_ours_alone_and_from_the_right() {
        for (peer, lines, expected) in [
            ("192.0.2.1", &["198.51.100.1"][..], "192.0.2.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", &["203.0.113.9, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
            ("10.0.0.1", &["203.0.113.9", "198.51.100.1:4711"], "198.51.100.1"),
            ("10.0.0.1", &["[2001:db9::1]:4711"], "2001:db9::1"),
            ("2001:db8::1", &["::ffff:198.51.100.1"], "198.51.100.1"),
            ("10.0.0.1", &["198.51.100.1, unknown, 10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", &["10.0.0.3"], "10.0.0.3"),
        ] {
            assert_eq!(client(peer, lines), expected, "{peer} {lines:?}");
        }
    }

    async fn read(bytes: &[u8]) -> (Result<Said, NoHeader>, usize) {
        let mut left = bytes;
        (read_header(&mut left).await, left.len())
    }

    #[tokio::test]
    async fn a_header_is_read_to_its_last_byte_and_no_further() {
        let someone = Said::Client("192.0.2.1:4711".parse().unwrap());
        let mut second = SIGNATURE.to_vec();
        second.extend([0x21, 0x11, 0, 12, 192, 0, 2, 1, 198, 51, 100, 1, 0x12, 0x67, 1, 187]);
        let local = [&SIGNATURE[..], &[0x20, 0, 0, 0]].concat();
        for (header, expected) in [
            (&b"PROXY TCP4 192.0.2.1 198.51.100.1 4711 443\r\n"[..], someone),
            (b"PROXY UNKNOWN\r\n", Said::Nothing),
            (&second, someone),
            (&local, Said::Nothing),
        ] {
            let (said, left) = read(&[header, b"GET / HTTP/1.1\r\n"].concat()).await;
            assert_eq!((said.unwrap(), left), (expected, 16), "{header:?}");
        }
        for bad in [
            &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..],
            b"PROXY TCP4 999.0.2.1 198.51.100.1 4711 443\r\n",
            b"PROXY TCP4 192.0.2.1 198.51.100.1 4711\r\n",
            &[b"PROXY ", &[b'x'; 200][..]].concat(),
            &[&SIGNATURE[..], &[0x21, 0x11, 0xff, 0xff], &[0; 5000]].concat(),
            &[&SIGNATURE[..], &[0x31, 0x11, 0, 12], &[0; 12]].concat(),
        ] {
            assert!(matches!(read(bad).await.0, Err(NoHeader::Malformed)), "{bad:?}");
        }
        assert!(matches!(read(b"PROXY TCP4 192.").await.0, Err(NoHeader::Ended(_))));
    }

    proptest! {
        #[test]
        fn nothing_that_comes_in_its_place_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
            let _ = parse(&[&SIGNATURE[..], &bytes].concat());
        }
    }
}
