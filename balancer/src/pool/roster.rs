//! All members, and what each event changes. Synchronous: the task in `discover` awaits, this applies, and tests call it.

use std::{collections::BTreeMap, sync::Arc};

use pingora::upstreams::peer::HttpPeer;
use tidegate_common::{
    contract::{Health, ModelState, NodeRecord, RECORD_VERSION, Status},
    ids::NodeId,
    registry::{Link, View},
};
use tracing::{info, warn};

use super::{Incarnation, Pool, Probed, Rules, Signal, Snapshot, Target, member};
use crate::{
    admin::{MemberReport, Members, RegistryLink},
    auth::UnixSeconds,
    pick::Rotation,
};

/// What the task must do after an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Begin to probe this member.
    Probe { record: NodeRecord, incarnation: Incarnation },
    /// Stop probing it.
    Stop(NodeId),
    /// Probe it soon, or at the usual pace again.
    Pace { id: NodeId, soon: bool },
}

struct Member {
    record: NodeRecord,
    incarnation: Incarnation,
    listed: bool,
    state: member::State,
    since: UnixSeconds,
    peer: Option<Box<HttpPeer>>,
    health: Option<Box<Health>>,
    last_error: Option<String>,
}

/// A ready set: who, and with what weight.
type Shares = Vec<(NodeId, u32)>;

/// All members.
pub(crate) struct Roster {
    rules: Rules,
    members: BTreeMap<NodeId, Member>,
    /// Rotations by model, kept while the ready set stays the same, so that a new snapshot does not begin the turn anew.
    rotations: BTreeMap<String, (Shares, Arc<Rotation>)>,
    incarnations: u64,
    link: Link,
}

impl Roster {
    pub(crate) fn new(rules: Rules) -> Self {
        Self { rules, members: BTreeMap::new(), rotations: BTreeMap::new(), incarnations: 0, link: Link::default() }
    }

    /// The registry shows this now.
    pub(crate) fn apply_view(&mut self, view: &View, now: UnixSeconds) -> Vec<Effect> {
        self.link = view.link;
        let mut effects = Vec::new();
        for record in view.nodes.values().filter(|record| record.v <= RECORD_VERSION) {
            self.list(record, now, &mut effects);
        }
        let missing: Vec<NodeId> = self.members.keys().filter(|id| !view.nodes.contains_key(*id)).cloned().collect();
        for id in missing {
            if let Some(member) = self.members.get_mut(&id) {
                member.listed = false;
            }
            self.step(&id, member::Event::Unlisted, now, &mut effects);
        }
        effects
    }

    fn list(&mut self, record: &NodeRecord, now: UnixSeconds, effects: &mut Vec<Effect>) {
        match self.members.get_mut(&record.id) {
            Some(member) if member.record.address == record.address && member.record.tls == record.tls => {
                member.listed = true;
                member.record = record.clone();
            }
            known => {
                if known.is_some() {
                    effects.push(Effect::Stop(record.id.clone()));
                }
                self.join(record.clone(), now, effects);
            }
        }
    }

    fn join(&mut self, record: NodeRecord, now: UnixSeconds, effects: &mut Vec<Effect>) {
        self.incarnations += 1;
        let incarnation = Incarnation(self.incarnations);
        info!(node = %record.id, address = %record.address, model = %record.model, "member joins");
        effects.push(Effect::Probe { record: record.clone(), incarnation });
        effects.push(Effect::Pace { id: record.id.clone(), soon: true });
        let member = Member {
            incarnation,
            listed: true,
            state: member::State::Joining { successes: 0 },
            since: now,
            peer: None,
            health: None,
            last_error: None,
            record,
        };
        self.members.insert(member.record.id.clone(), member);
    }

