//! Which models stand, which may go, and who has to wait: the states and their transitions, with time passed in.
//!
//! `unloaded → loading → ready → unloading → unloaded`, and `loading → failed → loading` after a pause. Pure: the shell in this
//! module's parent loads, waits and frees. `T` is what stands once a model is loaded; whoever works with it holds an [`Arc`] of it, and
//! a model that somebody holds is never unloaded for want of room.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::ServeError;
use crate::config::{MODELS_MAX, ModelConfig};

/// Pause after a load that failed; doubled with each further one.
const PAUSE: Duration = Duration::from_secs(5);

/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// Pause after a load that found no room: running answers may end at any time.
const ROOM_PAUSE: Duration = Duration::from_secs(1);

/// Where a model stands.
#[derive(Debug)]
pub(super) enum State<T> {
    /// Not in memory.
    Unloaded,
    /// On its way in; `bytes` are set aside for it, 0 until they are known.
    Loading { bytes: u64 },
    /// Takes requests.
    Ready { loaded: Arc<T>, bytes: u64 },
    /// Takes nothing new; goes when the last answer has ended.
    Unloading { bytes: u64 },
    /// Could not be loaded; tried again with the first request after `until`.
    Failed { reason: String, no_room: bool, until: Instant },
}

/// One model.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) config: ModelConfig,
    pub(super) state: State<T>,
    /// Whether requests may have it; an operator's unload ends that, a load begins it.
    pub(super) offered: bool,
    /// Whether the configuration names it; others are forgotten when there are too many.
    configured: bool,
    pub(super) last_use: Option<Instant>,
    /// Loads that failed in a row.
    failures: u32,
    /// Most tokens of prompt and answer, once its file has been read.
    pub(super) context: Option<usize>,
}

/// What a request gets that asks for a model.
#[derive(Debug)]
pub(super) enum Asked<T> {
    /// The model.
    Ready(Arc<T>),
    /// Nothing yet: the table will change.
    Wait,
    /// Nothing yet, and the asker must have it loaded.
    Begin(Box<ModelConfig>),
}

/// Why it gets nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such model.
    Unknown(String),
    /// An operator has unloaded it.
    Withdrawn(String),
    /// It could not be loaded, and is tried again after the pause.
    Failed {
        /// The model's name.
        name: String,
        /// Until it is tried again.
        pause: Duration,
    },
    /// There was no room beside models with running answers.
    NoRoom {
        /// The model's name.
        name: String,
        /// For people: what takes the room.
        reason: String,
        /// Until it is tried again.
        pause: Duration,
    },
    /// It is not loaded yet, and the request's time is over.
    TooLate(String),
}

/// What a load may do.
#[derive(Debug)]
pub(super) enum Room<T> {
    /// Its bytes are set aside.
    Reserved,
    /// These must go first; the table has let go of them. Ask again once they are freed.
    Evict(Vec<(String, Arc<T>)>),
    /// Others are on their way out, and leave enough. Ask again when the table has changed.
    Wait,
}

/// All models of the node.
#[derive(Debug)]
pub(super) struct Table<T> {
    entries: Vec<Entry<T>>,
    /// Bytes that all models together may take.
    bytes_max: u64,
}

impl<T> Table<T> {
    /// Nothing loaded. The first of `models` is the default one.
    pub(super) fn new(models: &[ModelConfig], bytes_max: u64) -> Self {
        Self { entries: models.iter().map(|config| Entry::new(config.clone(), true)).collect(), bytes_max }
    }

    pub(super) fn entries(&self) -> &[Entry<T>] {
        &self.entries
    }

    pub(super) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    pub(super) fn entry(&self, name: &str) -> Option<&Entry<T>> {
        self.entries.iter().find(|entry| entry.config.name == name)
    }

    fn entry_mut(&mut self, name: &str) -> Option<&mut Entry<T>> {
        self.entries.iter_mut().find(|entry| entry.config.name == name)
    }

    /// A request asks for a model, by name or for the default one.
    ///
    /// # Errors
    /// When it cannot be had now.
    pub(super) fn ask(&mut self, name: Option<&str>, now: Instant) -> Result<Asked<T>, Refusal> {
        let entry = match name {
            None => self.entries.first_mut().ok_or_else(|| Refusal::Unknown(String::new()))?,
            Some(name) => self.entry_mut(name).ok_or_else(|| Refusal::Unknown(name.to_owned()))?,
        };
        if !entry.offered {
            return Err(Refusal::Withdrawn(entry.config.name.clone()));
        }
        entry.last_use = Some(now);
        entry.ask(now)
    }

