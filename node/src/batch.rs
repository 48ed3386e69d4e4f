//! One step's input as plain arrays: the plan, laid out for the model. Buffers are kept from step to step.

use crate::{
    kv::BLOCK_TOKENS,
    sched::{Plan, Scheduler, SeqId},
};

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row in the batch.
    pub first_row: usize,
    /// How many rows.
    pub rows: usize,
    /// Position of the first row in its sequence.
    pub start: usize,
    /// Where the sequence's block table begins in [`Batch::blocks`].
    pub blocks_at: usize,
}

/// `T` tokens of `B` sequences.
///
/// # Shapes
/// `tokens`, `positions`, `slots`: `[T]`; `spans`: `[B]`; `blocks`: all block tables, one after another; `logit_rows`, `samples`: `[S]`.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence.
    pub positions: Vec<u32>,
    /// Where each token's keys and values go: block × [`BLOCK_TOKENS`] + place within the block.
    pub slots: Vec<u32>,
    /// Which rows belong together.
    pub spans: Vec<Span>,
    /// Block tables.
    pub blocks: Vec<u32>,
    /// Rows after which a token is sampled.
    pub logit_rows: Vec<u32>,
    /// Whose token that is.
    pub samples: Vec<SeqId>,
}

impl Batch {
    /// Lays out `plan`.
    pub fn fill(&mut self, plan: &Plan, scheduler: &Scheduler) {
        self.clear();
        for piece in &plan.pieces {
            let sequence = scheduler.sequence(piece.seq).expect("a planned sequence runs");
            let blocks: Vec<u32> = sequence.blocks().iter().map(|b| b.0).collect();
            self.push(&sequence.tokens()[piece.start..piece.start + piece.len], piece.start, &blocks);
            if piece.samples {
                self.logit_rows.push(self.tokens.len() as u32 - 1);
                self.samples.push(piece.seq);
            }
        }
    }

    /// Appends `tokens` of one sequence, the first at position `start`.
    pub fn push(&mut self, tokens: &[u32], start: usize, blocks: &[u32]) {
        self.spans.push(Span { first_row: self.tokens.len(), rows: tokens.len(), start, blocks_at: self.blocks.len() });
        for (i, token) in tokens.iter().enumerate() {
            let position = start + i;
            self.tokens.push(*token);
            self.positions.push(position as u32);
            self.slots.push(blocks[position / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32);
        }
        self.blocks.extend_from_slice(blocks);
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.spans.clear();
        self.blocks.clear();
        self.logit_rows.clear();
        self.samples.clear();
    }
}
