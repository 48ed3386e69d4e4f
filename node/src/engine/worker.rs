//! The engine thread. Its step is four words: plan, forward, sample, commit. What a plan speculates on is sampled row by row for as long
//! as it comes true.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, TryRecvError},
    },
    time::Instant,
};

use tokio::sync::mpsc as events;
use tracing::{error, warn};

use super::{
    Begun, Delivery, Draft, EngineConfig, Event, Generation, Start, Stats,
    draft::{Drafter, Wish},
    extras::Extras,
    pace::Pace,
};
use crate::{
    batch::{Batch, Pick},
    guide::Guide,
    model::Model,
    sample::{self, Draw, Logprobs, Said, Sampling},
    sched::{Cause, Plan, Scheduler, SeqId, Sequence},
    speculate::{Cost, Drafts, Lookup, Prospects, Speculation, Trust},
    stop::{Finish, StopRule},
};

/// Where the ids of new sequences begin: those from a lost node count from zero, and so are older than all that began here.
const NEW_IDS: u64 = 1 << 63;

/// What the engine knows of a sequence beside its tokens, which the scheduler keeps.
struct Running {
    choice: u32,
    sampling: Sampling,
    said: Option<Said>,
    guide: Option<Guide>,
    stop: StopRule,
    logprobs: Option<usize>,
    lookup: Lookup,
    trust: Trust,
    /// Guesses of the draft model in this step.
    drafted: usize,
    extras: Extras,
    events: events::Sender<Event>,
    generated: usize,
    /// Until its first step.
    waits: Option<Waits>,
}

struct Waits {
    since: Instant,
    begun: Arc<Begun>,
}

impl Running {
    fn new(generation: Generation, tokens: &[u32], events: events::Sender<Event>, waits: Waits) -> Self {
        let (prompt, had) = tokens.split_at(generation.prompt_len);
        let mut guide = generation.guide;
        if let Some(guide) = &mut guide {
            had.iter().for_each(|token| guide.accept(*token));
        }
        Self {
            said: Said::of(&generation.sampling, prompt, had),
            choice: generation.choice,
            sampling: generation.sampling,
            guide,
            stop: generation.stop,
            logprobs: generation.logprobs,
            lookup: Lookup::default(),
            trust: Trust::default(),
            drafted: 0,
            extras: Extras::new(generation.wants),
            events,
            generated: had.len(),
            waits: Some(waits),
        }
    }

    /// How the device may choose the `nth` token from now by itself; None when its logits are needed here.
    fn pick(&self, nth: usize) -> Option<Pick> {
        let needs_logits = self.moves_logits() || self.logprobs.is_some() || self.extras.wants_logits();
        (!needs_logits).then(|| sample::pick(&self.sampling, self.draw(nth)))
    }

    fn draw(&self, nth: usize) -> Draw {
        Draw { choice: self.choice, position: (self.generated + nth) as u32 }
    }

    /// The next token, that was chosen by a pick; none when no more are asked for.
    fn take(&mut self, token: u32) -> Option<Event> {
        if self.generated >= self.stop.tokens_max {
            return None;
        }
        self.generated += 1;
        Some(Event { token, logprobs: None, finish: self.stop.after(token, self.generated) })
    }

