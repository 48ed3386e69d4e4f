//! Sixteen f32 values at a time, on each instruction set with the same bits: products and sums are fused where [`Simd::mul_add`] says so
//! and nowhere else, and everything else is exact or rounded once.
//!
//! A [`Kernel`] is written once over [`Simd`] and compiled for each set. The value of a set's type proves that the machine has it.

use half::{bf16, f16};

use super::isa::Isa;

/// Values in one register of the widest set.
pub(crate) const LANES: usize = 16;

/// Largest value of f16.
const F16_MAX: f32 = 65_504.0;

/// One instruction set.
pub(crate) trait Simd: Copy {
    /// Sixteen values.
    type Lanes: Copy;

    /// Whether sixteen and more sums fit the registers; else it is four.
    const HAS_MANY_REGISTERS: bool;

    fn splat(self, x: f32) -> Self::Lanes;
    fn load(self, x: &[f32; LANES]) -> Self::Lanes;
    fn store(self, x: Self::Lanes, to: &mut [f32; LANES]);
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    fn sub(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    fn mul(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    /// `a` where it is greater, else `b`, also where one is not a number.
    fn max(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `2^n` for whole numbers from -126 to 127.
    fn pow2(self, n: Self::Lanes) -> Self::Lanes;
    /// Zero where `x < bound`, else `value`.
    fn zero_below(self, x: Self::Lanes, bound: Self::Lanes, value: Self::Lanes) -> Self::Lanes;
    /// Finite values, exactly.
    fn widen_f16(self, x: &[f16; LANES]) -> Self::Lanes;
    /// To the nearest, of equals the even; within f16's range, so that nothing becomes infinite.
    fn narrow_f16(self, x: Self::Lanes, to: &mut [f16; LANES]);
    fn widen_bf16(self, x: &[bf16; LANES]) -> Self::Lanes;
    fn widen_i8(self, x: &[i8; LANES]) -> Self::Lanes;

    /// e^x for x up to 0, good to about 2 ulp down to -87, and zero below: split off the power of two, then a polynomial (Cephes
    /// `expf`, Moshier).
    #[inline(always)]
    fn exp(self, x: Self::Lanes) -> Self::Lanes {
        let least = self.splat(-87.0);
        // adding and subtracting 1.5 * 2^23 rounds to the nearest whole number
        let magic = self.splat(12_582_912.0);
        let clamped = self.max(least, x);
        let n = self.sub(self.mul_add(clamped, self.splat(std::f32::consts::LOG2_E), magic), magic);
        let r = self.mul_add(n, self.splat(-0.693_359_4), clamped);
        let r = self.mul_add(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_2e-4);
        for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = self.mul_add(p, r, self.splat(c));
        }
        let e = self.mul_add(self.mul(p, r), r, self.add(r, self.splat(1.0)));
        self.zero_below(x, least, self.mul(e, self.pow2(n)))
    }

    /// The values one by one.
    #[inline(always)]
    fn array(self, x: Self::Lanes) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        self.store(x, &mut array);
        array
    }
}

/// Work that is compiled for each instruction set. `run` and all that it calls must be `#[inline(always)]`, as only what stands within
/// the set's own function is compiled for it.
pub(crate) trait Kernel {
    type Output;

    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `kernel` on the set that `isa` names.
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        // SAFETY: this value of `Isa` exists only where the features were detected
        #[cfg(target_arch = "x86_64")]
        Isa::Amx | Isa::Avx512Vnni => unsafe { x86::avx512(kernel) },
        // SAFETY: as above
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { x86::avx2(kernel) },
        #[cfg(target_arch = "aarch64")]
        Isa::Dotprod => kernel.run(Portable),
        Isa::Portable => kernel.run(Portable),
    }
}

