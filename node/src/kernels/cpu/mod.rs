//! The fast form on CPUs: the widest instructions that the machine has, and the same bits on each of them.

pub mod isa;
mod memory;
mod pool;
mod rowwise;
mod simd;
mod linear;
mod attention;
mod experts;

use self::{
    attention::Cache as PagedCache,
    experts::Routes,
    isa::Isa,
    linear::{Cores, Source},
};
use super::{Activation, Backend, CacheShape, Experts, HeadNorms, Norm, Rope, View};
use crate::{batch::Batch, weights::Weight};

/// Rows that a thread norms at a time.
const NORMED_ROWS_A_TURN: usize = 8;

/// The cores of this machine.
pub struct Cpu {
    cores: Cores,
    /// What a product gives before it is normed or weighed, `[T, N]`.
    product: Rows,
    mixture: Mixture,
    attention: attention::Work,
}

/// Buffers of a mixture of experts.
#[derive(Debug, Default)]
struct Mixture {
    routes: Routes,
    /// The normed rows of the step, `[T, E]`.
    normed: Rows,
    /// The rows of one expert, `[n, E]`.
    gathered: Rows,
    /// `[n, 2F]`
    gate_up: Rows,
}

/// Activations, `[T, width]`.
#[derive(Debug, Default)]
pub struct Rows {
    width: usize,
    values: Vec<f32>,
}

pub use linear::Matrix;

/// Keys and values in blocks.
#[derive(Debug)]
pub struct Cache(PagedCache);

/// A place that several threads write to, each its own part.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: every use writes disjoint ranges from different threads, and reads none of them
unsafe impl Sync for Shared {}
// SAFETY: as above
unsafe impl Send for Shared {}

impl Shared {
    /// # Safety
    /// `at..at + len` lies within the buffer, and no other thread touches it now.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, at: usize, len: usize) -> &mut [f32] {
        // SAFETY: the caller's promise
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}

impl Rows {
    fn new(rows_max: usize, width: usize) -> Self {
        Self { width, values: Vec::with_capacity(rows_max * width) }
    }

    fn resize(&mut self, rows: usize, width: usize) {
        self.width = width;
        self.values.resize(rows * width, 0.0);
    }

    fn count(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.width..][..self.width]
    }

    fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.values[i * self.width..][..self.width]
    }
}

impl Cpu {
    /// A device of `threads` threads on the widest instructions that the machine has.
    pub fn new(threads: usize) -> Self {
        let isa = Isa::detect();
        tracing::info!(instructions = isa.name(), threads, "the CPU computes");
        Self::with_isa(threads, isa)
    }

