//! The paged cache of keys and values in memory, and what a value of it is.
//!
//! A block holds, for each key-value head, the keys as `[D, 16]` (so 16 scores come from one pass over `D`) and then the values as
//! `[16, P]`, where `P` is `D` up to whole registers. In front of int8 stand the 16 scales of the keys and those of the values.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::{
    kernels::{
        CacheShape, Heads, KvDtype,
        cpu::{
            isa::Isa,
            simd::{self, Kernel, LANES, Simd},
        },
    },
    kv::BLOCK_TOKENS,
};

/// Bytes that a cache line has.
const LINE: usize = 64;

/// Widest head that a model may have.
const HEAD_MAX: usize = 1 << 10;

const _: () = assert!(BLOCK_TOKENS == LANES, "the scores of a block are one register");

/// A stored value.
pub(super) trait Element: Copy + Default + Send + Sync + 'static {
    /// Whether a scale for each token and head stands beside the values.
    const IS_SCALED: bool;

    /// What is stored, without its scale.
    fn widen<S: Simd>(s: S, x: &[Self; LANES]) -> S::Lanes;

    /// Stores `x`, and gives its scale.
    fn narrow<S: Simd>(s: S, x: &[f32], to: &mut [Self]) -> f32;
}

impl Element for f16 {
    const IS_SCALED: bool = false;

    #[inline(always)]
    fn widen<S: Simd>(s: S, x: &[Self; LANES]) -> S::Lanes {
        s.widen_f16(x)
    }

    #[inline(always)]
    fn narrow<S: Simd>(s: S, x: &[f32], to: &mut [Self]) -> f32 {
        let ((x, x_rest), (to, to_rest)) = (x.as_chunks(), to.as_chunks_mut());
        for (x, to) in x.iter().zip(to) {
            s.narrow_f16(s.load(x), to);
        }
        let mut last = ([0.0; LANES], [Self::ZERO; LANES]);
        last.0[..x_rest.len()].copy_from_slice(x_rest);
        s.narrow_f16(s.load(&last.0), &mut last.1);
        to_rest.copy_from_slice(&last.1[..x_rest.len()]);
        1.0
    }
}

impl Element for bf16 {
    const IS_SCALED: bool = false;

    #[inline(always)]
    fn widen<S: Simd>(s: S, x: &[Self; LANES]) -> S::Lanes {
        s.widen_bf16(x)
    }

    #[inline(always)]
    fn narrow<S: Simd>(_: S, x: &[f32], to: &mut [Self]) -> f32 {
        x.iter().zip(to).for_each(|(x, to)| *to = Self::from_f32(*x));
        1.0
    }
}

impl Element for i8 {
    const IS_SCALED: bool = true;

    #[inline(always)]
    fn widen<S: Simd>(s: S, x: &[Self; LANES]) -> S::Lanes {
        s.widen_i8(x)
    }

    #[inline(always)]
    fn narrow<S: Simd>(_: S, x: &[f32], to: &mut [Self]) -> f32 {
        let top = x.iter().fold(0.0f32, |top, x| if x.abs() > top { x.abs() } else { top });
        // below this the inverse would be infinite, and the values are nothing beside any other
        let inverse = if top > 1e-30 { 127.0 / top } else { 0.0 };
        // adding and subtracting 1.5 * 2^23 rounds to the nearest whole number
        let magic = 12_582_912.0f32;
        x.iter().zip(to).for_each(|(x, to)| *to = (x * inverse + magic - magic) as i8);
        top / 127.0
    }
}

/// Keys and values of all layers: `[layers, blocks, K]` heads of [`head_bytes`] bytes.
#[derive(Debug)]
pub(crate) struct Cache {
    shape: CacheShape,
    bytes: Vec<u8>,
    /// First byte that a cache line begins with.
    start: usize,
}

/// Values of one token's head, up to whole registers.
pub(super) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}

/// Bytes of the scales of one head in one block.
const fn scale_bytes<E: Element>() -> usize {
    if E::IS_SCALED { size_of::<[[f32; BLOCK_TOKENS]; 2]>() } else { 0 }
}

fn head_bytes(dim: usize, dtype: KvDtype) -> usize {
    let (scales, value) = match dtype {
        KvDtype::F16 => (scale_bytes::<f16>(), size_of::<f16>()),
        KvDtype::Bf16 => (scale_bytes::<bf16>(), size_of::<bf16>()),
        KvDtype::Int8 => (scale_bytes::<i8>(), size_of::<i8>()),
    };
    let bytes = scales + (dim + padded(dim)) * BLOCK_TOKENS * value;
    bytes.next_multiple_of(LINE)
}

impl Cache {
    pub(crate) fn new(shape: CacheShape) -> Self {
        // zeroed by the system, page by page as it is used
        let bytes = vec![0; shape.blocks * Self::block_bytes(shape) + LINE];
        let start = bytes.as_ptr().align_offset(LINE);
        Self { shape, bytes, start }
    }

    /// Bytes of one block in all layers.
    pub(crate) fn block_bytes(shape: CacheShape) -> usize {
        shape.layers * shape.heads.kv * head_bytes(shape.heads.dim, shape.dtype)
    }

    pub(crate) fn heads(&self) -> Heads {
        self.shape.heads
    }

