//! Drains: an operator writes a key for a node, and the node reads it again and again. The key has no lease, so a drain outlives the
//! node's process, until somebody takes it back.
//!
//! A store that was wiped says that nobody is drained; one that is out of reach says nothing, and what it said last holds.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use etcd_client::{Client, GetOptions, PutOptions};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tracing::{debug, info};

use super::{
    Keys,
    link::{Dialer, LinkError, jittered},
};
use crate::{
    config::{ClusterConfig, RegistryConfig},
    ids::NodeId,
    registry::OpenError,
};

/// How often a node looks whether it is to be drained, at most.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long a command waits until the node has done as it was told.
const OBEYED_WITHIN: Duration = Duration::from_secs(10);

/// Keeps `drained` as the store says until nobody listens.
pub(super) async fn follow(dialer: Arc<Dialer>, key: String, drained: watch::Sender<bool>) {
    let mut client = None;
    while !drained.is_closed() {
        match read(&dialer, &mut client, &key).await {
            Ok(said) => {
                if drained.send_if_modified(|known| std::mem::replace(known, said) != said) {
                    info!(key, drained = said, "the registry has news about this node's drain");
                }
            }
            Err(error) => {
                debug!(key, %error, "cannot see whether this node is to be drained");
                client = None;
            }
        }
        time::sleep(jittered(INTERVAL)).await;
    }
}

async fn read(dialer: &Dialer, client: &mut Option<Client>, key: &str) -> Result<bool, LinkError> {
    let client = match client {
        Some(client) => client,
        none => none.insert(dialer.dial().await?),
    };
    let found = dialer.bounded("read the drain of", client.get(key, Some(GetOptions::new().with_count_only()))).await?;
    Ok(found.count() > 0)
}

/// What became of an order to drain a node or to take that back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ordered {
    /// The node has withdrawn, or announced itself again.
    Obeyed,
    /// The order stands in the store, and the node has not followed it yet.
    Noted,
    /// It had been so already.
    Already,
}

/// Why a node was not drained, or not taken back.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Neither announced nor drained.
    #[error("no node '{node}' is in this cluster; {}", listed(.known))]
    Unknown {
        /// Which node was meant.
        node: NodeId,
        /// The ids of all nodes, drained or not.
        known: Vec<String>,
    },
    /// The members of this cluster are not found in a store that can be written.
    #[error("cluster.registry.kind is not \"etcd\", so there is no store to write this to")]
    NoStore,
    /// No member of etcd answers as it must.
    #[error("etcd is out of reach: {0}")]
    OutOfReach(String),
    /// A file that the configuration names.
    #[error(transparent)]
    Open(#[from] OpenError),
}

fn listed(known: &[String]) -> String {
    match known {
        [] => "there is none".to_owned(),
        ids => format!("there are: {}", ids.join(", ")),
    }
}

/// Orders `node` to drain, or takes that order back, and waits a bounded time until it has done so.
///
/// # Errors
/// When the cluster has no such node, its registry is no store, or the store is out of reach.
pub async fn order(cluster: &ClusterConfig, node: &NodeId, drained: bool) -> Result<Ordered, OrderError> {
    let RegistryConfig::Etcd(config) = &cluster.registry else { return Err(OrderError::NoStore) };
    let desk = Desk { dialer: Dialer::new(config.clone())?, keys: Keys::new(&cluster.name), node };
    let mut error = None;
    for _ in &config.endpoints {
        match desk.order(drained).await {
            Ok(outcome) => return outcome,
            Err(e) => error = Some(e),
        }
    }
    Err(OrderError::OutOfReach(error.map_or_else(String::new, |e| e.to_string())))
}

/// Where orders for one node are written.
struct Desk<'a> {
    dialer: Dialer,
    keys: Keys,
    node: &'a NodeId,
}

/// What an order asks for, seen from what the store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judged {
    Already,
    Unknown,
    Write,
}

fn judge(is_listed: bool, is_drained: bool, drained: bool) -> Judged {
    match (is_drained, is_listed) {
        (false, false) => Judged::Unknown,
        _ if is_drained == drained => Judged::Already,
        _ => Judged::Write,
    }
}

impl Desk<'_> {
    /// Over one member of etcd.
    async fn order(&self, drained: bool) -> Result<Result<Ordered, OrderError>, LinkError> {
        let mut client = self.dialer.dial().await?;
        let (node_key, drain_key) = (self.keys.node(self.node), self.keys.drain(self.node));
        let is_listed = self.stands(&mut client, &node_key).await?;
        let is_drained = self.stands(&mut client, &drain_key).await?;
        match judge(is_listed, is_drained, drained) {
            Judged::Already => return Ok(Ok(Ordered::Already)),
            Judged::Unknown => {
                let known = self.known(&mut client).await?;
                return Ok(Err(OrderError::Unknown { node: self.node.clone(), known }));
            }
            Judged::Write => {}
        }
        if drained {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let value = json!({"v": 1, "since": since}).to_string();
            self.dialer.bounded("put", client.put(drain_key.as_str(), value, None::<PutOptions>)).await?;
        } else {
            self.dialer.bounded("delete", client.delete(drain_key.as_str(), None)).await?;
        }
        self.obeyed(&mut client, &node_key, drained).await.map(Ok)
    }

    /// A drained node is not announced, any other is.
    async fn obeyed(&self, client: &mut Client, node_key: &str, drained: bool) -> Result<Ordered, LinkError> {
        let deadline = Instant::now() + OBEYED_WITHIN;
        while Instant::now() < deadline {
            if self.stands(client, node_key).await? != drained {
                return Ok(Ordered::Obeyed);
            }
            time::sleep(Duration::from_millis(100)).await;
        }
        Ok(Ordered::Noted)
    }

    async fn stands(&self, client: &mut Client, key: &str) -> Result<bool, LinkError> {
        let options = GetOptions::new().with_count_only();
        Ok(self.dialer.bounded("get", client.get(key, Some(options))).await?.count() > 0)
    }

    async fn known(&self, client: &mut Client) -> Result<Vec<String>, LinkError> {
        let mut ids = Vec::new();
        for prefix in [self.keys.nodes(), self.keys.drains()] {
            let options = GetOptions::new().with_prefix().with_keys_only();
            let listing = self.dialer.bounded("list", client.get(prefix.as_str(), Some(options))).await?;
            let names = listing.kvs().iter().filter_map(|kv| kv.key_str().ok()?.strip_prefix(&prefix));
            ids.extend(names.map(str::to_owned));
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_for_nodes_that_are_there_and_changes_what_is_otherwise() {
        for drained in [true, false] {
            assert_eq!(judge(false, false, drained), Judged::Unknown);
        }
        assert_eq!(judge(true, false, true), Judged::Write);
        assert_eq!(judge(true, false, false), Judged::Already);
        assert_eq!(judge(false, true, true), Judged::Already);
        assert_eq!(judge(false, true, false), Judged::Write);
        // it has not heard yet
        assert_eq!(judge(true, true, false), Judged::Write);
    }
}
