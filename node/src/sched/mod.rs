//! Which tokens the next step computes. Pure: no clock, no device, no I/O; the plan is a plain value one can print.
//!
//! There is no prefill phase and no decode phase, only sequences with tokens to catch up on under a token budget. A step is planned in
//! three passes:
//! 1. **Admit.** A free place goes to the share (`share`) with fewest places for its weight. When the batch or the pool is full, such
//!    a share takes a place from the one with most: its youngest sequence is put back, and what it had computed stays in the prefix
//!    cache. What is let in has blocks for all its present tokens.
//! 2. **Decode.** Every running sequence that lacks one token gets it. When blocks run out, somebody is put back.
//! 3. **Catch up.** What is left of the budget goes to prompts in pieces, the share that has spent least first, within it the oldest.
//!
//! What several have in common is computed by one. Before the three passes, who still catches up takes full blocks that have become known
//! meanwhile in place of its own; and in the third, whose next block somebody else fills in this very step waits for it. So of many that
//! come at once with one beginning, one computes it, and each of the others no more than its own end. Who reads something off its rows
//! neither takes nor waits, but others may have its blocks.
//!
//! To a step that has nothing to catch up on, the caller may add guesses at the next tokens ([`Scheduler::propose`]), which are computed
//! as if they were known. They take what nobody else wants: the rest of the budget, and blocks while one is left for each running
//! sequence, given back when the guesses prove wrong. So nobody is put back for a guess. Only tokens that were really sampled count as
//! computed and are sealed into the prefix cache.
//!
//! Why everybody comes to an end: the oldest running sequence is never put back, in neither pass; it decodes in each step, and its share
//! gets its part of the budget. Who waits for a block waits for what is in the plan, and has it in the next step; when the one that was
//! to fill it is gone by then, it waits for the next or fills it itself. Nobody is passed by for want of blocks: when the next one to
//! let in does not fit, the others wait too. A place changes hands only towards a more even batch, so it does not change back, and blocks
//! run out only where somebody has grown.

mod sequence;
mod share;

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap, HashSet},
};

use crate::kv::{BlockHash, BlockId, KvPool};

pub use sequence::{Sequence, States, Terms};
pub use share::{Class, Owner};
use share::{ShareId, Shares};

/// Most rows of a step whose logits are asked for beside the newest tokens': they take `V` numbers each.
const LOGIT_ROWS_MAX: usize = 32;

/// One sequence within the engine: the smaller is the older. Ids grow with time, but those that began on another node come before all that
/// began here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// Bounds of one step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most sequences in a batch.
    pub batch_size_max: usize,
    /// Most tokens in a step; each sequence of the batch must have one.
    pub batch_tokens_max: usize,
}

/// A run of consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Whose tokens.
    pub seq: SeqId,
    /// Position of the first.
    pub start: usize,
    /// How many, at least one.
    pub len: usize,
    /// Whether the sequence's last is among them, so that a next token is sampled after it.
    pub samples: bool,
    /// How many of them, at the end, are guesses; what comes after each is sampled too, for as long as they are right.
    pub proposed: usize,
}

impl Piece {
    /// How many of its tokens are known to be the sequence's.
    pub fn known(&self) -> usize {
        self.len - self.proposed
    }
}

/// Why a sequence was put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The pool had no block left.
    Blocks,
    /// A share with fewer places took its place.
    Share,
}

/// What one step computes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// In the order of the batch.
    pub pieces: Vec<Piece>,
    /// Sequences put back.
    pub preempted: Vec<(SeqId, Cause)>,
    /// Tokens of newly admitted sequences that were looked up in the prefix cache.
    pub tokens_looked_up: usize,
    /// Tokens whose keys and values came from the prefix cache, when their sequence was let in or while it caught up. From one time that
    /// it is let in to the next each of them counts once at most, so they are never more than were looked up.
    pub tokens_cached: usize,
}

impl Plan {
    /// Tokens in the step.
    pub fn tokens(&self) -> usize {
        self.pieces.iter().map(|p| p.len).sum()
    }

