//! One step's input as plain arrays: the plan, laid out for the model. Buffers are kept from step to step.

use crate::{
    kv::BLOCK_TOKENS,
    sched::{Piece, Plan, Scheduler, SeqId, Sequence, States, Terms},
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

/// A row that someone asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Whose row.
    pub seq: SeqId,
    /// Its position in the sequence.
    pub position: usize,
    /// Whether the next token is sampled after it: the sequence's last, and guesses.
    pub samples: bool,
    /// What that token was guessed to be; the row after this one stands for it.
    pub guess: Option<u32>,
}

/// How the token after a row is chosen where the logits are; `Pick` in `pick.cuh`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Pick {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this.
    pub top_p: f32,
    /// Tokens less likely than this share of the likeliest are dropped.
    pub min_p: f32,
    /// The draw, in [0, 1).
    pub uniform: f32,
    /// Most tokens to choose from; 0 keeps all.
    pub top_k: i32,
}

/// `T` tokens of `B` sequences.
///
/// # Shapes
/// `tokens`, `positions`, `slots`: `[T]`; `spans`: `[B]`; `blocks`: all block tables, one after another; `logit_rows`, `logit_asks`:
/// `[S]`; `picks`: `[S]` or empty; `hidden_rows`, `hidden_asks`: `[P]`.
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
    /// Rows whose logits are asked for.
    pub logit_rows: Vec<u32>,
    /// Who asks for them.
    pub logit_asks: Vec<Ask>,
    /// How their tokens are chosen; None where the logits themselves are wanted. Empty where all are.
    pub picks: Vec<Option<Pick>>,
    /// Rows whose hidden states are asked for.
    pub hidden_rows: Vec<u32>,
    /// Who asks for them.
    pub hidden_asks: Vec<Ask>,
}

impl Batch {
    /// Lays out `plan`.
    pub fn fill(&mut self, plan: &Plan, scheduler: &Scheduler) {
        self.clear();
        for piece in &plan.pieces {
            let sequence = scheduler.sequence(piece.seq).expect("a planned sequence runs");
            let blocks = sequence.blocks().iter().map(|b| b.0);
            let known = &sequence.tokens()[piece.start..piece.start + piece.known()];
            self.push_rows(&[known, sequence.proposed()], piece.start, blocks);
            self.ask(piece, sequence);
        }
    }

    /// Notes which rows of the piece just pushed are asked for.
    fn ask(&mut self, piece: &Piece, sequence: &Sequence) {
        let Terms { all_logits, states } = sequence.terms();
        let first_row = self.tokens.len() - piece.len;
        for i in 0..piece.len {
            let (row, samples) = ((first_row + i) as u32, piece.samples && i + 1 >= piece.known());
            let guess = (i + 1).checked_sub(piece.known()).and_then(|i| sequence.proposed().get(i).copied());
            let ask = Ask { seq: piece.seq, position: piece.start + i, samples, guess };
            if samples || all_logits {
                self.logit_rows.push(row);
                self.logit_asks.push(ask);
            }
            if states == States::All || (samples && states == States::Last) {
                self.hidden_rows.push(row);
                self.hidden_asks.push(ask);
            }
        }
    }

    /// Appends `tokens` of one sequence, the first at position `start`.
    pub fn push(&mut self, tokens: &[u32], start: usize, blocks: &[u32]) {
        self.push_rows(&[tokens], start, blocks.iter().copied());
    }

    fn push_rows(&mut self, parts: &[&[u32]], start: usize, blocks: impl Iterator<Item = u32>) {
        let (blocks_at, first_row) = (self.blocks.len(), self.tokens.len());
        self.blocks.extend(blocks);
        parts.iter().for_each(|tokens| self.tokens.extend_from_slice(tokens));
        let rows = self.tokens.len() - first_row;
        self.spans.push(Span { first_row, rows, start, blocks_at });
        for position in start..start + rows {
            let block = self.blocks[blocks_at + position / BLOCK_TOKENS];
            self.positions.push(position as u32);
            self.slots.push(block * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32);
        }
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.spans.clear();
        self.blocks.clear();
        self.logit_rows.clear();
        self.logit_asks.clear();
        self.picks.clear();
        self.hidden_rows.clear();
        self.hidden_asks.clear();
    }
}
