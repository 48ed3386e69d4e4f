//! What decides about members beyond one alone: how many probes, how fast a new one takes its share, when failed ones are asked all the
//! same. Pure.

use std::time::Duration;

/// Parts of its weight that a slow start goes through.
pub(crate) const RAMP_STEPS: u32 = 10;

/// The rules of `[balancer.health]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Successes in a row that make a member ready.
    pub(crate) up: u32,
    /// Failures in a row that eject it.
    pub(crate) down: u32,
    /// How long a member that comes to an old pool takes to reach its whole share; zero is at once.
    pub(crate) slow_start: Duration,
    /// Percent of a pool that must be ready for the failed ones to be left alone; 0 leaves them alone always.
    pub(crate) panic_percent: u32,
}

impl Rules {
    /// The part of its weight that a slow starter gets so long after it became ready, in [`RAMP_STEPS`]ths. Never none: a member without
    /// requests would warm nothing up.
    pub(crate) fn ramp(&self, age: Duration) -> u32 {
        if self.is_warm(age) {
            return RAMP_STEPS;
        }
        let steps = age.as_nanos() * u128::from(RAMP_STEPS) / self.slow_start.as_nanos();
        steps as u32 + 1
    }

    /// Whether a member is new no more.
    pub(crate) fn is_warm(&self, age: Duration) -> bool {
        age >= self.slow_start
    }

    /// Whether so few are ready that those of which nothing is known but that they failed are asked too. Who says itself that it takes
    /// nothing counts on neither side: a fleet that is drained or loads is not in trouble.
    pub(crate) fn panics(&self, ready: usize, failed: usize) -> bool {
        ready * 100 < (ready + failed) * self.panic_percent as usize
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules(slow_start: Duration, panic_percent: u32) -> Rules {
        Rules { up: 2, down: 3, slow_start, panic_percent }
    }

    #[test]
    fn fewer_than_half_is_a_panic_and_half_is_none() {
        let rules = rules(Duration::ZERO, 50);
        assert!(rules.panics(0, 1) && rules.panics(1, 2));
        assert!(!rules.panics(1, 1) && !rules.panics(1, 0) && !rules.panics(0, 0));
    }

    proptest! {
        #[test]
        fn a_share_only_grows_and_is_whole_in_time(slow_ms in 0u64..100_000, a_ms in 0u64..200_000, b_ms in 0u64..200_000) {
            let rules = rules(Duration::from_millis(slow_ms), 50);
            let (young, old) = (a_ms.min(b_ms), a_ms.max(b_ms));
            let share = |ms| rules.ramp(Duration::from_millis(ms));
            prop_assert!((1..=RAMP_STEPS).contains(&share(young)));
            prop_assert!(share(young) <= share(old));
            prop_assert_eq!(share(slow_ms), RAMP_STEPS);
            prop_assert!(slow_ms == 0 || share(0) == 1);
        }

        #[test]
        fn one_more_that_is_ready_never_brings_a_panic(ready in 0usize..99, failed in 0usize..99, percent in 0u32..=100) {
            let rules = rules(Duration::ZERO, percent);
            prop_assert!(!rules.panics(ready + 1, failed) || rules.panics(ready, failed));
            prop_assert!(percent > 0 || !rules.panics(ready, failed));
            prop_assert!(!rules.panics(ready, 0));
        }
    }
}
