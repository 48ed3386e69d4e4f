//! Tiles times rows on AMX int8, sixteen rows at a time: two thirds of the work of the AVX-512 form's products goes to the tile unit. The
//! products are the same whole numbers and what follows is in the same order, so the bits are too.
//!
//! The compiler has no stable intrinsics for tiles yet, so they are written as assembly. Tile registers hold their values only within
//! [`multiply`]: nothing else in this process uses them.
//!
//! # Source
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (AMX).

use std::{
    arch::{asm, x86_64::*},
    cell::RefCell,
    mem::MaybeUninit,
    ops::Range,
};

use super::{
    Target,
    avx512::{self, halves, unpack},
    quantized::{GROUP_ROWS, Group, Places},
    tiles::{Layout, SECOND_AT, TILE_COLS, TILE_ROWS, Tiles, VECTOR, with_layout},
};

/// Fewest rows for which unpacking pays: measured on two threads, the AVX-512 form is 1.2 times as fast at 16 rows and as fast at 32, and
/// this one 1.06 times at 48 and 1.09 times at 64.
pub(super) const ROWS_MIN: usize = 3 * GROUP_ROWS;

/// Bytes of a tile's values, unpacked.
const UNPACKED: usize = TILE_ROWS * TILE_COLS;

/// `LDTILECFG`'s operand. Registers 0 and 1 hold products, 16 rows of 16 i32; 2 and 4 activations, 16 rows of 32 bytes; 3 and 5 weights,
/// 8 rows of 64 bytes; 6 and 7 the same for half a block.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const CONFIG: Config = {
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let registers = [(16, 64), (16, 64), (16, 32), (8, 64), (16, 32), (8, 64), (16, 16), (4, 64)];
    let mut i = 0;
    while i < registers.len() {
        (config.rows[i], config.row_bytes[i]) = registers[i];
        i += 1;
    }
    config
};

/// Products of 16 rows of activations with 16 rows of weights.
#[repr(C, align(64))]
struct Product([i32; GROUP_ROWS * TILE_ROWS]);

thread_local! {
    /// One row of tiles, unpacked to signed bytes.
    static WEIGHTS: RefCell<Vec<__m512i>> = const { RefCell::new(Vec::new()) };
}

/// Asks the system for the use of tile registers, which grow the space that it keeps for each thread. Whether this process may use them.
pub(in crate::kernels::cpu) fn is_permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XTILEDATA: usize = 18;
    let leaf = __cpuid_count(7, 0).edx;
    let has_tiles = leaf & (1 << 24) != 0 && leaf & (1 << 25) != 0;
    if !cfg!(target_os = "linux") || !has_tiles {
        return false;
    }
    let result: isize;
    // SAFETY: a system call that only changes what this process may use; it says no where the kernel does not know it
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL as isize => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

/// One row of tiles times groups of rows; those of a last smaller group go the other way.
///
/// # Safety
/// The machine has AMX int8 and the process may use it; the rest is as in the AVX-512 form.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn multiply(tiles: &Tiles, tile_row: usize, groups: Range<usize>, x: Places, out: Target) {
    let (format, tiles) = (tiles.format, tiles.tile_row(tile_row));
    let mut groups = groups.map(|i| (x.group(i), out.from(i * GROUP_ROWS)));
    WEIGHTS.with_borrow_mut(|weights| {
        // SAFETY: the caller's promises are those of the functions called
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly));
            with_layout!(format, L => {
                unpack_all::<L>(tiles, weights);
                let whole = groups.clone().filter(|(x, _)| x.rows == GROUP_ROWS);
                whole.for_each(|(x, out)| pass::<L>(tiles, weights, x, out));
            });
            asm!("tilerelease", options(nostack, nomem));
        }
    });
    if let Some((x, out)) = groups.next_back().filter(|(x, _)| x.rows < GROUP_ROWS) {
        // SAFETY: the caller's promises
        unsafe { avx512::multiply(format, tiles, x, out) };
    }
}

/// Values as signed bytes, counted from zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn unpack_all<L: Layout>(tiles: &[u8], weights: &mut Vec<__m512i>) {
    weights.resize(tiles.len() / L::BYTES * UNPACKED / VECTOR, _mm512_setzero_si512());
    let offset = if L::HAS_MIN { 0 } else { 1u8 << L::OFFSET_LOG2 };
    let (out, _) = weights.as_chunks_mut::<8>();
    for (tile, out) in tiles.chunks_exact(L::BYTES).zip(out) {
        avx512::fetch_ahead::<L>(tile.as_ptr());
        // SAFETY: a tile of this layout has its values there
        let values = unsafe { unpack::<L>(tile.as_ptr().wrapping_add(L::VALUES_AT)) };
        *out = values.map(|values| _mm512_sub_epi8(values, _mm512_set1_epi8(offset as i8)));
    }
}

/// Steps from a product's computing to its scaling: it is stored one step later, and loads wait until such stores are through.
const BEHIND: usize = 3;

