//! A leaky bucket that may be overdrawn. What was used drains at a steady rate, and more may be used while all of it fits.
//!
//! It is the generic cell rate algorithm (ITU-T I.371) with the level kept in the place of the due time: a level means something under any
//! rate, so a reload can change the limit and nobody's count is lost. Pure; time comes in, as seconds since any one moment.

use std::time::Duration;

/// What rounding may let pass too much.
const SLACK: f64 = 1e-6;
/// Longer than any wait that is told.
const WAIT_S_MAX: f64 = 86_400.0;

/// A steady rate, and how much may come at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rate {
    pub(crate) per_second: f64,
    /// What fits into an empty bucket.
    pub(crate) burst: f64,
}

/// What was used lately. The default is nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Bucket {
    used: f64,
    at_s: f64,
}

impl Bucket {
    /// What was used and has not drained yet; more than the burst where a settlement found more than was reserved.
    pub(crate) fn used(&self, rate: Rate, now_s: f64) -> f64 {
        (self.used - (now_s - self.at_s).max(0.0) * rate.per_second).max(0.0)
    }

    /// Whether `cost` fits now, or how long it takes until it does. What would never fit is asked to fit alone.
    pub(crate) fn fits(&self, rate: Rate, cost: f64, now_s: f64) -> Result<(), Duration> {
        let over = self.used(rate, now_s) + cost.min(rate.burst) - rate.burst;
        if over <= SLACK { Ok(()) } else { Err(seconds(over / rate.per_second)) }
    }

    /// Uses `amount`, whether it fits or not; a negative one gives back.
    pub(crate) fn add(&mut self, rate: Rate, amount: f64, now_s: f64) {
        self.used = (self.used(rate, now_s) + amount).max(0.0);
        self.at_s = self.at_s.max(now_s);
    }

    /// What still fits.
    pub(crate) fn left(&self, rate: Rate, now_s: f64) -> f64 {
        (rate.burst - self.used(rate, now_s)).max(0.0)
    }

    /// How long until nothing of it is left.
    pub(crate) fn drains_in(&self, rate: Rate, now_s: f64) -> Duration {
        let used = self.used(rate, now_s);
        if used <= SLACK { Duration::ZERO } else { seconds(used / rate.per_second) }
    }
}

/// A wait of so many seconds; never a hair too short.
pub(crate) fn seconds(s: f64) -> Duration {
    Duration::from_secs_f64(s.clamp(0.0, WAIT_S_MAX)) + Duration::from_micros(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEN: Rate = Rate { per_second: 10.0, burst: 3.0 };

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let mut bucket = Bucket::default();
        for _ in 0..3 {
            assert_eq!(bucket.fits(TEN, 1.0, 0.0), Ok(()));
            bucket.add(TEN, 1.0, 0.0);
        }
        let wait = bucket.fits(TEN, 1.0, 0.0).unwrap_err();
        assert!((wait.as_secs_f64() - 0.1).abs() < 1e-5, "{wait:?}");
        assert_eq!((bucket.left(TEN, 0.0), bucket.left(TEN, 0.2).round()), (0.0, 2.0));
        assert_eq!(bucket.drains_in(TEN, 1.0), Duration::ZERO);
    }

    #[test]
    fn what_is_larger_than_the_burst_passes_alone() {
        let mut bucket = Bucket::default();
        assert_eq!(bucket.fits(TEN, 50.0, 0.0), Ok(()));
        bucket.add(TEN, 1.0, 0.0);
        assert!(bucket.fits(TEN, 50.0, 0.0).is_err());
        assert_eq!(bucket.fits(TEN, 50.0, 0.2), Ok(()));
    }

    #[test]
    fn a_settlement_may_overdraw_and_what_is_given_back_is_never_more_than_was_used() {
        let mut bucket = Bucket::default();
        bucket.add(TEN, 8.0, 0.0);
        assert!(bucket.fits(TEN, 1.0, 0.5).is_err());
        assert_eq!(bucket.fits(TEN, 1.0, 0.61), Ok(()));
        bucket.add(TEN, -100.0, 0.61);
        assert_eq!(bucket.left(TEN, 0.61), 3.0);
    }

    fn any_rate() -> impl Strategy<Value = Rate> {
        (0.01f64..1e6, 1f64..1e7).prop_map(|(per_second, burst)| Rate { per_second, burst })
    }

    proptest! {
        /// Law: in any stretch of time, no more passes than the burst and the rate allow; and who waits as told is let through.
        #[test]
        fn the_rate_is_kept(
            rate in any_rate(),
            steps in prop::collection::vec((0.0f64..3.0, 0.0f64..1.0), 1..200),
        ) {
            let (mut bucket, mut now_s, mut passed) = (Bucket::default(), 0.0, 0.0);
            for (pause, share) in steps {
                now_s += pause;
                let cost = share * rate.burst;
                if let Err(wait) = bucket.fits(rate, cost, now_s) {
                    now_s += wait.as_secs_f64();
                    prop_assert_eq!(bucket.fits(rate, cost, now_s), Ok(()));
                }
                bucket.add(rate, cost, now_s);
                passed += cost;
                let most = rate.burst + now_s * rate.per_second;
                prop_assert!(passed <= most * (1.0 + 1e-6) + 1.0, "{} passed, {} may", passed, most);
            }
        }

        /// Law: reserving too much and settling leaves no less room than reserving what was right, once what was reserved has drained.
        #[test]
        fn a_settled_reservation_costs_what_was_used(rate in any_rate(), used in 0.0f64..1.0, more in 0.0f64..1.0) {
            let (used, reserved) = (used * rate.burst, (used + more) * rate.burst);
            let (mut guessed, mut exact) = (Bucket::default(), Bucket::default());
            guessed.add(rate, reserved, 0.0);
            guessed.add(rate, used - reserved, 0.0);
            exact.add(rate, used, 0.0);
            prop_assert!((guessed.left(rate, 0.0) - exact.left(rate, 0.0)).abs() <= 1e-6 * rate.burst);
        }

        /// Law: a clock that jumps back gives nothing away.
        #[test]
        fn time_that_goes_back_drains_nothing(rate in any_rate(), at in 0.0f64..1e6, back in 0.0f64..1e6) {
            let mut bucket = Bucket::default();
            bucket.add(rate, rate.burst, at);
            bucket.add(rate, 0.0, at - back);
            prop_assert!(bucket.used(rate, at - back) >= rate.burst - SLACK);
            prop_assert!(bucket.used(rate, at) >= rate.burst - SLACK);
        }
    }
}
