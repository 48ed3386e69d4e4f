//! The engine: one thread that owns the device, the scheduler and the KV pool, and a handle by which the async side talks to it.
//! There is no lock between them: requests go in by a channel; a step's tokens come out together, and a task hands them to one channel for
//! each choice.

mod draft;
mod extras;
mod pace;
mod places;
mod stats;
mod worker;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{self, SyncSender, TrySendError},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc as events, oneshot};

use crate::{
    guide::Guide,
    model::Model,
    sample::{Logprobs, Sampling},
    sched::{Limits, Owner},
    speculate::Speculation,
    stop::{Finish, StopRule},
};

pub use draft::Draft;
use places::{Place, Places};
pub use stats::Stats;

/// Most starts on their way to the engine thread, which takes them in before each step.
const STARTS_MAX: usize = 4096;

/// One token of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The token.
    pub token: u32,
    /// How likely it was, when the generation asked.
    pub logprobs: Option<Box<Logprobs>>,
    /// Why the choice ended with it, if it did.
    pub finish: Option<Finish>,
}

/// One sequence to generate.
#[derive(Debug)]
pub struct Generation {
    /// Prompt, and after it the tokens that the client has had from another node.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_len: usize,
    /// Index of the choice.
    pub choice: u32,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// When to end. With `tokens_max` 0 nothing is generated: the channel closes once the prompt is computed.
    pub stop: StopRule,
    /// Which tokens may come at all.
    pub guide: Option<Guide>,
    /// Asks for the log-probability of each token, and of so many of the likeliest.
    pub logprobs: Option<usize>,
    /// Whether another node had taken it and was lost: it has a place where a new one has none, and goes before it.
    pub is_moved: bool,
    /// Asks for more than tokens.
    pub wants: Wants,
}

/// What a generation asks for beside its tokens; each is computed once the whole prompt is.
#[derive(Debug, Default)]
pub struct Wants {
    /// The log-probabilities of the given tokens after the first, those had from another node included, and so many of the likeliest of
    /// each. They are delivered before the first event.
    pub prompt_logprobs: Option<(usize, oneshot::Sender<Vec<Logprobs>>)>,
    /// One vector for the prompt.
    pub embedding: Option<(Pooling, oneshot::Sender<Vec<f32>>)>,
}

/// How the hidden states of a prompt's tokens become one vector, `[E]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The last one.
    Last,
}

/// Tokens of a running choice. Dropping it ends the choice, and frees its blocks within one step.
#[derive(Debug)]
pub struct Tokens {
    /// The tokens as they come; it closes early only when the engine dies.
    pub events: events::Receiver<Event>,
    submitted: Instant,
    begun: Arc<Begun>,
    _place: Place,
}

impl Tokens {
    /// Whether it waits for its first step.
    pub fn is_waiting(&self) -> bool {
        self.begun_at().is_none()
    }

    /// When its first step began.
    pub fn begun_at(&self) -> Option<Instant> {
        self.begun.after().map(|waited| self.submitted + waited)
    }
}

/// How long a choice waited for its first step, once that has begun.
#[derive(Debug, Default)]
struct Begun(AtomicU64);

impl Begun {
    /// It begins.
    fn set(&self, waited: Duration) {
        // 0 is for what still waits
        self.0.store(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX).saturating_add(1), Relaxed);
    }

    fn after(&self) -> Option<Duration> {
        self.0.load(Relaxed).checked_sub(1).map(Duration::from_micros)
    }
}

/// A token on its way to its reader.
struct Delivery {
    to: events::Sender<Event>,
    event: Event,
}

/// Hands out the tokens of each step. A task does it because the engine thread would wake another thread with each token, and may lose
/// its core to that thread each time; so it is once a step.
async fn deliver(mut steps: events::UnboundedReceiver<Vec<Delivery>>) {
    while let Some(step) = steps.recv().await {
        for Delivery { to, event } in step {
            // an error means that the reader is gone, which the next step sees
            let _ = to.try_send(event);
        }
    }
}

struct Start {
    owner: Owner,
    generation: Generation,
    events: events::Sender<Event>,
    begun: Arc<Begun>,
    submitted: Instant,
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// As many sequences run and wait as may.
    Full,
    /// As many of this tenant's sequences run and wait as may.
    TenantFull,
    /// The engine has ended.
    Dead,
}

/// Bounds of the engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Bounds of one step.
    pub limits: Limits,
    /// Most sequences that wait for a place.
    pub queue_max: usize,
    /// Most of one tenant's sequences that wait for a place.
    pub queue_max_tenant: usize,
    /// KV blocks.
    pub blocks: usize,
    /// Whether next tokens are guessed.
    pub speculation: Speculation,
}

/// The async side of the engine.
#[derive(Debug, Clone)]
pub struct Engine {
    starts: SyncSender<Start>,
    places: Arc<Places>,
    stats: Arc<Stats>,
}

impl Engine {
    /// Starts the engine thread, with a draft model if there is one; it ends when the last handle is gone. Call it within a tokio runtime,
    /// which hands out the tokens.
    pub fn start(model: Box<dyn Model>, draft: Option<Draft>, config: EngineConfig) -> (Self, JoinHandle<()>) {
        let size = config.limits.batch_size_max;
        let places = Places::new(size + config.queue_max, size + config.queue_max_tenant);
        // starts of clients that left at once are only taken out with the next step
        let (starts, receiver) = mpsc::sync_channel(STARTS_MAX.min(4 * (size + config.queue_max)));
        let stats = Arc::new(Stats::new(config.blocks));
        // bounded all the same: every token in it has a place in its choice's own channel
        let (deliveries, steps) = events::unbounded_channel();
        tokio::spawn(deliver(steps));
        let worker = worker::Worker::new(model, draft, config, receiver, deliveries, stats.clone());
        let builder = std::thread::Builder::new().name("engine".into());
        let thread = builder.spawn(move || worker.run()).expect("a thread can be started");
        (Self { starts, places, stats }, thread)
    }

    /// Takes all of a request's choices, or none.
    ///
    /// # Errors
    /// When there is no place for all of them, or the engine has ended.
    pub fn submit(&self, owner: &Owner, generations: Vec<Generation>) -> Result<Vec<Tokens>, Refused> {
        let is_moved = generations.iter().any(|generation| generation.is_moved);
        let places = self.places.take(&owner.tenant, generations.len(), is_moved)?;
        let mut all = Vec::with_capacity(generations.len());
        for (generation, place) in generations.into_iter().zip(places) {
            // a place for every token the choice can make: the engine never waits for a slow reader
            let (sender, events) = events::channel(generation.stop.tokens_max.max(1));
            let (owner, begun, submitted) = (owner.clone(), Arc::<Begun>::default(), Instant::now());
            let start = Start { owner, generation, events: sender, begun: begun.clone(), submitted };
            self.starts.try_send(start).map_err(|e| match e {
                TrySendError::Full(_) => Refused::Full,
                TrySendError::Disconnected(_) => Refused::Dead,
            })?;
            all.push(Tokens { events, submitted, begun, _place: place });
        }
        Ok(all)
    }

    /// Choices whose answers have not been read to their end.
    pub fn open(&self) -> usize {
        self.places.open()
    }

    /// What the engine does now.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}

#[cfg(test)]
mod tests;
