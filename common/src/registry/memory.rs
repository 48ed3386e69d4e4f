//! The registry of one process: what `tidegate up` and tests use.

use async_trait::async_trait;
use tokio::sync::watch;

use super::{Link, Registry, View};
use crate::{contract::NodeRecord, ids::NodeId};

/// A view behind a watch channel.
#[derive(Debug)]
pub struct MemoryRegistry {
    view: watch::Sender<View>,
}

impl Default for MemoryRegistry {
    fn default() -> Self {
        Self { view: watch::Sender::new(View { link: Link::Live, ..View::default() }) }
    }
}

#[async_trait]
impl Registry for MemoryRegistry {
    async fn announce(&self, record: NodeRecord) {
        self.view.send_modify(|view| {
            view.nodes.insert(record.id.clone(), record);
        });
    }

    async fn withdraw(&self, id: &NodeId) {
        self.view.send_modify(|view| {
            view.nodes.remove(id);
        });
    }

    fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watcher_sees_who_came_and_who_left() {
        let registry = MemoryRegistry::default();
        let mut views = registry.watch();
        let record = NodeRecord::new("n1".parse().unwrap(), "127.0.0.1:1".into(), "m".into());
        registry.announce(record.clone()).await;
        views.changed().await.unwrap();
        assert_eq!(views.borrow_and_update().nodes.get(&record.id), Some(&record));
        registry.withdraw(&record.id).await;
        views.changed().await.unwrap();
        assert!(views.borrow().nodes.is_empty());
    }
}
