//! Quantized weights packed for AVX-512 VNNI: tiles of 16 rows by 32 columns, in which one 64-byte load holds 4 columns of 16 rows.
//!
//! A tile is multiplied with up to [`ROWS_MAX`] rows of activations while it stays in registers, so one read of the weights serves a
//! whole batch. Activations are int8 with a scale per 32 values; weights are the unsigned operand of `vpdpbusd`, and what that adds
//! (the minimum of a 4-bit block, the offset 128 of an 8-bit one) comes in through the activations' block sums. The arithmetic of one
//! row is the same whatever the number of rows beside it.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::{kernels::cpu::rowwise::QUANT_BLOCK, weights::Weight};

/// Rows of weights in a tile.
pub(crate) const TILE_ROWS: usize = 16;

/// Rows of activations that one pass over a tile serves.
pub(crate) const ROWS_MAX: usize = 8;

/// 16 scales, 16 minimums, 256 bytes of nibbles.
const BYTES_4BIT: usize = 32 + 32 + 256;

/// 16 scales, 512 bytes.
const BYTES_8BIT: usize = 32 + 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// `d * q + m`, q from 0 to 15.
    FourBit,
    /// `d * (q - 128)`, q from 0 to 255.
    EightBit,
}

/// A packed matrix `[N, K]`.
#[derive(Debug)]
pub(crate) struct Tiles {
    format: Format,
    rows: usize,
    blocks: usize,
    bytes: Vec<u8>,
}

/// Rows of quantized activations.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Quantized<'a> {
    /// `[T, K]`
    pub(crate) q: &'a [i8],
    /// `[T, K / 32]`
    pub(crate) scales: &'a [f32],
    /// `[T, K / 32]`: scale times the sum of `q`.
    pub(crate) sums: &'a [f32],
}

impl Tiles {
    /// Packs a matrix, when its type and shape have a tile form.
    pub(crate) fn pack(weight: &Weight) -> Option<Self> {
        let format = match weight.dtype() {
            GgmlDType::Q4_0 | GgmlDType::Q4_1 => Format::FourBit,
            GgmlDType::Q8_0 => Format::EightBit,
            _ => return None,
        };
        if !weight.rows().is_multiple_of(TILE_ROWS) {
            return None;
        }
        let blocks = weight.cols() / QUANT_BLOCK;
        let mut tiles = Self {
            format,
            rows: weight.rows(),
            blocks,
            bytes: vec![0; weight.rows() / TILE_ROWS * blocks * bytes_of(format)],
        };
        for row in 0..weight.rows() {
            let block_bytes = weight.dtype().type_size();
            for (b, block) in weight.row_bytes(row).chunks_exact(block_bytes).enumerate() {
                let tile = tiles.tile_mut(row / TILE_ROWS, b);
                match weight.dtype() {
                    GgmlDType::Q4_0 => {
                        pack_4bit(tile, row % TILE_ROWS, half_at(block, 0), -8.0 * half_at(block, 0), &block[2..])
                    }
                    GgmlDType::Q4_1 => {
                        pack_4bit(tile, row % TILE_ROWS, half_at(block, 0), half_at(block, 2), &block[4..])
                    }
                    _ => pack_8bit(tile, row % TILE_ROWS, half_at(block, 0), &block[2..]),
                }
            }
        }
        Some(tiles)
    }

    /// Outputs, `N`.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs, `K`.
    pub(crate) fn cols(&self) -> usize {
        self.blocks * QUANT_BLOCK
    }

    /// One row as f32, `out[K]`.
    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let lane = row % TILE_ROWS;
        for (b, out) in out.chunks_exact_mut(QUANT_BLOCK).enumerate() {
            let tile = self.tile(row / TILE_ROWS, b);
            let d = half_at(tile, 2 * lane);
            for (k, out) in out.iter_mut().enumerate() {
                *out = match self.format {
                    Format::FourBit => {
                        let byte = tile[64 + k / 8 * 64 + lane * 4 + k % 4];
                        let q = if k % 8 < 4 { byte & 15 } else { byte >> 4 };
                        d * f32::from(q) + half_at(tile, 32 + 2 * lane)
                    }
                    Format::EightBit => d * (f32::from(tile[32 + k / 4 * 64 + lane * 4 + k % 4]) - 128.0),
                };
            }
        }
    }

    fn tile(&self, tile_row: usize, block: usize) -> &[u8] {
        let bytes = bytes_of(self.format);
        &self.bytes[(tile_row * self.blocks + block) * bytes..][..bytes]
    }

    fn tile_mut(&mut self, tile_row: usize, block: usize) -> &mut [u8] {
        let bytes = bytes_of(self.format);
        &mut self.bytes[(tile_row * self.blocks + block) * bytes..][..bytes]
    }
}