    /// A probe or a request says this; what it says of an earlier incarnation is old.
    pub(crate) fn apply_signal(&mut self, signal: Signal, now: UnixSeconds) -> Vec<Effect> {
        let mut effects = Vec::new();
        match signal {
            Signal::Probed { id, incarnation, outcome } if self.is_current(&id, incarnation) => {
                let event = self.note(&id, outcome);
                self.step(&id, event, now, &mut effects);
            }
            Signal::Lost { id, incarnation, counts } if self.is_current(&id, incarnation) => {
                if counts {
                    let last_ready = self.is_last_ready(&id);
                    self.step(&id, member::Event::Missed { last_ready }, now, &mut effects);
                }
                effects.push(Effect::Pace { id, soon: true });
            }
            _ => {}
        }
        effects
    }

    fn is_current(&self, id: &NodeId, incarnation: Incarnation) -> bool {
        self.members.get(id).is_some_and(|member| member.incarnation == incarnation)
    }

    fn is_last_ready(&self, id: &NodeId) -> bool {
        let Some(member) = self.members.get(id) else { return false };
        let has_another = |model: &str| self.members.iter().any(|(other, m)| other != id && m.is_ready_for(model));
        !member.models().iter().all(|(model, _)| has_another(model))
    }

    fn note(&mut self, id: &NodeId, outcome: Probed) -> member::Event {
        let Some(member) = self.members.get_mut(id) else { return member::Event::Failed };
        match outcome {
            Probed::Failed(reason) => {
                member.last_error = Some(reason);
                member::Event::Failed
            }
            Probed::Answered { health, .. } if health.node != *id => {
                member.last_error = Some(format!("node '{}' answers at this address", health.node));
                member::Event::Failed
            }
            Probed::Answered { peer, health } => {
                let event = match health.status {
                    Status::Healthy => member::Event::Healthy,
                    Status::Loading | Status::Stalled => member::Event::Unready,
                    Status::Draining => member::Event::Draining,
                };
                member.last_error = (event != member::Event::Healthy).then(|| self::reason(&health));
                member.peer = Some(peer);
                member.health = Some(health);
                event
            }
        }
    }

    fn step(&mut self, id: &NodeId, event: member::Event, now: UnixSeconds, effects: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        let before = member.state;
        member.state = before.next(event, member.listed, self.rules);
        if member.state.phase() != before.phase() {
            member.since = now;
            tell(id, member, before);
        }
        if member.state == member::State::Gone {
            self.members.remove(id);
            effects.push(Effect::Stop(id.clone()));
        } else {
            effects.push(Effect::Pace { id: id.clone(), soon: member.state.is_undecided() });
        }
    }

    /// What readers see from now on.
    pub(crate) fn snapshot(&mut self) -> Snapshot {
        let mut pools: BTreeMap<String, (Pool, Shares)> = BTreeMap::new();
        for member in self.members.values() {
            let target = member.target(false).map(Arc::new);
            for (model, state) in member.models() {
                let (pool, key) = pools.entry(model.to_owned()).or_default();
                pool.members += 1;
                if let Some(target) = target.as_ref().filter(|_| state.takes_requests()) {
                    let must_load = state != ModelState::Ready;
                    let loading = member.target(must_load).filter(|_| must_load).map(Arc::new);
                    pool.ready.push(loading.unwrap_or_else(|| Arc::clone(target)));
                    key.push((member.record.id.clone(), member.record.weight));
                }
            }
        }
        self.rotations.retain(|model, _| pools.contains_key(model));
        let models = pools
            .into_iter()
            .map(|(model, (mut pool, key))| {
                pool.rotation = self.rotation(&model, key);
                (model, pool)
            })
            .collect();
        Snapshot { models, default_model: self.default_model(), report: self.report() }
    }

    /// The model of requests that name none: what all members say of themselves, if they agree.
    fn default_model(&self) -> Option<String> {
        let mut defaults = self.members.values().map(|member| &member.record.model);
        let first = defaults.next()?;
        defaults.all(|model| model == first).then(|| first.clone())
    }

    fn rotation(&mut self, model: &str, key: Shares) -> Arc<Rotation> {
        match self.rotations.get(model) {
            Some((known, rotation)) if *known == key => Arc::clone(rotation),
            _ => {
                let weights: Vec<u32> = key.iter().map(|(_, weight)| *weight).collect();
                let rotation = Arc::new(Rotation::new(&weights));
                self.rotations.insert(model.to_owned(), (key, Arc::clone(&rotation)));
                rotation
            }
        }
    }

