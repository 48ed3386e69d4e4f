//! The models that this node serves: which stand in memory, which come in with the first request for them, which go to make room.
//!
//! The `table` decides; this shell loads on threads that serve nobody, waits, and frees. Each model has an engine thread, a KV pool
//! and kernel threads of its own; their steps take `turns`. Whoever works on a request holds the [`Loaded`] it began with to its
//! last byte, so nothing that happens to the table ends a running answer; a model's memory is free when its engine thread has ended,
//! and only then counts as free.

mod compute;
mod load;
mod alike;
mod report;
mod table;
mod turns;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytesize::ByteSize;
use tidegate_common::{
    contract::{ApiError, ErrorKind},
    ids::Fingerprint,
};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    config::{LoadWhen, ModelConfig, NodeConfig},
    engine::Engine,
    guide::Guides,
    text,
    weights::Recommended,
};
use compute::Compute;
use load::Measured;
use table::{Asked, Room, State, Table};
use turns::Turns;

pub use load::ServeError;
pub use report::Report;
pub use table::{Refusal, Unaddable, Unloadable};

/// Taken for the context of a model whose file has not been read.
const CONTEXT_UNKNOWN: usize = 1 << 15;

/// What stands once a model is loaded.
pub struct Loaded {
    /// The model's name in the API.
    pub name: String,
    /// The engine thread's handle.
    pub engine: Engine,
    /// Words to tokens and back.
    pub tokenizer: Arc<text::Tokenizer>,
    /// Grammars that answers can be held to.
    pub guides: Guides,
    /// Conversations to prompts.
    pub template: text::ChatTemplate,
    /// Most tokens of prompt and answer.
    pub context: usize,
    /// Numbers of a hidden state.
    pub width: usize,
    /// Device class.
    pub device: String,
    /// Which nodes answer alike.
    pub fingerprint: Fingerprint,
    /// Tokens that end an answer.
    pub end_tokens: Arc<[u32]>,
    /// What the model's makers recommend to sample with.
    pub sampling: Recommended,
}

/// The models of one node; clones are handles of the same.
#[derive(Clone)]
pub struct Models {
    shared: Arc<Shared>,
}

struct Shared {
    config: NodeConfig,
    compute: Compute,
    inner: Mutex<Inner>,
    /// Counts changes of the table, for those who wait for one.
    changed: watch::Sender<u64>,
    turns: Turns,
}

struct Inner {
    table: Table<Loaded>,
    /// Engine threads of models that stand.
    engines: HashMap<String, JoinHandle<()>>,
    /// Whether all that is to stand at start does.
    started: bool,
}

