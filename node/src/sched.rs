//! Which tokens the next step computes. Pure: no clock, no device, no I/O; the plan is a plain value one can print.
//!
//! There is no prefill phase and no decode phase, only sequences with tokens to catch up on under a token budget. A sequence that
//! lacks one token is decoding and goes first; chunked prefill falls out of the rest. When blocks run out, the youngest sequence is
//! put back and later computed again from its tokens, which changes none of them.

use std::collections::VecDeque;

use crate::kv::{BLOCK_TOKENS, BlockHash, BlockId, KvPool};

/// One sequence within the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

/// Bounds of one step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most sequences in a batch.
    pub batch_size_max: usize,
    /// Most tokens in a step.
    pub batch_tokens_max: usize,
}

/// What a sequence asks of the steps that compute it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Terms {
    /// Logits after every token of the prompt, not only the last: no prefix cache, and small pieces.
    pub all_logits: bool,
    /// Which hidden states.
    pub states: States,
}

/// Which hidden states a sequence asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum States {
    /// None.
    #[default]
    None,
    /// After its last token.
    Last,
    /// After each: no prefix cache.
    All,
}

/// Most rows of a sequence that asks for all logits in one step: they take `V` numbers each.
const LOGIT_ROWS_MAX: usize = 32;

/// A sequence's tokens, and how far their keys and values are computed.
#[derive(Debug)]
pub struct Sequence {
    id: SeqId,
    terms: Terms,
    tokens: Vec<u32>,
    /// Tokens whose keys and values stand in the blocks.
    computed: usize,
    blocks: Vec<BlockId>,
    /// Hashes of the leading full blocks.
    sealed: Vec<BlockHash>,
}

impl Sequence {
    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// What it asks for.
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// What is found in the cache is not computed, so nothing can be read off it.
    fn uses_prefix_cache(&self) -> bool {
        !self.terms.all_logits && self.terms.states != States::All
    }

    /// Most of its tokens in one step.
    fn piece_max(&self) -> usize {
        if self.terms.all_logits { LOGIT_ROWS_MAX } else { usize::MAX }
    }

    /// All tokens, prompt first.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Where the keys and values stand, in order of position.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
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
    /// Whether the last one is the sequence's last, so that a next token is sampled after it.
    pub samples: bool,
}

/// What one step computes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// In the order of the batch.
    pub pieces: Vec<Piece>,
    /// Sequences put back for want of blocks.
    pub preempted: Vec<SeqId>,
    /// Tokens of newly admitted sequences that were looked up in the prefix cache.
    pub tokens_looked_up: usize,
    /// Tokens of newly admitted sequences whose keys and values came from the prefix cache.
    pub tokens_cached: usize,
}

impl Plan {
    /// Tokens in the step.
    pub fn tokens(&self) -> usize {
        self.pieces.iter().map(|p| p.len).sum()
    }
}

/// Who runs, who waits, and the block pool they share.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    kv: KvPool,
    /// Oldest first.
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
}

impl Scheduler {
    /// A scheduler over a pool of `blocks`.
    pub fn new(limits: Limits, blocks: usize) -> Self {
        Self { limits, kv: KvPool::new(blocks), running: Vec::new(), waiting: VecDeque::new() }
    }

    /// Adds a sequence at the end of the queue. `tokens` must not be empty, and the caller has checked that the whole sequence fits
    /// into the pool alone.
    pub fn add(&mut self, id: SeqId, tokens: Vec<u32>, terms: Terms) {
        debug_assert!(!tokens.is_empty(), "an empty sequence has nothing to compute");
        self.waiting.push_back(Sequence { id, terms, tokens, computed: 0, blocks: Vec::new(), sealed: Vec::new() });
    }

    /// Takes a sequence out, running or waiting; its blocks are free at once.
    pub fn remove(&mut self, id: SeqId) -> bool {
        if let Some(i) = self.running.iter().position(|s| s.id == id) {
            let mut sequence = self.running.remove(i);
            self.give_back(&mut sequence);
            return true;
        }
        let waiting = self.waiting.len();
        self.waiting.retain(|s| s.id != id);
        self.waiting.len() < waiting
    }

