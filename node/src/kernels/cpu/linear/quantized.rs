//! Activations as int8, in blocks that share a scale.

use super::tiles::TILE_COLS;
use crate::kernels::cpu::{isa::Isa, rowwise};

/// Rows of quantized activations, each block of [`TILE_COLS`] with what the forms of weights need of it.
#[derive(Debug, Default)]
pub(crate) struct QuantizedRows {
    cols: usize,
    q: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<f32>,
    /// `-sum(q)` of each block.
    less: Vec<i32>,
    /// `-sum(q)` of each half block.
    less_halves: Vec<i32>,
}

/// The rows from one on, as kernels read them.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// `[T, K]`
    pub(super) q: *const i8,
    /// `[T, K / 32]`: `scale * q` is the value.
    pub(super) scales: *const f32,
    /// `[T, K / 32]`: `scale * sum(q)`.
    pub(super) sums: *const f32,
    /// `[T, K / 32]`: `-sum(q)`.
    pub(super) less: *const i32,
    /// `[T, K / 16]`: the same of each half.
    pub(super) less_halves: *const i32,
}

// SAFETY: what it points to is only read
unsafe impl Send for View {}
// SAFETY: as above
unsafe impl Sync for View {}

/// A place for one row, which one thread writes.
pub(super) struct RowMut<'a> {
    q: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    less: &'a mut [i32],
    less_halves: &'a mut [i32],
}

impl QuantizedRows {
    pub(super) fn resize(&mut self, rows: usize, cols: usize) {
        let blocks = cols / TILE_COLS;
        self.cols = cols;
        self.q.resize(rows * cols, 0);
        self.scales.resize(rows * blocks, 0.0);
        self.sums.resize(rows * blocks, 0.0);
        self.less.resize(rows * blocks, 0);
        self.less_halves.resize(rows * 2 * blocks, 0);
    }

    /// All rows, as long as nothing is written.
    pub(super) fn view(&self) -> View {
        View {
            q: self.q.as_ptr(),
            scales: self.scales.as_ptr(),
            sums: self.sums.as_ptr(),
            less: self.less.as_ptr(),
            less_halves: self.less_halves.as_ptr(),
        }
    }

    /// All rows apart from each other, to be written by several threads.
    pub(super) fn places(&mut self) -> Places {
        Places {
            cols: self.cols,
            q: self.q.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            less: self.less.as_mut_ptr(),
            less_halves: self.less_halves.as_mut_ptr(),
        }
    }
}

/// The rows of [`QuantizedRows`], to be written by several threads.
#[derive(Clone, Copy)]
pub(super) struct Places {
    cols: usize,
    q: *mut i8,
    scales: *mut f32,
    sums: *mut f32,
    less: *mut i32,
    less_halves: *mut i32,
}

// SAFETY: each row is written by one thread, which `row` makes its caller promise
unsafe impl Send for Places {}
// SAFETY: as above
unsafe impl Sync for Places {}

impl Places {
    /// # Safety
    /// `row` is within the rows, which live as long as `'a`, and no other thread has this row now.
    pub(super) unsafe fn row<'a>(&self, row: usize) -> RowMut<'a> {
        use std::slice::from_raw_parts_mut as slice;
        let (cols, blocks) = (self.cols, self.cols / TILE_COLS);
        // SAFETY: the buffers were made for so many rows; the rest is the caller's promise
        unsafe {
            RowMut {
                q: slice(self.q.add(row * cols), cols),
                scales: slice(self.scales.add(row * blocks), blocks),
                sums: slice(self.sums.add(row * blocks), blocks),
                less: slice(self.less.add(row * blocks), blocks),
                less_halves: slice(self.less_halves.add(row * 2 * blocks), 2 * blocks),
            }
        }
    }
}

impl RowMut<'_> {
    /// Quantizes a row, `x[K]`.
    pub(super) fn fill(self, isa: Isa, x: &[f32]) {
        rowwise::quantize(isa, x, self.q, self.scales, self.sums, self.less, self.less_halves);
    }
}