impl Models {
    /// Nothing loaded yet.
    ///
    /// # Errors
    /// When what to compute on cannot be had.
    pub fn new(config: &NodeConfig) -> Result<Self, ServeError> {
        let compute = Compute::open(config)?;
        let bytes_max = config.models_bytes.unwrap_or_else(|| compute.memory().bytes);
        info!(models = config.models.len(), models_memory = %ByteSize(bytes_max), "models");
        let inner = Inner { table: Table::new(&config.models, bytes_max), engines: HashMap::new(), started: false };
        let shared = Shared {
            config: config.clone(),
            compute,
            inner: Mutex::new(inner),
            changed: watch::Sender::new(0),
            turns: Turns::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Loads what is to stand before the node is ready, one after the other.
    ///
    /// # Errors
    /// When a model is not there or cannot be loaded.
    pub async fn start(&self) -> Result<(), ServeError> {
        for model in self.shared.config.models.iter().filter(|model| model.load == LoadWhen::Start) {
            let asked = self.lock().table.ask(Some(&model.name), Instant::now());
            if let Ok(Asked::Begin(model)) = asked {
                self.bring_in(*model).await?;
            }
        }
        self.lock().started = true;
        self.tell();
        Ok(())
    }

    /// What stands of the model that a request names, or of the default one; waits for it until `deadline` where it has to be loaded
    /// first.
    ///
    /// # Errors
    /// When no such model is served here, or it cannot be had now.
    ///
    /// # Cancel safety
    /// Safe: a load that has begun goes on.
    pub async fn get(&self, name: Option<&str>, deadline: Instant) -> Result<Arc<Loaded>, ApiError> {
        if !self.lock().started {
            return Err(unavailable("loading", "the model is still loading", Duration::from_secs(1)));
        }
        let ask = |table: &mut Table<Loaded>| table.ask(name, Instant::now());
        let shown = name.unwrap_or(&self.shared.config.default_model().name);
        self.settle(shown, ask, deadline).await.map_err(refusal)
    }

    /// Asks until there is an answer or the time is over; begins the load where that falls to this asker.
    async fn settle(
        &self,
        name: &str,
        mut ask: impl FnMut(&mut Table<Loaded>) -> Result<Asked<Loaded>, Refusal>,
        deadline: Instant,
    ) -> Result<Arc<Loaded>, Refusal> {
        let mut changes = self.shared.changed.subscribe();
        loop {
            changes.mark_unchanged();
            let asked = ask(&mut self.lock().table)?;
            match asked {
                Asked::Ready(loaded) => return Ok(loaded),
                Asked::Begin(model) => {
                    let models = self.clone();
                    // a task of its own: the load goes on when this asker leaves
                    tokio::spawn(async move { models.bring_in(*model).await });
                }
                Asked::Wait => {}
            }
            let change = tokio::time::timeout_at(deadline.into(), changes.changed()).await;
            if !matches!(change, Ok(Ok(()))) {
                return Err(Refusal::TooLate(name.to_owned()));
            }
        }
    }

    /// Loads a model that the table says is on its way in.
    async fn bring_in(&self, model: ModelConfig) -> Result<(), ServeError> {
        let (name, began) = (model.name.clone(), Instant::now());
        info!(model = name, reference = %model.model, "loading");
        let outcome = self.load(model).await;
        let told = match outcome {
            Ok((loaded, engine)) => {
                let (device, fingerprint) = (&loaded.device, loaded.fingerprint);
                info!(model = name, device, %fingerprint, seconds = began.elapsed().as_secs_f32(), "model ready");
                let mut inner = self.lock();
                inner.engines.insert(name.clone(), engine);
                inner.table.loaded(&name, Ok(loaded), Instant::now());
                Ok(())
            }
            Err(error) => {
                warn!(model = name, %error, "model not loaded");
                self.lock().table.loaded(&name, Err(&error), Instant::now());
                Err(error)
            }
        };
        self.tell();
        told
    }

    async fn load(&self, model: ModelConfig) -> Result<(Loaded, JoinHandle<()>), ServeError> {
        let (name, shared) = (model.name.clone(), self.shared.clone());
        let bytes_max = self.lock().table.bytes_max();
        let measured = aside(move || Measured::open(&shared.config, &shared.compute, model, bytes_max)).await?;
        self.make_room(&name, &measured).await?;
        let shared = self.shared.clone();
        aside(move || measured.load(&shared.config, &shared.compute, &shared.turns)).await
    }

    async fn make_room(&self, name: &str, measured: &Measured) -> Result<(), ServeError> {
        let mut changes = self.shared.changed.subscribe();
        loop {
            changes.mark_unchanged();
            let room = self.lock().table.reserve(name, measured.bytes, measured.context())?;
            match room {
                Room::Reserved => return Ok(()),
                Room::Evict(victims) => {
                    for (victim, loaded) in victims {
                        info!(model = victim, for_model = name, "unloading, to make room");
                        self.free(victim, loaded);
                    }
                }
                Room::Wait => {}
            }
            // the sender lives in `self`
            let _ = changes.changed().await;
        }
    }

    /// Lets go of a model, and notes when its memory is free: after the last answer that holds it.
    fn free(&self, name: String, loaded: Arc<Loaded>) {
        let engine = self.lock().engines.remove(&name);
        let models = self.clone();
        std::thread::spawn(move || {
            drop(loaded);
            let ended = engine.map_or(Ok(()), JoinHandle::join);
            models.lock().table.freed(&name);
            info!(model = name, panicked = ended.is_err(), "model unloaded");
            models.tell();
        });
    }

    /// Serves a model that an operator names; returns once it stands.
    ///
    /// # Errors
    /// When it cannot be added or loaded.
    pub async fn want(&self, model: ModelConfig, deadline: Instant) -> Result<(), WantError> {
        let name = model.name.clone();
        self.lock().table.add(model)?;
        let mut first = true;
        let ask = |table: &mut Table<Loaded>| match std::mem::take(&mut first) {
            true => table.want(&name, Instant::now()),
            false => table.ask(Some(&name), Instant::now()),
        };
        let settled = self.settle(&name, ask, deadline).await;
        self.tell();
        settled?;
        Ok(())
    }

    /// Takes a model out: nothing new is taken from now on, and what runs goes on. Returns once its memory is free, at the latest at
    /// `deadline`; whether it is.
    ///
    /// # Errors
    /// When there is no such model, or it is being loaded.
    pub async fn unload(&self, name: &str, deadline: Instant) -> Result<bool, Unloadable> {
        let mut changes = self.shared.changed.subscribe();
        let freed = self.lock().table.unload(name)?;
        self.tell();
        if let Some(loaded) = freed {
            info!(model = name, "unloading, as an operator wants");
            self.free(name.to_owned(), loaded);
        }
        let is_out = |_: &u64| self.lock().table.entry(name).is_none_or(|e| matches!(e.state, State::Unloaded));
        let waited = tokio::time::timeout_at(deadline.into(), changes.wait_for(is_out)).await;
        Ok(matches!(waited, Ok(Ok(_))))
    }

    /// The configured model of this name, or what an operator added under it.
    pub fn config_of(&self, name: &str) -> Option<ModelConfig> {
        self.lock().table.entry(name).map(|entry| entry.config.clone())
    }

    /// Names of the models that can be asked for, the default one first, each with the most tokens of prompt and answer where they are
    /// known.
    pub fn offered(&self) -> Vec<(String, Option<usize>)> {
        let inner = self.lock();
        let offered = inner.table.entries().iter().filter(|e| e.offered);
        offered.map(|e| (e.config.name.clone(), e.context)).collect()
    }

    /// Tells of each change of the table.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Most tokens of prompt and answer that any model here takes, as far as it is known.
    pub fn context_max(&self) -> usize {
        let inner = self.lock();
        let known = |e: &table::Entry<Loaded>| e.context.or(e.config.context_max).unwrap_or(CONTEXT_UNKNOWN);
        inner.table.entries().iter().map(known).max().unwrap_or(CONTEXT_UNKNOWN)
    }

    /// Whether all that is to stand at start does.
    pub fn is_started(&self) -> bool {
        self.lock().started
    }

    /// Bytes that all models together may take.
    pub fn bytes_max(&self) -> u64 {
        self.lock().table.bytes_max()
    }

    /// Calls `look` with each model that stands. The table is locked meanwhile, so that looking does not count as using.
    pub fn for_each_ready(&self, mut look: impl FnMut(&Loaded)) {
        for entry in self.lock().table.entries() {
            if let State::Ready { loaded, .. } = &entry.state {
                look(loaded);
            }
        }
    }

    /// Answers that have not been read to their end.
    pub fn open(&self) -> usize {
        let mut open = 0;
        self.for_each_ready(|loaded| open += loaded.engine.open());
        open
    }

    /// Returns when an engine thread has ended that should not have.
    pub async fn engine_death(&self) {
        while !self.lock().engines.values().any(JoinHandle::is_finished) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn tell(&self) {
        self.shared.changed.send_modify(|count| *count += 1);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // no panic can happen halfway through a change of the table
        self.shared.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Why a model that an operator wants does not stand.
#[derive(Debug)]
pub enum WantError {
    /// It cannot be added.
    Unaddable(Unaddable),
    /// It cannot be had now.
    Refused(Refusal),
}

impl From<Unaddable> for WantError {
    fn from(reason: Unaddable) -> Self {
        Self::Unaddable(reason)
    }
}

impl From<Refusal> for WantError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Does `work` on a thread that serves nobody.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ServeError> + Send + 'static,
) -> Result<T, ServeError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| ServeError::Internal(e.to_string()))?
}

/// What a client is told. Why a load failed stands in the log and on the private listener, since it may name this machine's files.
pub fn refusal(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Unknown(name) => ApiError::model_not_found(&name),
        Refusal::Withdrawn(name) => {
            let text = format!("the model '{name}' has been unloaded on this node by its operator");
            unavailable("model_unloaded", &text, Duration::from_secs(5))
        }
        Refusal::Failed { name, pause } => {
            let text = format!(
                "the model '{name}' could not be loaded; the node's log and `tidegate model ps` say why, and a request after {} s tries again",
                pause.as_secs() + 1
            );
            unavailable("model_failed", &text, pause)
        }
        Refusal::NoRoom { reason, pause, .. } => {
            unavailable("no_room", &format!("{reason}; try again when an answer has ended"), pause)
        }
        Refusal::TooLate(name) => {
            let text = format!("the model '{name}' was still loading when the request's time was over");
            ApiError::new(ErrorKind::DeadlineExceeded, "model_loading", text)
        }
    }
}

fn unavailable(code: &'static str, text: &str, after: Duration) -> ApiError {
    ApiError::new(ErrorKind::Unavailable, code, text).with_retry_after(after)
}
