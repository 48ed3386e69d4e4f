//! Attention over paged keys and values in f16, one row of queries at a time.
//!
//! A block holds, for each key-value head, the keys as `[D, 16]` (so 16 scores come from one pass over `D`) and the values as
//! `[16, D]`. All query heads of a key-value head are served by one read of it.

use std::ops::Range;

use half::f16;

use super::{
    isa::{Isa, for_each_isa},
    rowwise,
};
use crate::{
    kernels::{CacheShape, Heads},
    kv::BLOCK_TOKENS,
};

/// Keys and values of all layers: `[layers, blocks, K, 2, 16 * D]`, as the bits of f16.
#[derive(Debug)]
pub(crate) struct Cache {
    heads: Heads,
    blocks: usize,
    bits: Vec<u16>,
}

impl Cache {
    pub(crate) fn new(shape: CacheShape) -> Self {
        let values = shape.layers * shape.blocks * Self::block_values(shape.heads);
        Self { heads: shape.heads, blocks: shape.blocks, bits: vec![0; values] }
    }

    /// Values of one block in one layer.
    pub(crate) fn block_values(heads: Heads) -> usize {
        2 * heads.kv * heads.dim * BLOCK_TOKENS
    }

    pub(crate) fn heads(&self) -> Heads {
        self.heads
    }

    fn at(&self, layer: usize, block: usize, kv_head: usize) -> usize {
        let half = self.heads.dim * BLOCK_TOKENS;
        ((layer * self.blocks + block) * self.heads.kv + kv_head) * 2 * half
    }

    /// Keys `[D, 16]` and values `[16, D]` of one head in one block.
    fn head(&self, layer: usize, block: usize, kv_head: usize) -> (&[u16], &[u16]) {
        let half = self.heads.dim * BLOCK_TOKENS;
        self.bits[self.at(layer, block, kv_head)..][..2 * half].split_at(half)
    }

    /// Writes one token's keys and values, `[K, D]` each.
    pub(crate) fn write(&mut self, layer: usize, slot: usize, keys: &[f32], values: &[f32]) {
        let (dim, place) = (self.heads.dim, slot % BLOCK_TOKENS);
        for kv_head in 0..self.heads.kv {
            let at = self.at(layer, slot / BLOCK_TOKENS, kv_head);
            let (k, v) = self.bits[at..at + 2 * dim * BLOCK_TOKENS].split_at_mut(dim * BLOCK_TOKENS);
            for d in 0..dim {
                k[d * BLOCK_TOKENS + place] = f16::from_f32(keys[kv_head * dim + d]).to_bits();
                v[place * dim + d] = f16::from_f32(values[kv_head * dim + d]).to_bits();
            }
        }
    }
}

/// A finite f16 as f32, in a form that compilers widen: move the bits, then let one product mend the exponent.
#[inline(always)]
fn widen(bits: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

for_each_isa! {
    /// `scores[16] = scale * (q[D] @ keys[D, 16])`
    fn score_block(q: &[f32], keys: &[u16], scale: f32, scores: &mut [f32; BLOCK_TOKENS]) {
        let mut sums = [0.0f32; BLOCK_TOKENS];
        let (keys, _) = keys.as_chunks::<BLOCK_TOKENS>();
        for (q, keys) in q.iter().zip(keys) {
            for i in 0..BLOCK_TOKENS {
                sums[i] += q * widen(keys[i]);
            }
        }
        for i in 0..BLOCK_TOKENS {
            scores[i] = sums[i] * scale;
        }
    }
}

for_each_isa! {
    /// `out[D] += weights[n] @ values[n, D]`, token after token
    fn mix_block(weights: &[f32], values: &[u16], out: &mut [f32]) {
        for (weight, values) in weights.iter().zip(values.chunks_exact(out.len())) {
            for (out, bits) in out.iter_mut().zip(values) {
                *out += weight * widen(*bits);
            }
        }
    }
}

/// One row of queries against the keys and values of positions `seen`, for the query heads of `kv_head`.
///
/// # Shapes
/// `queries`, `out`: `[H / K, D]`; `blocks`: the sequence's block table; `scores`: scratch.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attend(
    isa: Isa,
    cache: &Cache,
    layer: usize,
    kv_head: usize,
    blocks: &[u32],
    seen: Range<usize>,
    scale: f32,
    queries: &[f32],
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let dim = cache.heads.dim;
    let group = queries.len() / dim;
    let blocks = &blocks[seen.start / BLOCK_TOKENS..seen.end.div_ceil(BLOCK_TOKENS)];
    // what the first block holds before the window
    let unseen = seen.start % BLOCK_TOKENS;
    let (stride, end) = (blocks.len() * BLOCK_TOKENS, unseen + seen.len());
    scores.resize(group * stride, 0.0);
    for (b, block) in blocks.iter().enumerate() {
        let (keys, _) = cache.head(layer, *block as usize, kv_head);
        for (g, q) in queries.chunks_exact(dim).enumerate() {
            let (scores, _) = scores[g * stride + b * BLOCK_TOKENS..].as_chunks_mut();
            score_block(isa, q, keys, scale, &mut scores[0]);
        }
    }
    scores.chunks_exact_mut(stride).for_each(|scores| rowwise::softmax(isa, &mut scores[unseen..end]));
    out.fill(0.0);
    for (b, block) in blocks.iter().enumerate() {
        let (_, values) = cache.head(layer, *block as usize, kv_head);
        let first = b * BLOCK_TOKENS;
        let skipped = unseen.saturating_sub(first);
        for (g, out) in out.chunks_exact_mut(dim).enumerate() {
            let weights = &scores[g * stride + first..][skipped..BLOCK_TOKENS.min(end - first)];
            mix_block(isa, weights, &values[skipped * dim..], out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_finite_half() {
        for bits in (0..=u16::MAX).filter(|b| f16::from_bits(*b).is_finite()) {
            assert_eq!(widen(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits(), "{bits:#x}");
        }
    }
}
