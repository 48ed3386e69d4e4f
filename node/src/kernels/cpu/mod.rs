//! The fast form on CPUs: packed int8 products where the machine has them, plain f32 products elsewhere and for every other format.

pub mod isa;
mod attention;
mod experts;
mod pool;
mod rowwise;
mod simd;
mod tiles;

use std::{cell::RefCell, ops::Range};

use self::{
    attention::Cache as PagedCache,
    experts::Routes,
    isa::Isa,
    pool::Pool,
    rowwise::QUANT_BLOCK,
    tiles::{Quantized, TILE_ROWS, Tiles},
};
use super::{Activation, Backend, CacheShape, Experts, HeadNorms, Norm, Rope, View};
use crate::{batch::Batch, weights::Weight};

/// Tile rows that a thread takes at a time.
const TILES_A_TURN: usize = 4;

/// Rows of unpacked weights that a thread takes at a time.
const WEIGHT_ROWS_A_TURN: usize = 16;

/// The cores of this machine.
pub struct Cpu {
    cores: Cores,
    /// Activations after norm or gate, `[T, K]`.
    staged: Rows,
    /// What a product gives before it is normed or weighed, `[T, N]`.
    product: Rows,
    mixture: Mixture,
    attention: attention::Work,
}

/// What multiplies.
struct Cores {
    isa: Isa,
    pool: Pool,
    quantized: QuantizedRows,
}

/// Buffers of a mixture of experts.
#[derive(Debug, Default)]
struct Mixture {
    routes: Routes,
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

/// Weights of one or more matrices whose outputs stand side by side, and a bias, `[N]` or empty.
#[derive(Debug)]
pub struct Matrix {
    parts: Vec<Part>,
    bias: Vec<f32>,
    rows: usize,
    cols: usize,
}

/// Keys and values in blocks.
#[derive(Debug)]
pub struct Cache(PagedCache);

#[derive(Debug)]
enum Part {
    Packed(Tiles),
    /// As the file has it, dequantized row by row as it is used.
    AsStored(Weight),
}

#[derive(Debug, Default)]
struct QuantizedRows {
    q: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<f32>,
}

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

thread_local! {
    /// One row of dequantized weights.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
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

impl Part {
    fn rows(&self) -> usize {
        match self {
            Self::Packed(tiles) => tiles.rows(),
            Self::AsStored(weight) => weight.rows(),
        }
    }

    fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Packed(tiles) => tiles.dequantize_row(row, out),
            Self::AsStored(weight) => weight.dequantize_row(row, out),
        }
    }
}

impl Cpu {
    /// A device of `threads` threads on the widest instructions that the machine has.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// A device on given instructions, for tests that compare them.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        let cores = Cores { isa, pool: Pool::new(threads), quantized: QuantizedRows::default() };
        Self {
            cores,
            staged: Rows::default(),
            product: Rows::default(),
            mixture: Mixture::default(),
            attention: attention::Work::default(),
        }
    }

    fn pack(&self, weight: Weight) -> Part {
        #[cfg(target_arch = "x86_64")]
        if self.cores.isa == Isa::Avx512Vnni
            && let Some(tiles) = Tiles::pack(&weight)
        {
            return Part::Packed(tiles);
        }
        Part::AsStored(weight)
    }

    /// `staged[i] = norm(x[rows[i]])`
    fn stage_normed(&mut self, x: &Rows, rows: impl ExactSizeIterator<Item = usize>, norm: &Norm) {
        self.staged.resize(rows.len(), x.width);
        for (i, row) in rows.enumerate() {
            rowwise::rms_norm(self.cores.isa, x.row(row), &norm.gains, norm.epsilon, self.staged.row_mut(i));
        }
    }

    /// `residual += norm(product)`
    fn add_normed_product(&mut self, norm: &Norm, residual: &mut Rows) {
        for i in 0..self.product.count() {
            rowwise::rms_norm_add(self.cores.isa, self.product.row(i), &norm.gains, norm.epsilon, residual.row_mut(i));
        }
    }
}

fn stage_gated(isa: Isa, gate_up: &Rows, activation: Activation, out: &mut Rows) {
    out.resize(gate_up.count(), gate_up.width / 2);
    for i in 0..gate_up.count() {
        let (gate, up) = gate_up.row(i).split_at(gate_up.width / 2);
        rowwise::gate_mul(isa, activation, gate, up, out.row_mut(i));
    }
}

