//! From a model's file to an engine that runs: read, size, load, warm up. Blocking work, for a thread that serves nobody.

use std::{sync::Arc, thread::JoinHandle};

use tracing::info;

use super::Loaded;
use crate::{
    config::NodeConfig,
    engine::{Engine, EngineConfig},
    guide::Guides,
    kernels::{Backend, cpu::Cpu},
    kv::BLOCK_TOKENS,
    machine::Memory,
    model::{self, Capacity, Plan, Shape},
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
    /// A fault of ours.
    #[error("loading the model failed: {0}")]
    Internal(String),
}

/// Loads the model and starts its engine thread.
pub(super) fn load(config: &NodeConfig) -> Result<(Loaded, JoinHandle<()>), ServeError> {
    let path = Store::open(&config.data_dir).locate(&config.model)?;
    let checkpoint = Checkpoint::open(&path)?.quantized(config.quantize)?;
    let (sizes, mib) = (checkpoint.sizes(), |bytes: usize| bytes.div_ceil(1 << 20));
    let quantize = config.quantize.name();
    info!(model = %config.model, stored_mib = mib(sizes.stored), weights_mib = mib(sizes.loaded), quantize, "weights");
    let tokenizer = Arc::new(Tokenizer::from_checkpoint(&checkpoint)?);
    let template = ChatTemplate::from_checkpoint(&checkpoint, &tokenizer)?;
    let shape = Plan::read(&checkpoint)?.shape;
    let capacity = capacity::<Cpu>(config, &shape)?;
    let mut model = model::load(&checkpoint, Cpu::new(config.engine.threads), capacity)?;
    let device = model.device_class();
    warm_up(&mut *model, &tokenizer, capacity.context);
    let limits =
        Limits { batch_size_max: config.engine.batch_size_max, batch_tokens_max: config.engine.batch_tokens_max };
    let queue = &config.engine;
    let engine = EngineConfig {
        limits,
        queue_max: queue.queue_max,
        queue_max_tenant: queue.queue_max_tenant,
        blocks: capacity.blocks,
    };
    let (engine, thread) = Engine::start(model, engine);
    let end_tokens = tokenizer.end_tokens().into();
    let guides = Guides::new(tokenizer.clone());
    let name = config.served_model_name.clone();
    let loaded = Loaded { name, engine, tokenizer, guides, template, context: capacity.context, device, end_tokens };
    Ok((loaded, thread))
}

/// Sizes from the configuration and the machine, each printed with its reason.
fn capacity<B: Backend>(config: &NodeConfig, shape: &Shape) -> Result<Capacity, LoadError> {
    let wish = sizes::Wish {
        limits: &config.engine,
        model_context: shape.context,
        block_bytes: B::block_bytes(shape.cache(1)),
        memory: Memory::available(),
    };
    let (capacity, found) = wish.capacity()?;
    config.engine.sizes.iter().chain(&found).for_each(sizes::Size::print);
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