    /// An operator wants the model, whatever was before. Begins its load unless it is there or on its way.
    ///
    /// # Errors
    /// When there is no such model.
    pub(super) fn want(&mut self, name: &str, now: Instant) -> Result<Asked<T>, Refusal> {
        let entry = self.entry_mut(name).ok_or_else(|| Refusal::Unknown(name.to_owned()))?;
        entry.offered = true;
        entry.last_use = Some(now);
        if matches!(entry.state, State::Failed { .. }) {
            entry.state = State::Unloaded;
        }
        entry.ask(now)
    }

    /// Adds a model, or puts another one under a name whose model is not in memory.
    ///
    /// # Errors
    /// When that name is taken, or there are [`MODELS_MAX`] models that are still of use.
    pub(super) fn add(&mut self, config: ModelConfig) -> Result<(), Unaddable> {
        match self.entry_mut(&config.name) {
            Some(entry) if entry.config.model == config.model => Ok(()),
            Some(entry) if matches!(entry.state, State::Unloaded | State::Failed { .. }) => {
                (entry.config.model, entry.config.draft) = (config.model, config.draft);
                (entry.context, entry.failures) = (None, 0);
                Ok(())
            }
            Some(_) => Err(Unaddable::NameTaken),
            None => self.push(config),
        }
    }

    fn push(&mut self, config: ModelConfig) -> Result<(), Unaddable> {
        if self.entries.len() >= MODELS_MAX {
            // those that an operator named and has unloaded since; until now their names were refused as withdrawn, and not as unknown
            self.entries.retain(|e| e.configured || e.offered || !matches!(e.state, State::Unloaded));
        }
        if self.entries.len() >= MODELS_MAX {
            return Err(Unaddable::TooMany);
        }
        self.entries.push(Entry::new(config, false));
        Ok(())
    }

    /// A load has found out what it needs.
    ///
    /// # Errors
    /// When the model can never fit, or cannot beside models with running answers.
    pub(super) fn reserve(&mut self, name: &str, bytes: u64, context: usize) -> Result<Room<T>, ServeError> {
        let (bytes_max, taken) = (self.bytes_max, self.taken_beside(name));
        if bytes > bytes_max {
            return Err(ServeError::TooLarge { name: name.to_owned(), bytes, bytes_max });
        }
        if taken + bytes <= bytes_max {
            if let Some(entry) = self.entry_mut(name) {
                entry.state = State::Loading { bytes };
                entry.context = Some(context);
            }
            return Ok(Room::Reserved);
        }
        let over = taken + bytes - bytes_max;
        let leaving = self.bytes_of(|state| matches!(state, State::Unloading { .. }));
        if leaving >= over {
            return Ok(Room::Wait);
        }
        let victims = self.victims(over - leaving);
        match victims.is_empty() {
            true => Err(ServeError::NoRoom { name: name.to_owned(), bytes, bytes_max, holders: self.holders(name) }),
            false => Ok(Room::Evict(victims.into_iter().filter_map(|i| self.entries[i].let_go()).collect())),
        }
    }

    /// The models to unload for `bytes`: idle and not pinned, those longest unused first. None when they would not be enough.
    fn victims(&self, bytes: u64) -> Vec<usize> {
        let mut idle: Vec<usize> = (0..self.entries.len()).filter(|i| self.entries[*i].is_idle()).collect();
        idle.sort_by_key(|i| self.entries[*i].last_use);
        let (mut victims, mut freed) = (Vec::new(), 0);
        for i in idle {
            if freed >= bytes {
                break;
            }
            freed += self.entries[i].state.bytes();
            victims.push(i);
        }
        if freed >= bytes { victims } else { Vec::new() }
    }

    fn taken_beside(&self, name: &str) -> u64 {
        self.entries.iter().filter(|entry| entry.config.name != name).map(|entry| entry.state.bytes()).sum()
    }

    fn bytes_of(&self, state: impl Fn(&State<T>) -> bool) -> u64 {
        self.entries.iter().map(|entry| &entry.state).filter(|s| state(s)).map(State::bytes).sum()
    }

