//! Tiles times rows on NEON with `dotprod` (Arm since v8.2). Four rows of weights at a time: a register holds a quarter of a tile's vector.

use std::{
    arch::{aarch64::*, asm},
    ops::Range,
};

use super::{
    Target,
    quantized::Group,
    tiles::{self, Format, Layout, SECOND_AT, TILE_COLS, TILE_ROWS, VECTOR, with_layout},
};

/// Rows of weights in a register.
const LANES: usize = 4;

/// Registers that hold one value of every row of a tile.
const QUARTERS: usize = TILE_ROWS / LANES;

/// One row of tiles times a group of rows.
///
/// # Safety
/// The machine has the dot product instructions; the rest is as in the AVX-512 form.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn multiply(format: Format, tiles: &[u8], x: Group, out: Target) {
    // SAFETY: the caller's promises are those of the functions called
    with_layout!(format, L => unsafe { multiply_layout::<L>(tiles, x, out) });
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
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

#[target_feature(enable = "neon,dotprod")]
unsafe fn pass<L: Layout, const R: usize>(tiles: &[u8], x: Group, out: Target) -> usize {
    let mut sums = [[vdupq_n_f32(0.0); QUARTERS]; R];
    let mut values = [0u8; TILE_ROWS * TILE_COLS];
    for (b, tile) in tiles.chunks_exact(L::BYTES).enumerate() {
        tiles::unpack::<L>(tile, &mut values);
        let first = tiles::halves(tile, 0);
        let second = if L::HAS_MIN || L::HAS_HALVES { tiles::halves(tile, SECOND_AT) } else { [0.0; TILE_ROWS] };
        for quarter in 0..QUARTERS {
            // SAFETY: the arrays hold four quarters; `x` holds R rows of as many blocks as there are tiles
            unsafe {
                let first = vld1q_f32(first.as_ptr().wrapping_add(LANES * quarter));
                let second = vld1q_f32(second.as_ptr().wrapping_add(LANES * quarter));
                let w = values.as_ptr().wrapping_add(VECTOR / QUARTERS * quarter);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let (at, sum) = (b * x.stride + r, &mut sums[quarter]);
                    let q = x.q.wrapping_add(at).cast::<i8>();
                    let scale = *x.scales.wrapping_add(at);
                    if L::HAS_HALVES {
                        for (half, d) in [first, second].into_iter().enumerate() {
                            let less = (*x.less_halves.wrapping_add(at))[half];
                            let product = products::<L>(w, q, half..half + 1, less);
                            *sum = vfmaq_f32(*sum, vcvtq_f32_s32(product), vmulq_n_f32(d, scale));
                        }
                        continue;
                    }
                    let product = products::<L>(w, q, 0..2, *x.less.wrapping_add(at));
                    *sum = vfmaq_f32(*sum, vcvtq_f32_s32(product), vmulq_n_f32(first, scale));
                    if L::HAS_MIN {
                        *sum = vfmaq_n_f32(*sum, second, *x.sums.wrapping_add(at));
                    }
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let mut row = [0.0f32; TILE_ROWS];
        // SAFETY: the array holds four quarters, and `out` has R rows whose lanes nobody else touches now
        unsafe {
            sums.iter().enumerate().for_each(|(i, sum)| vst1q_f32(row.as_mut_ptr().wrapping_add(LANES * i), *sum));
            out.put(r, &row);
        }
    }
    R
}

/// Sums of products of vectors `4 * halves` with a row's values, without what the offset adds.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn products<L: Layout>(w: *const u8, q: *const i8, halves: Range<usize>, less: i32) -> int32x4_t {
    // values of eight bits are made signed, so that nothing is to be taken away
    let is_signed = L::BITS == 8;
    let mut sum = vdupq_n_s32(if L::HAS_MIN || is_signed { 0 } else { less << L::OFFSET_LOG2 });
    for half in halves {
        // SAFETY: the caller's pointers have these vectors and values behind them
        unsafe {
            let q = vld1q_s8(q.wrapping_add(16 * half));
            let weights: [int8x16_t; 4] = std::array::from_fn(|v| {
                let w = vld1q_u8(w.wrapping_add((4 * half + v) * VECTOR));
                vreinterpretq_s8_u8(if is_signed { veorq_u8(w, vdupq_n_u8(0x80)) } else { w })
            });
            // the intrinsic is not stable yet
            asm!(
                "sdot {sum:v}.4s, {w0:v}.16b, {q:v}.4b[0]",
                "sdot {sum:v}.4s, {w1:v}.16b, {q:v}.4b[1]",
                "sdot {sum:v}.4s, {w2:v}.16b, {q:v}.4b[2]",
                "sdot {sum:v}.4s, {w3:v}.16b, {q:v}.4b[3]",
                sum = inout(vreg) sum, q = in(vreg) q,
                w0 = in(vreg) weights[0], w1 = in(vreg) weights[1], w2 = in(vreg) weights[2], w3 = in(vreg) weights[3],
                options(pure, nomem, nostack, preserves_flags)
            );
        }
    }
    sum
}
