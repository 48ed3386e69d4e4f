//! Dense weights in tiles of 16 rows: the values of one column stand together, `[N / 16, K, 16]`, in the type that the file has.

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use super::{Target, tiles::TILE_ROWS};
use crate::{
    kernels::cpu::{
        isa::Isa,
        memory::{Arena, Slab},
        simd::{self, Kernel, Simd},
    },
    weights::Weight,
};

/// Sums that a product is cut into, column after column in turn, since each addition waits for the last one to its sum.
const CHAINS: usize = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    F16,
    BF16,
}

impl Kind {
    fn of(dtype: GgmlDType) -> Option<Self> {
        match dtype {
            GgmlDType::F32 => Some(Self::F32),
            GgmlDType::F16 => Some(Self::F16),
            GgmlDType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }

    fn value_bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
}

/// A dense matrix `[N, K]`; the last tile is filled up with rows of zeros.
#[derive(Debug)]
pub(crate) struct FloatTiles {
    kind: Kind,
    rows: usize,
    cols: usize,
    bytes: Slab,
}

impl FloatTiles {
    /// Lays a dense matrix out; None when it is not dense.
    pub(crate) fn pack(weight: &Weight, arena: &Arena) -> Option<Self> {
        let kind = Kind::of(weight.dtype())?;
        let (size, cols) = (kind.value_bytes(), weight.cols());
        let mut bytes = arena.slab(weight.rows().div_ceil(TILE_ROWS) * TILE_ROWS * cols * size);
        for row in 0..weight.rows() {
            let tile = &mut bytes[row / TILE_ROWS * TILE_ROWS * cols * size..];
            for (k, value) in weight.row_bytes(row).chunks_exact(size).enumerate() {
                tile[(k * TILE_ROWS + row % TILE_ROWS) * size..][..size].copy_from_slice(value);
            }
        }
        Some(Self { kind, rows: weight.rows(), cols, bytes })
    }

    /// Outputs, `N`.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of one row of tiles.
    pub(crate) fn row_bytes(&self) -> usize {
        self.cols * TILE_ROWS * self.kind.value_bytes()
    }

    fn tile_row(&self, tile_row: usize) -> &[u8] {
        &self.bytes[tile_row * self.row_bytes()..][..self.row_bytes()]
    }

    /// One row as f32, `out[K]`.
    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let (tile, size) = (self.tile_row(row / TILE_ROWS), self.kind.value_bytes());
        for (column, out) in tile.chunks_exact(TILE_ROWS * size).zip(out) {
            let value = &column[row % TILE_ROWS * size..][..size];
            *out = match self.kind {
                Kind::F32 => f32::from_le_bytes([value[0], value[1], value[2], value[3]]),
                Kind::F16 => f16::from_le_bytes([value[0], value[1]]).to_f32(),
                Kind::BF16 => bf16::from_le_bytes([value[0], value[1]]).to_f32(),
            };
        }
    }

    /// One row of tiles times rows of activations, `x[T, K]`.
    ///
    /// # Safety
    /// `out` is as [`Target`] says, with a row for each of `x`.
    pub(super) unsafe fn multiply(&self, isa: Isa, tile_row: usize, x: &[f32], out: Target) {
        let tile = self.tile_row(tile_row);
        match self.kind {
            Kind::F32 => simd::run(isa, Product { columns: columns::<f32>(tile), x, out }),
            Kind::F16 => simd::run(isa, Product { columns: columns::<f16>(tile), x, out }),
            Kind::BF16 => simd::run(isa, Product { columns: columns::<bf16>(tile), x, out }),
        }
    }
}

/// The values of each column of a tile.
fn columns<T: Value>(tile: &[u8]) -> &[[T; TILE_ROWS]] {
    // SAFETY: tiles begin at a cache line, so they are aligned, and every bit pattern is a value of these types
    let (before, columns, _) = unsafe { tile.align_to() };
    assert!(before.is_empty(), "tiles are aligned");
    columns
}

/// A type of weights that registers can be filled with.
trait Value: Sized {
    fn widen<S: Simd>(s: S, values: &[Self; TILE_ROWS]) -> S::Lanes;
}

impl Value for f32 {
    #[inline(always)]
    fn widen<S: Simd>(s: S, values: &[Self; TILE_ROWS]) -> S::Lanes {
        s.load(values)
    }
}

impl Value for f16 {
    #[inline(always)]
    fn widen<S: Simd>(s: S, values: &[Self; TILE_ROWS]) -> S::Lanes {
        s.widen_f16(values)
    }
}

impl Value for bf16 {
    #[inline(always)]
    fn widen<S: Simd>(s: S, values: &[Self; TILE_ROWS]) -> S::Lanes {
        s.widen_bf16(values)
    }
}

/// One row of tiles, `[K, 16]`, times rows of activations, `[T, K]`.
struct Product<'a, T> {
    columns: &'a [[T; TILE_ROWS]],
    x: &'a [f32],
    out: Target,
}

impl<T: Value> Kernel for Product<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.x.len() / self.columns.len();
        let mut row = 0;
        while row < rows {
            row += match rows - row {
                8.. if S::HAS_MANY_REGISTERS => self.pass::<S, 8>(s, row),
                4.. if S::HAS_MANY_REGISTERS => self.pass::<S, 4>(s, row),
                2.. => self.pass::<S, 2>(s, row),
                _ => self.pass::<S, 1>(s, row),
            };
        }
    }
}

impl<T: Value> Product<'_, T> {
    #[inline(always)]
    fn pass<S: Simd, const R: usize>(&self, s: S, row: usize) -> usize {
        let cols = self.columns.len();
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(row + r) * cols..][..cols]);
        let mut sums = [[s.splat(0.0); CHAINS]; R];
        for (k, column) in self.columns.iter().enumerate() {
            let weights = T::widen(s, column);
            for r in 0..R {
                let sum = &mut sums[r][k % CHAINS];
                *sum = s.mul_add(weights, s.splat(x[r][k]), *sum);
            }
        }
        for (r, [even, odd]) in sums.into_iter().enumerate() {
            // SAFETY: the caller's `out` has a row for each of `x`
            unsafe { self.out.put(row + r, &s.array(s.add(even, odd))) };
        }
        R
    }
}
