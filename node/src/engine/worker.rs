//! The engine thread. Its step is four words: plan, forward, sample, commit.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, TryRecvError},
    },
};

use tokio::sync::mpsc as events;
use tracing::error;

use super::{EngineConfig, Event, Start, Stats};
use crate::{
    batch::Batch,
    model::Model,
    sample::{self, Draw, Sampling},
    sched::{Plan, Scheduler, SeqId},
    stop::StopRule,
};

/// What the engine knows of a sequence beside its tokens, which the scheduler keeps.
struct Running {
    prompt_len: usize,
    choice: u32,
    sampling: Sampling,
    stop: StopRule,
    events: events::Sender<Event>,
    generated: usize,
}

pub(super) struct Worker {
    model: Box<dyn Model>,
    scheduler: Scheduler,
    batch: Batch,
    sequences: HashMap<SeqId, Running>,
    starts: Receiver<Start>,
    stats: Arc<Stats>,
    next_id: u64,
    scratch: Vec<(f32, u32)>,
}

impl Worker {
    pub(super) fn new(model: Box<dyn Model>, config: EngineConfig, starts: Receiver<Start>, stats: Arc<Stats>) -> Self {
        Self {
            model,
            scheduler: Scheduler::new(config.limits, config.blocks),
            batch: Batch::default(),
            sequences: HashMap::new(),
            starts,
            stats,
            next_id: 0,
            scratch: Vec::new(),
        }
    }

    /// Runs until every handle is gone and nothing is left to do.
    pub(super) fn run(mut self) {
        while self.receive() {
            self.drop_abandoned();
            let plan = self.scheduler.plan();
            self.publish(&plan);
            if !plan.pieces.is_empty() {
                self.step_or_drop(&plan);
            }
        }
    }

    /// A panic in a step ends the sequences of that step and no more: their readers see their channels close.
    fn step_or_drop(&mut self, plan: &Plan) {
        if std::panic::catch_unwind(AssertUnwindSafe(|| self.step(plan))).is_err() {
            error!(sequences = plan.pieces.len(), "a step panicked; its sequences are dropped");
            plan.pieces.iter().for_each(|piece| self.remove(piece.seq));
        }
    }

    fn step(&mut self, plan: &Plan) {
        self.batch.fill(plan, &self.scheduler);
        let (stats, vocab) = (self.stats.clone(), self.model.vocab());
        let logits = self.model.forward(&self.batch, &|| stats.note_progress());
        let draws = self.batch.samples.iter().zip(logits.chunks_exact(vocab));
        let tokens: Vec<(SeqId, u32)> = draws
            .map(|(id, logits)| {
                let s = &self.sequences[id];
                let draw = Draw { choice: s.choice, position: s.generated as u32 };
                (*id, sample::sample(logits, &s.sampling, draw, &mut self.scratch))
            })
            .collect();
        self.commit(plan, &tokens);
        self.stats.steps.fetch_add(1, Relaxed);
    }

    fn commit(&mut self, plan: &Plan, tokens: &[(SeqId, u32)]) {
        self.scheduler.advance(plan);
        for (id, token) in tokens {
            let s = self.sequences.get_mut(id).expect("a sampled sequence is known");
            s.generated += 1;
            let finish = s.stop.after(*token, s.generated);
            // an error means that the reader is gone, which the next step sees
            let _ = s.events.try_send(Event { token: *token, finish });
            match finish {
                Some(_) => self.remove(*id),
                None => self.scheduler.push(*id, *token),
            }
        }
        self.stats.generated_tokens.fetch_add(tokens.len() as u64, Relaxed);
        debug_assert!(self.scheduler.kv().is_balanced(), "free + referenced + cached = all");
    }

    /// Takes what has come; waits for something while there is nothing to do. False once no more can come.
    fn receive(&mut self) -> bool {
        if self.sequences.is_empty() {
            self.publish(&Plan::default());
            match self.starts.recv() {
                Ok(start) => self.add(start),
                Err(_) => return false,
            }
        }
        loop {
            match self.starts.try_recv() {
                Ok(start) => self.add(start),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !self.sequences.is_empty(),
            }
        }
    }

    fn add(&mut self, Start { generation, events }: Start) {
        if self.sequences.is_empty() {
            // the time without work was no silence
            self.stats.note_progress();
        }
        let id = SeqId(self.next_id);
        self.next_id += 1;
        let generated = generation.tokens.len() - generation.prompt_len;
        let running = Running {
            prompt_len: generation.prompt_len,
            choice: generation.choice,
            sampling: generation.sampling,
            stop: generation.stop,
            events,
            generated,
        };
        self.stats.prompt_tokens.fetch_add(running.prompt_len as u64, Relaxed);
        self.sequences.insert(id, running);
        self.scheduler.add(id, generation.tokens);
    }

    /// Frees the blocks of sequences whose readers are gone.
    fn drop_abandoned(&mut self) {
        let abandoned: Vec<SeqId> =
            self.sequences.iter().filter(|(_, s)| s.events.is_closed()).map(|(id, _)| *id).collect();
        abandoned.into_iter().for_each(|id| self.remove(id));
    }

    fn remove(&mut self, id: SeqId) {
        self.sequences.remove(&id);
        self.scheduler.remove(id);
    }

    fn publish(&self, plan: &Plan) {
        let stats = &self.stats;
        stats.running.store(self.scheduler.running() as u64, Relaxed);
        stats.waiting.store(self.scheduler.waiting() as u64, Relaxed);
        stats.blocks_free.store(self.scheduler.kv().available() as u64, Relaxed);
        stats.prompt_tokens_cached.fetch_add(plan.tokens_cached as u64, Relaxed);
        stats.preemptions.fetch_add(plan.preempted.len() as u64, Relaxed);
    }
}
