//! Models: tensors and [`Batch`], never requests. One architecture a file, written once over [`Backend`].

mod llama;

use crate::{
    batch::Batch,
    kernels::{Backend, CacheShape, Heads},
    kv::BLOCK_TOKENS,
    weights::{Checkpoint, LoadError},
};

pub use llama::Llama;

/// What the engine asks of a model.
pub trait Model: Send {
    /// Computes one step. Calls `beat` after each layer.
    fn forward(&mut self, batch: &Batch, beat: &dyn Fn()) -> Output<'_>;

    /// Width of a hidden state, `E`.
    fn width(&self) -> usize;

    /// Vocabulary, `V`.
    fn vocab(&self) -> usize;

    /// Device class of the backend it runs on.
    fn device_class(&self) -> String;
}

/// What one step computed.
#[derive(Debug, Clone, Copy)]
pub struct Output<'a> {
    /// Logits after each of the batch's `logit_rows`, `[S, V]`.
    pub logits: &'a [f32],
    /// Normed hidden states of the batch's `hidden_rows`, `[P, E]`.
    pub hidden: &'a [f32],
}

/// Shape of a decoder, read from a model file and checked against sane bounds.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Layers.
    pub layers: usize,
    /// Embedding width, `E`.
    pub width: usize,
    /// Width of the gated layer, `F`.
    pub gate_width: usize,
    /// Attention heads.
    pub heads: Heads,
    /// Vocabulary, `V`.
    pub vocab: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Epsilon of the norms.
    pub epsilon: f32,
}

impl Shape {
    /// Reads the shape under the architecture's prefix.
    ///
    /// # Errors
    /// When a value is missing or absurd.
    pub fn read(checkpoint: &Checkpoint, arch: &str) -> Result<Self, LoadError> {
        let number = |key: &str, max: usize| checkpoint.number_in(&format!("{arch}.{key}"), 1..=max);
        let width = number("embedding_length", 1 << 16)?;
        let query = number("attention.head_count", 1 << 10)?;
        let kv = checkpoint.number(&format!("{arch}.attention.head_count_kv")).unwrap_or(query);
        let dim = checkpoint.number(&format!("{arch}.attention.key_length")).unwrap_or(width / query);
        if kv == 0 || !query.is_multiple_of(kv) || dim == 0 || dim > 1 << 10 || !dim.is_multiple_of(2) {
            return Err(checkpoint
                .broken(format!("{query} query heads, {kv} key-value heads of width {dim} do not fit together")));
        }
        let vocab = match checkpoint.dims("token_embd.weight") {
            Some(&[vocab, _]) if vocab > 0 => vocab,
            _ => return Err(checkpoint.broken("tensor 'token_embd.weight' is missing or no matrix")),
        };
        Ok(Self {
            layers: number("block_count", 1 << 10)?,
            width,
            gate_width: number("feed_forward_length", 1 << 20)?,
            heads: Heads { query, kv, dim },
            vocab,
            context: number("context_length", 1 << 24)?,
            rope_base: checkpoint.real(&format!("{arch}.rope.freq_base")).unwrap_or(10_000.0),
            epsilon: checkpoint.real(&format!("{arch}.attention.layer_norm_rms_epsilon")).unwrap_or(1e-5),
        })
    }

    /// Shape of the cache with `blocks` blocks.
    pub fn cache(&self, blocks: usize) -> CacheShape {
        CacheShape { layers: self.layers, blocks, heads: self.heads }
    }
}

/// Sizes that a model is loaded for.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Most tokens in a step.
    pub batch_tokens_max: usize,
    /// Most positions of a sequence.
    pub context: usize,
    /// KV blocks.
    pub blocks: usize,
}

impl Capacity {
    /// Blocks that one sequence of full length takes.
    pub fn blocks_per_sequence(&self) -> usize {
        self.context.div_ceil(BLOCK_TOKENS)
    }
}

/// Architecture of a file, when it is one of ours.
///
/// # Errors
/// When it is missing, another, or a variant that this code would compute wrongly.
pub fn architecture(checkpoint: &Checkpoint) -> Result<&str, LoadError> {
    let arch = match checkpoint.text("general.architecture") {
        Some(arch @ "llama") => arch,
        Some(other) => {
            let text = format!("architecture '{other}' is not supported yet; supported: llama");
            return Err(LoadError::Unsupported(text));
        }
        None => return Err(checkpoint.broken("'general.architecture' is missing")),
    };
    let is_scaled = checkpoint.text(&format!("{arch}.rope.scaling.type")).is_some_and(|kind| kind != "none");
    let variants = [
        ("scaled rotary positions", is_scaled || checkpoint.has("rope_freqs.weight")),
        ("mixtures of experts", checkpoint.number(&format!("{arch}.expert_count")).is_some_and(|n| n > 0)),
        ("biases in attention", checkpoint.has("blk.0.attn_q.bias")),
        ("partly rotated heads", partly_rotated(checkpoint, arch)),
    ];
    match variants.iter().find(|(_, is_so)| *is_so) {
        Some((what, _)) => Err(LoadError::Unsupported(format!("this model has {what}, which are not supported yet"))),
        None => Ok(arch),
    }
}

fn partly_rotated(checkpoint: &Checkpoint, arch: &str) -> bool {
    let number = |key: &str| checkpoint.number(&format!("{arch}.{key}"));
    let head = number("attention.key_length")
        .or_else(|| number("embedding_length")?.checked_div(number("attention.head_count")?));
    number("rope.dimension_count").is_some_and(|rotated| Some(rotated) != head)
}

/// Loads the model of a file onto a backend.
///
/// # Errors
/// When the file lacks a tensor, or one has the wrong shape.
pub fn load<B: Backend + 'static>(
    checkpoint: &Checkpoint,
    backend: B,
    capacity: Capacity,
) -> Result<Box<dyn Model>, LoadError> {
    let arch = architecture(checkpoint)?;
    Ok(Box::new(Llama::load(checkpoint, &Shape::read(checkpoint, arch)?, backend, capacity)?))
}

#[cfg(test)]
pub(crate) mod tiny;

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, gguf_file::Value};

    use super::*;

    /// A model that would be computed wrongly is refused when it is loaded.
    #[test]
    fn variants_that_are_not_supported_are_refused_by_name() {
        let refusal = |key: &str, value: Value| {
            let checkpoint = tiny::llama_with(1, GgmlDType::F32, &[(key, value)]);
            architecture(&checkpoint).map(str::to_owned).unwrap_err().to_string()
        };
        assert!(refusal("llama.rope.scaling.type", Value::String("yarn".into())).contains("scaled rotary"));
        assert!(refusal("llama.expert_count", Value::U32(8)).contains("mixtures of experts"));
        assert!(refusal("llama.rope.dimension_count", Value::U32(8)).contains("partly rotated"));
        assert!(architecture(&tiny::llama(1, GgmlDType::F32)).is_ok());
    }

    #[test]
    fn absurd_shapes_are_refused() {
        for (key, value) in
            [("llama.attention.head_count_kv", 3), ("llama.attention.head_count", 0), ("llama.attention.key_length", 7)]
        {
            let checkpoint = tiny::llama_with(1, GgmlDType::F32, &[(key, Value::U32(value))]);
            assert!(Shape::read(&checkpoint, "llama").is_err(), "{key} = {value} passed");
        }
    }
}
