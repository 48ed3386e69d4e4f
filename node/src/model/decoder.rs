//! The forward pass that all architectures share, over the operations of [`Backend`], and the loading of its weights.

use std::{
    cell::RefCell,
    collections::HashSet,
    time::{Duration, Instant},
};

use tracing::info;

use super::{
    Capacity, Model, Output,
    plan::{ExpertsPlan, Plan},
};
use crate::{
    batch::Batch,
    kernels::{Activation, Backend, Experts, HeadNorms, KvDtype, Norm, View},
    weights::{Checkpoint, LoadError, Weight},
};

/// Weights, cache and activations on one backend.
pub(super) struct Decoder<B: Backend> {
    backend: B,
    embedding: B::Matrix,
    embedding_scale: f32,
    layers: Vec<Layer<B>>,
    ropes: Vec<B::Rope>,
    norm: B::Norm,
    /// None when the embedding serves as the head too.
    head: Option<B::Matrix>,
    /// The last norm with the factor of the logits in its gains.
    head_norm: B::Norm,
    cache: B::Cache,
    kv_dtype: KvDtype,
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
    attention_norm: B::Norm,
    qkv: B::Matrix,
    head_norms: Option<HeadNorms<B::Norm>>,
    /// Which of the decoder's tables.
    rope: usize,
    view: View,
    attention_out: B::Matrix,
    attention_out_norm: Option<B::Norm>,
    feed_norm: B::Norm,
    feed: Feed<B>,
}

enum Feed<B: Backend> {
    Gated { gate_up: B::Matrix, activation: Activation, down: B::Matrix, out_norm: Option<B::Norm> },
    Experts(Experts<B::Matrix>),
}

impl<B: Backend> Decoder<B> {
    /// Loads the weights that `plan` describes. They are read before any buffer of the plan's sizes is made, so a file that lies about
    /// its sizes is found out first.
    ///
    /// # Errors
    /// When a tensor is missing or has the wrong shape.
    pub(super) fn load(file: &Checkpoint, plan: &Plan, backend: B, capacity: Capacity) -> Result<Self, LoadError> {
        let shape = &plan.shape;
        let tensors = Tensors { file, plan, backend: &backend, used: RefCell::default() };
        let embedding = tensors.matrix("token_embd.weight", shape.vocab, shape.width)?;
        let head = match file.has("output.weight") {
            true => Some(tensors.matrix("output.weight", shape.vocab, shape.width)?),
            false => None,
        };
        let norm = tensors.plain_norm("output_norm.weight", shape.width)?;
        let layers = tensors.layers()?;
        tensors.refuse_unused()?;
        let gains = norm.gains.iter().map(|g| g * plan.logit_scale).collect();
        let head_norm = backend.norm(Norm { gains, epsilon: norm.epsilon });
        let rows = capacity.batch_tokens_max;
        Ok(Self {
            embedding,
            embedding_scale: plan.embedding_scale,
            layers,
            ropes: plan.ropes.iter().map(|rope| backend.rope(rope.table(capacity.context))).collect(),
            head,
            head_norm,
            norm: backend.norm(norm),
            cache: backend.cache(shape.cache(capacity.blocks, capacity.kv_dtype)),
            kv_dtype: capacity.kv_dtype,
            vocab: shape.vocab,
            width: shape.width,
            residual: backend.rows(rows, shape.width),
            qkv: backend.rows(rows, shape.heads.qkv_width()),
            mixed: backend.rows(rows, shape.heads.query_width()),
            gate_up: backend.rows(if plan.experts.is_some() { 0 } else { rows }, 2 * shape.gate_width),
            logits: backend.rows(0, shape.vocab),
            hidden: backend.rows(0, shape.width),
            backend,
        })
    }
}

