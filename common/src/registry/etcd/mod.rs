//! The registry in etcd, with supervision of its own.
//!
//! The client's watch and keep-alive streams fail for good when their member goes, and can also fall silent, so nothing here trusts
//! one: every wait has an end, every error drops the whole client, and the next attempt builds a new one to the next endpoint.
//! What was known stays in the view meanwhile, marked [`Link::Lost`](super::Link::Lost).
//!
//! The tasks run on one thread of the registry's own, because who opens it may be on no tokio runtime or on several; the thread ends
//! when the registry is dropped. A dropped registry revokes nothing: its leases run out, as those of a process that died.

mod known;
mod link;
mod follow;
mod keep;
mod drain;
mod balancers;

use std::{collections::HashMap, sync::Arc, thread};

use async_trait::async_trait;
use serde_json::json;
use tokio::{
    runtime,
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tracing::warn;

use self::{keep::Keeper, link::Dialer};
use super::{OpenError, Registry, View};
use crate::{
    config::EtcdConfig,
    contract::NodeRecord,
    ids::{ClusterName, NodeId},
};
pub use drain::{OrderError, Ordered, order};

/// Announcements that may wait for the registry's thread; it takes each at once, so this is only a bound.
const COMMANDS_MAX: usize = 64;

/// Nodes under `/tidegate/v1/{cluster}/nodes/`, orders to drain them under `/tidegate/v1/{cluster}/drain/`, balancers under
/// `/tidegate/v1/{cluster}/balancers/`.
#[derive(Debug)]
pub struct EtcdRegistry {
    commands: mpsc::Sender<Command>,
    view: watch::Sender<View>,
    watched: Arc<Notify>,
}

#[derive(Debug)]
enum Command {
    Announce(NodeRecord),
    Withdraw(NodeId, oneshot::Sender<()>),
    FollowDrain(NodeId, watch::Sender<bool>),
    Join(String, watch::Sender<usize>),
    Leave(String, oneshot::Sender<()>),
}

/// The keys of one cluster.
#[derive(Debug, Clone)]
struct Keys(String);

impl Keys {
    fn new(cluster: &ClusterName) -> Self {
        Self(format!("/tidegate/v1/{cluster}"))
    }

    /// What all nodes' keys begin with.
    fn nodes(&self) -> String {
        format!("{}/nodes/", self.0)
    }

    /// What the keys of all drains begin with.
    fn drains(&self) -> String {
        format!("{}/drain/", self.0)
    }

    /// What the keys of all balancers begin with.
    fn balancers(&self) -> String {
        format!("{}/balancers/", self.0)
    }

    fn balancer(&self, id: &str) -> String {
        format!("{}{id}", self.balancers())
    }

    fn node(&self, id: &NodeId) -> String {
        format!("{}{id}", self.nodes())
    }

    fn drain(&self, id: &NodeId) -> String {
        format!("{}{id}", self.drains())
    }
}

impl EtcdRegistry {
    /// Starts the registry's thread. Nothing is sent to etcd before the first announcement or watch, and an etcd that is out of reach
    /// is no error: it is tried again for as long as the registry lives.
    ///
    /// # Errors
    /// When a certificate or the password file cannot be read, or no thread can be had.
    pub fn open(cluster: &ClusterName, config: &EtcdConfig) -> Result<Self, OpenError> {
        let dialer = Arc::new(Dialer::new(config.clone())?);
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let view = watch::Sender::new(View::default());
        let watched = Arc::new(Notify::new());
        let supervisor = Supervisor {
            dialer,
            keys: Keys::new(cluster),
            view: view.clone(),
            watched: Arc::clone(&watched),
            kept: HashMap::new(),
        };
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(OpenError::Thread)?;
        thread::Builder::new()
            .name("tidegate-etcd".into())
            .spawn(move || runtime.block_on(supervisor.run(inbox)))
            .map_err(OpenError::Thread)?;
        Ok(Self { commands, view, watched })
    }
}

#[async_trait]
impl Registry for EtcdRegistry {
    async fn announce(&self, record: NodeRecord) {
        // the thread only ends after this sender is gone
        let _ = self.commands.send(Command::Announce(record)).await;
    }

    async fn withdraw(&self, id: &NodeId) {
        let (reply, done) = oneshot::channel();
        let _ = self.commands.send(Command::Withdraw(id.clone(), reply)).await;
        // the keeper bounds itself, so no timer of the caller's runtime is needed; a thread that died drops the sender
        let _ = done.await;
    }

    fn watch(&self) -> watch::Receiver<View> {
        self.watched.notify_one();
        self.view.subscribe()
    }

    async fn drained(&self, id: &NodeId) -> watch::Receiver<bool> {
        let (drained, says) = watch::channel(false);
        let _ = self.commands.send(Command::FollowDrain(id.clone(), drained)).await;
        says
    }

    async fn join(&self, id: &str) -> watch::Receiver<usize> {
        let (alive, says) = watch::channel(0);
        let _ = self.commands.send(Command::Join(id.to_owned(), alive)).await;
        says
    }

    async fn leave(&self, id: &str) {
        let (reply, done) = oneshot::channel();
        let _ = self.commands.send(Command::Leave(id.to_owned(), reply)).await;
        let _ = done.await;
    }
}

/// Who runs what on the registry's thread.
struct Supervisor {
    dialer: Arc<Dialer>,
    keys: Keys,
    view: watch::Sender<View>,
    watched: Arc<Notify>,
    /// By their keys.
    kept: HashMap<String, Kept>,
}

/// One key that a task keeps in etcd; `None` asks the task to take it out and end.
struct Kept {
    wanted: watch::Sender<Option<Vec<u8>>>,
    task: JoinHandle<()>,
}

impl Supervisor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        tokio::spawn(Self::follow(Arc::clone(&self.watched), self.follower()));
        while let Some(command) = inbox.recv().await {
            match command {
                Command::Announce(record) => {
                    let value = serde_json::to_vec(&record).expect("a node record is always JSON");
                    self.announce(self.keys.node(&record.id), value);
                }
                Command::Withdraw(id, reply) => self.withdraw(&self.keys.node(&id), reply),
                Command::Join(id, alive) => {
                    self.announce(self.keys.balancer(&id), json!({"v": 1, "id": id}).to_string().into_bytes());
                    tokio::spawn(balancers::count(Arc::clone(&self.dialer), self.keys.balancers(), alive));
                }
                Command::Leave(id, reply) => self.withdraw(&self.keys.balancer(&id), reply),
                Command::FollowDrain(id, drained) => {
                    tokio::spawn(drain::follow(Arc::clone(&self.dialer), self.keys.drain(&id), drained));
                }
            }
        }
    }

    fn follower(&self) -> follow::Follower {
        follow::Follower::new(Arc::clone(&self.dialer), self.keys.nodes(), self.view.clone())
    }

    /// A node never watches, so it puts no watch on etcd.
    async fn follow(watched: Arc<Notify>, follower: follow::Follower) {
        watched.notified().await;
        follower.run().await;
    }

    fn announce(&mut self, key: String, value: Vec<u8>) {
        if let Some(kept) = self.kept.get(&key) {
            kept.wanted.send_replace(Some(value));
            return;
        }
        let (wanted, orders) = watch::channel(Some(value));
        let task = tokio::spawn(Keeper::new(Arc::clone(&self.dialer), key.clone(), orders).run());
        self.kept.insert(key, Kept { wanted, task });
    }

    fn withdraw(&mut self, key: &str, reply: oneshot::Sender<()>) {
        let Some(kept) = self.kept.remove(key) else {
            let _ = reply.send(());
            return;
        };
        kept.wanted.send_replace(None);
        tokio::spawn(async move {
            if let Err(error) = kept.task.await {
                warn!(%error, "the task that kept a key in etcd ended badly");
            }
            let _ = reply.send(());
        });
    }
}
