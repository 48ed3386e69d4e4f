//! Tiles times rows on AVX-512 VNNI. Weights are the unsigned operand of `vpdpbusd`, activations the signed one.

use std::arch::x86_64::*;

use super::{
    Target,
    quantized::Group,
    tiles::{Format, Layout, SECOND_AT, TILE_ROWS, VECTOR, with_layout},
};

/// Bytes ahead that the next tiles are fetched; with two threads 8 KiB read a quarter faster than 1 KiB here.
const PREFETCH: usize = 8192;

/// 16 halves as f32.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn halves(at: *const u8) -> __m512 {
    // SAFETY: the caller's pointer has 32 bytes behind it
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn vector(at: *const u8) -> __m512i {
    // SAFETY: the caller's pointer has 64 bytes behind it
    unsafe { _mm512_loadu_si512(at.cast()) }
}

/// Four int8 activations in each 32-bit lane.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn four(q: *const i8) -> __m512i {
    // SAFETY: the caller's pointer has four values behind it
    _mm512_set1_epi32(unsafe { q.cast::<i32>().read_unaligned() })
}

/// Fetches the tile that comes [`PREFETCH`] bytes after this one.
#[inline(always)]
pub(super) fn fetch_ahead<L: Layout>(tile: *const u8) {
    for line in 0..L::BYTES.div_ceil(VECTOR) {
        // SAFETY: fetching reads nothing, wherever it points
        unsafe { _mm_prefetch::<_MM_HINT_T0>(tile.wrapping_add(PREFETCH + line * VECTOR).cast()) };
    }
}

/// The values of a tile as unsigned bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn unpack<L: Layout>(values: *const u8) -> [__m512i; 8] {
    let low = _mm512_set1_epi8(15);
    let mut out = [_mm512_setzero_si512(); 8];
    for (v, out) in out.iter_mut().enumerate() {
        // SAFETY: a tile of this layout has these vectors behind `values`
        *out = unsafe {
            if L::BITS == 8 {
                vector(values.wrapping_add(v * VECTOR))
            } else {
                let both = vector(values.wrapping_add(v / 2 * VECTOR));
                _mm512_and_si512(if v % 2 == 0 { both } else { _mm512_srli_epi16::<4>(both) }, low)
            }
        };
        if L::BITS == 5 {
            // SAFETY: as above; the masks stand behind four vectors
            let mask = unsafe { values.wrapping_add(4 * VECTOR + 8 * v).cast::<u64>().read_unaligned() };
            *out = with_fifth_bits(*out, mask);
        }
        if L::BITS == 6 {
            // SAFETY: as above; two vectors of high bits stand behind four
            let high = unsafe { vector(values.wrapping_add((4 + v / 4) * VECTOR)) };
            let high = match v % 4 {
                0 => _mm512_slli_epi16::<4>(high),
                1 => _mm512_slli_epi16::<2>(high),
                2 => high,
                _ => _mm512_srli_epi16::<2>(high),
            };
            *out = _mm512_or_si512(*out, _mm512_and_si512(high, _mm512_set1_epi8(0x30)));
        }
    }
    out
}

/// Sets the fifth bit of the bytes that `mask` names.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn with_fifth_bits(values: __m512i, mask: u64) -> __m512i {
    // fifth bits are zero before, so adding sets them
    _mm512_mask_add_epi8(values, mask, values, _mm512_set1_epi8(16))
}

/// One row of tiles times a group of rows.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ and VNNI; the rows of `x` are as wide as the tiles; `out` has them, and nobody else touches
/// its columns now.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn multiply(format: Format, tiles: &[u8], x: Group, out: Target) {
    // SAFETY: the caller's promises are those of the functions called
    with_layout!(format, L => unsafe { multiply_layout::<L>(tiles, x, out) });
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn multiply_layout<L: Layout>(tiles: &[u8], x: Group, out: Target) {
    let mut row = 0;
    while row < x.rows {
        let (x, out) = (x.skip(row), out.from(row));
        // SAFETY: the caller's promises hold for each part of the rows
        row += unsafe {
            match x.rows {
                16.. => pass::<L, 16>(tiles, x, out),
                8.. => pass::<L, 8>(tiles, x, out),
                4.. => pass::<L, 4>(tiles, x, out),
                2.. => pass::<L, 2>(tiles, x, out),
                _ => pass::<L, 1>(tiles, x, out),
            }
        };
    }
}

