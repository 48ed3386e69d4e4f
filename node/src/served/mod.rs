//! The models that this node serves: one table from name to state, and what stands of each once it is loaded.
//!
//! Whoever works on a request holds the [`Loaded`] it began with, to its last byte: nothing that happens to the table ends it.

mod load;

use std::{
    sync::{Arc, OnceLock},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tidegate_common::contract::{ApiError, ErrorKind};
use tracing::info;

use crate::{config::NodeConfig, engine::Engine, guide::Guides, text};

pub use load::ServeError;

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
    /// Device class.
    pub device: String,
    /// Tokens that end an answer.
    pub end_tokens: Arc<[u32]>,
}

/// The table.
pub struct Models {
    name: String,
    loaded: OnceLock<(Arc<Loaded>, JoinHandle<()>)>,
}

impl Models {
    /// Nothing loaded yet.
    pub fn new(config: &NodeConfig) -> Self {
        Self { name: config.served_model_name.clone(), loaded: OnceLock::new() }
    }

    /// Loads what is to stand before the node is ready.
    ///
    /// # Errors
    /// When a model is not there or cannot be loaded.
    pub async fn start(&self, config: &NodeConfig) -> Result<(), ServeError> {
        let config = config.clone();
        let (loaded, engine) = tokio::task::spawn_blocking(move || load::load(&config))
            .await
            .map_err(|e| ServeError::Internal(e.to_string()))??;
        info!(model = loaded.name, device = loaded.device, "model ready");
        let _ = self.loaded.set((Arc::new(loaded), engine));
        Ok(())
    }

    /// What stands of the model that a request names, or of the default one; waits for it until `deadline` where it has to be loaded
    /// first.
    ///
    /// # Errors
    /// When no such model is served here, or it cannot be had now.
    pub async fn get(&self, name: Option<&str>, _deadline: Instant) -> Result<Arc<Loaded>, ApiError> {
        if let Some(name) = name.filter(|name| *name != self.name) {
            return Err(ApiError::model_not_found(name));
        }
        self.default().ok_or_else(|| {
            ApiError::new(ErrorKind::Unavailable, "loading", "the model is still loading")
                .with_retry_after(Duration::from_secs(1))
        })
    }

    /// What stands of the default model, when it does.
    pub fn default(&self) -> Option<Arc<Loaded>> {
        self.loaded.get().map(|(loaded, _)| loaded.clone())
    }

    /// Every model that stands.
    pub fn ready(&self) -> Vec<Arc<Loaded>> {
        self.default().into_iter().collect()
    }

    /// Most tokens of prompt and answer that any model here takes, as far as it is known.
    pub fn context_max(&self) -> usize {
        self.ready().iter().map(|loaded| loaded.context).max().unwrap_or(CONTEXT_UNKNOWN)
    }

    /// Answers that have not been read to their end.
    pub fn open(&self) -> usize {
        self.ready().iter().map(|loaded| loaded.engine.open()).sum()
    }

    /// Returns when an engine thread has ended that should not have.
    pub async fn engine_death(&self) {
        while self.loaded.get().is_some_and(|(_, engine)| !engine.is_finished()) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