    fn report(&self) -> Members {
        let registry = match self.link {
            Link::Connecting => RegistryLink::Connecting,
            Link::Live => RegistryLink::Live,
            Link::Lost => RegistryLink::Lost,
        };
        Members { registry, members: self.members.values().map(Member::report).collect() }
    }
}

impl Member {
    /// The models that it serves, and where each stands. What the node says of itself is newer than its record, and a
    /// node of an earlier release says nothing of models.
    fn models(&self) -> Vec<(&str, ModelState)> {
        match self.health.as_deref().and_then(|health| health.models.as_ref()) {
            Some(models) => models.iter().map(|m| (m.name.as_str(), m.state)).collect(),
            None => self.record.models().iter().map(|model| (model.as_str(), ModelState::Ready)).collect(),
        }
    }

    fn is_ready_for(&self, model: &str) -> bool {
        self.state.is_ready() && self.models().iter().any(|(name, state)| *name == model && state.takes_requests())
    }

    fn target(&self, must_load: bool) -> Option<Target> {
        let peer = self.peer.as_deref().filter(|_| self.state.is_ready())?;
        Some(Target {
            id: self.record.id.clone(),
            incarnation: self.incarnation,
            authority: self.record.address.clone(),
            peer: peer.clone(),
            must_load,
        })
    }

    fn report(&self) -> MemberReport {
        let health = self.health.as_deref();
        MemberReport {
            node: self.record.id.clone(),
            address: self.record.address.clone(),
            model: self.record.model.clone(),
            version: self.record.version.clone(),
            color: self.record.color.clone(),
            site: self.record.site.clone(),
            weight: self.record.weight,
            state: self.state.phase(),
            since: self.since.0,
            listed: self.listed,
            device: health.map(|h| h.device.clone()),
            running: health.map(|h| h.running),
            waiting: health.map(|h| h.waiting),
            kv_blocks_free: health.map(|h| h.kv_blocks_free),
            kv_blocks_total: health.map(|h| h.kv_blocks_total),
            step: health.map(|h| h.step),
            models: health.and_then(|h| h.models.clone()).unwrap_or_default(),
            last_probe_error: self.last_error.clone(),
        }
    }
}

fn reason(health: &Health) -> String {
    match &health.reason {
        Some(reason) => format!("{}: {reason}", health.status.as_str()),
        None => health.status.as_str().to_owned(),
    }
}