fn bytes_of(format: Format) -> usize {
    match format {
        Format::FourBit => BYTES_4BIT,
        Format::EightBit => BYTES_8BIT,
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn put_half(bytes: &mut [u8], at: usize, value: f32) {
    bytes[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// `nibbles[j]` holds value `j` below and value `j + 16` above, as GGML lays them.
fn pack_4bit(tile: &mut [u8], lane: usize, d: f32, m: f32, nibbles: &[u8]) {
    put_half(tile, 2 * lane, d);
    put_half(tile, 32 + 2 * lane, m);
    let value = |k: usize| if k < 16 { nibbles[k] & 15 } else { nibbles[k - 16] >> 4 };
    for group in 0..4 {
        for i in 0..4 {
            tile[64 + group * 64 + lane * 4 + i] = value(group * 8 + i) | value(group * 8 + 4 + i) << 4;
        }
    }
}

fn pack_8bit(tile: &mut [u8], lane: usize, d: f32, values: &[u8]) {
    put_half(tile, 2 * lane, d);
    for (k, value) in values.iter().enumerate() {
        // adding 128 to an i8 makes it the u8 with its top bit flipped
        tile[32 + k / 4 * 64 + lane * 4 + k % 4] = value ^ 0x80;
    }
}

/// Products of weight tiles `tile_rows` with `rows` rows of activations.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ and VNNI. `out` points to the first of `tile_rows * 16` columns in `rows` rows of `stride`
/// values, which nobody else touches now.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(crate) unsafe fn multiply(
    tiles: &Tiles,
    tile_rows: std::ops::Range<usize>,
    x: Quantized<'_>,
    rows: usize,
    out: *mut f32,
    stride: usize,
) {
    assert!(
        x.q.len() >= rows * tiles.cols()
            && x.scales.len() >= rows * tiles.blocks
            && x.sums.len() >= rows * tiles.blocks
    );
    let (k, blocks) = (tiles.cols(), tiles.blocks);
    for (column, tile_row) in tile_rows.enumerate() {
        let weights = &tiles.bytes[tile_row * blocks * bytes_of(tiles.format)..][..blocks * bytes_of(tiles.format)];
        let mut row = 0;
        while row < rows {
            let count = (rows - row).min(ROWS_MAX);
            let part =
                Quantized { q: &x.q[row * k..], scales: &x.scales[row * blocks..], sums: &x.sums[row * blocks..] };
            // SAFETY: the slices hold `count` rows as asserted above; `out` is as this function's caller promised
            unsafe {
                vnni::rows(
                    tiles.format,
                    count,
                    weights,
                    blocks,
                    part,
                    out.add(row * stride + column * TILE_ROWS),
                    stride,
                )
            };
            row += count;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;

    use super::{BYTES_4BIT, BYTES_8BIT, Format, QUANT_BLOCK, Quantized};

    /// Bytes ahead that the next tiles are fetched to the first-level cache.
    const PREFETCH: usize = 2048;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    pub(super) unsafe fn rows(
        format: Format,
        count: usize,
        weights: &[u8],
        blocks: usize,
        x: Quantized<'_>,
        out: *mut f32,
        stride: usize,
    ) {
        macro_rules! by_count {
            ($($n:literal),*) => {
                // SAFETY: the caller's promises are those of the functions called
                unsafe {
                    match (format, count) {
                        $((Format::FourBit, $n) => four_bit::<$n>(weights, blocks, x, out, stride),
                          (Format::EightBit, $n) => eight_bit::<$n>(weights, blocks, x, out, stride),)*
                        _ => unreachable!("at most ROWS_MAX rows a pass"),
                    }
                }
            };
        }
        by_count!(1, 2, 3, 4, 5, 6, 7, 8)
    }

    /// Four int8 activations as one 32-bit lane for `vpdpbusd`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn broadcast4(q: *const i8) -> __m512i {
        // SAFETY: the caller's pointer has four values behind it; the read needs no alignment
        _mm512_set1_epi32(unsafe { q.cast::<i32>().read_unaligned() })
    }

    /// 16 halves as f32.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn halves(at: *const u8) -> __m512 {
        // SAFETY: the caller's pointer has 32 bytes behind it
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    unsafe fn four_bit<const R: usize>(weights: &[u8], blocks: usize, x: Quantized<'_>, out: *mut f32, stride: usize) {
        let k = blocks * QUANT_BLOCK;
        let low = _mm512_set1_epi8(15);
        let mut sums = [_mm512_setzero_ps(); R];
        for b in 0..blocks {
            // SAFETY: `weights` holds `blocks` tiles, `x` holds R rows of `blocks` blocks; a prefetch may point anywhere
            unsafe {
                let tile = weights.as_ptr().add(b * BYTES_4BIT);
                _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(PREFETCH).cast());
                let mut products = [_mm512_setzero_si512(); R];
                for group in 0..4 {
                    let nibbles = _mm512_loadu_si512(tile.add(64 + group * 64).cast());
                    let first = _mm512_and_si512(nibbles, low);
                    let second = _mm512_and_si512(_mm512_srli_epi16::<4>(nibbles), low);
                    for (r, product) in products.iter_mut().enumerate() {
                        let q = x.q.as_ptr().add(r * k + b * QUANT_BLOCK + group * 8);
                        *product = _mm512_dpbusd_epi32(*product, first, broadcast4(q));
                        *product = _mm512_dpbusd_epi32(*product, second, broadcast4(q.add(4)));
                    }
                }
                let (d, m) = (halves(tile), halves(tile.add(32)));
                for (r, sum) in sums.iter_mut().enumerate() {
                    let scale = _mm512_mul_ps(d, _mm512_set1_ps(*x.scales.get_unchecked(r * blocks + b)));
                    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r]), scale, *sum);
                    *sum = _mm512_fmadd_ps(m, _mm512_set1_ps(*x.sums.get_unchecked(r * blocks + b)), *sum);
                }
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            // SAFETY: `out` has R rows of `stride` with 16 columns from its start
            unsafe { _mm512_storeu_ps(out.add(r * stride), *sum) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
    unsafe fn eight_bit<const R: usize>(weights: &[u8], blocks: usize, x: Quantized<'_>, out: *mut f32, stride: usize) {
        let k = blocks * QUANT_BLOCK;
        let mut sums = [_mm512_setzero_ps(); R];
        for b in 0..blocks {
            // SAFETY: as in `four_bit`
            unsafe {
                let tile = weights.as_ptr().add(b * BYTES_8BIT);
                _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(2 * PREFETCH).cast());
                let mut products = [_mm512_setzero_si512(); R];
                for group in 0..8 {
                    let values = _mm512_loadu_si512(tile.add(32 + group * 64).cast());
                    for (r, product) in products.iter_mut().enumerate() {
                        let q = x.q.as_ptr().add(r * k + b * QUANT_BLOCK + group * 4);
                        *product = _mm512_dpbusd_epi32(*product, values, broadcast4(q));
                    }
                }
                let d = halves(tile);
                for (r, sum) in sums.iter_mut().enumerate() {
                    let scale = _mm512_mul_ps(d, _mm512_set1_ps(*x.scales.get_unchecked(r * blocks + b)));
                    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[r]), scale, *sum);
                    *sum = _mm512_fmadd_ps(d, _mm512_set1_ps(-128.0 * *x.sums.get_unchecked(r * blocks + b)), *sum);
                }
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            // SAFETY: `out` has R rows of `stride` with 16 columns from its start
            unsafe { _mm512_storeu_ps(out.add(r * stride), *sum) };
        }
    }
}
