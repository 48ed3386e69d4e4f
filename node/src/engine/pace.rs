//! How fast the engine computes, and so how long what it has will take. Pure; time is passed in.

use std::time::Duration;

/// How much of what was measured before a step still counts after it.
const MEMORY: f64 = 0.98;

/// Measured over steps and answers, the recent ones most.
#[derive(Debug, Default)]
pub(super) struct Pace {
    tokens: f64,
    seconds: f64,
    answers: f64,
    answered: f64,
}

impl Pace {
    /// A step of so many tokens took so long.
    pub(super) fn note_step(&mut self, tokens: usize, time: Duration) {
        self.tokens = self.tokens * MEMORY + tokens as f64;
        self.seconds = self.seconds * MEMORY + time.as_secs_f64();
    }

    /// An answer ended with so many tokens.
    pub(super) fn note_answer(&mut self, tokens: usize) {
        self.answers = self.answers * MEMORY + 1.0;
        self.answered = self.answered * MEMORY + tokens as f64;
    }

    /// Tokens likely still to be computed for a sequence: `pending` of them are there, and it may generate `left_max` more.
    pub(super) fn owed(&self, pending: usize, left_max: usize) -> usize {
        let typical = if self.answers > 0.0 { (self.answered / self.answers).ceil() as usize } else { usize::MAX };
        pending.saturating_add(left_max.min(typical))
    }

    /// How long so many tokens take; none before the first step.
    pub(super) fn time_for(&self, tokens: usize) -> Option<Duration> {
        let seconds = tokens as f64 * self.seconds / self.tokens;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_queued_takes_as_long_as_the_measured_rate_says() {
        let mut pace = Pace::default();
        assert_eq!((pace.time_for(100), pace.owed(10, 90)), (None, 100));
        (0..10).for_each(|_| pace.note_step(50, Duration::from_millis(100)));
        assert!((pace.time_for(1000).unwrap().as_secs_f64() - 2.0).abs() < 1e-9);
        // answers are shorter than they may be
        (0..10).for_each(|_| pace.note_answer(20));
        assert_eq!((pace.owed(10, 500), pace.owed(0, 5)), (30, 5));
        // twice as fast: the estimate follows
        (0..500).for_each(|_| pace.note_step(100, Duration::from_millis(100)));
        assert!((pace.time_for(1000).unwrap().as_secs_f64() - 1.0).abs() < 0.01);
    }
}
