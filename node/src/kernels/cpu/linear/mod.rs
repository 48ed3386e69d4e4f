//! Matrix products. Weights are packed once, in the order in which the kernels read them; activations are quantized once for all parts
//! of a matrix that want them so. The products of int8 are exact and what follows is fused in one order everywhere, so every
//! instruction set gives the same bits, and one row's result is the same whatever rows are beside it.

mod floats;
mod portable;
mod quantized;
mod tiles;
#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use std::{cell::RefCell, ops::Range};

use self::{
    floats::FloatTiles,
    quantized::{GROUP_ROWS, Places, QuantizedRows},
    tiles::{TILE_ROWS, Tiles},
};
use super::{Rows, Shared, isa::Isa, memory::Arena, pool::Pool, rowwise};
use crate::{
    kernels::{Activation, Norm},
    weights::Weight,
};

/// Bytes of weights that a thread takes at a time: they stay in the first-level cache while the rows pass by.
const TURN_BYTES: usize = 20 << 10;

/// Rows of weights without a packed form that a thread takes at a time.
const STORED_ROWS_A_TURN: usize = 16;

/// Rows of activations that a thread prepares at a time.
const STAGED_ROWS_A_TURN: usize = 4;

/// Rows that a thread takes through a whole matrix where there are so many for each: it finds what it has written in its own cache when
/// the next operation reads it.
const PANEL_ROWS: usize = 4 * GROUP_ROWS;

/// Weights of one or more matrices whose outputs stand side by side, and a bias, `[N]` or empty.
#[derive(Debug)]
pub struct Matrix {
    parts: Vec<Part>,
    bias: Vec<f32>,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

#[derive(Debug)]
enum Part {
    /// Multiplied with int8 activations.
    Tiles(Tiles),
    /// Multiplied with f32 activations.
    Floats(FloatTiles),
    /// As the file has it, dequantized row by row as it is used.
    Stored(Weight),
}

/// Where the rows of a product come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// As they are.
    Plain(&'a Rows),
    /// `norm(x)`
    Normed(&'a Rows, &'a Norm),
    /// `norm(x[rows])`
    Picked(&'a Rows, &'a [u32], &'a Norm),
    /// `activation(gate) * up` of rows `[gate, up]`
    Gated(&'a Rows, Activation),
}

/// Columns of the outputs: all of a part's, or 16 of them, or as many as there are.
#[derive(Clone, Copy)]
struct Target {
    /// The first row's.
    at: *mut f32,
    /// From row to row.
    stride: usize,
    lanes: usize,
    /// Whether to add to what is there.
    add: bool,
}

// SAFETY: threads that share a target write to different columns
unsafe impl Send for Target {}
// SAFETY: as above
unsafe impl Sync for Target {}

/// What multiplies.
pub(super) struct Cores {
    pub(super) isa: Isa,
    pub(super) pool: Pool,
    threads: usize,
    arena: Arena,
    quantized: QuantizedRows,
    floats: Rows,
}

/// Rows of activations in the forms that parts of a matrix want, to be written and then read by several threads.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    quantized: Option<Places<'a>>,
    floats: Option<Shared>,
    width: usize,
}

thread_local! {
    /// One row of weights or activations.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Part {
    fn pack(weight: Weight, threads: usize, arena: &Arena) -> Self {
        if let Some(tiles) = Tiles::pack(&weight, threads, arena) {
            return Self::Tiles(tiles);
        }
        FloatTiles::pack(&weight, arena).map_or(Self::Stored(weight), Self::Floats)
    }

    fn rows(&self) -> usize {
        match self {
            Self::Tiles(tiles) => tiles.rows(),
            Self::Floats(tiles) => tiles.rows(),
            Self::Stored(weight) => weight.rows(),
        }
    }

    fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Tiles(tiles) => tiles.dequantize_row(row, out),
            Self::Floats(tiles) => tiles.dequantize_row(row, out),
            Self::Stored(weight) => weight.dequantize_row(row, out),
        }
    }