/// One row of tiles times sixteen rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn pass<L: Layout>(tiles: &[u8], weights: &[__m512i], x: Group, out: Target) {
    for r in 0..GROUP_ROWS {
        // each row of the outputs is on a page of its own; they come while the products are computed
        _mm_prefetch::<_MM_HINT_ET0>(out.row(r).cast());
    }
    let mut products = [const { MaybeUninit::<Product>::uninit() }; BEHIND + 1];
    let mut sums = [_mm512_setzero_ps(); GROUP_ROWS];
    // a block of two halves takes two steps
    let halves_a_block = if L::HAS_HALVES { 2 } else { 1 };
    let steps = tiles.len() / L::BYTES * halves_a_block;
    for step in 0..steps + BEHIND {
        // SAFETY: a tile of this layout has its halves there; `weights` holds all blocks, `x` sixteen rows of them
        unsafe {
            if step < steps {
                let (b, half) = (step / halves_a_block, step % halves_a_block);
                let q = x.q.wrapping_add(b * GROUP_ROWS).cast::<i8>().wrapping_add(half * TILE_COLS / 2);
                let w = weights.as_ptr().wrapping_add(b * 8 + half * 4);
                match (L::HAS_HALVES, step % 2) {
                    (false, 0) => even::multiply(q, w),
                    (false, _) => odd::multiply(q, w),
                    (true, 0) => even::multiply_half(q, w),
                    (true, _) => odd::multiply_half(q, w),
                }
            }
            if let Some(last) = step.checked_sub(1).filter(|last| *last < steps) {
                let product = &mut products[last % (BEHIND + 1)];
                if last % 2 == 0 { even::store(product) } else { odd::store(product) }
            }
            let Some(done) = step.checked_sub(BEHIND) else { continue };
            let (b, half) = (done / halves_a_block, done % halves_a_block);
            let tile = tiles.as_ptr().wrapping_add(b * L::BYTES);
            let d = halves(tile.wrapping_add(half * SECOND_AT));
            // it was stored in an earlier step
            let product = products[done % (BEHIND + 1)].assume_init_ref();
            scale_add(product, d, x.scales.wrapping_add(b * GROUP_ROWS), &mut sums);
            if L::HAS_MIN {
                let m = halves(tile.wrapping_add(SECOND_AT));
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_fmadd_ps(m, _mm512_set1_ps(*x.sums.wrapping_add(b * GROUP_ROWS + r)), *sum);
                }
            }
        }
    }
    for (r, sum) in sums.iter().enumerate() {
        // SAFETY: `out` has sixteen rows
        unsafe { avx512::store(out.row(r), out.lanes, out.add, *sum) };
    }
}

/// `sums += d * scales * product`
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scale_add(product: &Product, d: __m512, scales: *const f32, sums: &mut [__m512; GROUP_ROWS]) {
    let (rows, _) = product.0.as_chunks::<TILE_ROWS>();
    for (r, (sum, row)) in sums.iter_mut().zip(rows).enumerate() {
        // SAFETY: a row has sixteen values; the caller's scales are there for sixteen rows
        unsafe {
            let row = _mm512_cvtepi32_ps(_mm512_load_si512(row.as_ptr().cast()));
            *sum = _mm512_fmadd_ps(row, _mm512_mul_ps(d, _mm512_set1_ps(*scales.wrapping_add(r))), *sum);
        }
    }
}

/// The tile instructions of every second step, on registers of their own, so that one step's need not wait for the other's.
macro_rules! steps {
    ($name:ident, $product:literal, $x:literal, $w:literal) => {
        mod $name {
            use super::*;

            /// Sixteen rows of 32 activations times a tile of weights.
            #[inline]
            pub(super) unsafe fn multiply(q: *const i8, w: *const __m512i) {
                // SAFETY: the registers are configured for these shapes, and the caller's pointers have them behind them
                unsafe { product!($product, $x, $w, q, w) }
            }

            /// The same for half a tile, 16 columns.
            #[inline]
            pub(super) unsafe fn multiply_half(q: *const i8, w: *const __m512i) {
                // SAFETY: as above
                unsafe { product!($product, "tmm6", "tmm7", q, w) }
            }

            /// Writes the last product.
            #[inline]
            pub(super) unsafe fn store(to: &mut MaybeUninit<Product>) {
                // SAFETY: a product is as large as its register
                unsafe {
                    asm!(
                        concat!("tilestored [{to} + {line}], ", $product),
                        to = in(reg) to.as_mut_ptr(), line = in(reg) VECTOR,
                        options(nostack)
                    );
                }
            }
        }
    };
}

macro_rules! product {
    ($product:literal, $x:literal, $w:literal, $q:ident, $tile:ident) => {
        asm!(
            concat!("tilezero ", $product),
            concat!("tileloadd ", $x, ", [{q} + {row}]"),
            concat!("tileloadd ", $w, ", [{w} + {line}]"),
            concat!("tdpbssd ", $product, ", ", $x, ", ", $w),
            q = in(reg) $q, row = in(reg) TILE_COLS, w = in(reg) $tile, line = in(reg) VECTOR,
            options(nostack, readonly)
        )
    };
}

steps!(even, "tmm0", "tmm2", "tmm3");
steps!(odd, "tmm1", "tmm4", "tmm5");
