//! The pool's one writer: it follows the registry and the probes, and publishes a snapshot after each event.
//!
//! It awaits and does; what an event means is decided in `pool::roster`.

use std::{collections::HashMap, sync::Arc};

use serde_json::json;
use tidegate_common::{
    ids::NodeId,
    registry::{Registry, View},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};
use tracing::{info, warn};

use crate::{
    health::{Probe, Prober},
    pool::{Effect, Moment, Phase, PoolView, Roster, Rules, Signal, Snapshot},
    record::Books,
    remembered::Remembered,
};

/// The writer.
pub(crate) struct Discover {
    roster: Roster,
    view: Arc<PoolView>,
    prober: Arc<Prober>,
    probes: HashMap<NodeId, Probe>,
    books: Arc<Books>,
    remembered: Remembered,
    /// Where each member stood when it was recorded last.
    phases: HashMap<(NodeId, String), Phase>,
}

impl Discover {
    pub(crate) fn new(
        rules: Rules,
        view: Arc<PoolView>,
        prober: Arc<Prober>,
        books: Arc<Books>,
        remembered: Remembered,
    ) -> Self {
        let roster = Roster::new(rules, prober.upstreams());
        Self { roster, view, prober, probes: HashMap::new(), books, remembered, phases: HashMap::new() }
    }

    /// Runs until the process ends.
    pub(crate) async fn run(mut self, registry: Arc<dyn Registry>, mut signals: mpsc::Receiver<Signal>) {
        let mut views = registry.watch();
        self.follow(&mut views);
        let mut followed = true;
        loop {
            let ramp_step = self.roster.ramp_step(Instant::now());
            tokio::select! {
                () = sleep(ramp_step.unwrap_or_default()), if ramp_step.is_some() => self.publish(),
                changed = views.changed(), if followed => match changed {
                    Ok(()) => self.follow(&mut views),
                    Err(_) => {
                        info!("the registry has ended, its last view stays");
                        followed = false;
                    }
                },
                signal = signals.recv() => match signal {
                    Some(signal) => {
                        let is_reload = matches!(signal, Signal::Reloaded { .. });
                        self.hear(signal);
                        if is_reload {
                            self.follow(&mut views);
                        }
                    }
                    None => return,
                },
            }
        }
    }

    fn follow(&mut self, views: &mut watch::Receiver<View>) {
        let mut view = self.remembered.complete(views.borrow_and_update().clone());
        for record in self.prober.upstreams().records() {
            if view.nodes.insert(record.id.clone(), record.clone()).is_some_and(|known| known != *record) {
                warn!(id = %record.id, "a node has the id of one of balancer.upstreams, and is left out");
            }
        }
        let effects = self.roster.apply_view(&view, Moment::now());
        self.perform(effects);
    }

    fn hear(&mut self, signal: Signal) {
        let effects = self.roster.apply_signal(signal, Moment::now());
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Probe { record, incarnation } => {
                    let id = record.id.clone();
                    let probe = Arc::clone(&self.prober).start(record, incarnation, self.view.signals());
                    self.probes.insert(id, probe);
                }
                Effect::Stop(id) => drop(self.probes.remove(&id)),
                Effect::Pace { id, soon } => {
                    if let Some(probe) = self.probes.get(&id) {
                        probe.pace(soon);
                    }
                }
            }
        }
        self.publish();
    }

    fn publish(&mut self) {
        self.remembered.note(self.roster.records());
        let snapshot = self.roster.snapshot(Instant::now());
        self.books.metrics.show_members(&snapshot);
        self.record_phases(&snapshot);
        self.view.publish(snapshot);
    }

    /// Orders to drain, losses and returns, each once.
    fn record_phases(&mut self, snapshot: &Snapshot) {
        let Some(audit) = &self.books.audit else { return };
        let members = &snapshot.report.members;
        for member in members {
            let key = (member.node.clone(), member.model.clone());
            let before = self.phases.insert(key, member.state);
            if before != Some(member.state) {
                let (from, to) = (before.map(Phase::as_str), member.state.as_str());
                let fields = json!({"node": member.node, "model": member.model, "from": from, "to": to, "why": member.last_probe_error});
                audit.record("member", &fields, None);
            }
        }
        if self.phases.len() > members.len() {
            self.phases.retain(|(node, model), _| members.iter().any(|m| m.node == *node && m.model == *model));
        }
    }
}