    /// In how many strips of columns its outputs can be computed, and how many of them a thread takes at a time.
    fn strips(&self) -> (usize, usize) {
        let a_turn = |row_bytes: usize| (TURN_BYTES / row_bytes).max(1);
        match self {
            Self::Tiles(tiles) => (tiles.tile_rows(), a_turn(tiles.row_bytes())),
            Self::Floats(tiles) => (tiles.rows().div_ceil(TILE_ROWS), a_turn(tiles.row_bytes())),
            Self::Stored(weight) => (weight.rows(), STORED_ROWS_A_TURN),
        }
    }

    /// Some strips of the outputs of some rows, which begin a group.
    ///
    /// # Safety
    /// The rows of `x` are there, `out` begins with the part's columns of row 0, and nobody else touches these strips of these rows now.
    unsafe fn multiply(&self, isa: Isa, strips: Range<usize>, rows: Range<usize>, x: Inputs, out: Target) {
        // SAFETY: the caller's promises
        unsafe {
            match self {
                Self::Tiles(tiles) => multiply_tiles(isa, tiles, strips, rows, x.quantized(), out),
                Self::Floats(tiles) => {
                    let (x, out) = (x.floats(rows.clone()), out.from(rows.start));
                    strips.for_each(|i| tiles.multiply(isa, i, x, out.columns(i, tiles.rows())));
                }
                Self::Stored(weight) => {
                    multiply_stored(isa, weight, strips, x.floats(rows.clone()), out.from(rows.start))
                }
            }
        }
    }
}

impl<'a> Inputs<'a> {
    fn quantized(self) -> Places<'a> {
        self.quantized.expect("rows are quantized for tiles")
    }

    /// # Safety
    /// These rows have been prepared, and nobody writes them now.
    unsafe fn floats(self, rows: Range<usize>) -> &'a [f32] {
        let floats = self.floats.expect("rows are kept as floats for what is no tile of integers");
        // SAFETY: the caller's promise
        unsafe { std::slice::from_raw_parts(floats.0.add(rows.start * self.width), rows.len() * self.width) }
    }

    /// Prepares `rows` of `x`.
    ///
    /// # Safety
    /// No other thread has these rows now.
    unsafe fn stage(self, isa: Isa, x: Source, rows: Range<usize>) {
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(self.width, 0.0);
            for i in rows {
                let row = x.row(isa, i, scratch);
                // SAFETY: the caller's promise
                unsafe {
                    if let Some(places) = self.quantized {
                        places.fill(isa, i, row);
                    }
                    if let Some(floats) = self.floats {
                        floats.slice(i * self.width, self.width).copy_from_slice(row);
                    }
                }
            }
        });
    }
}

impl Matrix {
    /// One row of the first part as f32, `out[K]`.
    pub(super) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        self.parts[0].dequantize_row(row, out);
    }

    /// Each part with its columns of `out`.
    fn parts_of(&self, out: Target) -> impl Iterator<Item = (&Part, Target)> {
        let mut column = 0;
        self.parts.iter().map(move |part| {
            let at = out.at.wrapping_add(column);
            column += part.rows();
            (part, Target { at, ..out })
        })
    }
}

impl<'a> Source<'a> {
    fn count(&self) -> usize {
        match self {
            Self::Plain(x) | Self::Normed(x, _) | Self::Gated(x, _) => x.count(),
            Self::Picked(_, rows, _) => rows.len(),
        }
    }

    fn width(&self) -> usize {
        match self {
            Self::Plain(x) | Self::Normed(x, _) | Self::Picked(x, ..) => x.width,
            Self::Gated(x, _) => x.width / 2,
        }
    }

