//! What a sequence asks for beside tokens, gathered as its prompt is computed: in pieces, and from the beginning again after it was put
//! back. Each is sent once, when it is whole.

use tokio::sync::oneshot;

use super::{Pooling, Wants};
use crate::{
    batch::Ask,
    sample::Logprobs,
    sched::{States, Terms},
};

/// What is gathered for one sequence.
pub(super) struct Extras {
    scores: Option<Scores>,
    embedding: Option<Embedding>,
}

struct Scores {
    top: usize,
    found: Vec<Logprobs>,
    reader: oneshot::Sender<Vec<Logprobs>>,
}

struct Embedding {
    pooling: Pooling,
    sum: Vec<f64>,
    /// Rows in `sum`.
    rows: usize,
    reader: oneshot::Sender<Vec<f32>>,
}

impl Extras {
    pub(super) fn new(wants: Wants) -> Self {
        Self {
            scores: wants.prompt_logprobs.map(|(top, reader)| Scores { top, found: Vec::new(), reader }),
            embedding: wants.embedding.map(|(pooling, reader)| Embedding { pooling, sum: Vec::new(), rows: 0, reader }),
        }
    }

    /// What the scheduler must know of it.
    pub(super) fn terms(&self) -> Terms {
        let states = match self.embedding.as_ref().map(|e| e.pooling) {
            None => States::None,
            Some(Pooling::Last) => States::Last,
            Some(Pooling::Mean) => States::All,
        };
        Terms { all_logits: self.scores.is_some(), states }
    }

    /// Whether it has a use for logits.
    pub(super) fn wants_logits(&self) -> bool {
        self.scores.is_some()
    }

    /// Logits after one row, `[V]`. `known` are the sequence's tokens: until the scores are whole, those that were given, since nothing is
    /// sampled before; the last of them has no next one.
    pub(super) fn take_logits(&mut self, ask: &Ask, logits: &[f32], known: &[u32], scratch: &mut Vec<(f32, u32)>) {
        let Some(scores) = &mut self.scores else { return };
        if let Some(next) = known.get(ask.position + 1) {
            // rows computed again after a preemption are known already
            if ask.position == scores.found.len() {
                scores.found.push(Logprobs::of(logits, *next, scores.top, scratch));
            }
        } else if let Some(Scores { found, reader, .. }) = self.scores.take() {
            let _ = reader.send(found);
        }
    }

    /// The hidden state after one row, `[E]`.
    pub(super) fn take_state(&mut self, ask: &Ask, state: &[f32]) {
        let Some(embedding) = &mut self.embedding else { return };
        if ask.position == 0 || embedding.sum.is_empty() {
            embedding.sum = vec![0.0; state.len()];
            embedding.rows = 0;
        }
        embedding.sum.iter_mut().zip(state).for_each(|(sum, x)| *sum += f64::from(*x));
        embedding.rows += 1;
        if ask.samples
            && let Some(Embedding { sum, rows, reader, .. }) = self.embedding.take()
        {
            let _ = reader.send(sum.iter().map(|x| (x / rows as f64) as f32).collect());
        }
    }
}