    /// Of those, guesses.
    pub fn proposed(&self) -> usize {
        self.pieces.iter().map(|p| p.proposed).sum()
    }

    /// Whether each sequence in it computes no more than its last token, and guesses.
    pub fn only_decodes(&self) -> bool {
        self.pieces.iter().all(|p| p.samples && p.known() == 1)
    }
}

/// Who runs, who waits, and the block pool they share.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    kv: KvPool,
    sequences: HashMap<SeqId, Sequence>,
    /// Oldest first.
    running: BTreeSet<SeqId>,
    shares: Shares,
    /// Scratch of one step.
    decoding: Vec<SeqId>,
    /// Blocks that the step being planned fills; scratch too.
    filled: HashSet<BlockHash>,
}

/// How a waiting sequence gets in.
struct Room {
    /// The blocks of its prefix that are there.
    found: Vec<BlockId>,
    /// Who must be put back for it.
    gone: Vec<(ShareId, SeqId)>,
}

/// Whose turn it is to catch up: what the share has spent, its next sequence, and the share. The smallest goes first.
type Turn = Reverse<(u64, SeqId, ShareId)>;

impl Scheduler {
    /// A scheduler over a pool of `blocks`. A batch never has more sequences than a step has tokens.
    pub fn new(limits: Limits, blocks: usize) -> Self {
        let limits = Limits { batch_size_max: limits.batch_size_max.min(limits.batch_tokens_max), ..limits };
        let shares = Shares::new(limits.batch_tokens_max);
        let (sequences, running, decoding, filled) = (HashMap::new(), BTreeSet::new(), Vec::new(), HashSet::new());
        Self { limits, kv: KvPool::new(blocks), sequences, running, shares, decoding, filled }
    }

    /// Adds a sequence, which waits until it is let in. `id` must be new, `tokens` must not be empty, and the caller has checked that the
    /// whole sequence fits into the pool alone.
    pub fn add(&mut self, id: SeqId, tokens: Vec<u32>, terms: Terms, owner: Owner) {
        debug_assert!(!tokens.is_empty(), "an empty sequence has nothing to compute");
        let share = self.shares.join(owner, id);
        self.sequences.insert(id, Sequence::new(share, tokens, terms));
    }

    /// Takes a sequence out, running or waiting; its blocks are free at once.
    pub fn remove(&mut self, id: SeqId) -> bool {
        let Some(mut sequence) = self.sequences.remove(&id) else { return false };
        sequence.give_back(&mut self.kv);
        self.running.remove(&id);
        self.shares.leave(sequence.share, id);
        true
    }

    /// Sequences in the batch.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for a place.
    pub fn waiting(&self) -> usize {
        self.shares.waiting()
    }

    /// Sequences that wait, in the order of [`Class::ALL`].
    pub fn waiting_by_class(&self) -> [usize; 3] {
        self.shares.waiting_by_class()
    }

    /// The pool's books, to look at.
    pub fn kv(&self) -> &KvPool {
        &self.kv
    }

    /// A running sequence.
    pub fn sequence(&self, id: SeqId) -> Option<&Sequence> {
        self.sequences.get(&id).filter(|s| s.runs)
    }

    /// Tokens of a sequence that are still to be computed, whether it runs or waits.
    pub fn pending(&self, id: SeqId) -> usize {
        self.sequences.get(&id).map_or(0, Sequence::pending)
    }

