//! Who may connect, judged by address alone and before TLS: a refused address sees its connection closed, never a handshake.
//!
//! Pingora asks [`Gate`] right after `accept`; the count of connections per address is held by a permit for as long as one lives.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use ipnet::IpNet;
use pingora::listeners::ConnectionFilter;
use prometheus::IntCounter;
use tidegate_common::config::Reader;

use crate::live::Current;

/// Addresses that may connect; what `deny` names may not, whatever `allow` says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Allowlist {
    allow: Option<Vec<Network>>,
    deny: Vec<Network>,
}

/// A network, or a single address as a network of one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network(IpNet);

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map(Self).map_err(|_| "is neither an address nor a network such as 10.0.0.0/8".into())
    }
}

impl Network {
    /// Whether this address lies within.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl Allowlist {
    /// Reads `allow` and `deny`.
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        let allow = r.parse_list::<Network>("allow");
        if allow.as_ref().is_some_and(Vec::is_empty) {
            r.problem("allow", "an empty list lets nobody in", "list networks, or remove the key to let everybody in");
        }
        Self { allow, deny: r.parse_list("deny").unwrap_or_default() }
    }

    /// Whether `ip` may connect.
    pub(crate) fn permits(&self, ip: IpAddr) -> bool {
        !self.denies(ip) && self.allow.as_deref().is_none_or(|allow| allow.iter().any(|network| network.contains(ip)))
    }

    /// Whether `ip` is denied in so many words.
    pub(crate) fn denies(&self, ip: IpAddr) -> bool {
        self.deny.iter().any(|network| network.contains(ip))
    }
}

/// The allowlist at the door.
pub(crate) struct Gate {
    pub(crate) live: Current,
    pub(crate) refused: IntCounter,
}

/// What it holds has no other form for people than the file it came from.
impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

impl Gate {
    /// Proxies of ours come in, and whom they forward is judged later.
    fn permits(&self, ip: IpAddr) -> bool {
        let config = &self.live.load().config;
        config.allowlist.permits(ip) || (config.trusted.contains(ip) && !config.allowlist.denies(ip))
    }
}

#[async_trait]
impl ConnectionFilter for Gate {
    async fn should_accept(&self, address: Option<&SocketAddr>) -> bool {
        let accepted = address.is_some_and(|address| self.permits(address.ip()));
        if !accepted {
            self.refused.inc();
        }
        accepted
    }
}

/// Counts the connections of each address.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    open: Mutex<HashMap<IpAddr, usize>>,
}

impl Connections {
    /// A place for one more connection of `ip`, given back when the permit is dropped; none when it has `per_address_max` already.
    pub(crate) fn enter(self: &Arc<Self>, ip: IpAddr, per_address_max: usize) -> Option<ConnectionPermit> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(ip).or_default();
        if *count >= per_address_max {
            return None;
        }
        *count += 1;
        Some(ConnectionPermit { connections: Arc::clone(self), ip })
    }
}

/// One connection's place.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    connections: Arc<Connections>,
    ip: IpAddr,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut open = self.connections.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.ip);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(texts: &[&str]) -> Vec<Network> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn deny_goes_over_allow_and_absence_means_everybody() {
        let all = Allowlist::default();
        assert!(all.permits("203.0.113.9".parse().unwrap()));
        let some = Allowlist { allow: Some(networks(&["10.0.0.0/8", "::1"])), deny: networks(&["10.1.0.0/16"]) };
        for (ip, permitted) in
            [("10.2.0.1", true), ("10.1.0.1", false), ("11.0.0.1", false), ("::1", true), ("::ffff:10.2.0.1", true)]
        {
            assert_eq!(some.permits(ip.parse().unwrap()), permitted, "{ip}");
        }
    }

    #[test]
    fn places_come_back_when_connections_end() {
        let connections = Arc::new(Connections::default());
        let ip = IpAddr::from([127, 0, 0, 1]);
        let first = connections.enter(ip, 2);
        let _second = connections.enter(ip, 2).unwrap();
        assert!(connections.enter(ip, 2).is_none());
        assert!(connections.enter(IpAddr::from([127, 0, 0, 2]), 2).is_some());
        drop(first);
        assert!(connections.enter(ip, 2).is_some());
        assert_eq!(connections.open.lock().unwrap().len(), 1);
    }
}