    /// The next token, chosen from `logits[V]`; none when no more are asked for.
    fn next(&mut self, logits: &[f32], moved: &mut Vec<f32>, candidates: &mut Vec<(f32, u32)>) -> Option<Event> {
        if self.generated >= self.stop.tokens_max {
            return None;
        }
        let draw = self.draw(0);
        let mut stuck = None;
        let token = if self.moves_logits() {
            moved.clear();
            moved.extend_from_slice(logits);
            sample::adjust(moved, &self.sampling, self.said.as_ref());
            if let Some(Err(error)) = self.guide.as_mut().map(|guide| guide.mask(moved)) {
                warn!(%error, "a grammar cannot go on; its answer ends here");
                stuck = Some(Finish::Length);
            }
            // an answer that cannot go on gets no word that its grammar did not allow
            let end = stuck.and_then(|_| self.stop.end_tokens.first().copied());
            end.unwrap_or_else(|| sample::sample(moved, &self.sampling, draw, candidates))
        } else {
            sample::sample(logits, &self.sampling, draw, candidates)
        };
        self.generated += 1;
        if let Some(said) = &mut self.said {
            said.push(token);
        }
        if let Some(guide) = &mut self.guide {
            guide.accept(token);
        }
        let logprobs = self.logprobs.map(|top| Box::new(Logprobs::of(logits, token, top, candidates)));
        Some(Event { token, logprobs, finish: stuck.or_else(|| self.stop.after(token, self.generated)) })
    }

    /// What the draft model's `nth` guess is, by its logits `[V]`: drawn as the token itself will be, but for what moves its logits.
    fn guess(&self, nth: usize, logits: &[f32], candidates: &mut Vec<(f32, u32)>) -> u32 {
        sample::sample(logits, &self.sampling, self.draw(nth), candidates)
    }

    /// Tokens that may come after the next one.
    fn left_after_next(&self) -> usize {
        self.stop.tokens_max.saturating_sub(self.generated + 1)
    }

    fn moves_logits(&self) -> bool {
        self.said.is_some() || self.guide.is_some() || !self.sampling.bias.is_empty()
    }
}

pub(super) struct Worker {
    model: Box<dyn Model>,
    scheduler: Scheduler,
    batch: Batch,
    sequences: HashMap<SeqId, Running>,
    starts: Receiver<Start>,
    /// The tokens of each step, all at once.
    deliveries: events::UnboundedSender<Vec<Delivery>>,
    stats: Arc<Stats>,
    pace: Pace,
    speculation: Speculation,
    prospects: Prospects,
    cost: Cost,
    drafter: Option<Drafter>,
    drafts: Drafts,
    guesses: Vec<u32>,
    next_id: u64,
    next_id_moved: u64,
    candidates: Vec<(f32, u32)>,
    /// One row of logits, moved by bias, penalties and grammar.
    moved: Vec<f32>,
}

impl Worker {
    pub(super) fn new(
        model: Box<dyn Model>,
        draft: Option<Draft>,
        config: EngineConfig,
        starts: Receiver<Start>,
        deliveries: events::UnboundedSender<Vec<Delivery>>,
        stats: Arc<Stats>,
    ) -> Self {
        Self {
            model,
            scheduler: Scheduler::new(config.limits, config.blocks),
            batch: Batch::default(),
            sequences: HashMap::new(),
            starts,
            deliveries,
            stats,
            pace: Pace::default(),
            speculation: config.speculation,
            prospects: Prospects::default(),
            cost: Cost::default(),
            drafter: draft.map(Drafter::new),
            drafts: Drafts::default(),
            guesses: Vec::new(),
            next_id: NEW_IDS,
            next_id_moved: 0,
            candidates: Vec::new(),
            moved: Vec::new(),
        }
    }

    /// Runs until every handle is gone and nothing is left to do.
    pub(super) fn run(mut self) {
        while self.receive() {
            self.drop_abandoned();
            let mut plan = self.scheduler.plan();
            let began = Instant::now();
            self.speculate(&mut plan);
            self.publish(&plan);
            self.begin(&plan);
            if !plan.pieces.is_empty() {
                let stepped = Instant::now();
                let accepted = self.step_or_drop(&plan);
                if plan.only_decodes() {
                    self.cost.note_step(plan.tokens(), stepped.elapsed());
                }
                // guesses that were wrong bring nothing nearer to its end
                self.pace.note_step(plan.tokens() - plan.proposed() + accepted, began.elapsed());
            }
        }
    }

