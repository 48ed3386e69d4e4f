//! The Llama family (Touvron et al. 2023, arXiv:2302.13971): pre-norm decoder, grouped-query attention (arXiv:2305.13245) with rotary
//! positions, gated SiLU layer.

use crate::{
    batch::Batch,
    kernels::{Backend, Norm, Rope},
    weights::{Checkpoint, LoadError, Weight},
};

use super::{Capacity, Model, Output, Shape};

/// Weights, cache and activations on one backend.
pub struct Llama<B: Backend> {
    backend: B,
    layers: Vec<Layer<B>>,
    embedding: B::Matrix,
    /// None when the embedding serves as the head too.
    head: Option<B::Matrix>,
    norm: Norm,
    rope: Rope,
    cache: B::Cache,
    vocab: usize,
    width: usize,
    /// `[T, E]`
    residual: B::Rows,
    /// `[T, (H + 2K) * D]`
    qkv: B::Rows,
    /// `[T, H * D]`
    mixed: B::Rows,
    /// `[T, 2F]`
    gate_up: B::Rows,
    /// `[S, V]`
    logits: B::Rows,
    /// `[P, E]`
    hidden: B::Rows,
}

struct Layer<B: Backend> {
    attention_norm: Norm,
    qkv: B::Matrix,
    attention_out: B::Matrix,
    gate_norm: Norm,
    gate_up: B::Matrix,
    down: B::Matrix,
}

impl<B: Backend> Llama<B> {
    /// Loads a file.
    ///
    /// # Errors
    /// When a tensor is missing or has the wrong shape.
    pub fn load(checkpoint: &Checkpoint, shape: &Shape, backend: B, capacity: Capacity) -> Result<Self, LoadError> {
        let source = Source { checkpoint, shape };
        let layers = (0..shape.layers).map(|i| source.layer(&backend, i)).collect::<Result<_, _>>()?;
        let head = match checkpoint.has("output.weight") {
            true => Some(backend.matrix(vec![source.matrix("output.weight", shape.vocab, shape.width)?])),
            false => None,
        };
        let rows = capacity.batch_tokens_max;
        Ok(Self {
            layers,
            embedding: backend.matrix(vec![source.matrix("token_embd.weight", shape.vocab, shape.width)?]),
            head,
            norm: source.norm("output_norm.weight")?,
            rope: Rope::new(capacity.context, shape.heads.dim, shape.rope_base, checkpoint.has_interleaved_rotary()),
            cache: backend.cache(shape.cache(capacity.blocks)),
            vocab: shape.vocab,
            residual: backend.rows(rows, shape.width),
            qkv: backend.rows(rows, shape.heads.qkv_width()),
            mixed: backend.rows(rows, shape.heads.query_width()),
            gate_up: backend.rows(rows, 2 * shape.gate_width),
            logits: backend.rows(0, shape.vocab),
            hidden: backend.rows(0, shape.width),
            width: shape.width,
            backend,
        })
    }
}

/// A file, and the shape that its tensors must have.
struct Source<'a> {
    checkpoint: &'a Checkpoint,
    shape: &'a Shape,
}

impl Source<'_> {
    fn layer<B: Backend>(&self, backend: &B, i: usize) -> Result<Layer<B>, LoadError> {
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        let Shape { width, gate_width, heads, .. } = *self.shape;
        let (query, kv) = (heads.query_width(), heads.kv * heads.dim);
        let qkv = vec![
            self.matrix(&name("attn_q"), query, width)?,
            self.matrix(&name("attn_k"), kv, width)?,
            self.matrix(&name("attn_v"), kv, width)?,
        ];
        let gate_up =
            vec![self.matrix(&name("ffn_gate"), gate_width, width)?, self.matrix(&name("ffn_up"), gate_width, width)?];
        Ok(Layer {
            attention_norm: self.norm(&name("attn_norm"))?,
            qkv: backend.matrix(qkv),
            attention_out: backend.matrix(vec![self.matrix(&name("attn_output"), width, query)?]),
            gate_norm: self.norm(&name("ffn_norm"))?,
            gate_up: backend.matrix(gate_up),
            down: backend.matrix(vec![self.matrix(&name("ffn_down"), width, gate_width)?]),
        })
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, LoadError> {
        let weight = self.checkpoint.weight(name)?;
        if (weight.rows(), weight.cols()) == (rows, cols) {
            return Ok(weight);
        }
        Err(self.checkpoint.broken(format!(
            "tensor '{name}' is {} x {}, not {rows} x {cols}",
            weight.rows(),
            weight.cols()
        )))
    }

    fn norm(&self, name: &str) -> Result<Norm, LoadError> {
        let gains = self.matrix(name, 1, self.shape.width)?.dequantize();
        Ok(Norm { gains, epsilon: self.shape.epsilon })
    }
}

impl<B: Backend> Model for Llama<B> {
    fn forward(&mut self, batch: &Batch, beat: &dyn Fn()) -> Output<'_> {
        let b = &mut self.backend;
        b.embed(&self.embedding, &batch.tokens, &mut self.residual);
        for (i, layer) in self.layers.iter().enumerate() {
            b.norm_linear(&self.residual, &layer.attention_norm, &layer.qkv, &mut self.qkv);
            b.rope_write(&mut self.qkv, &self.rope, batch, i, &mut self.cache);
            b.attention(&self.qkv, batch, i, &self.cache, &mut self.mixed);
            b.linear_add(&self.mixed, &layer.attention_out, &mut self.residual);
            b.norm_linear(&self.residual, &layer.gate_norm, &layer.gate_up, &mut self.gate_up);
            b.gated_linear_add(&self.gate_up, &layer.down, &mut self.residual);
            beat();
        }
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        b.head(&self.residual, &batch.logit_rows, &self.norm, head, &mut self.logits);
        b.normed(&self.residual, &batch.hidden_rows, &self.norm, &mut self.hidden);
        Output { logits: b.read(&self.logits), hidden: b.read(&self.hidden) }
    }

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn width(&self) -> usize {
        self.width
    }

    fn device_class(&self) -> String {
        self.backend.class()
    }
}
