//! All members, and what each event changes. Synchronous: the task in `discover` awaits, this applies, and tests call it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use pingora::upstreams::peer::HttpPeer;
use tidegate_common::{
    contract::{Health, ModelState, NodeRecord, RECORD_VERSION, Status},
    ids::{Fingerprint, NodeId},
    registry::{Link, View},
};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Incarnation, Pool, Probed, RAMP_STEPS, Ring, Rules, Signal, Snapshot, Target, member};
use crate::{
    admin::{MemberReport, Members, RegistryLink},
    auth::UnixSeconds,
    pick::Rotation,
    upstreams::{Foreign, Upstreams},
};

/// A moment by both clocks: one for people, one that never jumps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) wall: UnixSeconds,
    pub(crate) at: Instant,
}

impl Moment {
    pub(crate) fn now() -> Self {
        Self { wall: UnixSeconds::now(), at: Instant::now() }
    }
}

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
    /// What is known of it beyond the record when it is none of ours.
    foreign: Option<Arc<Foreign>>,
    incarnation: Incarnation,
    listed: bool,
    state: member::State,
    since: Moment,
    /// Whether it became ready beside others that were warm, so that its share must grow.
    starts_slowly: bool,
    peer: Option<Box<HttpPeer>>,
    health: Option<Box<Health>>,
    last_error: Option<String>,
}

/// A set of members: who, and with what weight.
type Shares = Vec<(NodeId, u32)>;

/// A pool on its way into a snapshot.
#[derive(Default)]
struct Draft {
    ready: Vec<(Arc<Target>, u32)>,
    failed: Vec<(Arc<Target>, u32)>,
    members: usize,
    nodes: usize,
}

/// All members.
pub(crate) struct Roster {
    rules: Rules,
    upstreams: Arc<Upstreams>,
    members: BTreeMap<NodeId, Member>,
    /// Rotations by model, of the ready and of the failed, kept while the set stays the same, so that a new snapshot does not begin the
    /// turn anew.
    rotations: BTreeMap<(String, bool), (Shares, Arc<Rotation>)>,
    /// Models with too few members ready.
    panicking: BTreeSet<String>,
    /// Fingerprints of models whose nodes do not answer alike, as far as that has been warned of.
    unlike: BTreeMap<String, BTreeSet<Fingerprint>>,
    incarnations: u64,
    link: Link,
}

impl Roster {
    pub(crate) fn new(rules: Rules, upstreams: Arc<Upstreams>) -> Self {
        Self {
            rules,
            upstreams,
            members: BTreeMap::new(),
            rotations: BTreeMap::new(),
            panicking: BTreeSet::new(),
            unlike: BTreeMap::new(),
            incarnations: 0,
            link: Link::default(),
        }
    }

    /// The registry shows this now.
    pub(crate) fn apply_view(&mut self, view: &View, now: Moment) -> Vec<Effect> {
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

    fn list(&mut self, record: &NodeRecord, now: Moment, effects: &mut Vec<Effect>) {
        match self.members.get_mut(&record.id) {
            Some(member) if member.record.address == record.address && member.record.tls == record.tls => {
                member.listed = true;
                member.record = record.clone();
                member.foreign = self.upstreams.get(&record.id).cloned();
            }
            known => {
                if known.is_some() {
                    effects.push(Effect::Stop(record.id.clone()));
                }
                self.join(record.clone(), now, effects);
            }
        }
    }

    fn join(&mut self, record: NodeRecord, now: Moment, effects: &mut Vec<Effect>) {
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
            starts_slowly: false,
            peer: None,
            health: None,
            last_error: None,
            foreign: self.upstreams.get(&record.id).cloned(),
            record,
        };
        self.members.insert(member.record.id.clone(), member);
    }

    /// The records of all nodes.
    pub(crate) fn records(&self) -> impl Iterator<Item = &NodeRecord> + Clone {
        self.members.values().filter(|member| member.foreign.is_none()).map(|member| &member.record)
    }