impl<B: Backend> Model for Decoder<B> {
    fn forward(&mut self, batch: &Batch, beat: &dyn Fn()) -> Output<'_> {
        let b = &mut self.backend;
        b.begin(batch, &self.cache);
        b.embed(&self.embedding, batch, self.embedding_scale, &mut self.residual);
        for (i, layer) in self.layers.iter().enumerate() {
            b.norm_linear(&self.residual, &layer.attention_norm, &layer.qkv, &mut self.qkv);
            let rope = &self.ropes[layer.rope];
            b.rope_write(&mut self.qkv, layer.head_norms.as_ref(), rope, batch, i, &mut self.cache);
            b.attention(&self.qkv, layer.view, batch, i, &self.cache, &mut self.mixed);
            let norm = layer.attention_out_norm.as_ref();
            b.linear_add(&self.mixed, &layer.attention_out, norm, &mut self.residual);
            match &layer.feed {
                Feed::Gated { gate_up, activation, down, out_norm } => {
                    b.norm_linear(&self.residual, &layer.feed_norm, gate_up, &mut self.gate_up);
                    b.gated_linear_add(&self.gate_up, *activation, down, out_norm.as_ref(), &mut self.residual);
                }
                Feed::Experts(experts) => b.experts_add(&layer.feed_norm, experts, &mut self.residual),
            }
            beat();
        }
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        b.head(&self.residual, batch, &self.head_norm, head, &mut self.logits);
        b.hidden(&self.residual, batch, &self.norm, &mut self.hidden);
        let hidden = b.read(&mut self.hidden);
        let (logits, tokens) = b.choose(&mut self.logits, batch);
        Output { logits, tokens, hidden }
    }

    fn picks(&self) -> bool {
        B::PICKS
    }

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn width(&self) -> usize {
        self.width
    }

    fn device_class(&self) -> String {
        match self.kv_dtype {
            KvDtype::F16 => self.backend.class(),
            other => format!("{}-kv-{}", self.backend.class(), other.name()),
        }
    }
}

/// How often loading says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// A file, and the shapes that its tensors must have.
struct Tensors<'a, B: Backend> {
    file: &'a Checkpoint,
    plan: &'a Plan,
    backend: &'a B,
    /// Names of what was read.
    used: RefCell<HashSet<String>>,
}

/// Tensors of layers that old files carry and that say nothing: the plain rotary frequencies.
const WITHOUT_MEANING: &str = ".attn_rot_embd.weight";

