//! What sets one decoder apart from another, as plain values read from a model file and checked. What all share is `decoder`.

use candle_core::quantized::gguf_file::Value;

use super::{Architecture, rope::RopePlan};
use crate::{
    kernels::{Activation, CacheShape, Heads, KvDtype, View},
    weights::{Checkpoint, LoadError, whole_number},
};

/// Sizes of a decoder.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Layers.
    pub layers: usize,
    /// Embedding width, `E`.
    pub width: usize,
    /// Width of the gated layer, or of each expert's, `F`.
    pub gate_width: usize,
    /// Attention heads.
    pub heads: Heads,
    /// Vocabulary, `V`.
    pub vocab: usize,
    /// Positions that the model was trained for.
    pub context: usize,
}

impl Shape {
    /// Shape of the cache with `blocks` blocks.
    pub fn cache(&self, blocks: usize, dtype: KvDtype) -> CacheShape {
        CacheShape { layers: self.layers, blocks, heads: self.heads, dtype }
    }
}

/// A decoder's description.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Sizes.
    pub shape: Shape,
    /// Epsilon of all norms.
    pub(super) epsilon: f32,
    /// Factor of the embeddings.
    pub(super) embedding_scale: f32,
    /// Factor of the logits.
    pub(super) logit_scale: f32,
    /// What gates go through.
    pub(super) activation: Activation,
    /// Whether queries, keys and values are one tensor, and gate and up another.
    pub(super) is_fused: bool,
    /// Whether queries, keys and values must have biases; elsewhere they may.
    pub(super) needs_qkv_bias: bool,
    /// Whether queries and keys are normed head by head.
    pub(super) has_head_norms: bool,
    /// Whether what attention and the gated layer give is normed before it is added.
    pub(super) has_output_norms: bool,
    /// When the gated layer is a mixture.
    pub(super) experts: Option<ExpertsPlan>,
    /// Rotary tables that layers choose from.
    pub(super) ropes: Vec<RopePlan>,
    /// What differs from layer to layer.
    pub(super) layers: Vec<LayerPlan>,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertsPlan {
    pub(super) count: usize,
    pub(super) used: usize,
    pub(super) is_normalized: bool,
}

/// One layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerPlan {
    pub(super) view: View,
    /// Which of the plan's rotary tables.
    pub(super) rope: usize,
}

impl Plan {
    /// Reads the plan of a file.
    ///
    /// # Errors
    /// When a value is missing or absurd, or the architecture or a variant of it is not supported.
    pub fn read(file: &Checkpoint) -> Result<Self, LoadError> {
        let arch = Architecture::of(file)?;
        arch.plan(&Source { file, arch })
    }

    /// The plainest decoder of these sizes: what most architectures start from.
    /// `rope_base` is what the architecture takes where the file names none.
    pub(super) fn plain(source: &Source, rope_base: f32) -> Result<Self, LoadError> {
        source.refuse_unknown()?;
        let shape = source.shape()?;
        let rope = RopePlan::read(source, &shape, rope_base)?;
        let scale = source.real("attention.scale", 1e-6..=1e6)?.unwrap_or(1.0 / (shape.heads.dim as f32).sqrt());
        Ok(Self {
            epsilon: source.real("attention.layer_norm_rms_epsilon", 0.0..=0.1)?.unwrap_or(1e-5),
            embedding_scale: source.real("embedding_scale", 1e-6..=1e6)?.unwrap_or(1.0),
            logit_scale: source.real("logit_scale", 1e-6..=1e6)?.unwrap_or(1.0),
            activation: Activation::Silu,
            is_fused: false,
            needs_qkv_bias: false,
            has_head_norms: false,
            has_output_norms: false,
            experts: None,
            ropes: vec![rope],
            layers: vec![LayerPlan { view: View { scale, window: None }, rope: 0 }; shape.layers],
            shape,
        })
    }

    /// The same with a window in every layer.
    pub(super) fn with_window(mut self, window: Option<usize>) -> Self {
        self.layers.iter_mut().for_each(|layer| layer.view.window = window);
        self
    }
}

/// A model file, read under the keys of its architecture.
pub(super) struct Source<'a> {
    pub(super) file: &'a Checkpoint,
    pub(super) arch: Architecture,
}

