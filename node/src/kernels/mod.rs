//! The operations a model is written against, and their forms: [`mod@reference`], slow and obviously right, and [`cpu`], fast.
//!
//! An architecture is written once, over [`Backend`]. One row's arithmetic never depends on the other rows of a batch: that is what
//! makes an answer independent of who shares its step.
//!
//! Letters in shapes: `T` rows of a step, `S` sampled rows, `E` embedding width, `H` query heads, `K` key-value heads, `D` head
//! dimension, `F` width of the gated layer, `V` vocabulary.
// SIMD intrinsics, a pool that lends out borrowed closures, and disjoint writes from several threads need it
#![allow(unsafe_code)]

pub mod cpu;
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
}

/// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) as a table of angles.
#[derive(Debug, Clone)]
pub struct Rope {
    /// Whether pairs are neighbours (`2i`, `2i+1`), as in GGUF files of the Llama family, or halves (`i`, `i + D/2`).
    pub interleaved: bool,
    /// `[positions, D/2]`
    pub cos: Vec<f32>,
    /// `[positions, D/2]`
    pub sin: Vec<f32>,
    /// `D/2`
    pub half: usize,
}

impl Rope {
    /// The table for `positions` positions of heads of `dim`, with frequencies `base^(-2i/dim)`.
    pub fn new(positions: usize, dim: usize, base: f32, interleaved: bool) -> Self {
        let half = dim / 2;
        let angles = (0..positions)
            .flat_map(|p| (0..half).map(move |i| p as f64 * f64::from(base).powf(-2.0 * i as f64 / dim as f64)));
        let (cos, sin) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        Self { interleaved, cos, sin, half }
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
    /// `[E]`
    pub gains: Vec<f32>,
    /// Keeps the root away from zero.
    pub epsilon: f32,
}

/// A device that runs the operations of a model.
///
/// Every operation works on all rows of its input and sets the number of rows of its output.
pub trait Backend: Send {
    /// A weight matrix `[N, K]` in the device's own layout; a product is `x @ W^T`.
    type Matrix: Send;
    /// Activations `[T, width]`, f32.
    type Rows: Send;
    /// Keys and values of all layers, in blocks.
    type Cache: Send;

    /// Device class: answers are equal within one class and build.
    fn class(&self) -> String;

    /// Lays out weights for this device. Several matrices of equal `K` become one whose outputs stand side by side.
    fn matrix(&self, parts: Vec<Weight>) -> Self::Matrix;

    /// Memory for activations.
    fn rows(&self, rows_max: usize, width: usize) -> Self::Rows;

    /// Memory for keys and values.
    fn cache(&self, shape: CacheShape) -> Self::Cache;

    /// Bytes of cache that one block takes.
    fn block_bytes(shape: CacheShape) -> usize
    where
        Self: Sized;

    /// `out[T, E] = table[tokens]`
    fn embed(&mut self, table: &Self::Matrix, tokens: &[u32], out: &mut Self::Rows);

    /// `out[T, N] = norm(x)[T, E] @ W^T`
    fn norm_linear(&mut self, x: &Self::Rows, norm: &Norm, w: &Self::Matrix, out: &mut Self::Rows);

    /// Rotates queries and keys of `qkv[T, (H+2K)*D]` in place, and writes keys and values to their slots.
    fn rope_write(&mut self, qkv: &mut Self::Rows, rope: &Rope, batch: &Batch, layer: usize, cache: &mut Self::Cache);

    /// `out[T, H*D]`: each row's queries over all keys of its sequence up to its own position, scaled by `1/sqrt(D)`.
    fn attention(&mut self, qkv: &Self::Rows, batch: &Batch, layer: usize, cache: &Self::Cache, out: &mut Self::Rows);

    /// `residual[T, N] += x[T, K] @ W^T`
    fn linear_add(&mut self, x: &Self::Rows, w: &Self::Matrix, residual: &mut Self::Rows);

    /// `residual[T, N] += (silu(gate) * up)[T, F] @ W^T`, with `gate_up[T, 2F]`
    fn gated_linear_add(&mut self, gate_up: &Self::Rows, w: &Self::Matrix, residual: &mut Self::Rows);

    /// `logits[S, V] = norm(x[rows]) @ W^T`
    fn head(&mut self, x: &Self::Rows, rows: &[u32], norm: &Norm, w: &Self::Matrix, logits: &mut Self::Rows);

    /// `out[P, E] = norm(x[rows])`
    fn normed(&mut self, x: &Self::Rows, rows: &[u32], norm: &Norm, out: &mut Self::Rows);

    /// The values on the host, `[rows, width]`.
    fn read<'a>(&self, rows: &'a Self::Rows) -> &'a [f32];
}

/// Whether every CPU form can work with weights of this type.
pub fn supports(dtype: GgmlDType) -> bool {
    !matches!(dtype, GgmlDType::Q8_1 | GgmlDType::Q8K)
}

#[cfg(test)]
mod oracle;