impl<B: Backend> Tensors<'_, B> {
    /// All layers; says how far it is, as large models take their time.
    fn layers(&self) -> Result<Vec<Layer<B>>, LoadError> {
        let of = self.plan.shape.layers;
        let mut told = Instant::now();
        let mut layers = Vec::with_capacity(of);
        for i in 0..of {
            layers.push(self.layer(i)?);
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                info!(layers = i + 1, of, "packing weights");
            }
        }
        Ok(layers)
    }

    fn layer(&self, i: usize) -> Result<Layer<B>, LoadError> {
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        let Plan { shape, layers, has_head_norms, has_output_norms, .. } = self.plan;
        let (width, dim) = (shape.width, shape.heads.dim);
        let norm = |part: &str, width: usize| self.norm(&name(part), width);
        let norm_if = |has: bool, part: &str| has.then(|| norm(part, width)).transpose();
        let head_norms = || Ok(HeadNorms { query: norm("attn_q_norm", dim)?, key: norm("attn_k_norm", dim)? });
        Ok(Layer {
            attention_norm: norm("attn_norm", width)?,
            qkv: self.qkv(i)?,
            head_norms: has_head_norms.then(head_norms).transpose()?,
            rope: layers[i].rope,
            view: layers[i].view,
            attention_out: self.linear(i, &[("attn_output", width)], shape.heads.query_width(), false)?,
            attention_out_norm: norm_if(*has_output_norms, "post_attention_norm")?,
            feed_norm: norm("ffn_norm", width)?,
            feed: match self.plan.experts {
                Some(experts) => Feed::Experts(self.experts(i, experts)?),
                None => Feed::Gated {
                    gate_up: self.gate_up(i)?,
                    activation: self.plan.activation,
                    down: self.linear(i, &[("ffn_down", width)], shape.gate_width, false)?,
                    out_norm: norm_if(*has_output_norms, "post_ffw_norm")?,
                },
            },
        })
    }

    fn qkv(&self, i: usize) -> Result<B::Matrix, LoadError> {
        let (heads, width) = (self.plan.shape.heads, self.plan.shape.width);
        let kv = heads.kv * heads.dim;
        let apart = [("attn_q", heads.query_width()), ("attn_k", kv), ("attn_v", kv)];
        let parts = if self.plan.is_fused { &[("attn_qkv", heads.qkv_width())][..] } else { &apart };
        self.linear(i, parts, width, self.plan.needs_qkv_bias)
    }

    fn gate_up(&self, i: usize) -> Result<B::Matrix, LoadError> {
        let Plan { shape, is_fused, .. } = self.plan;
        let apart = [("ffn_gate", shape.gate_width), ("ffn_up", shape.gate_width)];
        let parts = if *is_fused { &[("ffn_up", 2 * shape.gate_width)][..] } else { &apart };
        self.linear(i, parts, shape.width, false)
    }

    fn experts(&self, i: usize, plan: ExpertsPlan) -> Result<Experts<B::Matrix>, LoadError> {
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        let (width, gate_width) = (self.plan.shape.width, self.plan.shape.gate_width);
        let part = |part: &str, expert: usize, rows: usize, cols: usize| {
            let weight = self.file.expert(&name(part), expert, plan.count)?;
            self.checked(&name(part), weight, rows, cols)
        };
        let gate_up = |expert: usize| {
            let parts = ["ffn_gate_exps", "ffn_up_exps"].map(|name| part(name, expert, gate_width, width));
            let [gate, up] = parts;
            Ok(self.backend.matrix(vec![gate?, up?], Vec::new()))
        };
        let down = |expert: usize| {
            Ok(self.backend.matrix(vec![part("ffn_down_exps", expert, width, gate_width)?], Vec::new()))
        };
        Ok(Experts {
            router: self.linear(i, &[("ffn_gate_inp", plan.count)], width, false)?,
            gate_up: (0..plan.count).map(gate_up).collect::<Result<_, LoadError>>()?,
            down: (0..plan.count).map(down).collect::<Result<_, LoadError>>()?,
            used: plan.used,
            is_normalized: plan.is_normalized,
            activation: self.plan.activation,
        })
    }

    /// Matrices `[rows, cols]` of a layer side by side, with biases where it has them: all of them or none.
    fn linear(&self, i: usize, parts: &[(&str, usize)], cols: usize, needs_bias: bool) -> Result<B::Matrix, LoadError> {
        let name = |part: &str, kind: &str| format!("blk.{i}.{part}.{kind}");
        let weights = parts.iter().map(|(part, rows)| self.weight(&name(part, "weight"), *rows, cols));
        let weights = weights.collect::<Result<_, _>>()?;
        let has_bias = needs_bias || parts.iter().any(|(part, _)| self.file.has(&name(part, "bias")));
        let biases = parts.iter().filter(|_| has_bias).map(|(part, rows)| self.vector(&name(part, "bias"), *rows));
        Ok(self.backend.matrix(weights, biases.collect::<Result<Vec<_>, _>>()?.concat()))
    }

    /// A matrix `[rows, cols]` outside of the layers.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<B::Matrix, LoadError> {
        Ok(self.backend.matrix(vec![self.weight(name, rows, cols)?], Vec::new()))
    }

    /// A tensor of the decoder that nothing reads would make a difference that we do not know.
    fn refuse_unused(&self) -> Result<(), LoadError> {
        let used = self.used.borrow();
        let is_ours = |name: &str| ["blk.", "output", "token_"].iter().any(|start| name.starts_with(start));
        let is_unused = |name: &&str| is_ours(name) && !name.ends_with(WITHOUT_MEANING) && !used.contains(*name);
        match self.file.names().filter(is_unused).min() {
            Some(name) => Err(LoadError::Unsupported(format!(
                "this model has a tensor '{name}', which has no place in what is computed for its architecture"
            ))),
            None => Ok(()),
        }
    }

    fn norm(&self, name: &str, width: usize) -> Result<B::Norm, LoadError> {
        Ok(self.backend.norm(self.plain_norm(name, width)?))
    }

    fn plain_norm(&self, name: &str, width: usize) -> Result<Norm, LoadError> {
        Ok(Norm { gains: self.vector(name, width)?, epsilon: self.plan.epsilon })
    }

    fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>, LoadError> {
        Ok(self.weight(name, 1, width)?.dequantize())
    }

    fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, LoadError> {
        self.checked(name, self.file.weight(name)?, rows, cols)
    }

    fn checked(&self, name: &str, weight: Weight, rows: usize, cols: usize) -> Result<Weight, LoadError> {
        self.used.borrow_mut().insert(name.to_owned());
        if (weight.rows(), weight.cols()) == (rows, cols) {
            return Ok(weight);
        }
        Err(self.file.broken(format!("tensor '{name}' is {} x {}, not {rows} x {cols}", weight.rows(), weight.cols())))
    }
}
