//! Fair sharing: who is owed how much of the engine. Pure books, in tokens.
//!
//! A share is one tenant's work of one class. Every token computed for it, prompt or answer alike, is charged to it, and weighs less in
//! a higher class. Who is served next is the share with the largest deficit, that is, the one that has spent least; so between shares
//! that always have something to compute, the difference never grows beyond one piece. That is deficit round-robin's promise with the
//! rounds replaced by an order, which spares a newcomer the wait for its round.
//!
//! A deficit is bounded: nobody falls further behind the leader than [`BURST_STEPS`] full steps' worth, and a share that was away comes
//! back with at most so much credit. The floor that says so also rises with whatever is computed, so that even an endless row of
//! newcomers with full credit cannot keep one that waits from its turn.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::SeqId;

/// Priority class. Weighted, not strict: while all are waiting, of 13 tokens 8 go to high, 4 to normal, 1 to low.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Twice as much as normal.
    High,
    /// What a request is that does not say.
    #[default]
    Normal,
    /// A quarter of normal.
    Low,
}

impl Class {
    /// All classes, the highest first.
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    /// Its word in headers, configuration and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }

    /// The class of a word.
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.word() == word)
    }

    /// Tokens that go to it for each that goes to [`Low`](Self::Low).
    pub fn weight(self) -> u64 {
        match self {
            Self::High => 8,
            Self::Normal => 4,
            Self::Low => 1,
        }
    }
}

/// Who a sequence is computed for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// Whose request it is.
    pub tenant: Arc<str>,
    /// Priority class.
    pub class: Class,
}

impl Default for Owner {
    fn default() -> Self {
        Self { tenant: "anonymous".into(), class: Class::default() }
    }
}

/// Largest deficit of a share of normal class, in full steps.
const BURST_STEPS: u64 = 8;

/// Cost of one token to a share of weight one; every weight divides it.
const UNIT: u64 = 8 << 10;

/// Shares that have no sequence and are remembered because they have had more than their part.
const REMEMBERED_MAX: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ShareId(u64);

#[derive(Debug)]
struct Share {
    owner: Owner,
    /// Weighted tokens computed for it, from a common beginning.
    spent: u64,
    running: BTreeSet<SeqId>,
    waiting: BTreeSet<SeqId>,
}

/// Places in the batch by weight, exact for all weights.
type Load = u64;

impl Share {
    fn weight(&self) -> u64 {
        self.owner.class.weight()
    }

    fn is_active(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// What `places` in the batch are to it.
    fn load(&self, places: usize) -> Load {
        places as u64 * UNIT / self.weight()
    }
}

/// All shares with work, and some that are remembered.
#[derive(Debug)]
pub(super) struct Shares {
    all: BTreeMap<ShareId, Share>,
    by_owner: HashMap<Owner, ShareId>,
    next: u64,
    /// Nobody has spent less.
    floor: u64,
    /// How far the leader may be above the floor.
    burst: u64,
    /// Tokens charged since the books were last settled.
    served: u64,
    waiting: usize,
}

impl Shares {
    pub(super) fn new(step_tokens_max: usize) -> Self {
        let burst = BURST_STEPS * step_tokens_max as u64 * UNIT / Class::Normal.weight();
        let (all, by_owner) = (BTreeMap::new(), HashMap::new());
        Self { all, by_owner, next: 0, floor: 0, burst, served: 0, waiting: 0 }
    }

    /// A new sequence waits.
    pub(super) fn join(&mut self, owner: Owner, id: SeqId) -> ShareId {
        let share_id = *self.by_owner.entry(owner).or_insert_with_key(|owner| {
            let share_id = ShareId(self.next);
            self.next += 1;
            let (running, waiting) = (BTreeSet::new(), BTreeSet::new());
            self.all.insert(share_id, Share { owner: owner.clone(), spent: self.floor, running, waiting });
            share_id
        });
        let floor = self.floor;
        let share = self.share(share_id);
        share.spent = share.spent.max(floor);
        share.waiting.insert(id);
        self.waiting += 1;
        share_id
    }

    /// A waiting sequence gets a place in the batch.
    pub(super) fn start(&mut self, share: ShareId, id: SeqId) {
        let share = self.share(share);
        share.waiting.remove(&id);
        share.running.insert(id);
        self.waiting -= 1;
    }

    /// A running sequence loses its place; being older, it stands before those of its share that never had one.
    pub(super) fn put_back(&mut self, share: ShareId, id: SeqId) {
        let share = self.share(share);
        share.running.remove(&id);
        share.waiting.insert(id);
        self.waiting += 1;
    }

