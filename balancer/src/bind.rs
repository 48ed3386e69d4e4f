//! Taking the sockets, before anything else runs: a port that is in use is told at once, and by whom it is held.
//!
//! The sockets are handed to Pingora as descriptors it finds already open, the way it takes them over in an upgrade.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::IntoRawFd,
    sync::Arc,
};

use pingora::server::{Fds, ListenFds};
use tidegate_common::{config::ClusterConfig, holder, registry::Registry, shutdown::Shutdown};
use tokio::sync::mpsc;

use crate::{
    config::BalancerConfig,
    live::{Reading, Reloads},
    run::{self, RunError},
    upgrade::{Predecessor, Sockets},
};

/// A balancer whose sockets are open: clients may connect, and are answered once it runs.
#[derive(Debug)]
pub struct Balancer {
    pub(crate) config: BalancerConfig,
    pub(crate) service: Vec<TcpListener>,
    pub(crate) admin: TcpListener,
    pub(crate) reloads: Reloads,
    pub(crate) readings: mpsc::Receiver<Reading>,
    /// Whose place it takes.
    pub(crate) predecessor: Option<Predecessor>,
    /// Whether another process may take its place.
    pub(crate) is_upgradable: bool,
}

impl Balancer {
    /// Takes the sockets that the configuration names.
    ///
    /// # Errors
    /// [`RunError::AddressInUse`] or [`RunError::Listen`].
    pub fn bind(config: BalancerConfig) -> Result<Self, RunError> {
        let service = config.listen.iter().map(|address| listen(*address)).collect::<Result<_, _>>()?;
        let admin = listen(config.admin)?;
        Ok(Self::new(config, service, admin))
    }

    /// Takes the sockets from the balancer that runs with this configuration's `balancer.upgrade_socket`; those that it has not are
    /// opened. It goes on serving until this one can, and leaves then.
    ///
    /// # Errors
    /// When there is no such balancer, or as [`bind`](Self::bind).
    pub fn take_over(config: BalancerConfig) -> Result<Self, RunError> {
        let path = config.upgrade_socket.path(config.admin).ok_or(RunError::NoUpgradeSocket)?;
        let (predecessor, Sockets { mut public, mut private }) = Predecessor::ask(&path)?;
        let take = |address: SocketAddr, from: &mut Vec<TcpListener>| match Sockets::take(from, address) {
            Some(socket) => Ok(socket),
            None => listen(address),
        };
        let service = config.listen.iter().map(|address| take(*address, &mut public)).collect::<Result<_, _>>()?;
        let admin = take(config.admin, &mut private)?;
        Ok(Self { predecessor: Some(predecessor), ..Self::new(config, service, admin).upgradable() })
    }

    fn new(config: BalancerConfig, service: Vec<TcpListener>, admin: TcpListener) -> Self {
        let (reloads, readings) = Reloads::new();
        Self { config, service, admin, reloads, readings, predecessor: None, is_upgradable: false }
    }

    /// Offers its sockets to the process that comes next, at `balancer.upgrade_socket`.
    #[must_use]
    pub fn upgradable(self) -> Self {
        Self { is_upgradable: true, ..self }
    }

    /// Where clients are served; the ports are the real ones, also where the configuration says 0.
    pub fn listen_addresses(&self) -> Vec<SocketAddr> {
        self.service.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }

    /// Where the private listener stands.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.local_addr().ok()
    }

    /// By which it is given new readings of its configuration, now and while it runs.
    pub fn reloads(&self) -> Reloads {
        self.reloads.clone()
    }

    /// Serves until `shutdown` fires and the open requests have ended, or their bound has passed. Blocks; call it on its own thread,
    /// outside any tokio runtime.
    ///
    /// # Errors
    /// When the runtime, TLS or a listener cannot be set up, or a listener breaks off.
    pub fn run(self, cluster: &ClusterConfig, registry: Arc<dyn Registry>, shutdown: Shutdown) -> Result<(), RunError> {
        run::serve(self, cluster, registry, shutdown)
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => RunError::AddressInUse { address, holder: holder::of_port(address.port()) },
        _ => RunError::Listen { address, source },
    })
}

/// Open sockets under the names that Pingora will ask for.
pub(crate) fn hand_over(sockets: Vec<TcpListener>) -> io::Result<(Vec<String>, ListenFds)> {
    let mut fds = Fds::new();
    let mut names = Vec::with_capacity(sockets.len());
    for socket in sockets {
        socket.set_nonblocking(true)?;
        let name = socket.local_addr()?.to_string();
        fds.add(name.clone(), socket.into_raw_fd());
        names.push(name);
    }
    Ok((names, Arc::new(fds.into())))
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;

    #[test]
    fn a_port_in_use_is_named_with_its_holder() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap();
        let text = format!("[balancer]\nlisten = \"{address}\"\n[balancer.admin]\nlisten = \"127.0.0.1:0\"");
        let config = Raw::from_toml(&text, "t").unwrap().check(BalancerConfig::read).unwrap();
        let error = Balancer::bind(config).unwrap_err();
        let pid = std::process::id().to_string();
        assert!(matches!(&error, RunError::AddressInUse { address: a, .. } if *a == address), "{error}");
        assert!(error.to_string().contains(&pid), "{error}");
    }
}