    /// A probe or a request says this; what it says of an earlier incarnation is old.
    pub(crate) fn apply_signal(&mut self, signal: Signal, now: Moment) -> Vec<Effect> {
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
            Signal::Reloaded { rules, upstreams } => {
                (self.rules, self.upstreams) = (rules, upstreams);
                self.drop_upstreams(&mut effects);
            }
            _ => {}
        }
        effects
    }

    /// Upstreams that are configured no more leave at once, however well they are. Those that are follow with the next view.
    fn drop_upstreams(&mut self, effects: &mut Vec<Effect>) {
        let upstreams = &self.upstreams;
        let is_left = |id: &NodeId, member: &mut Member| member.foreign.is_some() && upstreams.get(id).is_none();
        effects.extend(self.members.extract_if(.., is_left).map(|(id, _)| Effect::Stop(id)));
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
            Probed::Reached { peer } => {
                member.last_error = None;
                member.peer = Some(peer);
                member::Event::Healthy
            }
            Probed::Answered { health, .. } if health.node != *id => {
                member.last_error = Some(format!("node '{}' answers at this address", health.node));
                member.peer = None;
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

    fn step(&mut self, id: &NodeId, event: member::Event, now: Moment, effects: &mut Vec<Effect>) {
        let joins_warm_ones = self.has_warm_peer(id, now.at);
        let Some(member) = self.members.get_mut(id) else { return };
        let before = member.state;
        member.state = before.next(event, member.listed, self.rules);
        if member.state.phase() != before.phase() {
            member.since = now;
            member.starts_slowly = joins_warm_ones;
            tell(id, member, before);
        }
        if member.state == member::State::Gone {
            self.members.remove(id);
            effects.push(Effect::Stop(id.clone()));
        } else {
            effects.push(Effect::Pace { id: id.clone(), soon: member.state.is_undecided() });
        }
    }

    /// Whether another member that shares a model with it has been ready for long.
    fn has_warm_peer(&self, id: &NodeId, now: Instant) -> bool {
        let Some(member) = self.members.get(id) else { return false };
        let shares_a_model = |other: &Member| member.models().iter().any(|(model, _)| other.is_ready_for(model));
        let is_warm = |other: &Member| self.rules.is_warm(now - other.since.at);
        self.members.values().any(|other| other.record.id != *id && shares_a_model(other) && is_warm(other))
    }

    /// When shares change though nothing happens; `None` while nobody starts slowly.
    pub(crate) fn ramp_step(&self, now: Instant) -> Option<Duration> {
        let ramps = self.members.values().any(|member| member.share(self.rules, now) < RAMP_STEPS);
        ramps.then(|| self.rules.slow_start / RAMP_STEPS)
    }

    /// What readers see from now on.
    pub(crate) fn snapshot(&mut self, now: Instant) -> Snapshot {
        let models: BTreeMap<String, Pool> =
            self.drafts(now).into_iter().map(|(model, draft)| (model.clone(), self.pool(model, draft))).collect();
        self.rotations.retain(|(model, _), _| models.contains_key(model));
        self.note_panics(&models);
        self.note_unlike(&models);
        Snapshot { models, default_model: self.default_model(), report: self.report() }
    }

    fn drafts(&self, now: Instant) -> BTreeMap<String, Draft> {
        let mut drafts: BTreeMap<String, Draft> = BTreeMap::new();
        for member in self.members.values() {
            let weight = member.record.weight * member.share(self.rules, now);
            for (model, state) in member.models() {
                let draft = drafts.entry(model.to_owned()).or_default();
                draft.members += 1;
                draft.nodes += usize::from(member.foreign.is_none());
                if let Some(target) = member.target(model).filter(|_| state.takes_requests()) {
                    let set = if target.is_suspect { &mut draft.failed } else { &mut draft.ready };
                    set.push((Arc::new(target), weight));
                }
            }
        }
        drafts
    }

    fn pool(&mut self, model: String, draft: Draft) -> Pool {
        let panics = self.rules.panics(draft.ready.len(), draft.failed.len());
        let failed = if panics { draft.failed } else { Vec::new() };
        let (members, nodes) = (draft.members, draft.nodes);
        Pool {
            ready: self.ring((model.clone(), true), draft.ready),
            suspects: self.ring((model, false), failed),
            members,
            nodes,
        }
    }

    fn ring(&mut self, key: (String, bool), set: Vec<(Arc<Target>, u32)>) -> Ring {
        let shares: Shares = set.iter().map(|(target, weight)| (target.id.clone(), *weight)).collect();
        let (known, rotation) = self.rotations.entry(key).or_default();
        if *known != shares {
            let weights: Vec<u32> = shares.iter().map(|(_, weight)| *weight).collect();
            *rotation = Arc::new(rotation.followed_by(&weights));
            *known = shares;
        }
        Ring { targets: set.into_iter().map(|(target, _)| target).collect(), rotation: Arc::clone(rotation) }
    }

    fn note_panics(&mut self, models: &BTreeMap<String, Pool>) {
        for (model, pool) in models {
            let (ready, suspects) = (pool.ready.len(), pool.suspects.len());
            if pool.is_panicking() && self.panicking.insert(model.clone()) {
                warn!(model, ready, suspects, "too few members are ready, failed ones are asked too");
            }
        }
        let has_left = |model: &String| !models.get(model).is_some_and(Pool::is_panicking);
        self.panicking.extract_if(.., has_left).for_each(|model| {
            warn!(model, "failed members are left alone again");
        });
    }

    /// Warns once of each set of nodes that share a model and would not answer alike.
    fn note_unlike(&mut self, models: &BTreeMap<String, Pool>) {
        self.unlike.retain(|model, _| models.contains_key(model));
        for (model, pool) in models {
            let fingerprints = pool.ready.fingerprints();
            let is_known = self.unlike.get(model).is_some_and(|known| known.is_superset(&fingerprints));
            if fingerprints.len() > 1 && !is_known {
                let said = |target: &Arc<Target>| Some(format!("{} {}", target.id, target.fingerprint?));
                let nodes = pool.ready.targets.iter().filter_map(said).collect::<Vec<_>>().join(", ");
                warn!(
                    model,
                    nodes,
                    "nodes would not answer alike, so a stream of one cannot go on at another: their models or configurations differ"
                );
                self.unlike.insert(model.clone(), fingerprints);
            }
        }
    }

    /// The model of requests that name none: what all nodes say of themselves, if they agree.
    fn default_model(&self) -> Option<String> {
        let mut defaults = self.records().map(|record| &record.model);
        let first = defaults.next()?;
        defaults.all(|model| model == first).then(|| first.clone())
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

    /// Whether nothing is known of it but that probes or requests have failed: by its own last words it takes requests.
    fn has_failed(&self) -> bool {
        let is_ejected = matches!(self.state, member::State::Ejected { .. });
        let said_yes = self.health.as_ref().is_some_and(|health| health.status == Status::Healthy);
        is_ejected && (said_yes || self.foreign.is_some())
    }

    /// The part of its weight that it gets now, in [`RAMP_STEPS`]ths.
    fn share(&self, rules: Rules, now: Instant) -> u32 {
        let ramps = self.starts_slowly && self.state.is_ready();
        if ramps { rules.ramp(now - self.since.at) } else { RAMP_STEPS }
    }

    fn fingerprint(&self, model: &str) -> Option<Fingerprint> {
        let models = self.health.as_deref()?.models.as_ref()?;
        models.iter().find(|known| known.name == model)?.fingerprint
    }

    /// As who it is asked for a model, while it may be asked.
    fn target(&self, model: &str) -> Option<Target> {
        let peer = self.peer.as_deref().filter(|_| self.state.is_ready() || self.has_failed())?;
        Some(Target {
            id: self.record.id.clone(),
            incarnation: self.incarnation,
            authority: self.record.address.clone(),
            peer: peer.clone(),
            site: self.record.site.clone(),
            foreign: self.foreign.clone(),
            fingerprint: self.fingerprint(model),
            is_suspect: !self.state.is_ready(),
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
            since: self.since.wall.0,
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

    const SLOW_START: Duration = Duration::from_secs(10);

    fn now() -> Moment {
        Moment { wall: UnixSeconds(100), at: Instant::now() }
    }

    fn record(id: &str, address: &str) -> NodeRecord {
        NodeRecord::new(id.parse().unwrap(), address.into(), "m".into())
    }

    fn view(records: &[NodeRecord]) -> View {
        View { nodes: records.iter().map(|r| (r.id.clone(), r.clone())).collect(), link: Link::Live }
    }

    fn roster() -> Roster {
        Roster::new(Rules { up: 2, down: 3, slow_start: SLOW_START, panic_percent: 50 }, Arc::default())
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

    /// The same, with one model that stands and has this fingerprint.
    fn answered_as(record: &NodeRecord, incarnation: u64, hash: u64) -> Signal {
        let mut signal = answered_with(record, incarnation, &[("m", "ready")]);
        if let Signal::Probed { outcome: Probed::Answered { health, .. }, .. } = &mut signal {
            health.models.as_mut().unwrap()[0].fingerprint = Some(Fingerprint::new(hash));
        }
        signal
    }

    fn ready_for(roster: &mut Roster, model: &str) -> Option<Vec<String>> {
        let snapshot = roster.snapshot(Instant::now());
        snapshot.models.get(model).map(|pool| pool.ready.targets.iter().map(|t| t.id.to_string()).collect())
    }

    fn failed(record: &NodeRecord, incarnation: u64) -> Signal {
        let outcome = Probed::Failed("refused".into());
        Signal::Probed { id: record.id.clone(), incarnation: Incarnation(incarnation), outcome }
    }

    fn ready(roster: &mut Roster) -> Vec<String> {
        let snapshot = roster.snapshot(Instant::now());
        snapshot.models.get("m").map(|p| p.ready.targets.iter().map(|t| t.id.to_string()).collect()).unwrap_or_default()
    }

    #[test]
    fn a_registry_that_forgets_everyone_changes_nothing_while_probes_pass() {
        let (mut roster, a) = (roster(), record("a", "127.0.0.1:1"));
        let effects = roster.apply_view(&view(std::slice::from_ref(&a)), now());
        assert!(matches!(effects[0], Effect::Probe { incarnation: Incarnation(1), .. }));
        roster.apply_signal(answered(&a, 1, "healthy"), now());
        assert!(ready(&mut roster).is_empty());
        roster.apply_signal(answered(&a, 1, "healthy"), now());
        assert_eq!(ready(&mut roster), ["a"]);
        roster.apply_view(&view(&[]), now());
        roster.apply_signal(answered(&a, 1, "healthy"), now());
        assert_eq!(ready(&mut roster), ["a"]);
        for _ in 0..3 {
            roster.apply_signal(failed(&a, 1), now());
        }
        assert!(roster.snapshot(Instant::now()).models.is_empty());
    }

    #[test]
    fn another_address_is_another_member_and_old_news_of_the_first_is_ignored() {
        let (mut roster, old, new) = (roster(), record("a", "127.0.0.1:1"), record("a", "127.0.0.1:2"));
        roster.apply_view(&view(std::slice::from_ref(&old)), now());
        let effects = roster.apply_view(&view(std::slice::from_ref(&new)), now());
        assert_eq!(effects[0], Effect::Stop(old.id.clone()));
        for _ in 0..2 {
            roster.apply_signal(answered(&old, 1, "healthy"), now());
        }
        assert!(ready(&mut roster).is_empty());
        for _ in 0..2 {
            roster.apply_signal(answered(&new, 2, "healthy"), now());
        }
        assert_eq!(roster.snapshot(Instant::now()).models["m"].ready.targets[0].authority, "127.0.0.1:2");
    }

    #[test]
    fn a_stranger_at_the_address_is_a_failed_probe() {
        let (mut roster, a) = (roster(), record("a", "127.0.0.1:1"));
        roster.apply_view(&view(std::slice::from_ref(&a)), now());
        let Signal::Probed { outcome, .. } = answered(&record("b", "127.0.0.1:1"), 1, "healthy") else {
            unreachable!()
        };
        for _ in 0..5 {
            let outcome = outcome.clone();
            roster.apply_signal(Signal::Probed { id: a.id.clone(), incarnation: Incarnation(1), outcome }, now());
        }
        assert!(ready(&mut roster).is_empty());
        assert!(roster.snapshot(Instant::now()).report.members[0].last_probe_error.as_deref().unwrap().contains("'b'"));
    }

    #[test]
    fn each_model_of_a_node_has_a_pool_and_a_failed_one_takes_no_requests() {
        let (mut roster, mut a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        a.models = vec!["m".into(), "small".into()];
        roster.apply_view(&view(&[a.clone(), b.clone()]), now());
        assert_eq!(ready_for(&mut roster, "small"), Some(vec![]), "known from the record before any probe");
        let both = [("m", "ready"), ("small", "unloaded")];
        for _ in 0..2 {
            roster.apply_signal(answered_with(&a, 1, &both), now());
            roster.apply_signal(answered(&b, 2, "healthy"), now());
        }
        assert_eq!(ready_for(&mut roster, "small").unwrap(), ["a"]);
        assert_eq!(ready(&mut roster), ["a", "b"]);
        assert_eq!(roster.snapshot(Instant::now()).default_model.as_deref(), Some("m"));
        for state in ["failed", "stalled", "unloading"] {
            roster.apply_signal(answered_with(&a, 1, &[("m", "ready"), ("small", state)]), now());
            assert_eq!(ready_for(&mut roster, "small"), Some(vec![]), "{state}");
            assert_eq!(ready(&mut roster), ["a", "b"], "{state}");
        }
        roster.apply_signal(answered_with(&a, 1, &both), now());
        assert_eq!(ready_for(&mut roster, "small").unwrap(), ["a"]);
        roster.apply_signal(answered_with(&a, 1, &[("other", "ready")]), now());
        assert_eq!((ready_for(&mut roster, "small"), ready(&mut roster)), (None, vec!["b".to_owned()]));
    }

    #[test]
    fn nodes_that_do_not_answer_alike_are_told_apart_and_warned_of_once() {
        let (mut roster, a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        roster.apply_view(&view(&[a.clone(), b.clone()]), now());
        let say = |roster: &mut Roster, hashes: [u64; 2]| {
            for (i, record) in [&a, &b].into_iter().enumerate().cycle().take(4) {
                roster.apply_signal(answered_as(record, i as u64 + 1, hashes[i]), now());
            }
            roster.snapshot(Instant::now())
        };
        assert!(
            say(&mut roster, [7, 7]).models["m"]
                .ready
                .targets
                .iter()
                .all(|t| t.fingerprint == Some(Fingerprint::new(7)))
        );
        assert_eq!(roster.unlike.len(), 0);
        let snapshot = say(&mut roster, [7, 8]);
        let begun_by = Some(Fingerprint::new(7));
        let could: Vec<bool> = snapshot.models["m"].ready.targets.iter().map(|t| t.may_go_on(begun_by)).collect();
        assert_eq!(could, [true, false]);
        let warned = roster.unlike["m"].clone();
        say(&mut roster, [7, 7]);
        say(&mut roster, [8, 7]);
        assert_eq!((roster.unlike["m"].clone(), warned.len()), (warned, 2), "what was warned of is not again");
        say(&mut roster, [9, 7]);
        assert!(roster.unlike["m"].contains(&Fingerprint::new(9)));
    }

    #[test]
    fn a_node_is_kept_that_is_the_last_for_one_of_its_models() {
        let (mut roster, a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        roster.apply_view(&view(&[a.clone(), b.clone()]), now());
        for _ in 0..2 {
            roster.apply_signal(answered_with(&a, 1, &[("m", "ready"), ("only here", "ready")]), now());
            roster.apply_signal(answered_with(&b, 2, &[("m", "ready")]), now());
        }
        let lost = |r: &NodeRecord, n| Signal::Lost { id: r.id.clone(), incarnation: Incarnation(n), counts: true };
        for _ in 0..9 {
            roster.apply_signal(lost(&a, 1), now());
            roster.apply_signal(lost(&b, 2), now());
        }
        assert_eq!(ready(&mut roster), ["a"]);
    }

    #[test]
    fn lost_requests_eject_a_member_but_not_the_last_one() {
        let (mut roster, a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        roster.apply_view(&view(&[a.clone(), b.clone()]), now());
        for _ in 0..2 {
            roster.apply_signal(answered(&a, 1, "healthy"), now());
            roster.apply_signal(answered(&b, 2, "healthy"), now());
        }
        let lost = |r: &NodeRecord, n| Signal::Lost { id: r.id.clone(), incarnation: Incarnation(n), counts: true };
        for _ in 0..9 {
            roster.apply_signal(lost(&a, 1), now());
            roster.apply_signal(lost(&b, 2), now());
        }
        assert_eq!(ready(&mut roster), ["b"]);
    }

    #[test]
    fn the_turn_goes_on_across_snapshots() {
        let (mut roster, a, b) = (roster(), record("a", "127.0.0.1:1"), record("b", "127.0.0.1:2"));
        roster.apply_view(&view(&[a.clone(), b.clone()]), now());
        for _ in 0..2 {
            roster.apply_signal(answered(&a, 1, "healthy"), now());
            roster.apply_signal(answered(&b, 2, "healthy"), now());
        }
        let mut picked = Vec::new();
        for _ in 0..4 {
            picked.push(roster.snapshot(Instant::now()).models["m"].ready.pick(|_| true).unwrap().id.to_string());
            roster.apply_signal(answered(&a, 1, "healthy"), now());
        }
        assert_eq!(picked, ["a", "b", "a", "b"]);
    }

    fn shares(roster: &mut Roster, at: Instant) -> BTreeMap<String, usize> {
        let snapshot = roster.snapshot(at);
        let mut shares = BTreeMap::new();
        for _ in 0..210 {
            *shares.entry(snapshot.models["m"].ready.pick(|_| true).unwrap().id.to_string()).or_default() += 1;
        }
        shares
    }

    #[test]
    fn the_nodes_of_a_fresh_cluster_share_evenly_at_once_and_one_that_comes_later_grows() {
        let (mut roster, began) = (roster(), now());
        let after = |s: u64| Moment { at: began.at + Duration::from_secs(s), ..began };
        let [a, b, c] = ["a", "b", "c"].map(|id| record(id, &format!("127.0.0.1:{}", id.as_bytes()[0])));
        roster.apply_view(&view(&[a.clone(), b.clone(), c.clone()]), began);
        for (i, record) in [&a, &b].into_iter().enumerate() {
            for _ in 0..2 {
                roster.apply_signal(answered(record, i as u64 + 1, "healthy"), after(2 * i as u64));
            }
        }
        assert_eq!(shares(&mut roster, after(2).at).into_values().collect::<Vec<_>>(), [105, 105]);
        assert_eq!(roster.ramp_step(after(2).at), None);
        for _ in 0..2 {
            roster.apply_signal(answered(&c, 3, "healthy"), after(20));
        }
        let mut of_c = Vec::new();
        for s in 20..=30 {
            assert_eq!(roster.ramp_step(after(s).at), (s < 29).then_some(Duration::from_secs(1)));
            of_c.push(shares(&mut roster, after(s).at)["c"]);
        }
        assert!(of_c.is_sorted(), "{of_c:?}");
        assert_eq!((of_c[0], of_c[10]), (10, 70), "{of_c:?}");
    }

    #[test]
    fn while_too_few_are_ready_failed_ones_are_asked_but_none_that_says_no_and_no_stranger() {
        let mut roster = roster();
        let records = [1, 2, 3, 4, 5].map(|i| record(&format!("n{i}"), &format!("127.0.0.1:{i}")));
        roster.apply_view(&view(&records), now());
        let numbered = || (1u64..).zip(&records);
        for (i, record) in numbered().chain(numbered()) {
            roster.apply_signal(answered(record, i, "healthy"), now());
        }
        let suspects = |roster: &mut Roster| -> Vec<String> {
            let snapshot = roster.snapshot(Instant::now());
            snapshot.models["m"].suspects.targets.iter().map(|t| t.id.to_string()).collect()
        };
        roster.apply_signal(answered(&records[0], 1, "draining"), now());
        roster.apply_signal(answered(&records[1], 2, "stalled"), now());
        let fail = |roster: &mut Roster, i: usize| {
            for _ in 0..3 {
                roster.apply_signal(failed(&records[i], i as u64 + 1), now());
            }
        };
        fail(&mut roster, 1);
        fail(&mut roster, 2);
        assert_eq!(
            (ready(&mut roster).len(), suspects(&mut roster).len()),
            (2, 0),
            "two of three that could are enough"
        );
        fail(&mut roster, 3);
        assert_eq!(
            (ready(&mut roster), suspects(&mut roster)),
            (vec!["n5".to_owned()], vec!["n3".into(), "n4".into()])
        );
        let Signal::Probed { outcome, .. } = answered(&records[0], 4, "healthy") else { unreachable!() };
        let stranger = Signal::Probed { id: records[3].id.clone(), incarnation: Incarnation(4), outcome };
        roster.apply_signal(stranger, now());
        assert!(suspects(&mut roster).is_empty(), "one of two that could is enough again");
        fail(&mut roster, 4);
        assert_eq!((ready(&mut roster).len(), suspects(&mut roster)), (0, vec!["n3".to_owned(), "n5".into()]));
    }
}