    /// A sequence is gone.
    pub(super) fn leave(&mut self, share_id: ShareId, id: SeqId) {
        let floor = self.floor;
        let share = self.share(share_id);
        share.running.remove(&id);
        let waited = share.waiting.remove(&id);
        let is_over = !share.is_active() && share.spent <= floor;
        self.waiting -= usize::from(waited);
        if is_over {
            self.forget(share_id);
        } else if self.all.len() > REMEMBERED_MAX {
            self.forget_one();
        }
    }

    /// `tokens` are to be computed for it.
    pub(super) fn charge(&mut self, share: ShareId, tokens: usize) {
        let share = self.share(share);
        share.spent += tokens as u64 * UNIT / share.weight();
        self.served += tokens as u64;
    }

    /// They are not, after all.
    pub(super) fn refund(&mut self, share: ShareId, tokens: usize) {
        let share = self.share(share);
        share.spent -= tokens as u64 * UNIT / share.weight();
        self.served -= tokens as u64;
    }

    /// Bounds all deficits, after each step.
    pub(super) fn settle(&mut self) {
        let served = std::mem::take(&mut self.served);
        let (mut weights, mut lead) = (0, 0);
        for share in self.all.values().filter(|s| s.is_active()) {
            weights += share.weight();
            lead = lead.max(share.spent);
        }
        if weights == 0 {
            return;
        }
        // half the speed of a share that gets exactly its part: who takes all that is there soon stands above a newcomer
        self.floor += served * UNIT / (2 * weights);
        self.floor = self.floor.max(lead.saturating_sub(self.burst));
        let floor = self.floor;
        self.all.values_mut().filter(|s| s.is_active()).for_each(|s| s.spent = s.spent.max(floor));
        let is_over = |share: &Share| !share.is_active() && share.spent <= floor;
        let over: Vec<ShareId> = self.all.iter().filter(|(_, s)| is_over(s)).map(|(id, _)| *id).collect();
        over.into_iter().for_each(|id| self.forget(id));
    }

    /// Weighted tokens that it has had; the least is served first.
    pub(super) fn spent(&self, share: ShareId) -> u64 {
        self.all[&share].spent
    }

    /// Its running sequences, oldest first.
    pub(super) fn running_after(&self, share: ShareId, after: Option<SeqId>) -> impl Iterator<Item = SeqId> + '_ {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.all[&share].running.range((from, Unbounded)).copied()
    }