impl Source<'_> {
    /// The full name of a key.
    pub(super) fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch.name())
    }

    /// A whole number from 1 to `max` that must be there.
    pub(super) fn required(&self, key: &str, max: usize) -> Result<usize, LoadError> {
        self.file.number_in(&self.key(key), 1..=max)
    }

    /// A whole number from 1 to `max` that may be missing; nothing else may stand in its place.
    pub(super) fn optional(&self, key: &str, max: usize) -> Result<Option<usize>, LoadError> {
        match self.file.value(&self.key(key)) {
            None => Ok(None),
            Some(value) if whole_number(value).is_some() => self.required(key, max).map(Some),
            Some(_) => Err(self.file.broken(format!("'{}' is not a whole number", self.key(key)))),
        }
    }

    /// A real number within `range` that may be missing.
    pub(super) fn real(&self, key: &str, range: std::ops::RangeInclusive<f32>) -> Result<Option<f32>, LoadError> {
        let key = self.key(key);
        let Some(value) = self.file.value(&key) else { return Ok(None) };
        match self.file.real(&key).or_else(|| whole_number(value).map(|n| n as f32)) {
            Some(x) if range.contains(&x) => Ok(Some(x)),
            Some(x) => Err(self.file.broken(format!("'{key}' is {x}, outside {} to {}", range.start(), range.end()))),
            None => Err(self.file.broken(format!("'{key}' is not a number"))),
        }
    }

    /// How many positions a row sees where the model has a window; 0 stands for none.
    pub(super) fn window(&self) -> Result<Option<usize>, LoadError> {
        match self.file.number(&self.key("attention.sliding_window")) {
            Some(0) => Ok(None),
            _ => self.optional("attention.sliding_window", usize::MAX),
        }
    }

    /// The mixture of experts, when there is one.
    pub(super) fn experts(&self, is_normalized: bool) -> Result<Option<ExpertsPlan>, LoadError> {
        if matches!(self.file.number(&self.key("expert_count")), None | Some(0)) {
            return Ok(None);
        }
        let count = self.required("expert_count", 1 << 12)?;
        let is_normalized = self.file.flag(&self.key("expert_weights_norm")).unwrap_or(is_normalized);
        Ok(Some(ExpertsPlan { count, used: self.required("expert_used_count", count)?, is_normalized }))
    }

    fn shape(&self) -> Result<Shape, LoadError> {
        let width = self.required("embedding_length", 1 << 16)?;
        let query = self.required("attention.head_count", 1 << 10)?;
        let kv = self.optional("attention.head_count_kv", 1 << 10)?.unwrap_or(query);
        let dim = self.optional("attention.key_length", 1 << 10)?.unwrap_or(width / query);
        let value_dim = self.optional("attention.value_length", 1 << 10)?.unwrap_or(dim);
        if !query.is_multiple_of(kv) || dim == 0 || dim > 1 << 10 || !dim.is_multiple_of(2) || value_dim != dim {
            return Err(self.file.broken(format!(
                "{query} query heads, {kv} key-value heads of width {dim} (values {value_dim}) do not fit together"
            )));
        }
        let gate_width = match self.optional("expert_feed_forward_length", 1 << 20)? {
            Some(width) => width,
            None => self.required("feed_forward_length", 1 << 20)?,
        };
        Ok(Shape {
            layers: self.required("block_count", 1 << 10)?,
            width,
            gate_width,
            heads: Heads { query, kv, dim },
            vocab: self.vocab()?,
            context: self.required("context_length", 1 << 24)?,
        })
    }

    /// Rows of the embedding: at least the tokenizer's tokens, as models pad their vocabularies.
    fn vocab(&self) -> Result<usize, LoadError> {
        let rows = match self.file.dims("token_embd.weight") {
            Some(&[rows, _]) if rows > 0 => rows,
            _ => return Err(self.file.broken("tensor 'token_embd.weight' is missing or no matrix")),
        };
        match self.file.value("tokenizer.ggml.tokens") {
            Some(Value::Array(tokens)) if tokens.len() > rows => {
                let text = format!("the tokenizer has {} tokens, and the embedding {rows} rows", tokens.len());
                Err(self.file.broken(text))
            }
            _ => Ok(rows),
        }
    }

    /// Refuses by name what would be computed wrongly.
    fn refuse_unknown(&self) -> Result<(), LoadError> {
        let is_set = |key: &str| match self.file.value(&self.key(key)) {
            None | Some(Value::Bool(false)) => false,
            Some(value) => whole_number(value) != Some(0) && self.file.real(&self.key(key)) != Some(0.0),
        };
        let keys = [
            ("attn_logit_softcapping", "soft caps on attention scores"),
            ("final_logit_softcapping", "soft caps on logits"),
            ("residual_scale", "scaled residuals"),
            ("expert_shared_count", "shared experts"),
            ("expert_group_count", "grouped experts"),
            ("leading_dense_block_count", "dense layers beside mixtures of experts"),
            ("attention.max_alibi_bias", "linear biases by distance"),
            ("use_parallel_residual", "attention beside the gated layer"),
            ("attention.clamp_kqv", "clamped queries, keys and values"),
        ];
        if self.file.flag(&self.key("attention.causal")) == Some(false) {
            return Err(LoadError::Unsupported("this model sees what comes after a token, and cannot generate".into()));
        }
        match keys.iter().find(|(key, _)| is_set(key)) {
            Some((key, what)) => Err(LoadError::Unsupported(format!(
                "this model has {what} ('{}'), which are not supported",
                self.key(key)
            ))),
            None => Ok(()),
        }
    }
}
