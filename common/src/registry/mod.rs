//! Who is in the cluster: nodes announce themselves, balancers watch. Three stores behind one trait.
//!
//! A watcher is given the whole present [`View`], not a stream of changes: nothing can be missed, and nothing queues up.

mod memory;
mod fixed;
mod etcd;

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{
    config::{ClusterConfig, RegistryConfig},
    contract::NodeRecord,
    ids::NodeId,
    tls::TlsError,
};

pub use etcd::{EtcdRegistry, OrderError, Ordered, order};
pub use fixed::StaticRegistry;
pub use memory::MemoryRegistry;

/// Whether a view is what the store says now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Link {
    /// Nothing has been read yet.
    #[default]
    Connecting,
    /// The view follows the store.
    Live,
    /// The store is out of reach; the view is the last known.
    Lost,
}

/// The cluster as last known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// All announced nodes.
    pub nodes: BTreeMap<NodeId, NodeRecord>,
    /// How far to trust it.
    pub link: Link,
}

/// A store of the cluster's members.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Keeps `record` in the store until [`withdraw`](Self::withdraw). Returns at once; what it takes to get and keep it there,
    /// the registry does by itself.
    async fn announce(&self, record: NodeRecord);

    /// Takes a node out, and waits a bounded time until the store has confirmed it.
    async fn withdraw(&self, id: &NodeId);

    /// The present view, and each later one.
    fn watch(&self) -> watch::Receiver<View>;

    /// Whether an operator wants this node drained, as the store last said: not until it has been read, and never where there is no
    /// store that could say so.
    async fn drained(&self, _id: &NodeId) -> watch::Receiver<bool> {
        watch::channel(false).1
    }

    /// Says that a balancer of this id is alive, until it leaves or its process ends; and how many are, itself among them. That is 0
    /// until it is known, and where the store counts nobody.
    async fn join(&self, _id: &str) -> watch::Receiver<usize> {
        watch::channel(0).1
    }

    /// The balancer of this id is leaving. Waits a bounded time until the store has confirmed it.
    async fn leave(&self, _id: &str) {}
}

/// The registry that the configuration names.
///
/// # Errors
/// When certificates or the password file of etcd cannot be read. An etcd that is out of reach is no error.
pub fn open(cluster: &ClusterConfig) -> Result<Arc<dyn Registry>, OpenError> {
    Ok(match &cluster.registry {
        RegistryConfig::Memory => Arc::new(MemoryRegistry::default()),
        RegistryConfig::Static { nodes } => Arc::new(StaticRegistry::new(nodes.clone())),
        RegistryConfig::Etcd(config) => Arc::new(EtcdRegistry::open(&cluster.name, config)?),
    })
}

/// A registry could not be set up from its configuration.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file that the configuration names.
    #[error("cluster.registry: {path} cannot be read: {source}")]
    File {
        /// Which file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A certificate or key that the configuration names.
    #[error("cluster.registry: {0}")]
    Tls(#[from] TlsError),
    /// The registry's own thread cannot be had.
    #[error("the registry cannot start its thread: {0}")]
    Thread(std::io::Error),
}