/// One pass over a row of tiles for `R` rows: each tile is read and unpacked once.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn pass<L: Layout, const R: usize>(tiles: &[u8], x: Group, out: Target) -> usize {
    let mut sums = [_mm512_setzero_ps(); R];
    for (b, tile) in tiles.chunks_exact(L::BYTES).enumerate() {
        let (tile, at) = (tile.as_ptr(), b * x.stride);
        fetch_ahead::<L>(tile);
        // SAFETY: a tile of this layout has its halves and values there, `x` has R rows of as many blocks as there are tiles
        unsafe {
            let values = unpack::<L>(tile.wrapping_add(L::VALUES_AT));
            let first = halves(tile);
            let second =
                if L::HAS_MIN || L::HAS_HALVES { halves(tile.wrapping_add(SECOND_AT)) } else { _mm512_setzero_ps() };
            for (r, sum) in sums.iter_mut().enumerate() {
                let at = at + r;
                let q = x.q.wrapping_add(at).cast::<i8>();
                let scale = _mm512_set1_ps(*x.scales.wrapping_add(at));
                if L::HAS_HALVES {
                    let less = x.less_halves.wrapping_add(at).cast::<i32>();
                    for (half, d) in [first, second].into_iter().enumerate() {
                        let mut product = offset::<L>(*less.wrapping_add(half));
                        for (v, values) in values.iter().enumerate().skip(4 * half).take(4) {
                            product = _mm512_dpbusd_epi32(product, *values, four(q.wrapping_add(4 * v)));
                        }
                        *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_mul_ps(d, scale), *sum);
                    }
                    continue;
                }
                let mut product =
                    if L::HAS_MIN { _mm512_setzero_si512() } else { offset::<L>(*x.less.wrapping_add(at)) };
                for (v, values) in values.iter().enumerate() {
                    product = _mm512_dpbusd_epi32(product, *values, four(q.wrapping_add(4 * v)));
                }
                *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_mul_ps(first, scale), *sum);
                if L::HAS_MIN {
                    *sum = _mm512_fmadd_ps(second, _mm512_set1_ps(*x.sums.wrapping_add(at)), *sum);
                }
            }
        }
    }
    for (r, sum) in sums.iter().enumerate() {
        // SAFETY: `out` has R rows
        unsafe { store(out.row(r), out.lanes, out.add, *sum) };
    }
    R
}

/// What the offset of unsigned values takes from a product, with `less = -sum(q)`.
#[inline]
#[target_feature(enable = "avx512f")]
fn offset<L: Layout>(less: i32) -> __m512i {
    let less = _mm512_set1_epi32(less);
    match L::OFFSET_LOG2 {
        3 => _mm512_slli_epi32::<3>(less),
        4 => _mm512_slli_epi32::<4>(less),
        5 => _mm512_slli_epi32::<5>(less),
        _ => _mm512_slli_epi32::<7>(less),
    }
}

/// Writes or adds the first `lanes` of 16 sums.
///
/// # Safety
/// `at` has `lanes` values behind it that nobody else touches now.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store(at: *mut f32, lanes: usize, add: bool, sums: __m512) {
    let mask = ((1u32 << lanes.min(TILE_ROWS)) - 1) as __mmask16;
    // SAFETY: the caller's promise
    unsafe {
        let sums = if add { _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sums) } else { sums };
        _mm512_mask_storeu_ps(at, mask, sums);
    }
}
