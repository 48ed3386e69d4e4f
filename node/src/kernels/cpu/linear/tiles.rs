//! Quantized weights packed into tiles of 16 rows by 32 columns, in which one 64-byte load holds 4 columns of 16 rows.
//!
//! A tile has, in this order: scales of 16 rows (f16), perhaps 16 minimums or scales of a second half (f16), and the values: vector `v`
//! holds column `4v + i` of row `lane` at byte `4 * lane + i`. Of 4 bits of each value, two vectors lie in one: the even below, the odd
//! above. A fifth bit stands in masks of 64 bits, one for each vector; bits five and six in two vectors more, two bits for each of four.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::{
    kernels::{
        blocks::{self, Block},
        cpu::memory::{Arena, Slab},
    },
    weights::Weight,
};

/// Rows of weights in a tile.
pub(crate) const TILE_ROWS: usize = 16;

/// Columns of a tile; values that share one scale when activations are quantized.
pub(crate) const TILE_COLS: usize = 32;

/// Bytes of 16 halves.
const HALVES_BYTES: usize = 2 * TILE_ROWS;

/// Bytes of one vector.
pub(crate) const VECTOR: usize = 64;

/// How the values of a tile stand for weights. Without minimums a value counts from `2^(bits - 1)`: all are unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// `d * (q - 8)`: Q4_0.
    Four,
    /// `d * q + m`: Q4_1, Q4_K.
    FourMin,
    /// `d * (q - 16)`: Q5_0.
    Five,
    /// `d * q + m`: Q5_1, Q5_K.
    FiveMin,
    /// `d[k / 16] * (q - 32)`: Q6_K.
    SixHalves,
    /// `d * (q - 128)`: Q8_0.
    Eight,
}

/// What kernels need to know of a [`Format`] when they are compiled.
pub(crate) trait Layout {
    /// Bits of a value.
    const BITS: usize;
    /// Whether there are minimums.
    const HAS_MIN: bool = false;
    /// Whether each half of 16 columns has its own scale.
    const HAS_HALVES: bool = false;
    /// Where the values begin.
    const VALUES_AT: usize = if Self::HAS_MIN || Self::HAS_HALVES { 2 * HALVES_BYTES } else { HALVES_BYTES };
    /// Bytes of a tile.
    const BYTES: usize = Self::VALUES_AT + TILE_ROWS * TILE_COLS * Self::BITS / 8;
    /// What is taken from a value, as a power of two.
    const OFFSET_LOG2: u32 = Self::BITS as u32 - 1;
}

macro_rules! layouts {
    ($($name:ident { $($const:ident: $type:ty = $value:expr),* })*) => {
        $(
            #[derive(Debug)]
            pub(crate) struct $name;
            impl Layout for $name {
                $(const $const: $type = $value;)*
            }
        )*

        /// `$body` with `$layout` as the layout of `$format`.
        macro_rules! with_layout {
            ($format:expr, $layout:ident => $body:expr) => {
                match $format {
                    $($crate::kernels::cpu::linear::tiles::Format::$name => {
                        type $layout = $crate::kernels::cpu::linear::tiles::$name;
                        $body
                    })*
                }
            };
        }
        pub(crate) use with_layout;
    };
}
layouts! {
    Four { BITS: usize = 4 }
    FourMin { BITS: usize = 4, HAS_MIN: bool = true }
    Five { BITS: usize = 5 }
    FiveMin { BITS: usize = 5, HAS_MIN: bool = true }
    SixHalves { BITS: usize = 6, HAS_HALVES: bool = true }
    Eight { BITS: usize = 8 }
}

impl Format {
    fn of(dtype: GgmlDType) -> Option<Self> {
        Some(match dtype {
            GgmlDType::Q4_0 => Self::Four,
            GgmlDType::Q4_1 | GgmlDType::Q4K => Self::FourMin,
            GgmlDType::Q5_0 => Self::Five,
            GgmlDType::Q5_1 | GgmlDType::Q5K => Self::FiveMin,
            GgmlDType::Q6K => Self::SixHalves,
            GgmlDType::Q8_0 => Self::Eight,
            _ => return None,
        })
    }

    fn tile_bytes(self) -> usize {
        with_layout!(self, L => L::BYTES)
    }
}

/// A packed matrix `[N, K]`; the last tiles are filled up with rows of zeros.
#[derive(Debug)]
pub(crate) struct Tiles {
    pub(super) format: Format,
    rows: usize,
    /// Tiles in a row of tiles.
    pub(super) blocks: usize,
    bytes: Slab,
}

impl Tiles {
    /// Packs a matrix on `threads` threads. None when its type has no tile form, or one of its scales no f16.
    pub(crate) fn pack(weight: &Weight, threads: usize, arena: &Arena) -> Option<Self> {
        let format = Format::of(weight.dtype())?;
        let blocks = weight.cols() / TILE_COLS;
        let row_bytes = blocks * format.tile_bytes();
        let tile_rows = weight.rows().div_ceil(TILE_ROWS);
        let mut bytes = arena.slab(tile_rows * row_bytes);
        let share = tile_rows.div_ceil(threads.max(1)) * row_bytes;
        let are_finite = std::thread::scope(|scope| {
            let parts: Vec<_> = bytes
                .chunks_mut(share.max(1))
                .enumerate()
                .map(|(i, part)| scope.spawn(move || pack_rows(format, weight, i * share / row_bytes, row_bytes, part)))
                .collect();
            // every thread is waited for, also after one found a scale that does not fit
            parts.into_iter().map(|part| part.join().expect("packing does not panic")).fold(true, |a, b| a & b)
        });
        are_finite.then_some(Self { format, rows: weight.rows(), blocks, bytes })
    }

