//! The operations a model is written against, and their forms: [`mod@reference`], slow and obviously right, and [`cpu`], fast.
//!
//! An architecture is written once, over [`Backend`]. One row's arithmetic never depends on the other rows of a batch: that is what
//! makes an answer independent of who shares its step.
//!
//! Letters in shapes: `T` rows of a step, `S` sampled rows, `E` embedding width, `H` query heads, `K` key-value heads, `D` head
//! dimension, `F` width of the gated layer, `V` vocabulary.
// SIMD intrinsics, a pool that lends out borrowed closures, and disjoint writes from several threads need it
#![allow(unsafe_code)]

mod blocks;
pub mod cpu;
#[cfg(any(feature = "cuda", test))]
pub mod cuda;
pub mod reference;

use candle_core::quantized::GgmlDType;

use crate::{batch::Batch, weights::Weight};

/// Heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, `H`; a multiple of `kv`.
    pub query: usize,
    /// Key-value heads, `K`.
    pub kv: usize,
    /// Width of a head, `D`.
    pub dim: usize,
}

impl Heads {
    /// Width of a row that holds queries, keys and values, `(H + 2K) * D`.
    pub fn qkv_width(&self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }

    /// Width of a row of queries, `H * D`.
    pub fn query_width(&self) -> usize {
        self.query * self.dim
    }
}

/// Shape of the paged cache of keys and values.
#[derive(Debug, Clone, Copy)]
pub struct CacheShape {
    /// Layers of the model.
    pub layers: usize,
    /// Blocks of the pool.
    pub blocks: usize,
    /// Heads of each layer.
    pub heads: Heads,
    /// How a key or a value is kept.
    pub dtype: KvDtype,
}

/// How keys and values are kept.
///
/// What it costs, on SmolLM2-135M in Q4_1 (perplexity 26.71 with f16, over 7,873 tokens of English prose in windows of 512): `Bf16`
/// -0.10 % and `Int8` +0.15 % of perplexity, with standard errors of 0.10 % and 0.12 %; `Int8` holds 1.88 times the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvDtype {
    /// 16 bits; 11 of them for precision.
    #[default]
    F16,
    /// 16 bits; 8 of them for precision, with the range of f32.
    Bf16,
    /// 8 bits, and for each token and head a scale of f32 for its keys and one for its values.
    Int8,
}

impl KvDtype {
    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) as a table of angles.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Whether pairs are neighbours (`2i`, `2i+1`), as in GGUF files of the Llama family, or halves (`i`, `i + half`).
    pub interleaved: bool,
    /// `[positions, half]`
    pub cos: Vec<f32>,
    /// `[positions, half]`
    pub sin: Vec<f32>,
    /// Pairs that are rotated; what lies behind the first `2 * half` values of a head stays as it is.
    pub half: usize,
}

impl Rope {
    /// The table for `positions` positions: `position * inverse[i]` is the angle of pair `i`. Rotated pairs grow by `magnitude`.
    pub fn new(positions: usize, inverse: &[f64], magnitude: f32, interleaved: bool) -> Self {
        let angles = (0..positions).flat_map(|p| inverse.iter().map(move |f| p as f64 * f));
        let magnitude = f64::from(magnitude);
        let (cos, sin) = angles.map(|a| ((a.cos() * magnitude) as f32, (a.sin() * magnitude) as f32)).unzip();
        Self { interleaved, cos, sin, half: inverse.len() }
    }

    /// Rotates one head in place.
    pub fn rotate(&self, head: &mut [f32], position: usize) {
        let cos = &self.cos[position * self.half..][..self.half];
        let sin = &self.sin[position * self.half..][..self.half];
        for i in 0..self.half {
            let (a, b) = if self.interleaved { (2 * i, 2 * i + 1) } else { (i, i + self.half) };
            let (x, y) = (head[a], head[b]);
            head[a] = x * cos[i] - y * sin[i];
            head[b] = x * sin[i] + y * cos[i];
        }
    }
}

/// Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467): gains, and the epsilon under the root.
#[derive(Debug, Clone)]
pub struct Norm {
    /// `[E]`, or `[D]` over a head.
    pub gains: Vec<f32>,
    /// Keeps the root away from zero.
    pub epsilon: f32,
}

/// Norms over each query head and each key head before they are rotated (Dehghani et al. 2023, arXiv:2302.05442).
#[derive(Debug, Clone)]
pub struct HeadNorms<N> {
    /// For query heads, `[D]`.
    pub query: N,
    /// For key heads, `[D]`.
    pub key: N,
}

/// What a row's queries see, and how they weigh it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    /// Factor of the scores before softmax; `1/sqrt(D)` unless the model says otherwise.
    pub scale: f32,
    /// How many positions a row sees, its own among them; all before it when None (Beltagy et al. 2020, arXiv:2004.05150).
    pub window: Option<usize>,
}

impl View {
    /// The positions that a row at `position` sees.
    pub fn positions(&self, position: usize) -> std::ops::Range<usize> {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1
    }
}

/// What the gate of a gated layer goes through. Both are `x * sigmoid(s(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `s(x) = x` (Elfwing et al. 2017, arXiv:1702.03118).
    Silu,
    /// The tanh form of GELU, `s(x) = 2 * sqrt(2/pi) * (x + 0.044715 x^3)` (Hendrycks & Gimpel 2016, arXiv:1606.08415).
    GeluTanh,
}

