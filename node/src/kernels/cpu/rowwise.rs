//! What works on one row of activations: norm, gate, dot product, quantization to int8. Sums run over 16 lanes in a fixed order, so
//! a row's result is the same bits on every instruction set.

use super::{
    isa::{Isa, for_each_isa},
    simd::{self, Kernel, Simd},
};
use crate::kernels::Activation;

/// Lanes of a sum; the width of an AVX-512 register of f32.
const LANES: usize = 16;

/// Values that share one scale when activations are quantized.
pub(crate) const QUANT_BLOCK: usize = 32;

#[inline(always)]
fn add_lanes(lanes: [f32; LANES]) -> f32 {
    let mut sums = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

#[inline(always)]
fn max_lanes(lanes: [f32; LANES]) -> f32 {
    let mut tops = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            tops[i] = if tops[i] > tops[i + width] { tops[i] } else { tops[i + width] };
        }
        width /= 2;
    }
    tops[0]
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_whole.iter().zip(b_whole) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    add_lanes(lanes) + rest
}

/// e^x, good to about 2 ulp for x in -87 to 0, in a form that compilers widen: split off the power of two, then a polynomial
/// (Cephes `expf`, Moshier).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    // adding and subtracting 1.5 * 2^23 rounds to the nearest whole number, which stands in the lowest bits in between
    let magic = 12_582_912.0f32;
    let shifted = x * LOG2_E + magic;
    let exponent = shifted.to_bits().wrapping_sub(magic.to_bits());
    let n = shifted - magic;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_2e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let e = p * r * r + r + 1.0;
    e * f32::from_bits(exponent.wrapping_add(127) << 23)
}

for_each_isa! {
    /// Sum of `a[i] * b[i]`.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
        dot_body(a, b)
    }
}

for_each_isa! {
    /// `out = x / rms(x) * gains`
    pub(crate) fn rms_norm(x: &[f32], gains: &[f32], epsilon: f32, out: &mut [f32]) {
        let scale = 1.0 / (dot_body(x, x) / x.len() as f32 + epsilon).sqrt();
        for ((o, x), g) in out.iter_mut().zip(x).zip(gains) {
            *o = x * scale * g;
        }
    }
}

for_each_isa! {
    /// `x = x / rms(x) * gains`
    pub(crate) fn rms_norm_in_place(x: &mut [f32], gains: &[f32], epsilon: f32) {
        let scale = 1.0 / (dot_body(x, x) / x.len() as f32 + epsilon).sqrt();
        for (x, g) in x.iter_mut().zip(gains) {
            *x = *x * scale * g;
        }
    }
}

for_each_isa! {
    /// `out += x / rms(x) * gains`
    pub(crate) fn rms_norm_add(x: &[f32], gains: &[f32], epsilon: f32, out: &mut [f32]) {
        let scale = 1.0 / (dot_body(x, x) / x.len() as f32 + epsilon).sqrt();
        for ((o, x), g) in out.iter_mut().zip(x).zip(gains) {
            *o += x * scale * g;
        }
    }
}

for_each_isa! {
    /// `out += scale * x`
    pub(crate) fn scaled_add(x: &[f32], scale: f32, out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o += scale * x;
        }
    }
}

for_each_isa! {
    fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
}

for_each_isa! {
    fn gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
        // 2 * sqrt(2 / pi): twice what stands in the tanh, as (1 + tanh(s)) / 2 = 1 / (1 + e^(-2s))
        const TWICE: f32 = 1.595_769;
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-TWICE * (g + 0.044_715 * g * g * g))) * u;
        }
    }
}

/// `out = activation(gate) * up`
pub(crate) fn gate_mul(isa: Isa, activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    match activation {
        Activation::Silu => silu_mul(isa, gate, up, out),
        Activation::GeluTanh => gelu_mul(isa, gate, up, out),
    }
}

for_each_isa! {
    /// Scores to weights that add up to one.
    pub(crate) fn softmax(scores: &mut [f32]) {
        let (whole, rest) = scores.as_chunks::<LANES>();
        let mut tops = [f32::MIN; LANES];
        for x in whole {
            for i in 0..LANES {
                tops[i] = if x[i] > tops[i] { x[i] } else { tops[i] };
            }
        }
        let top = tops.iter().chain(rest).copied().fold(f32::MIN, f32::max);
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = scores.as_chunks_mut::<LANES>();
        for x in whole {
            for i in 0..LANES {
                x[i] = exp(x[i] - top);
                lanes[i] += x[i];
            }
        }
        let mut total = 0.0;
        for x in rest.iter_mut() {
            *x = exp(*x - top);
            total += *x;
        }
        let inverse = 1.0 / (add_lanes(lanes) + total);
        scores.iter_mut().for_each(|x| *x *= inverse);
    }
}

/// Where one block of quantized values goes.
pub(crate) struct BlockMut<'a> {
    pub(crate) q: &'a mut [i8; QUANT_BLOCK],
    /// `q * scale` is the value.
    pub(crate) scale: &'a mut f32,
    /// The scale times the sum of `q`.
    pub(crate) sum: &'a mut f32,
    /// Minus the sum of `q`.
    pub(crate) less: &'a mut i32,
    /// The same of each half.
    pub(crate) less_halves: &'a mut [i32; 2],
}

