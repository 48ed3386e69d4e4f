//! From a model's file to an engine that runs: read, size, load, warm up. Blocking work, for a thread that serves nobody.

use std::{path::PathBuf, sync::Arc, thread::JoinHandle};

use bytesize::ByteSize;
use tracing::info;

use super::{
    Loaded,
    alike::Basis,
    compute::Compute,
    turns::{InTurn, Turns},
};
use crate::{
    config::{EngineLimits, ModelConfig, NodeConfig},
    engine::{Draft, Engine, EngineConfig},
    guide::Guides,
    kv::BLOCK_TOKENS,
    model::{self, Capacity, Model as _, Plan, Shape},
    models::{self, ModelError, ModelRef, Store},
    sched::Limits,
    sizes,
    text::{ChatTemplate, Tokenizer},
    weights::{Checkpoint, LoadError, Quantize},
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
    path: PathBuf,
    quantize: Quantize,
    checkpoint: Checkpoint,
    capacity: Capacity,
    /// The draft model, if there is one.
    draft: Option<(Checkpoint, Capacity)>,
    /// Weights, keys and values.
    pub(super) bytes: u64,
}

impl Measured {
    /// Opens the model's file, and works out its sizes; `bytes_max` is what all models together may take.
    pub(super) fn open(
        node: &NodeConfig,
        compute: &Compute,
        config: ModelConfig,
        bytes_max: u64,
    ) -> Result<Self, ServeError> {
        let path = Store::open(&node.data_dir).locate(&config.model)?;
        let quantize = config.quantize.unwrap_or(node.quantize);
        let checkpoint = Checkpoint::open(&path)?.quantized(quantize)?;
        let (sizes, mib) = (checkpoint.sizes(), |bytes: usize| bytes.div_ceil(1 << 20));
        let (stored_mib, weights_mib) = (mib(sizes.stored), mib(sizes.loaded));
        info!(model = config.name, stored_mib, weights_mib, quantize = quantize.name(), "weights");
        let shape = Plan::read(&checkpoint)?.shape;
        let capacity = capacity(compute, &limits(node, &config), &shape, sizes.loaded as u64, bytes_max)?;
        let cache = capacity.blocks as u64 * compute.block_bytes(shape.cache(1, capacity.kv_dtype)) as u64;
        let mut bytes = (sizes.loaded as u64).saturating_add(cache);
        let draft =
            config.draft.as_ref().map(|draft| open_draft(node, compute, draft, quantize, capacity)).transpose()?;
        let draft = draft.map(|(checkpoint, capacity, draft_bytes)| {
            bytes = bytes.saturating_add(draft_bytes);
            (checkpoint, capacity)
        });
        Ok(Self { config, path, quantize, checkpoint, capacity, draft, bytes })
    }

    /// Most tokens of prompt and answer.
    pub(super) fn context(&self) -> usize {
        self.capacity.context
    }

    /// Loads the model and starts its engine thread.
    pub(super) fn load(
        self,
        node: &NodeConfig,
        compute: &Compute,
        turns: &Turns,
    ) -> Result<(Loaded, JoinHandle<()>), ServeError> {
        let Self { config, path, quantize, checkpoint, capacity, draft, .. } = self;
        let tokenizer = Arc::new(Tokenizer::from_checkpoint(&checkpoint)?);
        let template = ChatTemplate::from_checkpoint(&checkpoint, &tokenizer)?;
        let model = compute.load(&checkpoint, capacity)?;
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
        let draft = draft.map(|draft| load_draft(&config, draft, &tokenizer, compute, turns)).transpose()?;
        let (engine, thread) = Engine::start(Box::new(model), draft, engine);
        let end_tokens = tokenizer.end_tokens().into();
        let guides = Guides::new(tokenizer.clone());
        let (sampling, files) = (checkpoint.recommended(), models::sample(&path)?);
        let fingerprint = Basis { files, quantize, capacity, device: &device, sampling }.fingerprint(node);
        let loaded = Loaded {
            name: config.name,
            engine,
            tokenizer,
            guides,
            template,
            context: capacity.context,
            width,
            device,
            fingerprint,
            end_tokens,
            sampling,
        };
        Ok((loaded, thread))
    }
}

