//! The registry in etcd. (stub while the house is built)
use async_trait::async_trait;
use tokio::sync::watch;

use super::{OpenError, Registry, View};
use crate::{
    config::EtcdConfig,
    contract::NodeRecord,
    ids::{ClusterName, NodeId},
};

/// Nodes under `/tidegate/v1/{cluster}/nodes/`.
#[derive(Debug)]
pub struct EtcdRegistry {
    view: watch::Sender<View>,
}

impl EtcdRegistry {
    /// Opens.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn open(_cluster: &ClusterName, _config: &EtcdConfig) -> Result<Self, OpenError> {
        Ok(Self { view: watch::Sender::new(View::default()) })
    }
}

#[async_trait]
impl Registry for EtcdRegistry {
    async fn announce(&self, _record: NodeRecord) {}
    async fn withdraw(&self, _id: &NodeId) {}
    fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }
}
