//! Tiles times rows in plain loops, as the compiler widens them; the oracle of the forms with intrinsics, to the bit.

use super::{
    Target,
    quantized::Group,
    tiles::{self, Format, Layout, SECOND_AT, TILE_COLS, TILE_ROWS, VECTOR, with_layout},
};

/// One row of tiles times a group of rows.
///
/// # Safety
/// As in the AVX-512 form, but for the instructions.
pub(super) unsafe fn multiply(format: Format, tiles: &[u8], x: Group, out: Target) {
    for row in 0..x.rows {
        // SAFETY: the caller's promises hold for each row
        with_layout!(format, L => unsafe { one::<L>(tiles, x.skip(row), out.from(row)) });
    }
}

unsafe fn one<L: Layout>(tiles: &[u8], x: Group, out: Target) {
    let mut sums = [0.0f32; TILE_ROWS];
    let mut values = [0u8; TILE_ROWS * TILE_COLS];
    for (b, tile) in tiles.chunks_exact(L::BYTES).enumerate() {
        tiles::unpack::<L>(tile, &mut values);
        let first = tiles::halves(tile, 0);
        let at = b * x.stride;
        // SAFETY: `x` holds a row of so many blocks
        let (q, scale, sum, less, less_halves) =
            unsafe { (&*x.q.add(at), *x.scales.add(at), *x.sums.add(at), *x.less.add(at), *x.less_halves.add(at)) };
        if L::HAS_HALVES {
            let scales = [first, tiles::halves(tile, SECOND_AT)];
            for (half, d) in scales.iter().enumerate() {
                let product = products(&values, q, 4 * half..4 * half + 4, less_halves[half] << L::OFFSET_LOG2);
                add(&mut sums, &product, d, scale);
            }
            continue;
        }
        let product = products(&values, q, 0..8, if L::HAS_MIN { 0 } else { less << L::OFFSET_LOG2 });
        add(&mut sums, &product, &first, scale);
        if L::HAS_MIN {
            let minimums = tiles::halves(tile, SECOND_AT);
            sums.iter_mut().zip(minimums).for_each(|(s, m)| *s = m.mul_add(sum, *s));
        }
    }
    // SAFETY: the caller's promise
    unsafe { out.put(0, &sums) };
}

#[inline(always)]
fn products(
    values: &[u8; TILE_ROWS * TILE_COLS],
    q: &[i8; TILE_COLS],
    vectors: std::ops::Range<usize>,
    start: i32,
) -> [i32; TILE_ROWS] {
    let mut sums = [start; TILE_ROWS];
    for v in vectors {
        let (w, q) = (&values[v * VECTOR..][..VECTOR], &q[4 * v..][..4]);
        for (lane, sum) in sums.iter_mut().enumerate() {
            for i in 0..4 {
                *sum += i32::from(w[4 * lane + i]) * i32::from(q[i]);
            }
        }
    }
    sums
}

#[inline(always)]
fn add(sums: &mut [f32; TILE_ROWS], products: &[i32; TILE_ROWS], d: &[f32; TILE_ROWS], scale: f32) {
    for lane in 0..TILE_ROWS {
        sums[lane] = (products[lane] as f32).mul_add(d[lane] * scale, sums[lane]);
    }
}
