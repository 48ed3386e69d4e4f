//! Activations as int8, in blocks that share a scale, in the order in which the kernels read them.
//!
//! Rows stand in groups of [`GROUP_ROWS`], the last one perhaps smaller; a group holds the first block of each of its rows, then the
//! second of each, and so on: what is multiplied with one tile lies together.

use std::marker::PhantomData;

use super::tiles::TILE_COLS;
use crate::kernels::cpu::{
    isa::Isa,
    rowwise::{self, BlockMut},
};

/// Rows that are multiplied with one row of tiles at a time.
pub(super) const GROUP_ROWS: usize = 16;

/// Rows of quantized activations, each block of [`TILE_COLS`] with what the forms of weights need of it.
#[derive(Debug, Default)]
pub(crate) struct QuantizedRows {
    rows: usize,
    /// Blocks of a row.
    blocks: usize,
    q: Vec<[i8; TILE_COLS]>,
    scales: Vec<f32>,
    sums: Vec<f32>,
    less: Vec<i32>,
    less_halves: Vec<[i32; 2]>,
}

/// Some rows of one group, as kernels read them: block `b` of row `r` stands at `b * stride + r`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) rows: usize,
    /// From a row's block to its next one.
    pub(super) stride: usize,
    pub(super) q: *const [i8; TILE_COLS],
    /// `scale * q` is the value.
    pub(super) scales: *const f32,
    /// `scale * sum(q)`
    pub(super) sums: *const f32,
    /// `-sum(q)`
    pub(super) less: *const i32,
    /// The same of each half.
    pub(super) less_halves: *const [i32; 2],
    from: PhantomData<&'a QuantizedRows>,
}

impl QuantizedRows {
    /// Makes room for `rows` rows; what stands there is to be written before it is read.
    pub(super) fn resize(&mut self, rows: usize, cols: usize) {
        (self.rows, self.blocks) = (rows, cols / TILE_COLS);
        let count = rows * self.blocks;
        if count > self.q.len() {
            self.q.resize(count, [0; TILE_COLS]);
            self.scales.resize(count, 0.0);
            self.sums.resize(count, 0.0);
            self.less.resize(count, 0);
            self.less_halves.resize(count, [0; 2]);
        }
    }

    /// All rows, to be written and then read by several threads.
    pub(super) fn places(&mut self) -> Places<'_> {
        Places {
            rows: self.rows,
            blocks: self.blocks,
            q: self.q.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            less: self.less.as_mut_ptr(),
            less_halves: self.less_halves.as_mut_ptr(),
            of: PhantomData,
        }
    }
}

impl Group<'_> {
    /// Without its first `rows` rows.
    #[inline(always)]
    pub(super) fn skip(self, rows: usize) -> Self {
        Self {
            rows: self.rows - rows,
            q: self.q.wrapping_add(rows),
            scales: self.scales.wrapping_add(rows),
            sums: self.sums.wrapping_add(rows),
            less: self.less.wrapping_add(rows),
            less_halves: self.less_halves.wrapping_add(rows),
            ..self
        }
    }
}

/// The rows of [`QuantizedRows`], to be written and then read by several threads.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    rows: usize,
    blocks: usize,
    q: *mut [i8; TILE_COLS],
    scales: *mut f32,
    sums: *mut f32,
    less: *mut i32,
    less_halves: *mut [i32; 2],
    of: PhantomData<&'a mut QuantizedRows>,
}

// SAFETY: each row is written by one thread, which `fill` makes its caller promise
unsafe impl Send for Places<'_> {}
// SAFETY: as above
unsafe impl Sync for Places<'_> {}

impl<'a> Places<'a> {
    /// The rows of group `i`; whoever reads them knows that nobody writes them now.
    pub(super) fn group(&self, i: usize) -> Group<'a> {
        let first = i * GROUP_ROWS;
        assert!(first < self.rows, "the group is there");
        let (rows, at) = (GROUP_ROWS.min(self.rows - first), first * self.blocks);
        Group {
            rows,
            stride: rows,
            q: self.q.wrapping_add(at),
            scales: self.scales.wrapping_add(at),
            sums: self.sums.wrapping_add(at),
            less: self.less.wrapping_add(at),
            less_halves: self.less_halves.wrapping_add(at),
            from: PhantomData,
        }
    }

    /// Quantizes a row, `x[K]`, into place `row`.
    ///
    /// # Safety
    /// No other thread has this row now.
    pub(super) unsafe fn fill(&self, isa: Isa, row: usize, x: &[f32]) {
        let (blocks, _) = x.as_chunks::<TILE_COLS>();
        assert!(row < self.rows && blocks.len() == self.blocks, "the row has a place");
        let first = row / GROUP_ROWS * GROUP_ROWS;
        let stride = GROUP_ROWS.min(self.rows - first);
        let at = first * self.blocks + row - first;
        rowwise::quantize(isa, blocks, |b| {
            let at = at + b * stride;
            // SAFETY: the buffers hold `blocks` blocks of `rows` rows; the rest is the caller's promise
            unsafe {
                BlockMut {
                    q: &mut *self.q.add(at),
                    scale: &mut *self.scales.add(at),
                    sum: &mut *self.sums.add(at),
                    less: &mut *self.less.add(at),
                    less_halves: &mut *self.less_halves.add(at),
                }
            }
        });
    }
}