    pub(crate) fn dtype(&self) -> KvDtype {
        self.shape.dtype
    }

    /// To read the blocks of one head.
    pub(super) fn pages<E: Element>(&self, layer: usize, kv_head: usize) -> Pages<'_, E> {
        let dim = self.heads().dim;
        Pages { bytes: &self.bytes, at: self.place(layer, kv_head), dim, _values: PhantomData }
    }

    /// To write into one layer from several threads.
    pub(super) fn slots<E: Element>(&mut self, layer: usize) -> Slots<'_, E> {
        let Heads { kv, dim, .. } = self.heads();
        let at = self.place(layer, 0);
        Slots { bytes: self.bytes.as_mut_ptr(), len: self.bytes.len(), at, kv, dim, _cache: PhantomData }
    }

    fn place(&self, layer: usize, kv_head: usize) -> Place {
        let CacheShape { blocks, heads, dtype, .. } = self.shape;
        let head = head_bytes(heads.dim, dtype);
        Place { first: self.start + (layer * blocks * heads.kv + kv_head) * head, head, block: heads.kv * head, blocks }
    }
}

/// Where the blocks of one head stand.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// First byte of block 0.
    first: usize,
    /// Bytes of a head in a block.
    head: usize,
    /// Bytes from block to block.
    block: usize,
    blocks: usize,
}

impl Place {
    fn of(&self, block: usize) -> usize {
        assert!(block < self.blocks, "a block is one of the pool's");
        self.first + block * self.block
    }
}

/// The blocks of one head in one layer.
#[derive(Clone, Copy)]
pub(super) struct Pages<'a, E> {
    bytes: &'a [u8],
    at: Place,
    dim: usize,
    _values: PhantomData<&'a E>,
}

/// One head in one block.
pub(super) struct Page<'a, E> {
    /// `[D, 16]`
    pub(super) keys: &'a [[E; BLOCK_TOKENS]],
    /// `[16, P / 16, 16]`
    pub(super) values: &'a [[E; LANES]],
    /// Of keys and values.
    pub(super) scales: &'a [[f32; BLOCK_TOKENS]; 2],
}

static ONES: [[f32; BLOCK_TOKENS]; 2] = [[1.0; BLOCK_TOKENS]; 2];

impl<'a, E: Element> Pages<'a, E> {
    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    #[inline(always)]
    pub(super) fn page(&self, block: u32) -> Page<'a, E> {
        let bytes = &self.bytes[self.at.of(block as usize)..][..self.at.head];
        let (scales, bytes) = bytes.split_at(scale_bytes::<E>());
        // SAFETY: a head begins with a cache line, so scales and elements are aligned; every pattern of bits is a value of both; they
        // hold `(D + P) * 16` elements
        unsafe {
            let scales = if E::IS_SCALED { &*scales.as_ptr().cast() } else { &ONES };
            let keys = std::slice::from_raw_parts(bytes.as_ptr().cast::<[E; LANES]>(), self.dim + padded(self.dim));
            let (keys, values) = keys.split_at(self.dim);
            Page { keys, values, scales }
        }
    }
}

/// Places for keys and values of one layer.
pub(super) struct Slots<'a, E> {
    bytes: *mut u8,
    len: usize,
    at: Place,
    kv: usize,
    dim: usize,
    _cache: PhantomData<&'a mut E>,
}

// SAFETY: `write` is the only use, and its callers write different slots
unsafe impl<E: Element> Sync for Slots<'_, E> {}

impl<E: Element> Slots<'_, E> {
    /// Writes one token's keys and values, `[K, D]` each.
    ///
    /// # Safety
    /// No other thread writes to the same slot meanwhile.
    pub(super) unsafe fn write(&self, isa: Isa, slot: usize, keys: &[f32], values: &[f32]) {
        let (dim, place) = (self.dim, slot % BLOCK_TOKENS);
        let mut stored = [E::default(); HEAD_MAX];
        let heads = keys.chunks_exact(dim).zip(values.chunks_exact(dim)).take(self.kv);
        for (kv_head, (keys, values)) in heads.enumerate() {
            let at = self.at.of(slot / BLOCK_TOKENS) + kv_head * self.at.head;
            assert!(at + self.at.head <= self.len, "a head lies within the cache");
            let stored = &mut stored[..dim];
            let key_scale = simd::run(isa, Narrow(keys, stored));
            // SAFETY: within the cache, as just checked, and aligned as in `page`; what other threads write are other places
            unsafe {
                let scales = self.bytes.add(at).cast::<f32>();
                let first = self.bytes.add(at + scale_bytes::<E>()).cast::<E>();
                stored.iter().enumerate().for_each(|(d, x)| *first.add(d * BLOCK_TOKENS + place) = *x);
                let row = first.add(dim * BLOCK_TOKENS + place * padded(dim));
                let value_scale = simd::run(isa, Narrow(values, std::slice::from_raw_parts_mut(row, dim)));
                if E::IS_SCALED {
                    *scales.add(place) = key_scale;
                    *scales.add(BLOCK_TOKENS + place) = value_scale;
                }
            }
        }
    }
}

struct Narrow<'a, E>(&'a [f32], &'a mut [E]);

impl<E: Element> Kernel for Narrow<'_, E> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        E::narrow(s, self.0, self.1)
    }
}