/// Opens a draft model's file; it gets as many KV blocks as the model that it drafts for, and no longer context. Also gives the bytes of
/// its weights, keys and values.
fn open_draft(
    node: &NodeConfig,
    compute: &Compute,
    draft: &ModelRef,
    quantize: Quantize,
    of: Capacity,
) -> Result<(Checkpoint, Capacity, u64), ServeError> {
    let path = Store::open(&node.data_dir).locate(draft)?;
    let checkpoint = Checkpoint::open(&path)?.quantized(quantize)?;
    let shape = Plan::read(&checkpoint)?.shape;
    let capacity = Capacity { context: of.context.min(shape.context), ..of };
    let cache = capacity.blocks as u64 * compute.block_bytes(shape.cache(1, capacity.kv_dtype)) as u64;
    let bytes = (checkpoint.sizes().loaded as u64).saturating_add(cache);
    info!(draft_model = %draft, memory_mib = bytes.div_ceil(1 << 20), "draft model");
    Ok((checkpoint, capacity, bytes))
}

fn load_draft(
    config: &ModelConfig,
    (checkpoint, capacity): (Checkpoint, Capacity),
    tokenizer: &Tokenizer,
    compute: &Compute,
    turns: &Turns,
) -> Result<Draft, ServeError> {
    let own = Tokenizer::from_checkpoint(&checkpoint)?;
    check_vocabulary(&config.name, tokenizer, &own)?;
    let model = compute.load(&checkpoint, capacity)?;
    let mut model = InTurn { model, turns: turns.clone() };
    warm_up(&mut model, &own, capacity.context);
    Ok(Draft { model: Box::new(model), capacity })
}

/// A draft is made of token ids, so they must mean the same to both. Models of a family may pad their vocabularies differently.
fn check_vocabulary(name: &str, model: &Tokenizer, draft: &Tokenizer) -> Result<(), LoadError> {
    let ids = 0..model.vocab().max(draft.vocab()) as u32;
    match ids.into_iter().find(|id| model.spelled(*id) != draft.spelled(*id)) {
        None => Ok(()),
        Some(id) => {
            let shown =
                |tokenizer: &Tokenizer| tokenizer.spelled(id).map_or("not there".into(), |token| format!("{token:?}"));
            Err(LoadError::Config(format!(
                "draft_model has another vocabulary than '{name}': token {id} is {} there and {} here; name a smaller model of the same family",
                shown(draft),
                shown(model)
            )))
        }
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

/// Sizes from the configuration and the device, each printed with its reason.
fn capacity(
    compute: &Compute,
    limits: &EngineLimits,
    shape: &Shape,
    weight_bytes: u64,
    bytes_max: u64,
) -> Result<Capacity, LoadError> {
    let (memory, cache_share) = compute.cache_memory(weight_bytes, bytes_max);
    let block_bytes = compute.block_bytes(shape.cache(1, limits.kv_dtype));
    let wish = sizes::Wish { limits, model_context: shape.context, block_bytes, memory, cache_share };
    let (capacity, found) = wish.capacity()?;
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::quantized::{GgmlDType, gguf_file::Value};

    use super::*;
    use crate::model::tiny;

    /// A tokenizer whose 62nd token is spelled so.
    fn tokenizer(odd: &str) -> Tokenizer {
        let mut tokens: Vec<String> = (0..tiny::VOCAB).map(|i| format!("t{i}")).collect();
        [(0, "a"), (1, "b"), (2, "ab"), (61, odd)].into_iter().for_each(|(i, token)| tokens[i] = token.into());
        let more = [
            ("tokenizer.ggml.model", Value::String("gpt2".into())),
            ("tokenizer.ggml.merges", Value::Array(vec![Value::String("a b".into())])),
            ("tokenizer.ggml.tokens", Value::Array(tokens.into_iter().map(Value::String).collect())),
        ];
        let file = tiny::file(1, GgmlDType::F32, &more);
        Tokenizer::from_checkpoint(&Checkpoint::from_bytes(Path::new("t.gguf"), file.into()).unwrap()).unwrap()
    }

    #[test]
    fn a_draft_model_of_another_vocabulary_is_refused_with_what_differs() {
        let (model, same, other) = (tokenizer("sea"), tokenizer("sea"), tokenizer("land"));
        assert!(check_vocabulary("big", &model, &same).is_ok());
        let error = check_vocabulary("big", &model, &other).unwrap_err().to_string();
        for part in ["draft_model", "'big'", "token 61", "\"land\" there and \"sea\" here"] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
    }
}