fn tell(id: &NodeId, member: &Member, before: member::State) {
    let (from, to) = (before.phase().as_str(), member.state.phase().as_str());
    if member.state.is_ready() {
        info!(node = %id, from, to, "member changes state");
    } else {
        let error = member.last_error.as_deref().unwrap_or("");
        warn!(node = %id, from, to, listed = member.listed, error, "member changes state");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixSeconds = UnixSeconds(100);

    fn record(id: &str, address: &str) -> NodeRecord {
        NodeRecord::new(id.parse().unwrap(), address.into(), "m".into())
    }

    fn view(records: &[NodeRecord]) -> View {
        View { nodes: records.iter().map(|r| (r.id.clone(), r.clone())).collect(), link: Link::Live }
    }

    fn roster() -> Roster {
        Roster::new(Rules { up: 2, down: 3 })
    }

    fn answered(record: &NodeRecord, incarnation: u64, status: &str) -> Signal {
        let health = serde_json::json!({"status": status, "uptime": 1, "node": record.id, "model": "m", "version": "", "color": "blue",
            "site": "local", "build": "", "device": "", "context": 1, "running": 3, "waiting": 0, "kv_blocks_free": 1,
            "kv_blocks_total": 1, "step": 1});
        let outcome = Probed::Answered {
            peer: Box::new(HttpPeer::new(record.address.as_str(), false, String::new())),
            health: Box::new(serde_json::from_value(health).unwrap()),
        };
        Signal::Probed { id: record.id.clone(), incarnation: Incarnation(incarnation), outcome }
    }

    /// Healthy, with these models: name and state.
    fn answered_with(record: &NodeRecord, incarnation: u64, models: &[(&str, &str)]) -> Signal {
        let Signal::Probed { id, incarnation, outcome: Probed::Answered { peer, mut health } } =
            answered(record, incarnation, "healthy")
        else {
            unreachable!()
        };
        let model = |(name, state): &(&str, &str)| serde_json::json!({"name": name, "state": state, "running": 0, "waiting": 0, "kv_blocks_free": 0, "kv_blocks_total": 0});
        let models: Vec<serde_json::Value> = models.iter().map(model).collect();
        health.models = Some(serde_json::from_value(models.into()).unwrap());
        Signal::Probed { id, incarnation, outcome: Probed::Answered { peer, health } }
    }

    fn ready_for(roster: &mut Roster, model: &str) -> Option<Vec<String>> {
        let snapshot = roster.snapshot();
        snapshot.models.get(model).map(|pool| pool.ready.iter().map(|t| t.id.to_string()).collect())
    }

    fn failed(record: &NodeRecord, incarnation: u64) -> Signal {
        let outcome = Probed::Failed("refused".into());
        Signal::Probed { id: record.id.clone(), incarnation: Incarnation(incarnation), outcome }
    }

    fn ready(roster: &mut Roster) -> Vec<String> {
        let snapshot = roster.snapshot();
        snapshot.models.get("m").map(|p| p.ready.iter().map(|t| t.id.to_string()).collect()).unwrap_or_default()
    }

    #[test]
    fn a_registry_that_forgets_everyone_changes_nothing_while_probes_pass() {
        let (mut roster, a) = (roster(), record("a", "127.0.0.1:1"));
        let effects = roster.apply_view(&view(std::slice::from_ref(&a)), NOW);
        assert!(matches!(effects[0], Effect::Probe { incarnation: Incarnation(1), .. }));
        roster.apply_signal(answered(&a, 1, "healthy"), NOW);
        assert!(ready(&mut roster).is_empty());
        roster.apply_signal(answered(&a, 1, "healthy"), NOW);
        assert_eq!(ready(&mut roster), ["a"]);
        roster.apply_view(&view(&[]), NOW);
        roster.apply_signal(answered(&a, 1, "healthy"), NOW);
        assert_eq!(ready(&mut roster), ["a"]);
        for _ in 0..3 {
            roster.apply_signal(failed(&a, 1), NOW);
        }
        assert!(roster.snapshot().models.is_empty());
    }

    #[test]
    fn another_address_is_another_member_and_old_news_of_the_first_is_ignored() {
        let (mut roster, old, new) = (roster(), record("a", "127.0.0.1:1"), record("a", "127.0.0.1:2"));
        roster.apply_view(&view(std::slice::from_ref(&old)), NOW);
        let effects = roster.apply_view(&view(std::slice::from_ref(&new)), NOW);
        assert_eq!(effects[0], Effect::Stop(old.id.clone()));
        for _ in 0..2 {
            roster.apply_signal(answered(&old, 1, "healthy"), NOW);
        }
        assert!(ready(&mut roster).is_empty());
        for _ in 0..2 {
            roster.apply_signal(answered(&new, 2, "healthy"), NOW);
        }
        assert_eq!(roster.snapshot().models["m"].ready[0].authority, "127.0.0.1:2");
    }

    #[test]
    fn a_stranger_at_the_address_is_a_failed_probe() {
        let (mut roster, a) = (roster(), record("a", "127.0.0.1:1"));
        roster.apply_view(&view(std::slice::from_ref(&a)), NOW);
        let Signal::Probed { outcome, .. } = answered(&record("b", "127.0.0.1:1"), 1, "healthy") else {
            unreachable!()
        };
        for _ in 0..5 {
            let outcome = outcome.clone();
            roster.apply_signal(Signal::Probed { id: a.id.clone(), incarnation: Incarnation(1), outcome }, NOW);
        }
        assert!(ready(&mut roster).is_empty());
        assert!(roster.snapshot().report.members[0].last_probe_error.as_deref().unwrap().contains("'b'"));
    }

    #[test]
    fn each_model_of_a_node_has_a_pool_and_a_failed_one_takes_no_requests() {
        let (mut roster, mut a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        a.models = vec!["m".into(), "small".into()];
        roster.apply_view(&view(&[a.clone(), b.clone()]), NOW);
        assert_eq!(ready_for(&mut roster, "small"), Some(vec![]), "known from the record before any probe");
        let both = [("m", "ready"), ("small", "unloaded")];
        for _ in 0..2 {
            roster.apply_signal(answered_with(&a, 1, &both), NOW);
            roster.apply_signal(answered(&b, 2, "healthy"), NOW);
        }
        assert_eq!(ready_for(&mut roster, "small").unwrap(), ["a"]);
        assert_eq!(ready(&mut roster), ["a", "b"]);
        assert_eq!(roster.snapshot().default_model.as_deref(), Some("m"));
        for state in ["failed", "stalled", "unloading"] {
            roster.apply_signal(answered_with(&a, 1, &[("m", "ready"), ("small", state)]), NOW);
            assert_eq!(ready_for(&mut roster, "small"), Some(vec![]), "{state}");
            assert_eq!(ready(&mut roster), ["a", "b"], "{state}");
        }
        roster.apply_signal(answered_with(&a, 1, &both), NOW);
        assert_eq!(ready_for(&mut roster, "small").unwrap(), ["a"]);
        roster.apply_signal(answered_with(&a, 1, &[("other", "ready")]), NOW);
        assert_eq!((ready_for(&mut roster, "small"), ready(&mut roster)), (None, vec!["b".to_owned()]));
    }

    #[test]
    fn a_node_is_kept_that_is_the_last_for_one_of_its_models() {
        let (mut roster, a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        roster.apply_view(&view(&[a.clone(), b.clone()]), NOW);
        for _ in 0..2 {
            roster.apply_signal(answered_with(&a, 1, &[("m", "ready"), ("only here", "ready")]), NOW);
            roster.apply_signal(answered_with(&b, 2, &[("m", "ready")]), NOW);
        }
        let lost = |r: &NodeRecord, n| Signal::Lost { id: r.id.clone(), incarnation: Incarnation(n), counts: true };
        for _ in 0..9 {
            roster.apply_signal(lost(&a, 1), NOW);
            roster.apply_signal(lost(&b, 2), NOW);
        }
        assert_eq!(ready(&mut roster), ["a"]);
    }

    #[test]
    fn lost_requests_eject_a_member_but_not_the_last_one() {
        let (mut roster, a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        roster.apply_view(&view(&[a.clone(), b.clone()]), NOW);
        for _ in 0..2 {
            roster.apply_signal(answered(&a, 1, "healthy"), NOW);
            roster.apply_signal(answered(&b, 2, "healthy"), NOW);
        }
        let lost = |r: &NodeRecord, n| Signal::Lost { id: r.id.clone(), incarnation: Incarnation(n), counts: true };
        for _ in 0..9 {
            roster.apply_signal(lost(&a, 1), NOW);
            roster.apply_signal(lost(&b, 2), NOW);
        }
        assert_eq!(ready(&mut roster), ["b"]);
    }

    #[test]
    fn the_turn_goes_on_across_snapshots() {
        let (mut roster, a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        roster.apply_view(&view(&[a.clone(), b.clone()]), NOW);
        for _ in 0..2 {
            roster.apply_signal(answered(&a, 1, "healthy"), NOW);
            roster.apply_signal(answered(&b, 2, "healthy"), NOW);
        }
        let mut picked = Vec::new();
        for _ in 0..4 {
            picked.push(roster.snapshot().models["m"].pick(&[]).unwrap().id.to_string());
            roster.apply_signal(answered(&a, 1, "healthy"), NOW);
        }
        assert_eq!(picked, ["a", "b", "a", "b"]);
    }
}
