//! A second, smaller model that guesses where a sequence's own text says nothing (Leviathan et al. 2023, arXiv:2211.17192). It draws its
//! tokens with the numbers that the model itself will draw with, so that both choose alike where they think alike. What it guesses is
//! judged as any guess is: it can make an answer faster, never another one.
//!
//! It keeps keys and values of its own. A sequence that it has not seen, or not for a while, is caught up on within a step's budget, and
//! while that takes there are no guesses for it. When its blocks run out, the sequence it has not drafted for longest makes room.

use std::{collections::HashMap, time::Instant};

use crate::{
    batch::Batch,
    kv::{BLOCK_TOKENS, BlockId, KvPool},
    model::{Capacity, Model},
    sched::SeqId,
    speculate::{Cost, DRAFTED_MAX},
};

/// A loaded draft model, of the vocabulary of the model that it drafts for.
pub struct Draft {
    /// The model.
    pub model: Box<dyn Model>,
    /// What it was loaded for.
    pub capacity: Capacity,
}

/// The draft model at work.
pub(super) struct Drafter {
    model: Box<dyn Model>,
    capacity: Capacity,
    kv: KvPool,
    known: HashMap<SeqId, Known>,
    batch: Batch,
    clock: u64,
    cost: Cost,
}

/// What stands in a sequence's blocks.
#[derive(Default)]
struct Known {
    /// Whose keys and values; guesses among them, which may have proved wrong since.
    tokens: Vec<u32>,
    blocks: Vec<BlockId>,
    used: u64,
}

/// A sequence to draft for, and all its tokens.
pub(super) struct Wish<'a> {
    pub(super) id: SeqId,
    pub(super) tokens: &'a [u32],
}

/// Guesses for one sequence.
pub(super) type Drafted = (SeqId, Vec<u32>);

impl Drafter {
    pub(super) fn new(Draft { model, capacity }: Draft) -> Self {
        let (kv, batch, cost) = (KvPool::new(capacity.blocks), Batch::default(), Cost::default());
        Self { model, capacity, kv, known: HashMap::new(), batch, clock: 0, cost }
    }

    /// What a step of the draft model costs; none before the first one.
    pub(super) fn cost(&self) -> Option<&Cost> {
        self.cost.is_measured().then_some(&self.cost)
    }

    /// Forgets a sequence.
    pub(super) fn remove(&mut self, id: SeqId) {
        if let Some(known) = self.known.remove(&id) {
            known.blocks.into_iter().for_each(|block| self.kv.release(block));
        }
    }

    /// `count` guesses for each sequence that is caught up on within the budget. `choose` takes a sequence, how many tokens were guessed
    /// for it before, and logits `[V]`.
    pub(super) fn draft(
        &mut self,
        wishes: &[Wish<'_>],
        count: usize,
        mut choose: impl FnMut(SeqId, usize, &[f32]) -> u32,
        beat: &dyn Fn(),
    ) -> Vec<Drafted> {
        self.clock += 1;
        for wish in wishes {
            if let Some(known) = self.known.get_mut(&wish.id) {
                known.used = self.clock;
            }
        }
        let mut drafted = self.catch_up(wishes, count);
        for nth in 0..count {
            if nth > 0 {
                self.batch.clear();
                drafted.iter().for_each(|(id, guesses)| self.push(*id, &guesses[nth - 1..nth]));
            }
            if !self.batch.tokens.is_empty() {
                self.forward(&mut drafted, |id, logits| choose(id, nth, logits), beat);
            }
        }
        drafted
    }

    /// Lays out what the draft model lacks, as far as the budget goes; gives those that lack nothing after it.
    fn catch_up(&mut self, wishes: &[Wish<'_>], count: usize) -> Vec<Drafted> {
        self.batch.clear();
        let mut ready = Vec::with_capacity(wishes.len());
        for Wish { id, tokens } in wishes {
            let budget = self.capacity.batch_tokens_max - self.batch.tokens.len();
            if budget == 0 || !self.can_read(tokens, count) || !self.make_room(*id, tokens.len() + count) {
                continue;
            }
            let known = self.known.get_mut(id).expect("room was made for it");
            // at least one token is computed: its logits are what comes next
            let same = known.tokens.iter().zip(&tokens[..tokens.len() - 1]).take_while(|(a, b)| a == b).count();
            known.tokens.truncate(same);
            let end = tokens.len().min(same + budget);
            self.push(*id, &tokens[same..end]);
            if end == tokens.len() {
                ready.push((*id, Vec::with_capacity(count)));
            } else {
                self.batch.logit_rows.pop();
            }
        }
        ready
    }

    /// Whether it has weights for all the tokens, and positions for them and `count` more.
    fn can_read(&self, tokens: &[u32], count: usize) -> bool {
        tokens.len() + count <= self.capacity.context
            && tokens.iter().all(|token| (*token as usize) < self.model.vocab())
    }

    /// Takes blocks for `tokens` of a sequence, from those not drafted for longest when none is free. False when all are in use now.
    fn make_room(&mut self, id: SeqId, tokens: usize) -> bool {
        let clock = self.clock;
        self.known.entry(id).or_default().used = clock;
        let wanted = tokens.div_ceil(BLOCK_TOKENS);
        while self.known[&id].blocks.len() < wanted {
            if let Some(block) = self.kv.allocate() {
                self.known.entry(id).or_default().blocks.push(block);
                continue;
            }
            let unused = self.known.iter().filter(|(_, known)| known.used < clock && !known.blocks.is_empty());
            let Some(oldest) = unused.min_by_key(|(_, known)| known.used).map(|(id, _)| *id) else { return false };
            self.remove(oldest);
        }
        true
    }

    /// Appends tokens of a sequence to the batch, and asks for the logits after them.
    fn push(&mut self, id: SeqId, tokens: &[u32]) {
        let known = self.known.get_mut(&id).expect("a drafted sequence is known");
        let blocks: Vec<u32> = known.blocks.iter().map(|block| block.0).collect();
        self.batch.push(tokens, known.tokens.len(), &blocks);
        self.batch.logit_rows.push(self.batch.tokens.len() as u32 - 1);
        known.tokens.extend_from_slice(tokens);
    }

    /// Computes the batch; those drafted for get a guess more, in its order.
    fn forward(&mut self, drafted: &mut [Drafted], mut choose: impl FnMut(SeqId, &[f32]) -> u32, beat: &dyn Fn()) {
        let (began, vocab, rows) = (Instant::now(), self.model.vocab(), self.batch.tokens.len());
        let output = self.model.forward(&self.batch, beat);
        for ((id, guesses), logits) in drafted.iter_mut().zip(output.logits.chunks_exact(vocab)) {
            guesses.push(choose(*id, logits));
        }
        // catching up on a prompt says little about what a guess costs
        if rows <= drafted.len() * (DRAFTED_MAX + 1) {
            self.cost.note_step(rows, began.elapsed());
        }
    }
}