    /// A panic in a step ends the sequences of that step and no more: their readers see their channels close.
    fn step_or_drop(&mut self, plan: &Plan) -> usize {
        std::panic::catch_unwind(AssertUnwindSafe(|| self.step(plan))).unwrap_or_else(|_| {
            error!(sequences = plan.pieces.len(), "a step panicked; its sequences are dropped");
            plan.pieces.iter().for_each(|piece| self.remove(piece.seq));
            0
        })
    }

    /// Adds guesses at the next tokens, as many as pay.
    fn speculate(&mut self, plan: &mut Plan) {
        if self.speculation == Speculation::Off || self.scheduler.room_for_proposals(plan) == 0 {
            return;
        }
        for piece in &plan.pieces {
            let s = self.sequences.get_mut(&piece.seq).expect("a planned sequence is known");
            s.lookup.extend(self.scheduler.sequence(piece.seq).map_or(&[], Sequence::tokens));
            s.drafted = 0;
        }
        self.draft(plan);
        self.look_up(plan);
    }

    /// Guesses of the draft model, for sequences whose own text says nothing.
    fn draft(&mut self, plan: &mut Plan) {
        let Some(drafter) = &self.drafter else { return };
        let unsure = plan.pieces.iter().map(|piece| (piece.seq, &self.sequences[&piece.seq]));
        let unsure = unsure.filter(|(_, s)| !s.lookup.is_sure() && s.left_after_next() > 0);
        let (ids, chances): (Vec<SeqId>, Vec<f64>) = unsure.map(|(id, s)| (id, s.trust.chance())).unzip();
        let sizes = (plan.pieces.len(), self.scheduler.room_for_proposals(plan));
        let count = self.drafts.choose(self.speculation, &chances, sizes, &self.cost, drafter.cost());
        if count == 0 {
            return;
        }
        for (id, guesses) in self.drafted(&ids, count) {
            let s = self.sequences.get_mut(&id).expect("a planned sequence is known");
            let most = guesses.len().min(s.left_after_next());
            s.drafted = self.scheduler.propose(plan, id, &guesses[..most]);
        }
    }

    /// Asks the draft model. When it panics there is none from then on: answers do not need it.
    fn drafted(&mut self, ids: &[SeqId], count: usize) -> Vec<(SeqId, Vec<u32>)> {
        let Some(mut drafter) = self.drafter.take() else { return Vec::new() };
        let tokens =
            |id: &SeqId| self.scheduler.sequence(*id).map(|sequence| Wish { id: *id, tokens: sequence.tokens() });
        let wishes: Vec<Wish<'_>> = ids.iter().filter_map(tokens).collect();
        let (sequences, candidates, stats, vocab) =
            (&self.sequences, &mut self.candidates, &self.stats, self.model.vocab());
        let choose = |id: SeqId, nth: usize, logits: &[f32]| {
            // heads of one vocabulary may be padded differently
            sequences[&id].guess(nth, &logits[..logits.len().min(vocab)], candidates)
        };
        let drafted = std::panic::catch_unwind(AssertUnwindSafe(|| {
            drafter.draft(&wishes, count, choose, &|| stats.note_progress())
        }));
        match drafted {
            Ok(drafted) => {
                self.drafter = Some(drafter);
                drafted
            }
            Err(_) => {
                error!("the draft model panicked, and is not asked again");
                Vec::new()
            }
        }
    }

    /// Guesses from the sequences' own texts.
    fn look_up(&mut self, plan: &mut Plan) {
        self.prospects.clear();
        for piece in plan.pieces.iter().filter(|piece| piece.proposed == 0) {
            let s = &self.sequences[&piece.seq];
            self.prospects.add(piece.seq, s.lookup.chances().take(s.left_after_next()));
        }
        let room = self.scheduler.room_for_proposals(plan);
        for (id, count) in self.prospects.choose(self.speculation, plan.tokens(), room, &self.cost) {
            let tokens = self.scheduler.sequence(id).map_or(&[][..], Sequence::tokens);
            self.sequences[&id].lookup.guess(tokens, count, &mut self.guesses);
            self.scheduler.propose(plan, id, &self.guesses);
        }
    }