    /// Outputs, `N`.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Rows of tiles.
    pub(crate) fn tile_rows(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Bytes of one row of tiles.
    pub(crate) fn row_bytes(&self) -> usize {
        self.blocks * self.format.tile_bytes()
    }

    /// The tiles of 16 rows of weights.
    pub(super) fn tile_row(&self, tile_row: usize) -> &[u8] {
        &self.bytes[tile_row * self.row_bytes()..][..self.row_bytes()]
    }

    /// One row as f32, `out[K]`.
    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let tiles = self.tile_row(row / TILE_ROWS).chunks_exact(self.format.tile_bytes());
        for (tile, out) in tiles.zip(out.chunks_exact_mut(TILE_COLS)) {
            with_layout!(self.format, L => dequantize::<L>(tile, row % TILE_ROWS, out));
        }
    }
}

/// Whether all scales have an f16.
fn pack_rows(format: Format, weight: &Weight, first_tile_row: usize, row_bytes: usize, out: &mut [u8]) -> bool {
    let mut are_finite = true;
    for (i, tiles) in out.chunks_exact_mut(row_bytes).enumerate() {
        let first = (first_tile_row + i) * TILE_ROWS;
        for row in first..weight.rows().min(first + TILE_ROWS) {
            let mut tiles = tiles.chunks_exact_mut(format.tile_bytes());
            blocks::for_each(weight.dtype(), weight.row_bytes(row), |block| {
                let tile = tiles.next().expect("a row has as many tiles as blocks");
                with_layout!(format, L => put::<L>(tile, row - first, block));
                are_finite &= block.scales.iter().chain([&block.min]).all(|x| f16::from_f32(*x).is_finite());
            });
        }
    }
    are_finite
}

fn put<L: Layout>(tile: &mut [u8], lane: usize, block: &Block) {
    put_half(tile, 2 * lane, block.scales[0]);
    if L::HAS_MIN {
        put_half(tile, HALVES_BYTES + 2 * lane, block.min);
    }
    if L::HAS_HALVES {
        put_half(tile, HALVES_BYTES + 2 * lane, block.scales[1]);
    }
    let values = &mut tile[L::VALUES_AT..];
    for (k, q) in block.values.iter().enumerate() {
        let (v, at) = (k / 4, 4 * lane + k % 4);
        if L::BITS == 8 {
            values[v * VECTOR + at] = *q;
            continue;
        }
        values[v / 2 * VECTOR + at] |= (q & 15) << (4 * (v % 2));
        if L::BITS == 5 {
            values[4 * VECTOR + v * 8 + at / 8] |= (q >> 4) << (at % 8);
        }
        if L::BITS == 6 {
            values[(4 + v / 4) * VECTOR + at] |= (q >> 4) << (2 * (v % 4));
        }
    }
}

/// The value of column `k` of row `lane`.
fn value<L: Layout>(values: &[u8], lane: usize, k: usize) -> u8 {
    let (v, at) = (k / 4, 4 * lane + k % 4);
    if L::BITS == 8 {
        return values[v * VECTOR + at];
    }
    let low = (values[v / 2 * VECTOR + at] >> (4 * (v % 2))) & 15;
    match L::BITS {
        5 => low | ((values[4 * VECTOR + v * 8 + at / 8] >> (at % 8)) & 1) << 4,
        6 => low | ((values[(4 + v / 4) * VECTOR + at] >> (2 * (v % 4))) & 3) << 4,
        _ => low,
    }
}

fn dequantize<L: Layout>(tile: &[u8], lane: usize, out: &mut [f32]) {
    let (first, second) = (half_at(tile, 2 * lane), half_at(tile, HALVES_BYTES + 2 * lane));
    for (k, out) in out.iter_mut().enumerate() {
        let q = f32::from(value::<L>(&tile[L::VALUES_AT..], lane, k));
        *out = if L::HAS_MIN {
            first * q + second
        } else {
            let scale = if L::HAS_HALVES && k >= TILE_COLS / 2 { second } else { first };
            scale * (q - (1 << L::OFFSET_LOG2) as f32)
        };
    }
}

/// All values of a tile, `[8][16][4]`, as the kernels without shuffles read them.
#[inline(always)]
pub(super) fn unpack<L: Layout>(tile: &[u8], out: &mut [u8; TILE_ROWS * TILE_COLS]) {
    let values = &tile[L::VALUES_AT..L::BYTES];
    for (v, out) in out.as_chunks_mut::<VECTOR>().0.iter_mut().enumerate() {
        if L::BITS == 8 {
            out.copy_from_slice(&values[v * VECTOR..][..VECTOR]);
            continue;
        }
        let low = &values[v / 2 * VECTOR..][..VECTOR];
        for (out, low) in out.iter_mut().zip(low) {
            *out = (low >> (4 * (v % 2))) & 15;
        }
        if L::BITS == 5 {
            for (at, out) in out.iter_mut().enumerate() {
                *out |= ((values[4 * VECTOR + v * 8 + at / 8] >> (at % 8)) & 1) << 4;
            }
        }
        if L::BITS == 6 {
            for (out, high) in out.iter_mut().zip(&values[(4 + v / 4) * VECTOR..][..VECTOR]) {
                *out |= ((high >> (2 * (v % 4))) & 3) << 4;
            }
        }
    }
}

/// The 16 halves at `at`.
#[inline(always)]
pub(super) fn halves(tile: &[u8], at: usize) -> [f32; TILE_ROWS] {
    std::array::from_fn(|lane| half_at(tile, at + 2 * lane))
}

/// Where the minimums, or the second halves' scales, stand.
pub(super) const SECOND_AT: usize = HALVES_BYTES;

#[inline(always)]
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn put_half(bytes: &mut [u8], at: usize, value: f32) {
    bytes[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}