/// The sum over lanes in a fixed order.
#[inline(always)]
pub(crate) fn sum_lanes(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Plain arrays, for the compiler to make of them what it can.
#[derive(Debug, Clone, Copy)]
struct Portable;

/// A finite f16 as f32, in a form that compilers widen: move the bits, then let one product mend the exponent.
#[inline(always)]
fn widen(x: f16) -> f32 {
    let bits = x.to_bits();
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

impl Simd for Portable {
    type Lanes = [f32; LANES];
    const HAS_MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Lanes {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::Lanes {
        *x
    }

    #[inline(always)]
    fn store(self, x: Self::Lanes, to: &mut [f32; LANES]) {
        *to = x;
    }

    #[inline(always)]
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn pow2(self, n: Self::Lanes) -> Self::Lanes {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }

    #[inline(always)]
    fn zero_below(self, x: Self::Lanes, bound: Self::Lanes, value: Self::Lanes) -> Self::Lanes {
        std::array::from_fn(|i| if x[i] < bound[i] { 0.0 } else { value[i] })
    }

    #[inline(always)]
    fn widen_f16(self, x: &[f16; LANES]) -> Self::Lanes {
        x.map(widen)
    }

    #[inline(always)]
    fn narrow_f16(self, x: Self::Lanes, to: &mut [f16; LANES]) {
        *to = x.map(|x| f16::from_f32(x.clamp(-F16_MAX, F16_MAX)));
    }

    #[inline(always)]
    fn widen_bf16(self, x: &[bf16; LANES]) -> Self::Lanes {
        x.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }

    #[inline(always)]
    fn widen_i8(self, x: &[i8; LANES]) -> Self::Lanes {
        x.map(f32::from)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{F16_MAX, Kernel, LANES, Simd};

    /// AVX-512: one register.
    #[derive(Clone, Copy)]
    struct Avx512(());

    /// AVX2, FMA and F16C: two registers.
    #[derive(Clone, Copy)]
    struct Avx2(());

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx512(()))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx2(()))
    }

    // SAFETY of every intrinsic below: a value of the type is made only where its features are there; addresses are those of whole arrays
    // of references, and no instruction here asks for more than their alignment
    impl Simd for Avx512 {
        type Lanes = __m512;
        const HAS_MANY_REGISTERS: bool = true;

        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> __m512 {
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }

        #[inline(always)]
        fn store(self, x: __m512, to: &mut [f32; LANES]) {
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
        }

        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }

        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }

        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }

        #[inline(always)]
        fn pow2(self, n: __m512) -> __m512 {
            unsafe {
                let exponent = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
            }
        }

        #[inline(always)]
        fn zero_below(self, x: __m512, bound: __m512, value: __m512) -> __m512 {
            unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, bound), value) }
        }

        #[inline(always)]
        fn widen_f16(self, x: &[f16; LANES]) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        }

        #[inline(always)]
        fn narrow_f16(self, x: __m512, to: &mut [f16; LANES]) {
            unsafe {
                let bounded = _mm512_min_ps(_mm512_set1_ps(F16_MAX), _mm512_max_ps(_mm512_set1_ps(-F16_MAX), x));
                let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(bounded);
                _mm256_storeu_si256(to.as_mut_ptr().cast(), halves);
            }
        }

        #[inline(always)]
        fn widen_bf16(self, x: &[bf16; LANES]) -> __m512 {
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }

        #[inline(always)]
        fn widen_i8(self, x: &[i8; LANES]) -> __m512 {
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
        }
    }

    impl Simd for Avx2 {
        type Lanes = [__m256; 2];
        const HAS_MANY_REGISTERS: bool = false;

        #[inline(always)]
        fn splat(self, x: f32) -> [__m256; 2] {
            unsafe { [_mm256_set1_ps(x); 2] }
        }

        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> [__m256; 2] {
            unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
        }

        #[inline(always)]
        fn store(self, x: [__m256; 2], to: &mut [f32; LANES]) {
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), x[1]);
            }
        }

        #[inline(always)]
        fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }

        #[inline(always)]
        fn sub(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        }

        #[inline(always)]
        fn mul(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }

        #[inline(always)]
        fn mul_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }

        #[inline(always)]
        fn max(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
            unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        }

        #[inline(always)]
        fn pow2(self, n: [__m256; 2]) -> [__m256; 2] {
            unsafe {
                let bias = _mm256_set1_epi32(127);
                let low = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvttps_epi32(n[0]), bias));
                let high = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvttps_epi32(n[1]), bias));
                [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
            }
        }

        #[inline(always)]
        fn zero_below(self, x: [__m256; 2], bound: [__m256; 2], value: [__m256; 2]) -> [__m256; 2] {
            unsafe {
                let low = _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[0], bound[0]), value[0]);
                let high = _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[1], bound[1]), value[1]);
                [low, high]
            }
        }

        #[inline(always)]
        fn widen_f16(self, x: &[f16; LANES]) -> [__m256; 2] {
            unsafe {
                let (low, high) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x.as_ptr().add(8).cast()));
                [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
            }
        }

        #[inline(always)]
        fn narrow_f16(self, x: [__m256; 2], to: &mut [f16; LANES]) {
            unsafe {
                let (least, most) = (_mm256_set1_ps(-F16_MAX), _mm256_set1_ps(F16_MAX));
                let low = _mm256_min_ps(most, _mm256_max_ps(least, x[0]));
                let high = _mm256_min_ps(most, _mm256_max_ps(least, x[1]));
                _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low));
                _mm_storeu_si128(to.as_mut_ptr().add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high));
            }
        }

        #[inline(always)]
        fn widen_bf16(self, x: &[bf16; LANES]) -> [__m256; 2] {
            unsafe {
                let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
                let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(8).cast()));
                let (low, high) = (_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high));
                [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
            }
        }

        #[inline(always)]
        fn widen_i8(self, x: &[i8; LANES]) -> [__m256; 2] {
            unsafe {
                let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().cast()));
                let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().add(8).cast()));
                [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every operation that is more than one instruction everywhere.
    struct All<'a> {
        x: &'a [f32; LANES],
        halves: &'a [f16; LANES],
        bytes: &'a [i8; LANES],
    }

    impl Kernel for All<'_> {
        type Output = (Vec<[f32; LANES]>, [f16; LANES]);

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let x = s.load(self.x);
            let mut narrow = [f16::ZERO; LANES];
            s.narrow_f16(x, &mut narrow);
            let brains = self.x.map(bf16::from_f32);
            let (halves, brains, bytes) = (s.widen_f16(self.halves), s.widen_bf16(&brains), s.widen_i8(self.bytes));
            let all = [halves, brains, bytes, s.exp(x), s.max(x, bytes), s.mul_add(x, halves, bytes), s.sub(x, brains)];
            (all.into_iter().map(|x| s.array(x)).collect(), narrow)
        }
    }

    fn all(
        isa: Isa,
        x: &[f32; LANES],
        halves: &[f16; LANES],
        bytes: &[i8; LANES],
    ) -> (Vec<[u32; LANES]>, [u16; LANES]) {
        let (values, narrow) = run(isa, All { x, halves, bytes });
        (values.into_iter().map(|x| x.map(f32::to_bits)).collect(), narrow.map(f16::to_bits))
    }

    #[test]
    fn every_finite_half_is_widened_exactly() {
        let finite: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).collect();
        for isa in Isa::all_here() {
            for halves in finite.as_chunks().0 {
                let (values, narrow) = all(isa, &halves.map(f16::to_f32), halves, &[0; LANES]);
                assert_eq!(values[0], halves.map(|x| x.to_f32().to_bits()), "{}", isa.name());
                assert_eq!(narrow, halves.map(f16::to_bits), "{}", isa.name());
            }
        }
    }

    proptest! {
        /// Law: every instruction set gives the same bits.
        #[test]
        fn all_sets_agree_to_the_bit(
            x in prop::array::uniform16(prop_oneof![-90.0f32..0.0, -7e4f32..7e4, -1e-6f32..1e-6]),
            halves in prop::array::uniform16(0u16..0x7c00),
            bytes in prop::array::uniform16(any::<i8>()),
        ) {
            let halves = halves.map(f16::from_bits);
            let expected = all(Isa::Portable, &x, &halves, &bytes);
            let in_range = x.map(|x| f16::from_f32(x.clamp(-F16_MAX, F16_MAX)).to_bits());
            prop_assert_eq!(expected.1, in_range);
            for isa in Isa::all_here() {
                prop_assert!(all(isa, &x, &halves, &bytes) == expected, "{}", isa.name());
            }
        }

        #[test]
        fn exp_is_close_to_the_library_one(x in prop::array::uniform16(-86.9f32..0.0)) {
            let found = all(Isa::Portable, &x, &[f16::ZERO; LANES], &[0; LANES]).0[3].map(f32::from_bits);
            for (x, found) in x.into_iter().zip(found) {
                prop_assert!((found / x.exp() - 1.0).abs() < 1e-6, "{x}: {found} {}", x.exp());
            }
        }

        #[test]
        fn exp_of_very_little_is_nothing(x in -1e30f32..-87.001) {
            let found = all(Isa::Portable, &[x; LANES], &[f16::ZERO; LANES], &[0; LANES]).0[3];
            prop_assert_eq!(found, [0; LANES]);
        }
    }
}