    /// Computes the plan; gives how many guesses came true.
    fn step(&mut self, plan: &Plan) -> usize {
        self.batch.fill(plan, &self.scheduler);
        if self.model.picks() {
            self.set_picks();
        }
        let (stats, vocab, width) = (self.stats.clone(), self.model.vocab(), self.model.width());
        let output = self.model.forward(&self.batch, &|| stats.note_progress());
        for (ask, state) in self.batch.hidden_asks.iter().zip(output.hidden.chunks_exact(width)) {
            let s = self.sequences.get_mut(&ask.seq).expect("a planned sequence is known");
            s.extras.take_state(ask, state);
        }
        let mut tokens = Vec::with_capacity(plan.pieces.len());
        // whose guess proved wrong: its other rows say nothing
        let (mut missed, mut accepted) = (None, 0);
        let (mut logits, mut picked) = (output.logits.chunks_exact(vocab), output.tokens.iter());
        for (i, ask) in self.batch.logit_asks.iter().enumerate() {
            let is_picked = self.batch.picks.get(i).is_some_and(Option::is_some);
            let token = if is_picked { picked.next().copied() } else { None };
            let row = if is_picked { &[] } else { logits.next().expect("each row without a pick has logits") };
            if missed == Some(ask.seq) {
                continue;
            }
            let s = self.sequences.get_mut(&ask.seq).expect("a planned sequence is known");
            if token.is_none() {
                let known = self.scheduler.sequence(ask.seq).map_or(&[][..], |sequence| sequence.tokens());
                s.extras.take_logits(ask, row, known, &mut self.candidates);
            }
            if ask.samples {
                let event = match token {
                    Some(token) => s.take(token),
                    None => s.next(row, &mut self.moved, &mut self.candidates),
                };
                let is_right = event.as_ref().is_some_and(|event| Some(event.token) == ask.guess);
                accepted += usize::from(is_right);
                let goes_on = is_right && event.as_ref().is_some_and(|event| event.finish.is_none());
                missed = (!goes_on).then_some(ask.seq);
                tokens.push((ask.seq, event));
            }
        }
        self.commit(plan, tokens);
        self.stats.steps.fetch_add(1, Relaxed);
        self.stats.speculated_tokens.fetch_add(plan.proposed() as u64, Relaxed);
        self.stats.accepted_tokens.fetch_add(accepted as u64, Relaxed);
        accepted
    }

    /// Says how the device chooses the tokens that need nothing but the logits.
    fn set_picks(&mut self) {
        let Batch { logit_asks, picks, .. } = &mut self.batch;
        let mut of_sequence = (None, 0);
        picks.extend(logit_asks.iter().map(|ask| {
            // guesses of one sequence stand one after another
            of_sequence =
                if of_sequence.0 == Some(ask.seq) { (of_sequence.0, of_sequence.1 + 1) } else { (Some(ask.seq), 0) };
            self.sequences[&ask.seq].pick(of_sequence.1).filter(|_| ask.samples)
        }));
    }

    fn commit(&mut self, plan: &Plan, tokens: Vec<(SeqId, Option<Event>)>) {
        self.scheduler.advance(plan);
        self.judge_drafts(plan, &tokens);
        let mut deliveries = Vec::with_capacity(tokens.len());
        for (id, event) in tokens {
            let s = self.sequences.get_mut(&id).expect("a sampled sequence is known");
            // none when only the prompt was asked for
            let Some(event) = event else {
                self.remove(id);
                continue;
            };
            let (token, finish) = (event.token, event.finish);
            deliveries.push(Delivery { to: s.events.clone(), event });
            match finish {
                Some(_) => {
                    self.pace.note_answer(s.generated);
                    self.remove(id);
                }
                None => self.scheduler.push(id, token),
            }
        }
        self.stats.generated_tokens.fetch_add(deliveries.len() as u64, Relaxed);
        // an error means that the runtime is gone, and every reader with it
        let _ = self.deliveries.send(deliveries);
        debug_assert!(self.scheduler.kv().is_balanced(), "free + referenced + cached = all");
    }