    fn holders(&self, name: &str) -> Vec<String> {
        let holds = |entry: &&Entry<T>| entry.config.name != name && entry.state.bytes() > 0;
        self.entries.iter().filter(holds).map(|entry| entry.config.name.clone()).collect()
    }

    /// A load has ended.
    pub(super) fn loaded(&mut self, name: &str, outcome: Result<T, &ServeError>, now: Instant) {
        let Some(entry) = self.entry_mut(name) else { return };
        let State::Loading { bytes } = entry.state else { return };
        match outcome {
            Ok(loaded) => {
                entry.failures = 0;
                entry.state = State::Ready { loaded: Arc::new(loaded), bytes };
            }
            Err(error) => {
                let no_room = matches!(error, ServeError::NoRoom { .. });
                let pause = if no_room { ROOM_PAUSE } else { entry.next_pause() };
                entry.state = State::Failed { reason: error.to_string(), no_room, until: now + pause };
            }
        }
    }

    /// An operator takes the model out: nothing new from now on. What stood of it, for the shell to let go of.
    ///
    /// # Errors
    /// When there is no such model, or it is being loaded.
    pub(super) fn unload(&mut self, name: &str) -> Result<Option<Arc<T>>, Unloadable> {
        let entry = self.entry_mut(name).ok_or(Unloadable::Unknown)?;
        if matches!(entry.state, State::Loading { .. }) {
            return Err(Unloadable::Loading);
        }
        entry.offered = false;
        if matches!(entry.state, State::Failed { .. }) {
            entry.state = State::Unloaded;
        }
        Ok(entry.let_go().map(|(_, loaded)| loaded))
    }

    /// The last holder is gone, and the memory with it.
    pub(super) fn freed(&mut self, name: &str) {
        if let Some(entry) = self.entry_mut(name).filter(|entry| matches!(entry.state, State::Unloading { .. })) {
            entry.state = State::Unloaded;
        }
    }
}

/// Why an operator cannot add a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unaddable {
    /// Another model stands under this name.
    NameTaken,
    /// There are as many as may be.
    TooMany,
}

/// Why an operator cannot unload a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unloadable {
    /// There is none of this name.
    Unknown,
    /// It is being loaded.
    Loading,
}

impl<T> Entry<T> {
    fn new(config: ModelConfig, configured: bool) -> Self {
        let state = State::Unloaded;
        Self { config, state, offered: configured, configured, last_use: None, failures: 0, context: None }
    }

    fn ask(&mut self, now: Instant) -> Result<Asked<T>, Refusal> {
        let name = || self.config.name.clone();
        match &self.state {
            State::Ready { loaded, .. } => return Ok(Asked::Ready(Arc::clone(loaded))),
            State::Loading { .. } | State::Unloading { .. } => return Ok(Asked::Wait),
            State::Failed { reason, no_room: true, until } if *until > now => {
                return Err(Refusal::NoRoom { name: name(), reason: reason.clone(), pause: *until - now });
            }
            State::Failed { until, .. } if *until > now => {
                return Err(Refusal::Failed { name: name(), pause: *until - now });
            }
            State::Unloaded | State::Failed { .. } => {}
        }
        self.state = State::Loading { bytes: 0 };
        Ok(Asked::Begin(Box::new(self.config.clone())))
    }

    fn next_pause(&mut self) -> Duration {
        let pause = PAUSE.saturating_mul(1 << self.failures.min(16)).min(PAUSE_MAX);
        self.failures += 1;
        pause
    }

    /// Whether it stands and nobody but the table holds it. Nobody can begin to while the table is borrowed.
    fn is_idle(&self) -> bool {
        match &self.state {
            State::Ready { loaded, .. } => !self.config.pinned && Arc::strong_count(loaded) == 1,
            _ => false,
        }
    }

    fn let_go(&mut self) -> Option<(String, Arc<T>)> {
        let State::Ready { bytes, .. } = self.state else { return None };
        let State::Ready { loaded, .. } = std::mem::replace(&mut self.state, State::Unloading { bytes }) else {
            return None;
        };
        Some((self.config.name.clone(), loaded))
    }
}