    /// Row `i`, perhaps made in `scratch[width]`.
    fn row<'b>(&'b self, isa: Isa, i: usize, scratch: &'b mut [f32]) -> &'b [f32] {
        let (x, norm) = match self {
            Self::Plain(x) => return x.row(i),
            Self::Gated(x, activation) => {
                let (gate, up) = x.row(i).split_at(x.width / 2);
                rowwise::gate_mul(isa, *activation, gate, up, scratch);
                return scratch;
            }
            Self::Normed(x, norm) => (x.row(i), norm),
            Self::Picked(x, rows, norm) => (x.row(rows[i] as usize), norm),
        };
        rowwise::rms_norm(isa, x, &norm.gains, norm.epsilon, scratch);
        scratch
    }
}

impl Target {
    /// The columns of one row of tiles, of `columns` in all.
    fn columns(self, tile_row: usize, columns: usize) -> Self {
        let first = tile_row * TILE_ROWS;
        Self { at: self.at.wrapping_add(first), lanes: TILE_ROWS.min(columns - first), ..self }
    }

    /// The rows from `row` on.
    fn from(self, row: usize) -> Self {
        Self { at: self.row(row), ..self }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> *mut f32 {
        self.at.wrapping_add(row * self.stride)
    }

    /// Writes or adds 16 sums, or as many as there are lanes.
    ///
    /// # Safety
    /// Row `row` has these lanes, and nobody else touches them now.
    #[inline(always)]
    unsafe fn put(&self, row: usize, sums: &[f32; TILE_ROWS]) {
        // SAFETY: the caller's promise
        let out = unsafe { std::slice::from_raw_parts_mut(self.row(row), self.lanes) };
        if self.add {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        } else {
            out.copy_from_slice(&sums[..self.lanes]);
        }
    }
}

impl Cores {
    pub(super) fn new(isa: Isa, threads: usize) -> Self {
        Self {
            isa,
            pool: Pool::new(threads),
            threads,
            arena: Arena::default(),
            quantized: QuantizedRows::default(),
            floats: Rows::default(),
        }
    }

    /// Weights as the kernels read them; several matrices of equal `K` become one whose outputs stand side by side.
    pub(super) fn matrix(&self, parts: Vec<Weight>, bias: Vec<f32>) -> Matrix {
        let cols = parts[0].cols();
        debug_assert!(parts.iter().all(|p| p.cols() == cols), "matrices side by side have equal inputs");
        let parts: Vec<Part> = parts.into_iter().map(|w| Part::pack(w, self.threads, &self.arena)).collect();
        let rows = parts.iter().map(Part::rows).sum();
        debug_assert!(bias.is_empty() || bias.len() == rows, "a bias is as long as all outputs");
        Matrix { parts, bias, rows, cols }
    }

    /// `out = x @ W^T + bias`
    pub(super) fn multiply(&mut self, x: Source, w: &Matrix, out: &mut Rows) {
        out.resize(x.count(), w.rows);
        if w.bias.is_empty() {
            return self.product(x, w, &mut out.values, false);
        }
        out.values.chunks_exact_mut(w.rows).for_each(|row| row.copy_from_slice(&w.bias));
        self.product(x, w, &mut out.values, true);
    }

    /// `out += x @ W^T + bias`
    pub(super) fn multiply_add(&mut self, x: Source, w: &Matrix, out: &mut Rows) {
        debug_assert_eq!(out.values.len(), x.count() * w.rows, "products fit what they are added to");
        if !w.bias.is_empty() {
            let rows = out.values.chunks_exact_mut(w.rows);
            rows.for_each(|row| rowwise::scaled_add(self.isa, &w.bias, 1.0, row));
        }
        self.product(x, w, &mut out.values, true);
    }

