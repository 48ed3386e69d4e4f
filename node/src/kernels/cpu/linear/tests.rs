//! Products on random shapes: close to dense f32 ones, and the same bits on every instruction set, in any company, on any number of
//! threads.

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use proptest::prelude::*;

use super::*;

const TYPES: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
    GgmlDType::Q2K,
];

/// Values from -1 to 1 that look random and are the same in every run.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mix = |i: usize| (i as u64 + seed * 7919).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..count)
        .map(|i| ((mix(i) ^ (mix(i) >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32 / 8_388_608.0 - 1.0)
        .collect()
}

fn weight(dtype: GgmlDType, rows: usize, cols: usize, seed: u64) -> Weight {
    // a mean beside zero makes minimums matter
    let values: Vec<f32> = noise(seed, rows * cols).iter().map(|x| x * 0.1 + 0.03).collect();
    let tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap();
    let bytes = QTensor::quantize(&tensor, dtype).unwrap().data().unwrap().into_owned();
    Weight::new(dtype, rows, cols, bytes.into()).unwrap()
}

fn rows(values: Vec<f32>, width: usize) -> Rows {
    Rows { width, values }
}

fn multiply(isa: Isa, threads: usize, weight: &Weight, bias: &[f32], x: &Rows) -> Vec<f32> {
    let mut cores = Cores::new(isa, threads);
    let w = cores.matrix(vec![weight.clone()], bias.to_vec());
    let mut out = Rows::default();
    cores.multiply(Source::Plain(x), &w, &mut out);
    let written = out.values.clone();
    cores.multiply_add(Source::Plain(x), &w, &mut out);
    for (once, twice) in written.iter().zip(&out.values) {
        assert!((twice - 2.0 * once).abs() <= 1e-4 * (1.0 + once.abs()), "{twice} is not twice {once}");
    }
    written
}

fn dense(weight: &Weight, bias: &[f32], x: &Rows) -> Vec<f32> {
    let w = weight.dequantize();
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(x * w)).sum::<f64>() as f32;
    let products = |i: usize| w.chunks_exact(weight.cols()).map(move |w| (i, w));
    (0..x.count())
        .flat_map(|i| products(i).enumerate().map(|(n, (i, w))| dot(x.row(i), w) + bias.get(n).copied().unwrap_or(0.0)))
        .collect()
}

fn relative_error(a: &[f32], b: &[f32]) -> f32 {
    let difference: f32 = a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum();
    (difference / b.iter().map(|y| y * y).sum::<f32>().max(1e-12)).sqrt()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// How much of everything: cases, outputs, blocks and rows. Miri is a thousand times as slow.
const SIZES: (u32, usize, usize, usize) = if cfg!(miri) { (2, 20, 2, 44) } else { (40, 70, 8, 200) };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(SIZES.0))]

    #[test]
    fn products_are_close_to_dense_ones_and_equal_to_the_bit_everywhere(
        which in 0..TYPES.len(), outputs in 1..SIZES.1, blocks in 1..SIZES.2,
        count in prop_oneof![1usize..40, 40..SIZES.3], threads in 1usize..4,
        has_bias: bool, seed: u64,
    ) {
        let dtype = TYPES[which];
        let cols = blocks * dtype.block_size().max(32);
        let w = weight(dtype, outputs, cols, seed % 1000);
        let x = rows(noise(seed % 1000 + 1, count * cols), cols);
        let bias = if has_bias { noise(5, outputs) } else { Vec::new() };
        let expected = dense(&w, &bias, &x);
        let found: Vec<_> = Isa::all_here().into_iter().map(|isa| multiply(isa, threads, &w, &bias, &x)).collect();
        let error = relative_error(&found[0], &expected);
        // int8 activations cost a half percent; a f16 scale of a K type rounds the product of two
        prop_assert!(error < 1.5e-2, "{dtype:?}: {error}");
        for other in &found[1..] {
            prop_assert_eq!(bits(&found[0]), bits(other), "{:?}", dtype);
        }
        let last = rows(x.row(count - 1).to_vec(), cols);
        let alone = multiply(Isa::detect(), 1, &w, &bias, &last);
        prop_assert_eq!(bits(&alone), bits(&found[0][(count - 1) * outputs..]), "{:?}", dtype);
    }
}

#[test]
fn every_packed_value_is_the_one_of_the_file() {
    for dtype in TYPES {
        let w = weight(dtype, 21, 512, 3);
        let mut row = vec![0.0; 512];
        let part = Part::pack(w.clone(), 2, &Arena::default());
        for (i, expected) in w.dequantize().chunks_exact(512).enumerate() {
            part.dequantize_row(i, &mut row);
            let error = relative_error(&row, expected);
            // a scale of a K type is a product, which small ones round to what a f16 has near zero
            assert!(error < 1e-3, "{dtype:?} row {i}: {error}");
        }
    }
}

#[test]
fn a_scale_beyond_halves_leaves_the_matrix_as_it_is() {
    // Q4_K: d of 65504 times a scale of 63
    let mut bytes = vec![0u8; 144];
    bytes[..2].copy_from_slice(&half::f16::MAX.to_le_bytes());
    bytes[4..16].fill(63);
    bytes[16..].fill(0x11);
    let w = Weight::new(GgmlDType::Q4K, 1, 256, bytes.into()).unwrap();
    assert!(matches!(Part::pack(w.clone(), 1, &Arena::default()), Part::Stored(_)));
    let x = rows(vec![1.0; 256], 256);
    assert_eq!(multiply(Isa::detect(), 1, &w, &[], &x).len(), 1);
}