impl Cores {
    /// `out = x @ W^T + bias`
    fn multiply(&mut self, x: &Rows, w: &Matrix, out: &mut Rows) {
        out.resize(x.count(), w.rows);
        if w.bias.is_empty() {
            return self.product(x, w, &mut out.values, false);
        }
        out.values.chunks_exact_mut(w.rows).for_each(|row| row.copy_from_slice(&w.bias));
        self.product(x, w, &mut out.values, true);
    }

    /// `out += x @ W^T + bias`
    fn multiply_add(&mut self, x: &Rows, w: &Matrix, out: &mut Rows) {
        debug_assert_eq!(out.values.len(), x.count() * w.rows, "products fit what they are added to");
        if !w.bias.is_empty() {
            let rows = out.values.chunks_exact_mut(w.rows);
            rows.for_each(|row| rowwise::scaled_add(self.isa, &w.bias, 1.0, row));
        }
        self.product(x, w, &mut out.values, true);
    }

    /// `out = x @ W^T`, written over or added to what is there.
    fn product(&mut self, x: &Rows, w: &Matrix, out: &mut [f32], add: bool) {
        debug_assert_eq!(x.width, w.cols, "activations fit the weights");
        if w.parts.iter().any(|p| matches!(p, Part::Packed(_))) {
            self.quantized.fill(self.isa, x);
        }
        let mut column = 0;
        for part in &w.parts {
            match part {
                Part::Packed(tiles) => self.multiply_packed(tiles, x.count(), out, w.rows, column, add),
                Part::AsStored(weight) => self.multiply_stored(weight, x, out, w.rows, column, add),
            }
            column += part.rows();
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn multiply_packed(
        &mut self,
        tiles: &Tiles,
        rows: usize,
        out: &mut [f32],
        stride: usize,
        column: usize,
        add: bool,
    ) {
        let x = self.quantized.as_ref();
        let out = Shared(out.as_mut_ptr());
        self.pool.for_each(tiles.rows() / TILE_ROWS, TILES_A_TURN, |range: Range<usize>| {
            // a whole `Shared` moves into the closure, not its pointer
            let out = &out;
            let first = column + range.start * TILE_ROWS;
            if !add {
                // SAFETY: tiles are packed only where the instructions exist; columns of different tiles are disjoint
                return unsafe { tiles::multiply(tiles, range, x, rows, out.0.add(first), stride) };
            }
            SCRATCH.with_borrow_mut(|scratch| {
                let width = range.len() * TILE_ROWS;
                scratch.resize(rows * width, 0.0);
                // SAFETY: as above; `scratch` is this thread's own
                unsafe { tiles::multiply(tiles, range, x, rows, scratch.as_mut_ptr(), width) };
                for (row, products) in scratch.chunks_exact(width).enumerate() {
                    // SAFETY: these columns belong to this range alone
                    let out = unsafe { out.slice(row * stride + first, width) };
                    out.iter_mut().zip(products).for_each(|(o, p)| *o += p);
                }
            });
        });
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn multiply_packed(&mut self, _: &Tiles, _: usize, _: &mut [f32], _: usize, _: usize, _: bool) {
        unreachable!("weights are packed only where the instructions exist")
    }

    fn multiply_stored(&mut self, weight: &Weight, x: &Rows, out: &mut [f32], stride: usize, column: usize, add: bool) {
        let (isa, out) = (self.isa, Shared(out.as_mut_ptr()));
        self.pool.for_each(weight.rows(), WEIGHT_ROWS_A_TURN, |range| {
            let out = &out;
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.resize(weight.cols(), 0.0);
                for n in range {
                    weight.dequantize_row(n, scratch);
                    for row in 0..x.count() {
                        let product = rowwise::dot(isa, x.row(row), scratch);
                        // SAFETY: column `n` belongs to this range alone
                        let out = unsafe { out.slice(row * stride + column + n, 1) };
                        out[0] = if add { out[0] + product } else { product };
                    }
                }
            });
        });
    }
}

impl QuantizedRows {
    fn fill(&mut self, isa: Isa, x: &Rows) {
        let blocks = x.width / QUANT_BLOCK;
        self.q.resize(x.count() * x.width, 0);
        self.scales.resize(x.count() * blocks, 0.0);
        self.sums.resize(x.count() * blocks, 0.0);
        for row in 0..x.count() {
            let q = &mut self.q[row * x.width..][..x.width];
            let (scales, sums) = (&mut self.scales[row * blocks..][..blocks], &mut self.sums[row * blocks..][..blocks]);
            rowwise::quantize(isa, x.row(row), q, scales, sums);
        }
    }

