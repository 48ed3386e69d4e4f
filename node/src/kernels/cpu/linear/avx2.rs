//! Tiles times rows on AVX2 with FMA. Eight rows of weights at a time: a register holds half of a tile's vector.

use std::arch::x86_64::*;

use super::{
    Target,
    quantized::Group,
    tiles::{self, Format, Layout, SECOND_AT, TILE_COLS, TILE_ROWS, VECTOR, with_layout},
};

/// Rows of weights in a register.
const LANES: usize = 8;

/// Bytes of them in each vector of a tile.
const HALF_VECTOR: usize = VECTOR / 2;

#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn halves(at: *const u8) -> __m256 {
    // SAFETY: the caller's pointer has 16 bytes behind it
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
}

/// One row of tiles times a group of rows.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; the rest is as in the AVX-512 form.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply(format: Format, tiles: &[u8], x: Group, out: Target) {
    // SAFETY: the caller's promises are those of the functions called
    with_layout!(format, L => unsafe { multiply_layout::<L>(tiles, x, out) });
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_layout<L: Layout>(tiles: &[u8], x: Group, out: Target) {
    let mut row = 0;
    while row < x.rows {
        let (x, out) = (x.skip(row), out.from(row));
        // SAFETY: the caller's promises hold for each part of the rows
        row += unsafe {
            match x.rows {
                4.. => pass::<L, 4>(tiles, x, out),
                2.. => pass::<L, 2>(tiles, x, out),
                _ => pass::<L, 1>(tiles, x, out),
            }
        };
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pass<L: Layout, const R: usize>(tiles: &[u8], x: Group, out: Target) -> usize {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let mut values = [0u8; TILE_ROWS * TILE_COLS];
    for (b, tile) in tiles.chunks_exact(L::BYTES).enumerate() {
        tiles::unpack::<L>(tile, &mut values);
        for side in 0..2 {
            // SAFETY: a tile holds its halves and vectors; `x` holds R rows of as many blocks
            unsafe {
                let first = halves(tile.as_ptr().wrapping_add(2 * LANES * side));
                let second = if L::HAS_MIN || L::HAS_HALVES {
                    halves(tile.as_ptr().wrapping_add(SECOND_AT + 2 * LANES * side))
                } else {
                    _mm256_setzero_ps()
                };
                for (r, sums) in sums.iter_mut().enumerate() {
                    let (at, sum) = (b * x.stride + r, &mut sums[side]);
                    let q = x.q.wrapping_add(at).cast::<i8>();
                    let w = values.as_ptr().wrapping_add(HALF_VECTOR * side);
                    let scale = _mm256_set1_ps(*x.scales.wrapping_add(at));
                    if L::HAS_HALVES {
                        for (half, d) in [first, second].into_iter().enumerate() {
                            let less = (*x.less_halves.wrapping_add(at))[half];
                            let product = products::<L>(w, q, 4 * half..4 * half + 4, less);
                            *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), _mm256_mul_ps(d, scale), *sum);
                        }
                        continue;
                    }
                    let product = products::<L>(w, q, 0..8, *x.less.wrapping_add(at));
                    *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), _mm256_mul_ps(first, scale), *sum);
                    if L::HAS_MIN {
                        *sum = _mm256_fmadd_ps(second, _mm256_set1_ps(*x.sums.wrapping_add(at)), *sum);
                    }
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: `out` has R rows
        unsafe { store(out, r, sums) };
    }
    R
}

/// Sums of products of vectors `range` with a row's values, without what the offset adds.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn products<L: Layout>(w: *const u8, q: *const i8, range: std::ops::Range<usize>, less: i32) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let mut sum =
        if L::HAS_MIN || L::BITS == 8 { _mm256_setzero_si256() } else { _mm256_set1_epi32(less << L::OFFSET_LOG2) };
    for v in range {
        // SAFETY: the caller's pointers have these vectors and values behind them
        let (w, q) = unsafe {
            let w = _mm256_loadu_si256(w.wrapping_add(v * VECTOR).cast());
            (w, _mm256_set1_epi32(q.wrapping_add(4 * v).cast::<i32>().read_unaligned()))
        };
        let pairs = if L::BITS == 8 {
            // two products of 255 * 127 do not fit 16 bits; of 128 * 127 they do: so signed weights, whose sign goes to the other side
            let signed = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(q, signed))
        } else {
            _mm256_maddubs_epi16(w, q)
        };
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    sum
}

/// # Safety
/// `out` has a row `r`, whose lanes nobody else touches now.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store(out: Target, r: usize, sums: &[__m256; 2]) {
    let mut values = [0.0f32; TILE_ROWS];
    // SAFETY: the array holds both registers
    unsafe {
        _mm256_storeu_ps(values.as_mut_ptr(), sums[0]);
        _mm256_storeu_ps(values.as_mut_ptr().wrapping_add(LANES), sums[1]);
    }
    // SAFETY: the caller's promise
    unsafe { out.put(r, &values) };
}
