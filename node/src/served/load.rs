//! From a model's file to an engine that runs: read, size, load, warm up. Blocking work, for a thread that serves nobody.

use std::{sync::Arc, thread::JoinHandle};

use bytesize::ByteSize;
use tracing::info;

use super::{
    Loaded,
    turns::{InTurn, Turns},
};
use crate::{
    config::{EngineLimits, ModelConfig, NodeConfig},
    engine::{Engine, EngineConfig},
    guide::Guides,
    kernels::{Backend, cpu::Cpu},
    kv::BLOCK_TOKENS,
    machine::Memory,
    model::{self, Capacity, Model as _, Plan, Shape},
    models::{ModelError, Store},
    sched::Limits,
    sizes,
    text::{ChatTemplate, Tokenizer},
    weights::{Checkpoint, LoadError},
};

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It is not on this machine.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// It cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// It is larger than all the memory that models may take.
    #[error(
        "'{name}' takes {} for weights, keys and values, and node.models_memory is {}: raise it, or lower max_context or kv_cache_memory",
        ByteSize(*.bytes), ByteSize(*.bytes_max)
    )]
    TooLarge {
        /// The model's name.
        name: String,
        /// What it takes.
        bytes: u64,
        /// What all may take.
        bytes_max: u64,
    },
    /// It does not fit beside the others, and none of them can go.
    #[error(
        "'{name}' takes {}, and the {} of node.models_memory are taken by models that are pinned or have running answers: {}",
        ByteSize(*.bytes), ByteSize(*.bytes_max), .holders.join(", ")
    )]
    NoRoom {
        /// The model's name.
        name: String,
        /// What it takes.
        bytes: u64,
        /// What all may take.
        bytes_max: u64,
        /// Who takes it.
        holders: Vec<String>,
    },
    /// A fault of ours.
    #[error("loading the model failed: {0}")]
    Internal(String),
}

/// A model whose file has been opened, and how much memory it will take.
pub(super) struct Measured {
    config: ModelConfig,
    checkpoint: Checkpoint,
    capacity: Capacity,
    /// Weights, keys and values.
    pub(super) bytes: u64,
}

impl Measured {
    /// Opens the model's file, and works out its sizes; `bytes_max` is what all models together may take.
    pub(super) fn open(node: &NodeConfig, config: ModelConfig, bytes_max: u64) -> Result<Self, ServeError> {
        let path = Store::open(&node.data_dir).locate(&config.model)?;
        let quantize = config.quantize.unwrap_or(node.quantize);
        let checkpoint = Checkpoint::open(&path)?.quantized(quantize)?;
        let (sizes, mib) = (checkpoint.sizes(), |bytes: usize| bytes.div_ceil(1 << 20));
        let (stored_mib, weights_mib) = (mib(sizes.stored), mib(sizes.loaded));
        info!(model = config.name, stored_mib, weights_mib, quantize = quantize.name(), "weights");
        let shape = Plan::read(&checkpoint)?.shape;
        let capacity = capacity::<Cpu>(&limits(node, &config), &shape, bytes_max)?;
        let cache = capacity.blocks as u64 * Cpu::block_bytes(shape.cache(1, capacity.kv_dtype)) as u64;
        let bytes = (sizes.loaded as u64).saturating_add(cache);
        Ok(Self { config, checkpoint, capacity, bytes })
    }

    /// Most tokens of prompt and answer.
    pub(super) fn context(&self) -> usize {
        self.capacity.context
    }

    /// Loads the model and starts its engine thread.
    pub(super) fn load(self, node: &NodeConfig, turns: &Turns) -> Result<(Loaded, JoinHandle<()>), ServeError> {
        let Self { config, checkpoint, capacity, .. } = self;
        let tokenizer = Arc::new(Tokenizer::from_checkpoint(&checkpoint)?);
        let template = ChatTemplate::from_checkpoint(&checkpoint, &tokenizer)?;
        let model = model::load(&checkpoint, Cpu::new(node.engine.threads), capacity)?;
        let mut model = InTurn { model, turns: turns.clone() };
        let (device, width) = (model.device_class(), model.width());
        warm_up(&mut model, &tokenizer, capacity.context);
        let limits =
            Limits { batch_size_max: node.engine.batch_size_max, batch_tokens_max: node.engine.batch_tokens_max };
        let engine = EngineConfig {
            limits,
            queue_max: node.engine.queue_max,
            queue_max_tenant: node.engine.queue_max_tenant,
            blocks: capacity.blocks,
            speculation: node.engine.speculation,
        };
        let (engine, thread) = Engine::start(Box::new(model), engine);
        let end_tokens = tokenizer.end_tokens().into();
        let guides = Guides::new(tokenizer.clone());
        let (name, context, sampling) = (config.name, capacity.context, checkpoint.recommended());
        let loaded = Loaded { name, engine, tokenizer, guides, template, context, width, device, end_tokens, sampling };
        Ok((loaded, thread))
    }
}

/// The node's bounds, with the model's own in place of those it has.
fn limits(node: &NodeConfig, model: &ModelConfig) -> EngineLimits {
    let limits = node.engine.clone();
    EngineLimits {
        context_max: model.context_max.or(limits.context_max),
        kv_cache_bytes: model.kv_cache_bytes.or(limits.kv_cache_bytes),
        kv_dtype: model.kv_dtype.unwrap_or(limits.kv_dtype),
        ..limits
    }
}

/// Sizes from the configuration and the machine, each printed with its reason.
fn capacity<B: Backend>(limits: &EngineLimits, shape: &Shape, bytes_max: u64) -> Result<Capacity, LoadError> {
    let mut memory = Memory::available();
    if bytes_max < memory.bytes {
        memory = Memory { bytes: bytes_max, bound: "node.models_memory" };
    }
    let block_bytes = B::block_bytes(shape.cache(1, limits.kv_dtype));
    let (capacity, found) = sizes::Wish { limits, model_context: shape.context, block_bytes, memory }.capacity()?;
    limits.sizes.iter().chain(&found).for_each(sizes::Size::print);
    Ok(capacity)
}

/// One step, so that the first request does not pay for cold pages and buffers.
fn warm_up(model: &mut dyn model::Model, tokenizer: &Tokenizer, context: usize) {
    let count = BLOCK_TOKENS.min(tokenizer.vocab()).min(context);
    let tokens: Vec<u32> = (0..count as u32).collect();
    let mut batch = crate::batch::Batch::default();
    batch.push(&tokens, 0, &[0]);
    batch.logit_rows.push(tokens.len() as u32 - 1);
    model.forward(&batch, &|| {});
}
