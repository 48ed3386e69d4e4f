//! What the engine does now, for health and metrics: written by the engine thread after each step, read by anyone.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Counters and gauges.
#[derive(Debug)]
pub struct Stats {
    started: Instant,
    /// Sequences in the batch.
    pub running: AtomicU64,
    /// Sequences that wait.
    pub waiting: AtomicU64,
    /// KV blocks free or evictable.
    pub blocks_free: AtomicU64,
    /// All KV blocks.
    pub blocks_total: u64,
    /// Steps finished.
    pub steps: AtomicU64,
    /// Tokens of the prompts taken.
    pub prompt_tokens: AtomicU64,
    /// Tokens looked up in the prefix cache; again each time a sequence is let in after it was put back.
    pub tokens_looked_up: AtomicU64,
    /// Of those, found there.
    pub prompt_tokens_cached: AtomicU64,
    /// Tokens generated.
    pub generated_tokens: AtomicU64,
    /// Sequences put back for want of blocks.
    pub preemptions: AtomicU64,
    /// Layers computed; grows within a step too, so it tells a long step from a hung one.
    pub beats: AtomicU64,
    /// When the last layer was computed or the engine last had nothing to do, in milliseconds since `started`.
    progress_ms: AtomicU64,
}

impl Stats {
    pub(super) fn new(blocks: usize) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            started: Instant::now(),
            running: zero(),
            waiting: zero(),
            blocks_free: AtomicU64::new(blocks as u64),
            blocks_total: blocks as u64,
            steps: zero(),
            prompt_tokens: zero(),
            tokens_looked_up: zero(),
            prompt_tokens_cached: zero(),
            generated_tokens: zero(),
            preemptions: zero(),
            beats: zero(),
            progress_ms: zero(),
        }
    }

    pub(super) fn note_progress(&self) {
        self.beats.fetch_add(1, Relaxed);
        self.progress_ms.store(self.started.elapsed().as_millis() as u64, Relaxed);
    }

    /// How long ago a layer was computed, while sequences run; zero when idle.
    pub fn silent_for(&self) -> Duration {
        if self.running.load(Relaxed) == 0 {
            return Duration::ZERO;
        }
        self.started.elapsed().saturating_sub(Duration::from_millis(self.progress_ms.load(Relaxed)))
    }

    /// Share of the KV blocks in use, 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        1.0 - self.blocks_free.load(Relaxed) as f64 / self.blocks_total.max(1) as f64
    }
}
