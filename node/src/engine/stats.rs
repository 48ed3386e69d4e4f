//! What the engine does now, for health and metrics: written by the engine thread after each step, read by anyone.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use prometheus::{Histogram, HistogramOpts};

/// Counters and gauges.
#[derive(Debug)]
pub struct Stats {
    started: Instant,
    /// Sequences in the batch.
    pub running: AtomicU64,
    /// Sequences that wait.
    pub waiting: AtomicU64,
    /// The same in the order of [`Class::ALL`](crate::sched::Class::ALL).
    pub waiting_by_class: [AtomicU64; 3],
    /// From a sequence's coming to its first step, in seconds.
    pub queue_time: Histogram,
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
    /// Of those, found there, when the sequence was let in or while it caught up.
    pub prompt_tokens_cached: AtomicU64,
    /// Tokens generated.
    pub generated_tokens: AtomicU64,
    /// Guesses at next tokens that were computed.
    pub speculated_tokens: AtomicU64,
    /// Of those, the ones that came true.
    pub accepted_tokens: AtomicU64,
    /// Sequences put back.
    pub preemptions: AtomicU64,
    /// Of those, for a share with fewer places, and not for want of blocks.
    pub preemptions_for_share: AtomicU64,
    /// How long all that is there will take, in milliseconds; 0 before the first step.
    backlog_ms: AtomicU64,
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
            waiting_by_class: [zero(), zero(), zero()],
            queue_time: queue_time(),
            blocks_free: AtomicU64::new(blocks as u64),
            blocks_total: blocks as u64,
            steps: zero(),
            prompt_tokens: zero(),
            tokens_looked_up: zero(),
            prompt_tokens_cached: zero(),
            generated_tokens: zero(),
            speculated_tokens: zero(),
            accepted_tokens: zero(),
            preemptions: zero(),
            preemptions_for_share: zero(),
            backlog_ms: zero(),
            beats: zero(),
            progress_ms: zero(),
        }
    }

    pub(super) fn note_progress(&self) {
        self.beats.fetch_add(1, Relaxed);
        self.progress_ms.store(self.started.elapsed().as_millis() as u64, Relaxed);
    }

    pub(super) fn note_backlog(&self, time: Option<Duration>) {
        let ms = time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        self.backlog_ms.store(ms, Relaxed);
    }

    /// How long until all that runs and waits now is done, by the tokens it lacks and the measured rate; at most an hour. A request
    /// that is refused now finds a place by then.
    pub fn backlog(&self) -> Duration {
        Duration::from_millis(self.backlog_ms.load(Relaxed)).min(Duration::from_secs(3600))
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

fn queue_time() -> Histogram {
    let buckets = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
    let help = "From a sequence's coming to its first step.";
    let opts = HistogramOpts::new("vllm:request_queue_time_seconds", help).buckets(buckets.to_vec());
    Histogram::with_opts(opts).expect("the buckets rise")
}