/// A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): gated layers of which each row uses a few.
#[derive(Debug)]
pub struct Experts<M> {
    /// `[N, E]`: one score for each of `N` experts.
    pub router: M,
    /// `N` times `[2F, E]`: gate and up.
    pub gate_up: Vec<M>,
    /// `N` times `[E, F]`.
    pub down: Vec<M>,
    /// Experts that each row uses.
    pub used: usize,
    /// Whether the weights of the used experts are made to add up to one.
    pub is_normalized: bool,
    /// What the gates go through.
    pub activation: Activation,
}

/// A device that runs the operations of a model.
///
/// Every operation works on all rows of its input and sets the number of rows of its output.
pub trait Backend: Send {
    /// A weight matrix `[N, K]` in the device's own layout, perhaps with a bias `[N]`; a product is `x @ W^T + bias`.
    type Matrix: Send;
    /// A norm, with its gains where the device reads them.
    type Norm: Send;
    /// A table of angles, likewise.
    type Rope: Send;
    /// Activations `[T, width]`, f32.
    type Rows: Send;
    /// Keys and values of all layers, in blocks.
    type Cache: Send;

    /// Device class: answers are equal within one class and build.
    fn class(&self) -> String;

    /// Lays out weights for this device. Several matrices of equal `K` become one whose outputs stand side by side; `bias` is as long
    /// as all outputs, or empty.
    fn matrix(&self, parts: Vec<Weight>, bias: Vec<f32>) -> Self::Matrix;

    /// Lays out a norm for this device.
    fn norm(&self, norm: Norm) -> Self::Norm;

    /// Lays out a table of angles for this device.
    fn rope(&self, rope: Rope) -> Self::Rope;

    /// Memory for activations.
    fn rows(&self, rows_max: usize, width: usize) -> Self::Rows;

    /// Memory for keys and values.
    fn cache(&self, shape: CacheShape) -> Self::Cache;

    /// Bytes of cache that one block takes.
    fn block_bytes(shape: CacheShape) -> usize
    where
        Self: Sized;

    /// Takes over a step's input; the operations that follow, until the next one, are given the same `batch`.
    fn begin(&mut self, batch: &Batch, cache: &Self::Cache);

    /// `out[T, E] = scale * table[tokens]`
    fn embed(&mut self, table: &Self::Matrix, batch: &Batch, scale: f32, out: &mut Self::Rows);

    /// `out[T, N] = norm(x)[T, E] @ W^T`
    fn norm_linear(&mut self, x: &Self::Rows, norm: &Self::Norm, w: &Self::Matrix, out: &mut Self::Rows);

    /// Norms and rotates queries and keys of `qkv[T, (H+2K)*D]` in place, and writes keys and values to their slots.
    fn rope_write(
        &mut self,
        qkv: &mut Self::Rows,
        norms: Option<&HeadNorms<Self::Norm>>,
        rope: &Self::Rope,
        batch: &Batch,
        layer: usize,
        cache: &mut Self::Cache,
    );

    /// `out[T, H*D]`: each row's queries over the keys of its sequence that it sees.
    fn attention(
        &mut self,
        qkv: &Self::Rows,
        view: View,
        batch: &Batch,
        layer: usize,
        cache: &Self::Cache,
        out: &mut Self::Rows,
    );

    /// `residual[T, N] += norm(x[T, K] @ W^T)`; without a norm, the product itself.
    fn linear_add(&mut self, x: &Self::Rows, w: &Self::Matrix, norm: Option<&Self::Norm>, residual: &mut Self::Rows);

    /// `residual[T, N] += norm((activation(gate) * up)[T, F] @ W^T)`, with `gate_up[T, 2F]`; without a norm, the product itself.
    fn gated_linear_add(
        &mut self,
        gate_up: &Self::Rows,
        activation: Activation,
        w: &Self::Matrix,
        norm: Option<&Self::Norm>,
        residual: &mut Self::Rows,
    );

    /// `residual[T, E] += sum of p_i * expert_i(x)` with `x = norm(residual)`, over the `used` experts of greatest probability `p =
    /// softmax(x @ router^T)`; of equals the first.
    fn experts_add(&mut self, norm: &Self::Norm, experts: &Experts<Self::Matrix>, residual: &mut Self::Rows);

    /// `logits[S, V] = norm(x[logit_rows]) @ W^T`
    fn head(&mut self, x: &Self::Rows, batch: &Batch, norm: &Self::Norm, w: &Self::Matrix, logits: &mut Self::Rows);

    /// `out[P, E] = norm(x[hidden_rows])`
    fn hidden(&mut self, x: &Self::Rows, batch: &Batch, norm: &Self::Norm, out: &mut Self::Rows);

    /// Whether [`Backend::choose`] can choose tokens.
    const PICKS: bool = false;

    /// The logits after rows without a pick, and the tokens chosen after rows that have one.
    fn choose<'a>(&'a mut self, logits: &'a mut Self::Rows, batch: &Batch) -> (&'a [f32], &'a [u32]) {
        debug_assert!(batch.picks.is_empty(), "nothing is chosen where the host does it");
        (self.read(logits), &[])
    }

    /// The values on the host, `[rows, width]`.
    fn read<'a>(&self, rows: &'a mut Self::Rows) -> &'a [f32];
}

/// Whether every CPU form can work with weights of this type.
pub fn supports(dtype: GgmlDType) -> bool {
    !matches!(dtype, GgmlDType::Q8_1 | GgmlDType::Q8K)
}

#[cfg(test)]
mod oracle;
