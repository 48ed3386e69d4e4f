//! How fast streams may move from node to node, over the whole balancer: a node that dies with a thousand streams, or a cluster that
//! dies as a whole, must not be stormed by its own rescue. Over the pace a move is not refused but waits its turn.
//!
//! The generic cell rate algorithm (ITU-T I.371): one number says when the bucket would be full again. Pure; time comes in.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::time::Instant;

/// The pace of moves.
#[derive(Debug)]
pub(crate) struct Budget {
    began: Instant,
    /// Time between two moves at the steady pace.
    interval_ns: u64,
    /// How far ahead of the steady pace a burst may run.
    ahead_ns: u64,
    /// When the next move would be due at the steady pace, since `began`.
    due_ns: AtomicU64,
}

impl Budget {
    /// `per_second` moves at a steady pace, and at first, or after a pause, as many at once as fit a burst of `burst`.
    pub(crate) fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let interval_ns = 1_000_000_000 / u64::from(per_second.max(1));
        let ahead_ns = interval_ns * u64::from(burst.max(1) - 1);
        Self { began: now, interval_ns, ahead_ns, due_ns: AtomicU64::new(0) }
    }

    /// Takes one move, or says how long to wait before asking again.
    pub(crate) fn take(&self, now: Instant) -> Result<(), Duration> {
        let now_ns = now.saturating_duration_since(self.began).as_nanos() as u64;
        let mut early_ns = 0;
        let taken = self.due_ns.fetch_update(Relaxed, Relaxed, |due| {
            early_ns = due.saturating_sub(now_ns + self.ahead_ns);
            (early_ns == 0).then_some(due.max(now_ns) + self.interval_ns)
        });
        taken.map(drop).map_err(|_| Duration::from_nanos(early_ns))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_pace_holds() {
        let now = Instant::now();
        let budget = Budget::new(10, 3, now);
        let at = |ms: u64| now + Duration::from_millis(ms);
        assert!((0..3).all(|_| budget.take(now).is_ok()));
        assert_eq!(budget.take(now), Err(Duration::from_millis(100)));
        assert_eq!(budget.take(at(60)), Err(Duration::from_millis(40)));
        assert!(budget.take(at(100)).is_ok());
        assert!(budget.take(at(101)).is_err());
        assert!((0..3).all(|_| budget.take(at(10_000)).is_ok()), "a pause fills it again");
        assert!(budget.take(at(10_000)).is_err(), "and no further than its burst");
    }

    proptest! {
        /// Law: in any stretch of time, no more moves than the burst and the pace allow; and who waits as told is let through.
        #[test]
        fn the_pace_is_kept(pauses in prop::collection::vec(0u64..400, 1..200), per_second in 1u32..50, burst in 1u32..20) {
            let began = Instant::now();
            let budget = Budget::new(per_second, burst, began);
            let (mut now, mut taken) = (began, 0u64);
            for pause in pauses {
                now += Duration::from_millis(pause);
                if let Err(wait) = budget.take(now) {
                    now += wait;
                    prop_assert!(budget.take(now).is_ok());
                }
                taken += 1;
                let most = f64::from(burst) + (now - began).as_secs_f64() * f64::from(per_second) * 1.001;
                prop_assert!(taken as f64 <= most + 1e-6, "{taken} moves after {:?}", now - began);
            }
        }
    }
}
