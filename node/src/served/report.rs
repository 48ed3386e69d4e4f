//! What is said of each model: on the private listener in full, in `/health` in brief.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tidegate_common::contract::{ModelHealth, ModelState};

use super::{
    Loaded, Models,
    table::{Entry, State},
};
use crate::engine::Stats;

/// One model, as `GET /admin/models` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its name in the API, where it stands, and its load.
    #[serde(flatten)]
    pub health: ModelHealth,
    /// Which model it is.
    pub model: String,
    /// Whether requests may have it.
    pub offered: bool,
    /// When it is loaded: `start` or `first_use`.
    pub load: String,
    /// Never unloaded to make room for another.
    pub pinned: bool,
    /// Bytes of weights, keys and values that it has in memory.
    pub bytes: u64,
    /// Most tokens of prompt and answer, when they are known.
    pub context: Option<usize>,
    /// Answers that have not been read to their end.
    pub open: usize,
    /// Seconds since it was last asked for.
    pub idle_s: Option<u64>,
    /// Why the last load failed.
    pub error: Option<String>,
}

impl Models {
    /// All models, also those that an operator has unloaded.
    pub fn reports(&self, stall_after: Duration) -> Vec<Report> {
        let now = Instant::now();
        self.lock().table.entries().iter().map(|entry| report(entry, stall_after, now)).collect()
    }

    /// Those that requests may have, and those that are on their way out.
    pub fn health(&self, stall_after: Duration) -> Vec<ModelHealth> {
        let now = Instant::now();
        let inner = self.lock();
        let shown = inner.table.entries().iter().filter(|e| e.offered || !matches!(e.state, State::Unloaded));
        shown.map(|entry| health(entry, stall_after, now)).collect()
    }
}

fn report(entry: &Entry<Loaded>, stall_after: Duration, now: Instant) -> Report {
    let error = match &entry.state {
        State::Failed { reason, .. } => Some(reason.clone()),
        _ => None,
    };
    Report {
        health: health(entry, stall_after, now),
        model: entry.config.model.to_string(),
        offered: entry.offered,
        load: entry.config.load.as_str().to_owned(),
        pinned: entry.config.pinned,
        bytes: entry.state.bytes(),
        context: entry.context,
        open: stands(entry).map_or(0, |loaded| loaded.engine.open()),
        idle_s: entry.last_use.map(|at| now.saturating_duration_since(at).as_secs()),
        error,
    }
}

fn stands(entry: &Entry<Loaded>) -> Option<&Loaded> {
    match &entry.state {
        State::Ready { loaded, .. } => Some(loaded),
        _ => None,
    }
}

fn health(entry: &Entry<Loaded>, stall_after: Duration, now: Instant) -> ModelHealth {
    let stats = stands(entry).map(|loaded| loaded.engine.stats());
    let count = |read: fn(&Stats) -> u64| stats.map_or(0, |s| u32::try_from(read(s)).unwrap_or(u32::MAX));
    let silent = stats.map(Stats::silent_for).filter(|silent| *silent > stall_after);
    let (state, reason) = match &entry.state {
        State::Unloaded => (ModelState::Unloaded, None),
        State::Loading { .. } => (ModelState::Loading, None),
        State::Unloading { .. } => (ModelState::Unloading, None),
        State::Ready { .. } => match silent {
            Some(silent) => (ModelState::Stalled, Some(format!("no step has ended for {} s", silent.as_secs()))),
            None => (ModelState::Ready, None),
        },
        // after the pause, and when only room was missing, the next request tries
        State::Failed { no_room: true, .. } => (ModelState::Unloaded, Some("there was no room".to_owned())),
        State::Failed { until, .. } if *until <= now => (ModelState::Unloaded, None),
        State::Failed { .. } => (ModelState::Failed, Some("the model could not be loaded".to_owned())),
    };
    ModelHealth {
        name: entry.config.name.clone(),
        state,
        running: count(|s| s.running.load(Relaxed)),
        waiting: count(|s| s.waiting.load(Relaxed)),
        kv_blocks_free: count(|s| s.blocks_free.load(Relaxed)),
        kv_blocks_total: count(|s| s.blocks_total),
        fingerprint: stands(entry).map(|loaded| loaded.fingerprint),
        reason,
    }
}
