//! The members of the cluster as the edge sees them: one writer keeps them and publishes immutable snapshots.
//!
//! A request loads the snapshot once for each attempt and makes all its choices from that one. `rules` are the figures that decide,
//! `member` is the pure state machine, `roster` applies events to all members, `discover` and `health` bring the events.

mod rules;
mod member;
mod roster;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use arc_swap::ArcSwap;
use pingora::{connectors::http::Connector, upstreams::peer::HttpPeer};
use tidegate_common::{
    contract::Health,
    ids::{Fingerprint, NodeId, SiteName},
};
use tokio::sync::{Notify, futures::Notified, mpsc};

use crate::{
    admin::Members,
    pick::Rotation,
    upstreams::{Foreign, Upstreams},
};

pub use member::Phase;
pub(crate) use roster::{Effect, Moment, Roster};
pub(crate) use rules::{RAMP_STEPS, Rules};

/// One life of a member at one address; a record with another address begins the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Incarnation(pub(crate) u64);

/// A node that can be given requests.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) id: NodeId,
    pub(crate) incarnation: Incarnation,
    /// `host:port`, for the `Host` header.
    pub(crate) authority: String,
    pub(crate) peer: HttpPeer,
    /// Where it stands.
    pub(crate) site: SiteName,
    /// What its answers of the pool's model depend on, as far as it has said.
    pub(crate) fingerprint: Option<Fingerprint>,
    /// Whether probes or requests have failed there, so that nothing is to be expected of it.
    pub(crate) is_suspect: bool,
    /// What it takes to ask one that is none of ours.
    pub(crate) foreign: Option<Arc<Foreign>>,
}

impl Target {
    /// Whether an answer that nodes of this fingerprint have begun may go on here; who does not know is told, and says so.
    pub(crate) fn may_go_on(&self, begun_by: Option<Fingerprint>) -> bool {
        let own = self.fingerprint.or(begun_by);
        begun_by.is_none() || own == begun_by
    }

    /// By what it is asked; nodes by `ours`.
    pub(crate) fn connector<'a>(&'a self, ours: &'a Connector) -> &'a Connector {
        self.foreign.as_ref().map_or(ours, |foreign| &foreign.connector)
    }
}

/// Members that share requests by their weights.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    targets: Vec<Arc<Target>>,
    /// When each is due.
    rotation: Arc<Rotation>,
}

impl Ring {
    /// The next member that may be asked.
    pub(crate) fn pick(&self, may: impl Fn(&Target) -> bool) -> Option<Arc<Target>> {
        let skip = |i: usize| self.targets.get(i).is_none_or(|target| !may(target));
        self.rotation.pick(skip).map(|i| Arc::clone(&self.targets[i]))
    }

    /// Whether it has such a member.
    pub(crate) fn any(&self, is_such: impl Fn(&Target) -> bool) -> bool {
        self.targets.iter().any(|target| is_such(target))
    }

    /// The one of this id.
    pub(crate) fn find(&self, id: &NodeId) -> Option<Arc<Target>> {
        self.targets.iter().find(|target| target.id == *id).cloned()
    }

    /// What its members have said that their answers depend on.
    fn fingerprints(&self) -> BTreeSet<Fingerprint> {
        self.targets.iter().filter_map(|target| target.fingerprint).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.targets.len()
    }
}

/// The nodes of one model.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    /// Those that take requests now.
    pub(crate) ready: Ring,
    /// While too few are ready, those that failed, and have not said themselves that they take nothing. They are asked after all the
    /// ready ones: a node that is full says so and the next is asked, so those few cannot be overrun, and a dead one costs a
    /// request time.
    pub(crate) suspects: Ring,
    /// How many members there are, ready or not.
    pub(crate) members: usize,
    /// How many of them are nodes of ours.
    pub(crate) nodes: usize,
}

impl Pool {
    /// What the answers of all those that take requests depend on, where it is the same and all have said it.
    pub(crate) fn fingerprint(&self) -> Option<Fingerprint> {
        let mut all = self.ready.targets.iter().map(|target| target.fingerprint);
        let first = all.next()??;
        all.all(|other| other == Some(first)).then_some(first)
    }

    /// Whether nobody can be asked.
    pub(crate) fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.suspects.is_empty()
    }

    /// Whether so few are ready that failed ones are asked too.
    pub(crate) fn is_panicking(&self) -> bool {
        !self.suspects.is_empty()
    }
}

/// All that is known at one moment.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// The pool of each model, also of one whose members are all away.
    pub(crate) models: BTreeMap<String, Pool>,
    /// The model of requests that name none, where the members agree on one.
    pub(crate) default_model: Option<String>,
    /// What the private listener shows.
    pub(crate) report: Members,
}

impl Snapshot {
    pub(crate) fn has_ready(&self) -> bool {
        self.models.values().any(|pool| !pool.ready.is_empty())
    }
}

/// What a probe found.
#[derive(Debug, Clone)]
pub(crate) enum Probed {
    /// The node answered, from an address that is now known to be its own.
    Answered { peer: Box<HttpPeer>, health: Box<Health> },
    /// A foreign upstream answered.
    Reached { peer: Box<HttpPeer> },
    /// It did not, for this reason.
    Failed(String),
}

/// What requests and probes tell the writer.
#[derive(Debug)]
pub(crate) enum Signal {
    /// A probe has ended.
    Probed { id: NodeId, incarnation: Incarnation, outcome: Probed },
    /// A request lost the node. It `counts` like a failed probe when the node could not be reached or fell silent; otherwise it only
    /// makes the next probe come soon.
    Lost { id: NodeId, incarnation: Incarnation, counts: bool },
    /// A reload has changed what decides about members, and which are none of ours.
    Reloaded { rules: Rules, upstreams: Arc<Upstreams> },
}

/// Most signals that wait for the writer; passive ones beyond it are dropped, since the next failure says the same.
pub(crate) const SIGNALS_MAX: usize = 1024;

/// The readers' end of the pool.
#[derive(Debug)]
pub(crate) struct PoolView {
    snapshot: ArcSwap<Snapshot>,
    /// Wakes those who wait for another snapshot.
    changed: Notify,
    signals: mpsc::Sender<Signal>,
}

impl PoolView {
    /// A view that nothing has been published to, and the writer's end of its signals.
    pub(crate) fn new() -> (Arc<Self>, mpsc::Receiver<Signal>) {
        let (signals, inbox) = mpsc::channel(SIGNALS_MAX);
        (Arc::new(Self { snapshot: ArcSwap::default(), changed: Notify::new(), signals }), inbox)
    }

    /// The present snapshot.
    pub(crate) fn load(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Only the one writer calls this.
    pub(crate) fn publish(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
        self.changed.notify_waiters();
    }

    /// Ends with the first snapshot published after this call.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Where probes report to.
    pub(crate) fn signals(&self) -> mpsc::Sender<Signal> {
        self.signals.clone()
    }

    /// A request lost `target`.
    pub(crate) fn lost(&self, target: &Target, counts: bool) {
        let _ = self.signals.try_send(Signal::Lost { id: target.id.clone(), incarnation: target.incarnation, counts });
    }
}
