//! The registry of a list in the configuration: it never changes, and announcing to it does nothing.

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Link, Registry, View};
use crate::{contract::NodeRecord, ids::NodeId};

/// A fixed view.
#[derive(Debug)]
pub struct StaticRegistry {
    view: watch::Sender<View>,
}

impl StaticRegistry {
    /// The nodes that the configuration lists.
    pub fn new(nodes: Vec<NodeRecord>) -> Self {
        let nodes = nodes.into_iter().map(|record| (record.id.clone(), record)).collect();
        Self { view: watch::Sender::new(View { nodes, link: Link::Live }) }
    }
}

#[async_trait]
impl Registry for StaticRegistry {
    async fn announce(&self, _record: NodeRecord) {}

    async fn withdraw(&self, _id: &NodeId) {}

    fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }
}