    /// Decides the next step, and takes the blocks it writes to.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        self.reuse(&mut plan);
        self.admit(&mut plan);
        self.decode(&mut plan);
        self.catch_up(&mut plan);
        self.shares.settle();
        plan
    }

    /// Most guesses that can be added to a step.
    pub fn room_for_proposals(&self, plan: &Plan) -> usize {
        let rows = if plan.only_decodes() { LOGIT_ROWS_MAX - plan.proposed() } else { 0 };
        rows.min(self.limits.batch_tokens_max - plan.tokens())
    }

    /// Adds guesses at what follows the last token of a sequence that decodes in this step: as many of `tokens` as there is room for,
    /// which is returned. At most once for a sequence and step.
    pub fn propose(&mut self, plan: &mut Plan, id: SeqId, tokens: &[u32]) -> usize {
        let room = self.room_for_proposals(plan);
        let Some(piece) = plan.pieces.iter_mut().find(|piece| piece.seq == id) else { return 0 };
        let spare = self.kv.available().saturating_sub(self.running.len());
        let sequence = self.sequences.get_mut(&id).expect("a planned sequence is known");
        let count = tokens.len().min(room).min(sequence.proposable(spare));
        sequence.propose(&tokens[..count], &mut self.kv);
        piece.proposed += count;
        piece.len += count;
        self.shares.charge(sequence.share, count);
        count
    }

    /// Notes that the plan's tokens are computed, and seals the blocks that became full. Guesses do not count before they are pushed.
    pub fn advance(&mut self, plan: &Plan) {
        for piece in &plan.pieces {
            if let Some(sequence) = self.sequences.get_mut(&piece.seq) {
                sequence.advance(piece.known(), &mut self.kv);
            }
        }
    }

    /// Appends a sampled token; of a sequence with guesses all that were sampled, in order, until one is not as it was guessed. Follows
    /// [`advance`](Self::advance).
    pub fn push(&mut self, id: SeqId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.push(token, &mut self.kv);
        }
    }

    /// Gives those who catch up what has become known since they were let in. It comes first, while what the last step computed is surely
    /// still there.
    fn reuse(&mut self, plan: &mut Plan) {
        for id in &self.running {
            let sequence = self.sequences.get_mut(id).expect("a running sequence is known");
            if sequence.pending() > 1 {
                let found = self.kv.find(sequence.findable());
                plan.tokens_cached += sequence.reuse(found, &mut self.kv);
            }
        }
    }

    /// Lets waiting sequences in until the next one has no room. It is not passed by, so it gets what becomes free.
    fn admit(&mut self, plan: &mut Plan) {
        while let Some(id) = self.shares.next_to_start(self.running.len() >= self.limits.batch_size_max) {
            let Some(Room { found, gone }) = self.room_for(id) else { return };
            gone.into_iter().for_each(|(_, victim)| self.put_back(victim, Cause::Share, plan));
            self.start(id, found, plan);
        }
    }

    /// None when there is no room, and nobody who could be put back would make enough of it.
    fn room_for(&mut self, id: SeqId) -> Option<Room> {
        let sequence = self.known(id);
        let (share, wanted) = (sequence.share, sequence.blocks_wanted());
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
        let found = self.kv.find(sequence.findable());
        let idle = found.iter().filter(|block| self.kv.references(**block) == 0).count();
        let (mut available, mut running) = (self.kv.available() - idle, self.running.len());
        let mut gone = Vec::new();
        // each running sequence may need a block soon; leaving one for each avoids putting back what was just let in
        while running >= self.limits.batch_size_max || wanted - found.len() + running > available {
            let victim = self.shares.place_for(share, &gone)?;
            available += self.freed_by(victim.1, &found);
            running -= 1;
            gone.push(victim);
        }
        Some(Room { found, gone })
    }

    /// Blocks that nobody uses once a running sequence is put back; those in `found` are about to be used again.
    fn freed_by(&self, id: SeqId, found: &[BlockId]) -> usize {
        let blocks = self.known(id).blocks().iter().enumerate();
        blocks.filter(|(i, block)| self.kv.references(**block) == 1 && found.get(*i) != Some(*block)).count()
    }

    fn start(&mut self, id: SeqId, found: Vec<BlockId>, plan: &mut Plan) {
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
        plan.tokens_looked_up += if sequence.uses_prefix_cache() { sequence.tokens().len() } else { 0 };
        plan.tokens_cached += sequence.reuse(found, &mut self.kv);
        for _ in sequence.blocks.len()..sequence.blocks_wanted() {
            sequence.blocks.push(self.kv.allocate().expect("availability was checked"));
        }
        sequence.runs = true;
        self.shares.start(sequence.share, id);
        self.running.insert(id);
    }

    fn decode(&mut self, plan: &mut Plan) {
        let mut decoding = std::mem::take(&mut self.decoding);
        decoding.extend(self.running.iter().filter(|id| self.known(**id).pending() == 1));
        for id in decoding.drain(..) {
            // an earlier turn of this loop may have put it back
            if self.running.contains(&id) && self.grow(id, plan) {
                self.schedule(id, 1, plan);
            }
        }
        self.decoding = decoding;
    }

    fn catch_up(&mut self, plan: &mut Plan) {
        let first = |share| self.turn(share, None);
        let mut turns: BinaryHeap<Turn> = self.shares.with_running().filter_map(first).collect();
        if turns.is_empty() {
            return;
        }
        self.filled.clear();
        plan.pieces.iter().for_each(|piece| self.note_filled(piece.seq, piece.len));
        let mut budget = self.limits.batch_tokens_max - plan.tokens();
        let mut logit_rows = LOGIT_ROWS_MAX;
        while budget > 0
            && let Some(Reverse((_, id, share))) = turns.pop()
        {
            let sequence = self.known(id);
            let all_logits = sequence.terms().all_logits;
            let len = sequence.pending().min(budget).min(if all_logits { logit_rows } else { usize::MAX });
            if len > 0 && !self.next_is_filled(id) {
                budget -= len;
                logit_rows -= if all_logits { len } else { 0 };
                self.note_filled(id, len);
                self.schedule(id, len, plan);
            }
            turns.extend(self.turn(share, Some(id)));
        }
    }

    /// Notes which blocks a sequence's next `len` tokens fill.
    fn note_filled(&mut self, id: SeqId, len: usize) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is known");
        self.filled.extend(sequence.filled_by(len));
    }

    /// Whether this step fills a sequence's next block for somebody else, so that it is found in the next one.
    fn next_is_filled(&mut self, id: SeqId) -> bool {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is known");
        sequence.findable().first().is_some_and(|next| self.filled.contains(next))
    }

    /// A share's next turn to catch up, with its oldest sequence after `after` that has more than one token to compute.
    fn turn(&self, share: ShareId, after: Option<SeqId>) -> Option<Turn> {
        let mut running = self.shares.running_after(share, after);
        let id = running.find(|id| self.known(*id).pending() > 1)?;
        Some(Reverse((self.shares.spent(share), id, share)))
    }

    fn schedule(&mut self, id: SeqId, len: usize, plan: &mut Plan) {
        let sequence = self.known(id);
        let samples = len == sequence.pending();
        plan.pieces.push(Piece { seq: id, start: sequence.computed, len, samples, proposed: 0 });
        self.shares.charge(sequence.share, len);
    }

    /// Takes a block for a sequence's newest token where it needs one, putting others back while there is none. False when that is
    /// itself.
    fn grow(&mut self, id: SeqId, plan: &mut Plan) -> bool {
        while self.known(id).blocks.len() < self.known(id).blocks_wanted() {
            if let Some(block) = self.kv.allocate() {
                self.sequences.get_mut(&id).expect("a running sequence is known").blocks.push(block);
                continue;
            }
            let victim = self.shares.victim().expect("blocks can only run out when something runs");
            self.put_back(victim, Cause::Blocks, plan);
            if victim == id {
                return false;
            }
        }
        true
    }

    /// Takes a running sequence's place and blocks; it waits again, and nothing of it is in the plan.
    fn put_back(&mut self, id: SeqId, cause: Cause, plan: &mut Plan) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is known");
        sequence.give_back(&mut self.kv);
        sequence.runs = false;
        let share = sequence.share;
        self.running.remove(&id);
        self.shares.put_back(share, id);
        plan.preempted.push((id, cause));
        if let Some(i) = plan.pieces.iter().position(|piece| piece.seq == id) {
            self.shares.refund(share, plan.pieces.remove(i).len);
        }
    }

    fn known(&self, id: SeqId) -> &Sequence {
        &self.sequences[&id]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_began_elsewhere_goes_before_those_that_wait_here() {
        let mut s = scheduler(1, 64, 64);
        (10..13).for_each(|i| s.add(SeqId(i), vec![i as u32; 5], Terms::default(), Owner::default()));
        step(&mut s, 9);
        s.add(SeqId(0), vec![1; 5], Terms::default(), Owner::default());
        assert_eq!(step(&mut s, 9).pieces[0].seq, SeqId(10), "what runs keeps its place");
        s.remove(SeqId(10));
        assert_eq!(step(&mut s, 9).pieces[0].seq, SeqId(0));
    }

    fn scheduler(batch_size_max: usize, batch_tokens_max: usize, blocks: usize) -> Scheduler {
        Scheduler::new(Limits { batch_size_max, batch_tokens_max }, blocks)
    }

    fn step(s: &mut Scheduler, token: u32) -> Plan {
        let plan = s.plan();
        s.advance(&plan);
        plan.pieces.iter().filter(|p| p.samples).for_each(|p| s.push(p.seq, token));
        assert!(s.kv().is_balanced());
        plan
    }

    fn shape(plan: &Plan) -> Vec<(u64, usize, usize)> {
        plan.pieces.iter().map(|p| (p.seq.0, p.start, p.len)).collect()
    }

    #[test]
    fn decoding_goes_first_and_a_long_prompt_comes_in_pieces() {
        let mut s = scheduler(8, 32, 64);
        s.add(SeqId(1), vec![7; 5], Terms::default(), Owner::default());
        assert_eq!(shape(&step(&mut s, 9)), [(1, 0, 5)]);
        s.add(SeqId(2), (0..70).collect(), Terms::default(), Owner::default());
        assert_eq!(shape(&step(&mut s, 9)), [(1, 5, 1), (2, 0, 31)]);
        assert_eq!(shape(&step(&mut s, 9)), [(1, 6, 1), (2, 31, 31)]);
        let last = step(&mut s, 9);
        assert_eq!(shape(&last), [(1, 7, 1), (2, 62, 8)]);
        assert!(last.pieces[1].samples);
    }

    #[test]
    fn a_known_prefix_is_not_computed_again_but_its_last_token_is() {
        let mut s = scheduler(8, 512, 64);
        s.add(SeqId(1), (0..32).collect(), Terms::default(), Owner::default());
        step(&mut s, 9);
        s.add(SeqId(2), (0..32).collect(), Terms::default(), Owner::default());
        let plan = step(&mut s, 9);
        assert_eq!(shape(&plan), [(1, 32, 1), (2, 16, 16)]);
        assert_eq!(plan.tokens_cached, 16);
    }

    /// `shared` tokens that all prompts begin with, and `own` of nobody else.
    fn prompt(id: u64, shared: u32, own: u32) -> Vec<u32> {
        (0..shared).chain((0..own).map(|i| 1000 + 100 * id as u32 + i)).collect()
    }

    /// Steps until each has its first token, and the tokens that they computed of the prompts.
    fn until_all_sampled(s: &mut Scheduler, count: usize) -> (usize, usize) {
        let (mut steps, mut computed, mut sampled) = (0, 0, HashSet::new());
        while sampled.len() < count {
            let plan = step(s, 9);
            steps += 1;
            computed += plan.pieces.iter().filter(|p| !sampled.contains(&p.seq)).map(|p| p.len).sum::<usize>();
            sampled.extend(plan.pieces.iter().filter(|p| p.samples).map(|p| p.seq));
        }
        (steps, computed)
    }

    #[test]
    fn of_many_that_come_at_once_with_one_beginning_each_computes_its_own_end() {
        for (budget, steps) in [(256, 6), (2048, 2)] {
            let mut s = scheduler(32, budget, 32 * 34);
            let tenants = ["one", "two", "three"];
            (0..32).for_each(|i| s.add(SeqId(i), prompt(i, 500, 20), Terms::default(), owner(tenants[i as usize % 3])));
            // 31 blocks are common to all; after them each has 24 tokens, of which 4 are common, but fill no block
            assert_eq!(
                until_all_sampled(&mut s, 32),
                (steps, 496 + 32 * 24),
                "of {} tokens, {budget} a step",
                32 * 520
            );
        }
    }

    #[test]
    fn who_waits_for_a_block_gives_its_turn_to_others_and_is_not_charged() {
        let mut s = scheduler(8, 100, 64);
        s.add(SeqId(1), prompt(1, 64, 6), Terms::default(), owner("a"));
        s.add(SeqId(2), prompt(2, 64, 6), Terms::default(), owner("b"));
        s.add(SeqId(3), vec![7; 90], Terms::default(), owner("b"));
        assert_eq!(shape(&step(&mut s, 9)), [(1, 0, 70), (3, 0, 30)]);
        let plan = step(&mut s, 9);
        assert_eq!((shape(&plan), plan.tokens_cached), (vec![(1, 70, 1), (2, 64, 6), (3, 30, 60)], 64));
    }

    #[test]
    fn when_the_one_that_was_waited_for_is_gone_another_computes() {
        let mut s = scheduler(8, 100, 64);
        (1..4).for_each(|i| s.add(SeqId(i), prompt(i, 64, 6), Terms::default(), Owner::default()));
        let plan = s.plan();
        assert_eq!(shape(&plan), [(1, 0, 70)]);
        assert!(s.remove(SeqId(1)));
        s.advance(&plan);
        assert_eq!(shape(&step(&mut s, 9)), [(2, 0, 70)]);
        assert_eq!(shape(&step(&mut s, 9)), [(2, 70, 1), (3, 64, 6)]);
    }

    #[test]
    fn a_block_begun_is_left_for_the_same_one_filled_by_another() {
        let mut s = scheduler(8, 24, 64);
        s.add(SeqId(1), prompt(1, 64, 6), Terms::default(), owner("a"));
        assert_eq!(shape(&step(&mut s, 9)), [(1, 0, 24)]);
        // the newcomer has had less, and fills what the other has begun
        s.add(SeqId(2), prompt(2, 64, 6), Terms::default(), owner("b"));
        assert_eq!(shape(&step(&mut s, 9)), [(2, 16, 24)]);
        let (used, plan) = (s.kv().counts().referenced, s.plan());
        assert_eq!((plan.pieces[0].start, plan.tokens_cached), (32, 8), "{plan:?}");
        assert_eq!(s.kv().counts().referenced, used - 1, "the block that was begun is free");
    }

    #[test]
    fn what_is_read_off_is_computed_and_others_may_have_it() {
        for terms in [Terms { all_logits: true, ..Terms::default() }, Terms { states: States::All, ..Terms::default() }]
        {
            let mut s = scheduler(8, 512, 64);
            s.add(SeqId(1), prompt(1, 32, 0), Terms::default(), Owner::default());
            s.add(SeqId(2), prompt(2, 32, 0), terms, Owner::default());
            assert_eq!(shape(&step(&mut s, 9)), [(1, 0, 32), (2, 0, 32)]);
            // of two blocks with the same content one is kept
            assert_eq!(s.kv().counts().referenced, 2);
            s.add(SeqId(3), prompt(3, 40, 0), terms, Owner::default());
            s.add(SeqId(4), prompt(4, 40, 0), Terms::default(), Owner::default());
            let plan = step(&mut s, 9);
            assert!(shape(&plan).contains(&(4, 32, 8)), "{plan:?}");
            assert!(plan.pieces.iter().any(|p| p.seq == SeqId(3) && p.start == 0), "{plan:?}");
        }
    }

    #[test]
    fn when_blocks_run_out_the_youngest_is_put_back_and_comes_again() {
        let mut s = scheduler(8, 512, 4);
        s.add(SeqId(1), vec![1; 30], Terms::default(), Owner::default());
        s.add(SeqId(2), vec![2; 14], Terms::default(), Owner::default());
        step(&mut s, 9);
        let mut preempted = Vec::new();
        for _ in 0..20 {
            preempted.extend(step(&mut s, 9).preempted);
        }
        assert_eq!(preempted, [(SeqId(2), Cause::Blocks)]);
        assert_eq!((s.running(), s.waiting()), (1, 1));
        assert!(s.remove(SeqId(1)));
        let again = step(&mut s, 9);
        assert_eq!(again.pieces[0].seq, SeqId(2));
        assert!(again.pieces[0].samples);
    }

    fn owner(tenant: &str) -> Owner {
        Owner { tenant: tenant.into(), class: Class::Normal }
    }

    #[test]
    fn a_newcomer_gets_a_place_in_a_full_batch_and_whoever_lost_it_comes_again() {
        let mut s = scheduler(4, 64, 64);
        (0..9).for_each(|i| s.add(SeqId(i), vec![i as u32; 33], Terms::default(), owner("flood")));
        (0..6).for_each(|_| drop(step(&mut s, 9)));
        assert_eq!((s.running(), s.waiting()), (4, 5));
        s.add(SeqId(9), vec![99; 20], Terms::default(), owner("calm"));
        let plan = step(&mut s, 9);
        assert_eq!(plan.preempted, [(SeqId(3), Cause::Share)]);
        assert!(plan.pieces.iter().any(|p| p.seq == SeqId(9) && p.samples), "{plan:?}");
        // two places are not taken from two who have three, and nobody takes one back
        s.add(SeqId(10), vec![98; 20], Terms::default(), owner("calm"));
        assert_eq!(step(&mut s, 9).preempted, [(SeqId(2), Cause::Share)]);
        s.add(SeqId(11), vec![97; 20], Terms::default(), owner("calm"));
        (0..5).for_each(|_| assert_eq!(step(&mut s, 9).preempted, []));
        // the older of the two that lost their places is the first to come back, and finds what it had computed
        assert!(s.remove(SeqId(0)));
        let back = step(&mut s, 9);
        assert!(back.tokens_cached >= 32 && back.pieces.iter().any(|p| p.seq == SeqId(2)), "{back:?}");
    }

    #[test]
    fn a_full_pool_makes_room_for_a_newcomer_too_but_not_in_vain() {
        let mut s = scheduler(8, 64, 9);
        (0..2).for_each(|i| s.add(SeqId(i), vec![i as u32; 60], Terms::default(), owner("flood")));
        (0..3).for_each(|_| drop(step(&mut s, 9)));
        // the pool could hold it beside one of the two
        s.add(SeqId(2), vec![7; 48], Terms::default(), owner("calm"));
        assert_eq!(step(&mut s, 9).preempted, [(SeqId(1), Cause::Share)]);
        assert_eq!((s.running(), s.waiting()), (2, 1));
        // one that would not even fit then takes nobody's place
        s.add(SeqId(3), vec![8; 100], Terms::default(), owner("third"));
        assert_eq!(step(&mut s, 9).preempted, []);
    }

    #[test]
    fn blocks_that_the_newcomer_begins_with_are_not_counted_as_freed() {
        let mut s = scheduler(8, 64, 9);
        let prompt = |shared: u32, len: u32| (0..len).map(|i| if i < shared { i } else { 100 + i }).collect();
        s.add(SeqId(0), vec![1; 60], Terms::default(), owner("flood"));
        s.add(SeqId(1), prompt(48, 60), Terms::default(), owner("flood"));
        (0..3).for_each(|_| drop(step(&mut s, 9)));
        // one block is free, and of the four of the second three are its own beginning: two are not enough for its other three
        s.add(SeqId(2), prompt(48, 96), Terms::default(), owner("calm"));
        assert_eq!(step(&mut s, 9).preempted, []);
        assert!(s.remove(SeqId(0)));
        assert_eq!(step(&mut s, 9).preempted, []);
        assert_eq!(s.running(), 2);
    }

    #[test]
    fn what_is_left_of_a_step_goes_to_who_has_had_least() {
        let mut s = scheduler(8, 64, 256);
        s.add(SeqId(0), vec![1; 1000], Terms::default(), owner("flood"));
        (0..4).for_each(|_| drop(step(&mut s, 9)));
        s.add(SeqId(1), vec![2; 100], Terms::default(), owner("calm"));
        assert_eq!(shape(&step(&mut s, 9)), [(1, 0, 64)]);
        assert_eq!(shape(&step(&mut s, 9)), [(1, 64, 36), (0, 256, 28)]);
    }

    /// A step with guesses for one sequence, after which `sampled` comes.
    fn guess(s: &mut Scheduler, id: u64, guesses: &[u32], sampled: &[u32]) -> usize {
        let mut plan = s.plan();
        let count = s.propose(&mut plan, SeqId(id), guesses);
        assert_eq!(s.sequence(SeqId(id)).unwrap().proposed(), &guesses[..count]);
        s.advance(&plan);
        sampled.iter().for_each(|token| s.push(SeqId(id), *token));
        assert!(s.kv().is_balanced() && s.sequence(SeqId(id)).unwrap().proposed().is_empty());
        count
    }

    #[test]
    fn of_guesses_only_those_that_came_true_count_as_computed() {
        let mut s = scheduler(8, 64, 16);
        s.add(SeqId(1), vec![7; 30], Terms::default(), Owner::default());
        step(&mut s, 9);
        let free = s.kv().available();
        // the 31st token stands in the second block; the guesses reach into a third, which is given back when they were wrong
        assert_eq!(guess(&mut s, 1, &[1, 2, 3, 4], &[5]), 4);
        assert_eq!((s.pending(SeqId(1)), s.kv().available()), (1, free));
        assert_eq!(s.plan().pieces[0].start, 31);
        assert_eq!(guess(&mut s, 1, &[1, 2, 3, 4], &[1, 2, 8]), 4);
        assert_eq!((s.pending(SeqId(1)), s.kv().available()), (1, free - 1));
        assert_eq!(guess(&mut s, 1, &[1, 2], &[1, 2, 3]), 2);
        assert_eq!(s.plan().pieces[0].start, 37);
        // what was guessed right is found as what was computed
        let tokens = s.sequence(SeqId(1)).unwrap().tokens().to_vec();
        s.add(SeqId(2), tokens, Terms::default(), Owner::default());
        assert_eq!(s.plan().tokens_cached, 32);
    }

    #[test]
    fn guesses_take_what_nobody_else_wants() {
        let mut s = scheduler(8, 8, 4);
        s.add(SeqId(1), vec![1; 5], Terms::default(), Owner::default());
        s.add(SeqId(2), vec![2; 3], Terms { all_logits: true, ..Terms::default() }, Owner::default());
        step(&mut s, 9);
        // where something is read off a sequence's rows there are none, and together they keep within the budget
        assert_eq!(guess(&mut s, 2, &[1; 9], &[9]), 0);
        (0..2).for_each(|_| s.push(SeqId(1), 9));
        assert_eq!(guess(&mut s, 1, &[1; 9], &[9]), 0, "two tokens are to be caught up on");
        s.push(SeqId(2), 9);
        step(&mut s, 9);
        assert_eq!(guess(&mut s, 1, &[1; 9], &[9]), 6);
        s.push(SeqId(2), 9);
        // a third sequence waits for a block, and the two that run may need one each: there is none for a guess
        s.add(SeqId(3), vec![3; 8], Terms::default(), Owner::default());
        (0..3).for_each(|_| drop(step(&mut s, 9)));
        let tokens = s.sequence(SeqId(1)).unwrap().tokens().len();
        assert_eq!(guess(&mut s, 1, &[1; 9], &[9]), (16 - tokens).min(5));
    }

    #[test]
    fn removing_frees_blocks_at_once_and_knows_who_was_there() {
        let mut s = scheduler(1, 512, 8);
        s.add(SeqId(1), vec![1; 20], Terms::default(), Owner::default());
        s.add(SeqId(2), vec![1; 20], Terms::default(), Owner::default());
        step(&mut s, 9);
        assert!(s.remove(SeqId(2)) && s.remove(SeqId(1)) && !s.remove(SeqId(1)));
        assert_eq!(s.kv().available(), 8);
    }
}
