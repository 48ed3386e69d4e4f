//! Which of several equals gets the next request: smooth weighted round-robin, worked out once for a set of members.
//!
//! The order of one whole cycle is computed when the set changes; a pick is then one atomic increment, the same from every thread,
//! so the spread is even by construction and not by chance. Nothing here knows what a member is.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Longest cycle kept; larger weights are scaled down to it.
const CYCLE_MAX: u64 = 1 << 14;

/// The order in which members are due.
#[derive(Debug, Default)]
pub(crate) struct Rotation {
    order: Box<[u16]>,
    next: AtomicUsize,
}

impl Rotation {
    /// The cycle for members of these weights, in their order; a weight of 0 counts as 1.
    pub(crate) fn new(weights: &[u32]) -> Self {
        // a pool of more than 65,535 nodes does not exist; those beyond would not be picked
        let weights = &weights[..weights.len().min(usize::from(u16::MAX))];
        Self { order: smooth(&scale(weights)), next: AtomicUsize::new(0) }
    }

    /// The same, begun where this one stands: were each new cycle begun at its beginning, a set that changes often would know none but
    /// the first.
    pub(crate) fn followed_by(&self, weights: &[u32]) -> Self {
        Self { next: AtomicUsize::new(self.next.load(Ordering::Relaxed)), ..Self::new(weights) }
    }

    /// The member whose turn it is, passing over those that `skip` names. `None` when it names all.
    pub(crate) fn pick(&self, skip: impl Fn(usize) -> bool) -> Option<usize> {
        if self.order.is_empty() {
            return None;
        }
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let due = (0..self.order.len()).map(|step| self.order[start.wrapping_add(step) % self.order.len()]);
        due.map(usize::from).find(|member| !skip(*member))
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn scale(weights: &[u32]) -> Vec<u64> {
    let weights: Vec<u64> = weights.iter().map(|w| u64::from(*w).max(1)).collect();
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let total: u64 = weights.iter().map(|w| w / divisor).sum();
    let shrink = total.div_ceil(CYCLE_MAX).max(1);
    weights.iter().map(|w| (w / divisor / shrink).max(1)).collect()
}

/// Smooth weighted round-robin as nginx does it: each turn everyone gains its weight, the richest goes and pays the total.
fn smooth(weights: &[u64]) -> Box<[u16]> {
    let total: u64 = weights.iter().sum();
    let mut credit = vec![0i64; weights.len()];
    let mut order = Vec::with_capacity(total as usize);
    for _ in 0..total {
        let mut richest = 0;
        for (i, weight) in weights.iter().enumerate() {
            credit[i] += *weight as i64;
            if credit[i] > credit[richest] {
                richest = i;
            }
        }
        credit[richest] -= total as i64;
        order.push(richest as u16);
    }
    order.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counts(rotation: &Rotation, members: usize, picks: usize) -> Vec<usize> {
        let mut counts = vec![0; members];
        for _ in 0..picks {
            counts[rotation.pick(|_| false).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn equals_share_evenly_from_many_threads() {
        let rotation = Rotation::new(&[1, 1, 1]);
        let totals = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| counts(&rotation, 3, 75))).collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap())
                .fold([0; 3], |sum, c| [sum[0] + c[0], sum[1] + c[1], sum[2] + c[2]])
        });
        assert_eq!(totals, [100; 3]);
    }

    #[test]
    fn heavy_members_are_not_due_in_a_row() {
        assert_eq!(*Rotation::new(&[5, 1, 1]).order, [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(Rotation::new(&[1000, 500]).order.len(), 3);
    }

    #[test]
    fn absurd_sets_are_bounded() {
        assert!(Rotation::new(&[]).pick(|_| false).is_none());
        assert!(Rotation::new(&[u32::MAX, 1, u32::MAX - 1]).order.len() <= CYCLE_MAX as usize + 3);
    }

    proptest! {
        #[test]
        fn each_gets_its_share_of_every_cycle(weights in prop::collection::vec(1u32..50, 1..9)) {
            let rotation = Rotation::new(&weights);
            let cycle = rotation.order.len();
            let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
            for (count, weight) in counts(&rotation, weights.len(), cycle).into_iter().zip(&weights) {
                prop_assert_eq!(count as u64 * total, u64::from(*weight) * cycle as u64);
            }
        }

        #[test]
        fn changing_weights_before_every_pick_starves_nobody(members in 2usize..6) {
            let mut rotation = Rotation::default();
            let mut counts = vec![0; members];
            for turn in 0..members as u32 * 50 {
                let mut weights = vec![10; members];
                weights[0] = 1 + turn % 10;
                rotation = rotation.followed_by(&weights);
                counts[rotation.pick(|_| false).unwrap()] += 1;
            }
            prop_assert!(counts.iter().all(|count| *count > 5), "{:?}", counts);
        }

        #[test]
        fn someone_is_found_unless_all_are_skipped(weights in prop::collection::vec(1u32..9, 1..9), skipped: u16) {
            let rotation = Rotation::new(&weights);
            let skip = |member: usize| skipped & (1 << member) != 0;
            let all = (0..weights.len()).all(skip);
            for _ in 0..20 {
                match rotation.pick(skip) {
                    Some(member) => prop_assert!(!skip(member)),
                    None => prop_assert!(all),
                }
            }
        }

        #[test]
        fn the_rest_stays_even_when_one_of_equals_is_passed_over(members in 3usize..8, out in 0usize..3) {
            let rotation = Rotation::new(&vec![1; members]);
            let mut counts = vec![0usize; members];
            for _ in 0..members * 100 {
                counts[rotation.pick(|m| m == out).unwrap()] += 1;
            }
            prop_assert_eq!(counts[out], 0);
            prop_assert!(counts.iter().all(|c| *c <= 200), "{:?}", counts);
        }
    }
}