    /// `out = x @ W^T`, written over or added to what is there.
    fn product(&mut self, x: Source, w: &Matrix, out: &mut [f32], add: bool) {
        assert!(x.width() == w.cols && out.len() == x.count() * w.rows, "activations and outputs fit the weights");
        let (isa, count, out) = (self.isa, x.count(), Target { at: out.as_mut_ptr(), stride: w.rows, lanes: 0, add });
        let inputs = inputs(&mut self.quantized, &mut self.floats, w, count);
        if count >= PANEL_ROWS * self.threads {
            return self.pool.for_each(count.div_ceil(PANEL_ROWS), 1, |panels| {
                let rows = panels.start * PANEL_ROWS..count.min(panels.end * PANEL_ROWS);
                // SAFETY: these rows belong to this range alone
                unsafe { multiply_rows(isa, x, w, rows, inputs, out) };
            });
        }
        // SAFETY: these rows belong to this range alone
        self.pool.for_each(count, STAGED_ROWS_A_TURN, |rows| unsafe { inputs.stage(isa, x, rows) });
        for (part, out) in w.parts_of(out) {
            let (strips, a_turn) = part.strips();
            // SAFETY: these strips belong to this range alone, and all rows have been prepared
            self.pool.for_each(strips, a_turn, |strips| unsafe { part.multiply(isa, strips, 0..count, inputs, out) });
        }
    }
}

/// Room for `count` rows in each form that a part of the matrix wants.
fn inputs<'a>(quantized: &'a mut QuantizedRows, floats: &'a mut Rows, w: &Matrix, count: usize) -> Inputs<'a> {
    let has_tiles = w.parts.iter().any(|p| matches!(p, Part::Tiles(_)));
    let has_others = w.parts.iter().any(|p| !matches!(p, Part::Tiles(_)));
    quantized.resize(if has_tiles { count } else { 0 }, w.cols);
    floats.resize(if has_others { count } else { 0 }, w.cols);
    Inputs {
        quantized: has_tiles.then(|| quantized.places()),
        floats: has_others.then_some(Shared(floats.values.as_mut_ptr())),
        width: w.cols,
    }
}

/// Some rows through the whole matrix.
///
/// # Safety
/// Nobody else touches these rows now.
unsafe fn multiply_rows(isa: Isa, x: Source, w: &Matrix, rows: Range<usize>, inputs: Inputs, out: Target) {
    // SAFETY: the caller's promise
    unsafe { inputs.stage(isa, x, rows.clone()) };
    for (part, out) in w.parts_of(out) {
        // SAFETY: as above, and the rows have been prepared
        unsafe { part.multiply(isa, 0..part.strips().0, rows.clone(), inputs, out) };
    }
}

/// # Safety
/// As [`Part::multiply`] says.
unsafe fn multiply_stored(isa: Isa, weight: &Weight, columns: Range<usize>, x: &[f32], out: Target) {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.resize(weight.cols(), 0.0);
        for n in columns {
            weight.dequantize_row(n, scratch);
            for (row, x) in x.chunks_exact(weight.cols()).enumerate() {
                let product = rowwise::dot(isa, x, scratch);
                // SAFETY: the caller's promise
                let at = unsafe { &mut *out.row(row).wrapping_add(n) };
                *at = if out.add { *at + product } else { product };
            }
        }
    });
}

/// # Safety
/// As [`Part::multiply`] says.
unsafe fn multiply_tiles(isa: Isa, tiles: &Tiles, strips: Range<usize>, rows: Range<usize>, x: Places, out: Target) {
    let groups = rows.start / GROUP_ROWS..rows.end.div_ceil(GROUP_ROWS);
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx && rows.len() >= amx::ROWS_MIN {
        // tiles are unpacked to memory first, once for all rows
        for strip in strips {
            // SAFETY: the caller's promise; this value of `Isa` exists only where the instructions do
            unsafe { amx::multiply(tiles, strip, groups.clone(), x, out.columns(strip, tiles.rows())) };
        }
        return;
    }
    for group in groups {
        for strip in strips.clone() {
            let out = out.columns(strip, tiles.rows()).from(group * GROUP_ROWS);
            let (format, tile, x) = (tiles.format, tiles.tile_row(strip), x.group(group));
            // SAFETY: as above
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Amx | Isa::Avx512Vnni => avx512::multiply(format, tile, x, out),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2::multiply(format, tile, x, out),
                    #[cfg(target_arch = "aarch64")]
                    Isa::Dotprod => neon::multiply(format, tile, x, out),
                    Isa::Portable => portable::multiply(format, tile, x, out),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
