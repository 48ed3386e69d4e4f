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
    model::{self, Capacity, Shape},
    models::{ModelError, Store},
    sched::Limits,
    text::{ChatTemplate, Tokenizer},
    weights::{Checkpoint, LoadError},
};

/// Share of the machine's available memory that the KV cache takes when the configuration names none.
const KV_SHARE_OF_MEMORY: u64 = 8;

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
    let checkpoint = Checkpoint::open(&path)?;
    let tokenizer = Arc::new(Tokenizer::from_checkpoint(&checkpoint)?);
    let template = ChatTemplate::from_checkpoint(&checkpoint, &tokenizer)?;
    let shape = Shape::read(&checkpoint, model::architecture(&checkpoint)?)?;
    let capacity = capacity::<Cpu>(config, &shape)?;
    let mut model = model::load(&checkpoint, Cpu::new(config.engine.threads), capacity)?;
    let device = model.device_class();
    warm_up(&mut *model, &tokenizer, capacity.context);
    let limits =
        Limits { batch_size_max: config.engine.batch_size_max, batch_tokens_max: config.engine.batch_tokens_max };
    let (engine, thread) =
        Engine::start(model, EngineConfig { limits, queue_max: config.engine.queue_max, blocks: capacity.blocks });
    let end_tokens = tokenizer.end_tokens().into();
    let guides = Guides::new(tokenizer.clone());
    let name = config.served_model_name.clone();
    let loaded = Loaded { name, engine, tokenizer, guides, template, context: capacity.context, device, end_tokens };
    Ok((loaded, thread))
}

/// Sizes from the configuration, or sane ones from the machine: an eighth of the free memory for keys and values, but no less than one
/// sequence of full length, and no more than a whole batch of them.
fn capacity<B: Backend>(config: &NodeConfig, shape: &Shape) -> Result<Capacity, LoadError> {
    let limits = &config.engine;
    let context = limits.context_max.unwrap_or(shape.context).min(shape.context);
    let mut capacity = Capacity { batch_tokens_max: limits.batch_tokens_max, context, blocks: 0 };
    let least = capacity.blocks_per_sequence();
    let mib = |blocks: usize| (blocks as u64).saturating_mul(B::block_bytes(shape.cache(1)) as u64).div_ceil(1 << 20);
    let (free, needed) = (memory_available(), mib(least));
    if needed > free >> 20 {
        return Err(LoadError::Config(format!(
            "one sequence of {context} tokens takes {needed} MiB for keys and values, and {} MiB are free: lower node.max_context",
            free >> 20
        )));
    }
    capacity.blocks = match limits.kv_cache_bytes {
        Some(bytes) => shape.blocks_in::<B>(bytes),
        None => shape.blocks_in::<B>(free / KV_SHARE_OF_MEMORY).clamp(least, least * limits.batch_size_max),
    };
    // a slot's number must fit 32 bits
    capacity.blocks = capacity.blocks.min(u32::MAX as usize / BLOCK_TOKENS);
    let taken = mib(capacity.blocks);
    if capacity.blocks < least {
        return Err(LoadError::Config(format!(
            "node.kv_cache_memory holds {} blocks, and one sequence of {context} tokens takes {least}: raise it to {needed} MiB, or lower node.max_context",
            capacity.blocks
        )));
    }
    if taken > free >> 20 {
        return Err(LoadError::Config(format!(
            "node.kv_cache_memory is {taken} MiB, and {} MiB are free: lower it",
            free >> 20
        )));
    }
    info!(
        context,
        kv_blocks = capacity.blocks,
        kv_cache_mib = taken,
        threads = limits.threads,
        max_batch_size = limits.batch_size_max,
        "sizes"
    );
    Ok(capacity)
}

/// Bytes that the machine could give without swapping; 8 GiB where it does not say.
fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(8 << 30, |kib| kib << 10)
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