    /// Sequences in the batch.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for a place.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The pool's books, to look at.
    pub fn kv(&self) -> &KvPool {
        &self.kv
    }

    /// A running sequence.
    pub fn sequence(&self, id: SeqId) -> Option<&Sequence> {
        self.running.iter().find(|s| s.id == id)
    }

    /// Decides the next step, and takes the blocks it writes to.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        let mut budget = self.limits.batch_tokens_max;
        for id in self.in_order_of_service() {
            // an earlier turn of this loop may have preempted it
            let Some(i) = self.running.iter().position(|s| s.id == id) else { continue };
            let len = self.running[i].pending().min(budget).min(self.running[i].piece_max());
            if len > 0 && self.make_room(i, len, &mut plan, &mut budget) {
                budget -= len;
                self.schedule(id, len, &mut plan);
            }
        }
        if plan.preempted.is_empty() {
            self.admit(&mut plan, budget);
        }
        plan
    }

    /// Notes that the plan's tokens are computed, and seals the blocks that became full.
    pub fn advance(&mut self, plan: &Plan) {
        for piece in &plan.pieces {
            if let Some(sequence) = self.running.iter_mut().find(|s| s.id == piece.seq) {
                sequence.computed += piece.len;
                seal_full_blocks(&mut self.kv, sequence);
            }
        }
    }

    /// Appends a sampled token.
    pub fn push(&mut self, id: SeqId, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
            sequence.tokens.push(token);
        }
    }

    /// Decoding sequences first, then those catching up; each oldest first.
    fn in_order_of_service(&self) -> Vec<SeqId> {
        let (decoding, catching_up): (Vec<&Sequence>, Vec<&Sequence>) =
            self.running.iter().partition(|s| s.pending() == 1);
        decoding.into_iter().chain(catching_up).map(|s| s.id).collect()
    }

    fn schedule(&self, id: SeqId, len: usize, plan: &mut Plan) {
        let sequence = self.sequence(id).expect("a scheduled sequence runs");
        plan.pieces.push(Piece { seq: id, start: sequence.computed, len, samples: len == sequence.pending() });
    }

    /// Takes blocks for `len` more tokens of `running[i]`, putting back the youngest while there are none. False when that is itself.
    fn make_room(&mut self, i: usize, len: usize, plan: &mut Plan, budget: &mut usize) -> bool {
        let id = self.running[i].id;
        let needed = blocks_for(self.running[i].computed + len);
        while self.running[i].blocks.len() < needed {
            if let Some(block) = self.kv.allocate() {
                self.running[i].blocks.push(block);
                continue;
            }
            let victim = self.preempt_youngest();
            *budget += withdraw_piece(plan, victim);
            plan.preempted.push(victim);
            if victim == id {
                return false;
            }
        }
        true
    }

    fn preempt_youngest(&mut self) -> SeqId {
        let mut victim = self.running.pop().expect("blocks can only run out when something runs");
        self.give_back(&mut victim);
        let id = victim.id;
        self.waiting.push_front(victim);
        id
    }

    /// Lets waiting sequences in, in order, while the batch, the budget and the pool have room for their whole present length.
    fn admit(&mut self, plan: &mut Plan, mut budget: usize) {
        while budget > 0 && self.running.len() < self.limits.batch_size_max {
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            self.take_cached_prefix(&mut sequence);
            let wanted = blocks_for(sequence.tokens.len()) - sequence.blocks.len();
            // each running sequence may need a block soon; leaving one for each avoids preempting what was just let in
            if wanted + self.running.len() > self.kv.available() {
                self.give_back(&mut sequence);
                self.waiting.push_front(sequence);
                return;
            }
            plan.tokens_looked_up += if sequence.uses_prefix_cache() { sequence.tokens.len() } else { 0 };
            plan.tokens_cached += sequence.computed;
            let len = sequence.pending().min(budget).min(sequence.piece_max());
            for _ in sequence.blocks.len()..blocks_for(sequence.computed + len) {
                sequence.blocks.push(self.kv.allocate().expect("availability was checked"));
            }
            budget -= len;
            let id = sequence.id;
            self.running.push(sequence);
            self.schedule(id, len, plan);
        }
    }

    /// At least one token stays to be computed: its logits are what comes next.
    fn take_cached_prefix(&mut self, sequence: &mut Sequence) {
        if !sequence.uses_prefix_cache() {
            return;
        }
        let whole_blocks = (sequence.tokens.len() - 1) / BLOCK_TOKENS;
        let found = self.kv.take_prefix(&sequence.tokens, whole_blocks);
        (sequence.blocks, sequence.sealed) = found.into_iter().unzip();
        sequence.computed = sequence.blocks.len() * BLOCK_TOKENS;
    }

    /// Last block first, so that what stays cached longest is a prefix.
    fn give_back(&mut self, sequence: &mut Sequence) {
        for block in sequence.blocks.drain(..).rev() {
            self.kv.release(block);
        }
        sequence.sealed.clear();
        sequence.computed = 0;
    }
}

fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

fn seal_full_blocks(kv: &mut KvPool, sequence: &mut Sequence) {
    for i in sequence.sealed.len()..sequence.computed / BLOCK_TOKENS {
        let tokens = &sequence.tokens[i * BLOCK_TOKENS..(i + 1) * BLOCK_TOKENS];
        let hash = BlockHash::chain(sequence.sealed.last().copied(), tokens);
        kv.seal(sequence.blocks[i], hash);
        sequence.sealed.push(hash);
    }
}

/// Tokens that go back to the budget.
fn withdraw_piece(plan: &mut Plan, id: SeqId) -> usize {
    let Some(i) = plan.pieces.iter().position(|p| p.seq == id) else { return 0 };
    plan.pieces.remove(i).len
}

#[cfg(test)]
mod tests {
    use super::*;

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
        s.add(SeqId(1), vec![7; 5], Terms::default());
        assert_eq!(shape(&step(&mut s, 9)), [(1, 0, 5)]);
        s.add(SeqId(2), (0..70).collect(), Terms::default());
        assert_eq!(shape(&step(&mut s, 9)), [(1, 5, 1), (2, 0, 31)]);
        assert_eq!(shape(&step(&mut s, 9)), [(1, 6, 1), (2, 31, 31)]);
        let last = step(&mut s, 9);
        assert_eq!(shape(&last), [(1, 7, 1), (2, 62, 8)]);
        assert!(last.pieces[1].samples);
    }

    #[test]
    fn a_known_prefix_is_not_computed_again_but_its_last_token_is() {
        let mut s = scheduler(8, 512, 64);
        s.add(SeqId(1), (0..32).collect(), Terms::default());
        step(&mut s, 9);
        s.add(SeqId(2), (0..32).collect(), Terms::default());
        let plan = step(&mut s, 9);
        assert_eq!(shape(&plan), [(1, 32, 1), (2, 16, 16)]);
        assert_eq!(plan.tokens_cached, 16);
    }

    #[test]
    fn when_blocks_run_out_the_youngest_is_put_back_and_comes_again() {
        let mut s = scheduler(8, 512, 4);
        s.add(SeqId(1), vec![1; 30], Terms::default());
        s.add(SeqId(2), vec![2; 14], Terms::default());
        step(&mut s, 9);
        let mut preempted = Vec::new();
        for _ in 0..20 {
            preempted.extend(step(&mut s, 9).preempted);
        }
        assert_eq!(preempted, [SeqId(2)]);
        assert_eq!((s.running(), s.waiting()), (1, 1));
        assert!(s.remove(SeqId(1)));
        let again = step(&mut s, 9);
        assert_eq!(again.pieces[0].seq, SeqId(2));
        assert!(again.pieces[0].samples);
    }

    #[test]
    fn removing_frees_blocks_at_once_and_knows_who_was_there() {
        let mut s = scheduler(1, 512, 8);
        s.add(SeqId(1), vec![1; 20], Terms::default());
        s.add(SeqId(2), vec![1; 20], Terms::default());
        step(&mut s, 9);
        assert!(s.remove(SeqId(2)) && s.remove(SeqId(1)) && !s.remove(SeqId(1)));
        assert_eq!(s.kv().available(), 8);
    }
}