    fn as_ref(&self) -> Quantized<'_> {
        Quantized { q: &self.q, scales: &self.scales, sums: &self.sums }
    }
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Rows = Rows;
    type Cache = Cache;

    fn class(&self) -> String {
        format!("cpu-{}", self.cores.isa.name())
    }

    fn matrix(&self, parts: Vec<Weight>, bias: Vec<f32>) -> Matrix {
        let cols = parts[0].cols();
        debug_assert!(parts.iter().all(|p| p.cols() == cols), "matrices side by side have equal inputs");
        let parts: Vec<Part> = parts.into_iter().map(|w| self.pack(w)).collect();
        let rows = parts.iter().map(Part::rows).sum();
        debug_assert!(bias.is_empty() || bias.len() == rows, "a bias is as long as all outputs");
        Matrix { rows, parts, bias, cols }
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

    fn embed(&mut self, table: &Matrix, tokens: &[u32], scale: f32, out: &mut Rows) {
        out.resize(tokens.len(), table.cols);
        for (i, token) in tokens.iter().enumerate() {
            table.parts[0].dequantize_row(*token as usize, out.row_mut(i));
        }
        if scale != 1.0 {
            out.values.iter_mut().for_each(|x| *x *= scale);
        }
    }

    fn norm_linear(&mut self, x: &Rows, norm: &Norm, w: &Matrix, out: &mut Rows) {
        self.stage_normed(x, 0..x.count(), norm);
        self.cores.multiply(&self.staged, w, out);
    }

    fn rope_write(
        &mut self,
        qkv: &mut Rows,
        norms: Option<&HeadNorms>,
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
        stage_gated(self.cores.isa, gate_up, activation, &mut self.staged);
        let Some(norm) = norm else { return self.cores.multiply_add(&self.staged, w, residual) };
        self.cores.multiply(&self.staged, w, &mut self.product);
        self.add_normed_product(norm, residual);
    }

    fn experts_add(&mut self, norm: &Norm, experts: &Experts<Matrix>, residual: &mut Rows) {
        self.stage_normed(residual, 0..residual.count(), norm);
        let Self { cores, staged, product, mixture, .. } = self;
        let Mixture { routes, gathered, gate_up } = mixture;
        cores.multiply(staged, &experts.router, &mut routes.scores);
        routes.choose(cores.isa, experts.used, experts.is_normalized);
        for group in routes.by_expert() {
            let expert = group[0].expert as usize;
            gathered.resize(group.len(), staged.width);
            group.iter().enumerate().for_each(|(i, r)| gathered.row_mut(i).copy_from_slice(staged.row(r.row as usize)));
            cores.multiply(gathered, &experts.gate_up[expert], gate_up);
            stage_gated(cores.isa, gate_up, experts.activation, gathered);
            cores.multiply(gathered, &experts.down[expert], product);
            for (i, r) in group.iter().enumerate() {
                rowwise::scaled_add(cores.isa, product.row(i), r.weight, residual.row_mut(r.row as usize));
            }
        }
    }

    fn head(&mut self, x: &Rows, rows: &[u32], norm: &Norm, w: &Matrix, logits: &mut Rows) {
        self.stage_normed(x, rows.iter().map(|r| *r as usize), norm);
        self.cores.multiply(&self.staged, w, logits);
    }

    fn normed(&mut self, x: &Rows, rows: &[u32], norm: &Norm, out: &mut Rows) {
        out.resize(rows.len(), x.width);
        for (i, row) in rows.iter().enumerate() {
            rowwise::rms_norm(self.cores.isa, x.row(*row as usize), &norm.gains, norm.epsilon, out.row_mut(i));
        }
    }

    fn read<'a>(&self, rows: &'a Rows) -> &'a [f32] {
        &rows.values
    }
}