impl<T> State<T> {
    /// What it takes of the memory for models.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Loading { bytes } | Self::Ready { bytes, .. } | Self::Unloading { bytes } => *bytes,
            Self::Unloaded | Self::Failed { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(name: &str) -> ModelConfig {
        ModelConfig { name: name.into(), ..ModelConfig::new("smollm2-135m".parse().unwrap()) }
    }

    fn table(names: &[&str], bytes_max: u64) -> Table<()> {
        Table::new(&names.iter().map(|name| config(name)).collect::<Vec<_>>(), bytes_max)
    }

    /// Asks for a model that is not there, and loads it with `bytes`.
    fn load(table: &mut Table<()>, name: &str, bytes: u64, now: Instant) {
        assert!(matches!(table.ask(Some(name), now), Ok(Asked::Begin(_))), "{name}");
        assert!(matches!(table.reserve(name, bytes, 1), Ok(Room::Reserved)), "{name}");
        table.loaded(name, Ok(()), now);
    }

    fn failure() -> ServeError {
        ServeError::Internal("broken".into())
    }

    #[test]
    fn one_asker_loads_and_the_others_wait() {
        let (mut table, now) = (table(&["a", "b"], 10), Instant::now());
        assert!(matches!(table.ask(None, now), Ok(Asked::Begin(begun)) if begun.name == "a"));
        assert!(matches!(table.ask(Some("a"), now), Ok(Asked::Wait)));
        assert!(matches!(table.reserve("a", 4, 1), Ok(Room::Reserved)));
        table.loaded("a", Ok(()), now);
        assert!(matches!(table.ask(None, now), Ok(Asked::Ready(_))));
        assert_eq!(table.ask(Some("c"), now).unwrap_err(), Refusal::Unknown("c".into()));
    }

    #[test]
    fn the_idle_model_longest_unused_makes_room() {
        let (mut table, t) = (table(&["a", "b", "c", "d"], 10), Instant::now());
        let at = |s| t + Duration::from_secs(s);
        load(&mut table, "a", 4, at(0));
        load(&mut table, "b", 3, at(1));
        load(&mut table, "c", 3, at(2));
        assert!(matches!(table.ask(Some("a"), at(3)), Ok(Asked::Ready(_))));
        assert!(matches!(table.ask(Some("d"), at(4)), Ok(Asked::Begin(_))));
        let Ok(Room::Evict(victims)) = table.reserve("d", 3, 1) else { panic!("b makes room") };
        assert_eq!(victims.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["b"]);
        // its memory is not free before its thread has ended
        assert!(matches!(table.reserve("d", 3, 1), Ok(Room::Wait)));
        table.freed("b");
        assert!(matches!(table.reserve("d", 3, 1), Ok(Room::Reserved)));
    }

    #[test]
    fn a_model_that_is_held_or_pinned_stays_and_the_refusal_says_so() {
        let (mut table, now) = (table(&["a", "b", "c"], 10), Instant::now());
        table.entries[1].config.pinned = true;
        load(&mut table, "a", 5, now);
        load(&mut table, "b", 5, now);
        let Ok(Asked::Ready(held)) = table.ask(Some("a"), now) else { panic!("a stands") };
        assert!(matches!(table.ask(Some("c"), now), Ok(Asked::Begin(_))));
        let error = table.reserve("c", 5, 1).unwrap_err();
        assert!(error.to_string().contains("a, b"), "{error}");
        table.loaded("c", Err(&error), now);
        assert!(matches!(table.ask(Some("c"), now), Err(Refusal::NoRoom { .. })));
        drop(held);
        let later = now + ROOM_PAUSE;
        assert!(matches!(table.ask(Some("c"), later), Ok(Asked::Begin(_))));
        assert!(matches!(table.reserve("c", 5, 1), Ok(Room::Evict(victims)) if victims[0].0 == "a"));
    }

    #[test]
    fn a_model_larger_than_all_room_evicts_nobody() {
        let (mut table, now) = (table(&["a", "b"], 10), Instant::now());
        load(&mut table, "a", 5, now);
        assert!(matches!(table.ask(Some("b"), now), Ok(Asked::Begin(_))));
        assert!(matches!(table.reserve("b", 11, 1), Err(ServeError::TooLarge { .. })));
        assert!(matches!(table.ask(Some("a"), now), Ok(Asked::Ready(_))));
    }

    #[test]
    fn a_failed_load_is_tried_again_after_a_pause_that_grows() {
        let (mut table, mut now) = (table(&["a"], 10), Instant::now());
        for pause in [5, 10, 20] {
            assert!(matches!(table.ask(None, now), Ok(Asked::Begin(_))));
            table.loaded("a", Err(&failure()), now);
            let pause = Duration::from_secs(pause);
            assert_eq!(table.ask(None, now).unwrap_err(), Refusal::Failed { name: "a".into(), pause });
            now += pause;
        }
        // an operator does not wait
        table.ask(None, now).unwrap();
        table.loaded("a", Err(&failure()), now);
        assert!(matches!(table.want("a", now), Ok(Asked::Begin(_))));
    }

    #[test]
    fn what_an_operator_unloads_stays_out_until_it_is_wanted_again() {
        let (mut table, now) = (table(&["a"], 10), Instant::now());
        load(&mut table, "a", 5, now);
        let Ok(Asked::Ready(running)) = table.ask(None, now) else { panic!("a stands") };
        drop(table.unload("a").unwrap());
        assert_eq!(Arc::strong_count(&running), 1, "the answer's own hold is all that is left");
        assert_eq!(table.ask(None, now).unwrap_err(), Refusal::Withdrawn("a".into()));
        assert_eq!(table.entries[0].state.bytes(), 5);
        assert!(matches!(table.want("a", now), Ok(Asked::Wait)));
        table.freed("a");
        assert!(matches!(table.ask(None, now), Ok(Asked::Begin(_))));
        assert_eq!(table.unload("a").unwrap_err(), Unloadable::Loading);
    }

    #[test]
    fn an_operator_puts_another_model_under_a_name_that_is_free() {
        let (mut table, now) = (table(&["a"], 10), Instant::now());
        assert_eq!(table.add(config("x")), Ok(()));
        assert!(matches!(table.want("x", now), Ok(Asked::Begin(_))));
        table.reserve("x", 1, 1).unwrap();
        table.loaded("x", Ok(()), now);
        let other = |name| ModelConfig { model: "./other.gguf".parse().unwrap(), ..config(name) };
        assert_eq!(table.add(other("x")), Err(Unaddable::NameTaken));
        drop(table.unload("x").unwrap());
        table.freed("x");
        assert_eq!(table.ask(Some("x"), now).unwrap_err(), Refusal::Withdrawn("x".into()));
        assert_eq!(table.add(other("a")), Ok(()));
        assert_eq!(table.entry("a").unwrap().config.model, other("a").model);
        for i in table.entries.len()..MODELS_MAX {
            let name = format!("x{i}");
            table.add(config(&name)).unwrap();
            assert!(matches!(table.want(&name, now), Ok(Asked::Begin(_))));
        }
        assert_eq!(table.add(config("more")), Ok(()), "'x' was of no more use");
        table.want("more", now).unwrap();
        assert_eq!(table.add(config("most")), Err(Unaddable::TooMany));
    }

    proptest! {
        /// Whatever is asked for and held, the models in memory never take more than they may, and a held one never goes.
        #[test]
        fn memory_is_bounded_and_what_is_held_stays(steps in prop::collection::vec((0usize..4, 1u64..8, any::<bool>()), 1..80)) {
            let names = ["a", "b", "c", "d"];
            let (mut table, t) = (table(&names, 10), Instant::now());
            let mut held: Vec<(usize, Arc<()>)> = Vec::new();
            for (i, (model, bytes, hold)) in steps.into_iter().enumerate() {
                let (name, now) = (names[model], t + Duration::from_secs(600 * i as u64));
                match table.ask(Some(name), now) {
                    Ok(Asked::Ready(loaded)) if hold => held.push((model, loaded)),
                    Ok(Asked::Begin(_)) => loop {
                        match table.reserve(name, bytes, 1) {
                            Ok(Room::Reserved) => break table.loaded(name, Ok(()), now),
                            Ok(Room::Evict(victims)) => for (victim, loaded) in victims {
                                prop_assert_eq!(Arc::strong_count(&loaded), 1);
                                table.freed(&victim);
                            },
                            Ok(Room::Wait) => prop_assert!(false, "nothing is on its way out"),
                            Err(error) => break table.loaded(name, Err(&error), now),
                        }
                    },
                    _ => drop(held.pop()),
                }
                prop_assert!(table.taken_beside("") <= 10);
                for (model, loaded) in &held {
                    let entry = table.entry(names[*model]).unwrap();
                    let State::Ready { loaded: stands, .. } = &entry.state else { panic!("a held model went") };
                    prop_assert!(Arc::ptr_eq(stands, loaded));
                }
            }
        }
    }
}