    /// Notes how much of what was drafted came true: what was sampled beyond one token each.
    fn judge_drafts(&mut self, plan: &Plan, tokens: &[(SeqId, Option<Event>)]) {
        for piece in plan.pieces.iter().filter(|piece| piece.proposed > 0) {
            let s = self.sequences.get_mut(&piece.seq).expect("a planned sequence is known");
            let sampled = tokens.iter().filter(|(id, _)| *id == piece.seq).count();
            if s.drafted > 0 {
                s.trust.note(s.drafted, sampled - 1);
            }
        }
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

    fn add(&mut self, mut start: Start) {
        if self.sequences.is_empty() {
            // the time without work was no silence
            self.stats.note_progress();
        }
        let next = if start.generation.is_moved { &mut self.next_id_moved } else { &mut self.next_id };
        let id = SeqId(*next);
        *next += 1;
        let tokens = std::mem::take(&mut start.generation.tokens);
        self.stats.prompt_tokens.fetch_add(start.generation.prompt_len as u64, Relaxed);
        let waits = Waits { since: start.submitted, begun: start.begun };
        let running = Running::new(start.generation, &tokens, start.events, waits);
        self.scheduler.add(id, tokens, running.extras.terms(), start.owner);
        self.sequences.insert(id, running);
    }

    /// Frees the blocks of sequences whose readers are gone, and says how long the others will take.
    fn drop_abandoned(&mut self) {
        let (mut abandoned, mut owed) = (Vec::new(), 0usize);
        for (id, s) in &self.sequences {
            if s.events.is_closed() {
                abandoned.push(*id);
            } else {
                let left = s.stop.tokens_max.saturating_sub(s.generated);
                owed = owed.saturating_add(self.pace.owed(self.scheduler.pending(*id), left));
            }
        }
        abandoned.into_iter().for_each(|id| self.remove(id));
        self.stats.note_backlog(self.pace.time_for(owed));
    }

    /// Notes which sequences have waited until now.
    fn begin(&mut self, plan: &Plan) {
        for piece in &plan.pieces {
            if let Some(Waits { since, begun }) = self.sequences.get_mut(&piece.seq).and_then(|s| s.waits.take()) {
                let waited = since.elapsed();
                begun.set(waited);
                self.stats.queue_time.observe(waited.as_secs_f64());
            }
        }
    }

    fn remove(&mut self, id: SeqId) {
        self.sequences.remove(&id);
        self.scheduler.remove(id);
        self.drafter.iter_mut().for_each(|drafter| drafter.remove(id));
    }

    fn publish(&self, plan: &Plan) {
        let stats = &self.stats;
        stats.running.store(self.scheduler.running() as u64, Relaxed);
        stats.waiting.store(self.scheduler.waiting() as u64, Relaxed);
        stats.blocks_free.store(self.scheduler.kv().available() as u64, Relaxed);
        stats.tokens_looked_up.fetch_add(plan.tokens_looked_up as u64, Relaxed);
        stats.prompt_tokens_cached.fetch_add(plan.tokens_cached as u64, Relaxed);
        let waiting = self.scheduler.waiting_by_class();
        stats.waiting_by_class.iter().zip(waiting).for_each(|(gauge, count)| gauge.store(count as u64, Relaxed));
        let for_share = plan.preempted.iter().filter(|(_, cause)| *cause == Cause::Share).count();
        stats.preemptions.fetch_add(plan.preempted.len() as u64, Relaxed);
        stats.preemptions_for_share.fetch_add(for_share as u64, Relaxed);
    }
}