/// Quantizes a row; `place` tells where each block goes.
pub(crate) fn quantize<'a>(isa: Isa, x: &[[f32; QUANT_BLOCK]], place: impl Fn(usize) -> BlockMut<'a>) {
    simd::run(isa, Quantize { x, place });
}

struct Quantize<'x, P> {
    x: &'x [[f32; QUANT_BLOCK]],
    place: P,
}

impl<'a, P: Fn(usize) -> BlockMut<'a>> Kernel for Quantize<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.x.iter().enumerate().for_each(|(b, x)| quantize_block(x, (self.place)(b)));
    }
}

#[inline(always)]
fn quantize_block(x: &[f32; QUANT_BLOCK], to: BlockMut) {
    let mut tops = [0.0f32; LANES];
    for i in 0..LANES {
        let (a, b) = (x[i].abs(), x[i + LANES].abs());
        tops[i] = if a > b { a } else { b };
    }
    let top = max_lanes(tops);
    // below this the inverse would be infinite, and the values are nothing beside any other
    let inverse = if top > 1e-30 { 127.0 / top } else { 0.0 };
    // adding 1.5 * 2^23 rounds to the nearest whole number, which then stands in the lowest bits
    let magic = 12_582_912.0f32;
    let mut whole = [0i32; QUANT_BLOCK];
    for i in 0..QUANT_BLOCK {
        whole[i] = (x[i] * inverse + magic).to_bits() as i32 - magic.to_bits() as i32;
        to.q[i] = whole[i] as i8;
    }
    let halves = [sum_whole(&whole[..LANES]), sum_whole(&whole[LANES..])];
    let total = halves[0] + halves[1];
    *to.scale = top / 127.0;
    *to.sum = *to.scale * total as f32;
    *to.less = -total;
    *to.less_halves = halves.map(|half| -half);
}

#[inline(always)]
fn sum_whole(values: &[i32]) -> i32 {
    let mut sum = 0;
    for value in values {
        sum += value;
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Quantized = ([i8; QUANT_BLOCK], f32, f32, i32, [i32; 2]);

    /// The whole blocks of a row.
    fn quantized(isa: Isa, x: &[f32]) -> Vec<Quantized> {
        let quantize_one = |x: &[f32; QUANT_BLOCK]| {
            let mut to = ([0; QUANT_BLOCK], 0.0, 0.0, 0, [0; 2]);
            quantize_into(isa, x, &mut to);
            to
        };
        x.as_chunks().0.iter().map(quantize_one).collect()
    }

    fn quantize_into(isa: Isa, x: &[f32; QUANT_BLOCK], to: &mut Quantized) {
        struct One<'a>(&'a [f32; QUANT_BLOCK], &'a mut Quantized);
        impl Kernel for One<'_> {
            type Output = ();

            #[inline(always)]
            fn run<S: Simd>(self, _: S) {
                let (q, scale, sum, less, less_halves) = self.1;
                quantize_block(self.0, BlockMut { q, scale, sum, less, less_halves });
            }
        }
        simd::run(isa, One(x, to));
    }

    proptest! {
        #[test]
        fn exp_is_close_to_the_library_one(x in -86.0f32..0.0) {
            prop_assert!((exp(x) / x.exp() - 1.0).abs() < 1e-6, "{} {}", exp(x), x.exp());
        }

        /// Law: every instruction set gives the same bits.
        #[test]
        fn all_instruction_sets_agree_to_the_bit(x in prop::collection::vec(-9.0f32..9.0, 32..200)) {
            let results = Isa::all_here().into_iter().map(|isa| {
                let mut soft = x.clone();
                softmax(isa, &mut soft);
                let mut normed = vec![0.0; x.len()];
                rms_norm(isa, &x, &soft, 1e-5, &mut normed);
                rms_norm_add(isa, &x, &soft, 1e-5, &mut normed);
                rms_norm_in_place(isa, &mut normed, &soft, 1e-5);
                let gated = [Activation::Silu, Activation::GeluTanh].map(|activation| {
                    let mut gated = vec![0.0; x.len()];
                    gate_mul(isa, activation, &x, &normed, &mut gated);
                    scaled_add(isa, &x, 0.3, &mut gated);
                    gated
                });
                (soft, normed.clone(), gated, dot(isa, &x, &normed), quantized(isa, &x))
            });
            let results: Vec<_> = results.collect();
            prop_assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
        }

        #[test]
        fn a_quantized_row_is_within_half_a_step(x in prop::collection::vec(-9.0f32..9.0, 32..=32)) {
            let (q, scale, _, less, halves) = quantized(Isa::detect(), &x)[0];
            let total = |q: &[i8]| q.iter().map(|q| i32::from(*q)).sum::<i32>();
            prop_assert_eq!((less, halves), (-total(&q), [-total(&q[..16]), -total(&q[16..])]));
            for (x, q) in x.iter().zip(q) {
                prop_assert!((x - f32::from(q) * scale).abs() <= scale * 0.501);
            }
        }
    }
}