    /// A device on given instructions, for tests that compare them.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        Self {
            cores: Cores::new(isa, threads),
            product: Rows::default(),
            mixture: Mixture::default(),
            attention: attention::Work::default(),
        }
    }

    /// `residual += norm(product)`
    fn add_normed_product(&mut self, norm: &Norm, residual: &mut Rows) {
        let (isa, product, width) = (self.cores.isa, &self.product, residual.width);
        let out = Shared(residual.values.as_mut_ptr());
        self.cores.pool.for_each(product.count(), NORMED_ROWS_A_TURN, |range| {
            let out = &out;
            for i in range {
                // SAFETY: row `i` belongs to this range alone
                let out = unsafe { out.slice(i * width, width) };
                rowwise::rms_norm_add(isa, product.row(i), &norm.gains, norm.epsilon, out);
            }
        });
    }
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Norm = Norm;
    type Rope = Rope;
    type Rows = Rows;
    type Cache = Cache;

    fn class(&self) -> String {
        // whatever the instructions, the bits are the same
        "cpu".to_owned()
    }

    fn matrix(&self, parts: Vec<Weight>, bias: Vec<f32>) -> Matrix {
        self.cores.matrix(parts, bias)
    }

    fn norm(&self, norm: Norm) -> Norm {
        norm
    }

    fn rope(&self, rope: Rope) -> Rope {
        rope
    }

    fn rows(&self, rows_max: usize, width: usize) -> Rows {
        Rows::new(rows_max, width)
    }

    fn cache(&self, shape: CacheShape) -> Cache {
        Cache(PagedCache::new(shape))
    }

    fn block_bytes(shape: CacheShape) -> usize {
        PagedCache::block_bytes(shape)
    }

    fn begin(&mut self, _: &Batch, _: &Cache) {}

    fn embed(&mut self, table: &Matrix, batch: &Batch, scale: f32, out: &mut Rows) {
        out.resize(batch.tokens.len(), table.cols);
        for (i, token) in batch.tokens.iter().enumerate() {
            table.dequantize_row(*token as usize, out.row_mut(i));
        }
        if scale != 1.0 {
            out.values.iter_mut().for_each(|x| *x *= scale);
        }
    }

    fn norm_linear(&mut self, x: &Rows, norm: &Norm, w: &Matrix, out: &mut Rows) {
        self.cores.multiply(Source::Normed(x, norm), w, out);
    }

    fn rope_write(
        &mut self,
        qkv: &mut Rows,
        norms: Option<&HeadNorms<Norm>>,
        rope: &Rope,
        batch: &Batch,
        layer: usize,
        cache: &mut Cache,
    ) {
        let Cores { isa, pool, .. } = &mut self.cores;
        attention::rope_write(*isa, pool, qkv, norms, rope, batch, layer, &mut cache.0);
    }

    fn attention(&mut self, qkv: &Rows, view: View, batch: &Batch, layer: usize, cache: &Cache, out: &mut Rows) {
        let Cores { isa, pool, .. } = &mut self.cores;
        attention::attend(*isa, pool, &mut self.attention, qkv, view, batch, layer, &cache.0, out);
    }

    fn linear_add(&mut self, x: &Rows, w: &Matrix, norm: Option<&Norm>, residual: &mut Rows) {
        let x = Source::Plain(x);
        let Some(norm) = norm else { return self.cores.multiply_add(x, w, residual) };
        self.cores.multiply(x, w, &mut self.product);
        self.add_normed_product(norm, residual);
    }

    fn gated_linear_add(
        &mut self,
        gate_up: &Rows,
        activation: Activation,
        w: &Matrix,
        norm: Option<&Norm>,
        residual: &mut Rows,
    ) {
        let x = Source::Gated(gate_up, activation);
        let Some(norm) = norm else { return self.cores.multiply_add(x, w, residual) };
        self.cores.multiply(x, w, &mut self.product);
        self.add_normed_product(norm, residual);
    }

    fn experts_add(&mut self, norm: &Norm, experts: &Experts<Matrix>, residual: &mut Rows) {
        let mut normed = std::mem::take(&mut self.mixture.normed);
        normed_rows(self.cores.isa, residual, 0..residual.count(), norm, &mut normed);
        let Self { cores, product, mixture, .. } = self;
        let Mixture { routes, gathered, gate_up, .. } = mixture;
        cores.multiply(Source::Plain(&normed), &experts.router, &mut routes.scores);
        routes.choose(cores.isa, experts.used, experts.is_normalized);
        for group in routes.by_expert() {
            let expert = group[0].expert as usize;
            gathered.resize(group.len(), normed.width);
            group.iter().enumerate().for_each(|(i, r)| gathered.row_mut(i).copy_from_slice(normed.row(r.row as usize)));
            cores.multiply(Source::Plain(gathered), &experts.gate_up[expert], gate_up);
            cores.multiply(Source::Gated(gate_up, experts.activation), &experts.down[expert], product);
            for (i, r) in group.iter().enumerate() {
                rowwise::scaled_add(cores.isa, product.row(i), r.weight, residual.row_mut(r.row as usize));
            }
        }
        self.mixture.normed = normed;
    }

    fn head(&mut self, x: &Rows, batch: &Batch, norm: &Norm, w: &Matrix, logits: &mut Rows) {
        self.cores.multiply(Source::Picked(x, &batch.logit_rows, norm), w, logits);
    }

    fn hidden(&mut self, x: &Rows, batch: &Batch, norm: &Norm, out: &mut Rows) {
        normed_rows(self.cores.isa, x, batch.hidden_rows.iter().map(|row| *row as usize), norm, out);
    }

    fn read<'a>(&self, rows: &'a mut Rows) -> &'a [f32] {
        &rows.values
    }
}

/// `out = norm(x[rows])`
fn normed_rows(isa: Isa, x: &Rows, rows: impl ExactSizeIterator<Item = usize>, norm: &Norm, out: &mut Rows) {
    out.resize(rows.len(), x.width);
    for (i, row) in rows.enumerate() {
        rowwise::rms_norm(isa, x.row(row), &norm.gains, norm.epsilon, out.row_mut(i));
    }
}