    /// All shares with sequences in the batch.
    pub(super) fn with_running(&self) -> impl Iterator<Item = ShareId> + '_ {
        self.all.iter().filter(|(_, s)| !s.running.is_empty()).map(|(id, _)| *id)
    }

    /// Sequences that wait, of all shares.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Sequences that wait, by class.
    pub(super) fn waiting_by_class(&self) -> [usize; 3] {
        let mut counts = [0; 3];
        self.all.values().for_each(|share| counts[share.owner.class as usize] += share.waiting.len());
        counts
    }

    /// Who gets the next place: of the share with fewest places for its weight, the oldest. Among equals the share that has spent least.
    /// In a full batch places only change hands, and the share counts that would have fewest with one more.
    pub(super) fn next_to_start(&self, is_full: bool) -> Option<SeqId> {
        let waiting = self.all.values().filter_map(|share| {
            let load = share.load(share.running.len() + usize::from(is_full));
            share.waiting.first().map(|id| (load, share.spent, *id))
        });
        waiting.min().map(|(_, _, id)| id)
    }

    /// Whose place a sequence of `share` may take: the youngest of the share with most places for its weight, if that keeps at least as
    /// many as `share` then has. So no share loses its last place, and none takes it back at once. `gone` have lost theirs already.
    pub(super) fn place_for(&self, share: ShareId, gone: &[(ShareId, SeqId)]) -> Option<(ShareId, SeqId)> {
        let asking = &self.all[&share];
        let load = asking.load(asking.running.len() + 1);
        self.most_over(gone).filter(|(over, _, _)| *over >= load).map(|(_, id, share)| (share, id))
    }

    /// Who is put back when blocks run out: the youngest of the share with most places for its weight. Shares that have one place are
    /// equals, so the oldest sequence of all is never put back, and always comes to its end.
    pub(super) fn victim(&self) -> Option<SeqId> {
        self.most_over(&[]).map(|(_, id, _)| id)
    }

    /// By what a share holds beyond its first place, then by youth.
    fn most_over(&self, gone: &[(ShareId, SeqId)]) -> Option<(Load, SeqId, ShareId)> {
        let candidates = self.all.iter().filter_map(|(id, share)| {
            let gone = gone.iter().filter(|(of, _)| of == id).count();
            let youngest = share.running.iter().rev().nth(gone)?;
            Some((share.load(share.running.len() - gone - 1), *youngest, *id))
        });
        candidates.max()
    }

    fn share(&mut self, id: ShareId) -> &mut Share {
        self.all.get_mut(&id).expect("a share with sequences is known")
    }

    fn forget(&mut self, id: ShareId) {
        if let Some(share) = self.all.remove(&id) {
            self.by_owner.remove(&share.owner);
        }
    }

    /// Of those without work, forgets the one that has least to make up for.
    fn forget_one(&mut self) {
        let idle = self.all.iter().filter(|(_, s)| !s.is_active());
        if let Some(id) = idle.min_by_key(|(_, s)| s.spent).map(|(id, _)| *id) {
            self.forget(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(tenant: &str, class: Class) -> Owner {
        Owner { tenant: tenant.into(), class }
    }

    /// A step of 100 tokens for whoever has spent least.
    fn serve(shares: &mut Shares, among: &[ShareId]) -> usize {
        let i = (0..among.len()).min_by_key(|i| shares.spent(among[*i])).unwrap();
        shares.charge(among[i], 100);
        shares.settle();
        i
    }

    #[test]
    fn classes_share_eight_to_four_to_one() {
        let mut shares = Shares::new(100);
        let ids = Class::ALL.map(|class| shares.join(owner("a", class), SeqId(class as u64)));
        let mut had = [0; 3];
        (0..1300).for_each(|_| had[serve(&mut shares, &ids)] += 1);
        assert!((799..=801).contains(&had[0]) && (399..=401).contains(&had[1]), "{had:?}");
    }

    #[test]
    fn one_that_comes_goes_before_one_that_has_had_much_and_then_they_alternate() {
        let mut shares = Shares::new(100);
        let flood = shares.join(owner("flood", Class::Normal), SeqId(1));
        (0..100).for_each(|_| {
            serve(&mut shares, &[flood]);
        });
        let calm = shares.join(owner("calm", Class::Normal), SeqId(2));
        let first = (0..).take_while(|_| serve(&mut shares, &[flood, calm]) == 1).count();
        assert!((6..=10).contains(&first), "{first} steps in a row");
        let turns: usize = (0..100).map(|_| serve(&mut shares, &[flood, calm])).sum();
        assert!((49..=51).contains(&turns), "{turns} of 100");
    }

    #[test]
    fn an_endless_row_of_newcomers_does_not_keep_one_from_its_turn() {
        let mut shares = Shares::new(100);
        let old = shares.join(owner("old", Class::Normal), SeqId(0));
        (0..50).for_each(|_| {
            serve(&mut shares, &[old]);
        });
        for i in 1..1000 {
            let new = shares.join(owner(&format!("new {i}"), Class::High), SeqId(i));
            // whoever is old and as poor as the new one goes first
            if serve(&mut shares, &[old, new]) == 0 {
                return;
            }
            shares.leave(new, SeqId(i));
        }
        panic!("the old one starves");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_leaving_pays_no_debt() {
        let mut shares = Shares::new(100);
        let calm = shares.join(owner("calm", Class::Normal), SeqId(0));
        for i in 1..5000 {
            let id = shares.join(owner(&format!("t{i}"), Class::Normal), SeqId(i));
            shares.charge(id, 100);
            shares.leave(id, SeqId(i));
        }
        assert!(shares.all.len() <= REMEMBERED_MAX + 1);
        let greedy = shares.join(owner("greedy", Class::Normal), SeqId(9000));
        shares.charge(greedy, 100);
        shares.leave(greedy, SeqId(9000));
        let again = shares.join(owner("greedy", Class::Normal), SeqId(9001));
        assert!(shares.spent(again) > shares.spent(calm));
    }

    #[test]
    fn places_change_hands_only_towards_who_has_fewer() {
        let mut shares = Shares::new(100);
        let (a, b) = (owner("a", Class::Normal), owner("b", Class::Normal));
        let mut flood = ShareId(0);
        for i in 0..4 {
            flood = shares.join(a.clone(), SeqId(i));
            shares.start(flood, SeqId(i));
        }
        let calm = shares.join(b.clone(), SeqId(4));
        shares.join(b, SeqId(5));
        assert_eq!(shares.place_for(calm, &[]), Some((flood, SeqId(3))));
        assert_eq!(shares.place_for(flood, &[]), None);
        shares.put_back(flood, SeqId(3));
        shares.start(calm, SeqId(4));
        // three and one: one more change makes two and two
        assert_eq!(shares.place_for(calm, &[]), Some((flood, SeqId(2))));
        shares.put_back(flood, SeqId(2));
        shares.start(calm, SeqId(5));
        assert_eq!((shares.place_for(calm, &[]), shares.place_for(flood, &[])), (None, None));
        assert_eq!(shares.victim(), Some(SeqId(5)));
    }
}
