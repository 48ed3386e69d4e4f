//! The fast CPU form against the plain reference, through whole tiny models and the same file loader.
//!
//! Method: one model of seeded random weights per quantized type and per architecture; the same tokens through both backends; logits
//! close for all types, and on the CPU equal to the bit however the tokens are cut into steps, whatever shares the batch, on any number
//! of threads.

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use proptest::prelude::*;

use super::{
    Backend, KvDtype,
    cpu::{Cpu, isa::Isa},
    cuda::{Cuda, Device, emulated::Emulated},
    reference::Reference,
};
use crate::{
    batch::Batch,
    model::{
        self, Architecture, Capacity, Model,
        tiny::{self, Tiny},
    },
    weights::Checkpoint,
};

const CAPACITY: Capacity = Capacity { batch_tokens_max: 64, context: 128, blocks: 32, kv_dtype: KvDtype::F16 };

fn load<B: Backend + 'static>(file: &Checkpoint, backend: B) -> Box<dyn Model> {
    load_with(file, backend, KvDtype::F16)
}

fn load_with<B: Backend + 'static>(file: &Checkpoint, backend: B, kv_dtype: KvDtype) -> Box<dyn Model> {
    model::load(file, backend, Capacity { kv_dtype, ..CAPACITY }).unwrap()
}

/// Logits after the last token, the tokens fed in pieces that end at `cuts`; `beside` is a second sequence that shares each step.
fn logits(model: &mut dyn Model, tokens: &[u32], cuts: &[usize], beside: &[u32]) -> Vec<f32> {
    let (mine, others): (Vec<u32>, Vec<u32>) = ((0..8).collect(), (8..16).rev().collect());
    let mut last = Vec::new();
    let mut start = 0;
    for end in cuts.iter().copied().chain([tokens.len()]) {
        if end <= start {
            continue;
        }
        let mut batch = Batch::default();
        if !beside.is_empty() {
            batch.push(beside, 0, &others);
            batch.logit_rows.push(beside.len() as u32 - 1);
        }
        batch.push(&tokens[start..end], start, &mine);
        batch.logit_rows.push(batch.tokens.len() as u32 - 1);
        let all = model.forward(&batch, &|| {}).logits;
        last = all[all.len() - tiny::VOCAB..].to_vec();
        start = end;
    }
    last
}

fn error(a: &[f32], b: &[f32]) -> f32 {
    let difference: f32 = a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum();
    let size: f32 = b.iter().map(|y| y * y).sum();
    (difference / size).sqrt()
}

#[test]
fn the_fast_form_is_close_to_the_reference_for_every_type() {
    // (type, tolerance): int8 activations cost up to three percent where weights are packed, f16 caches a thousandth everywhere
    let types = [
        (GgmlDType::F32, 2e-3),
        (GgmlDType::F16, 2e-3),
        (GgmlDType::BF16, 2e-3),
        (GgmlDType::Q4_0, 4e-2),
        (GgmlDType::Q4_1, 4e-2),
        (GgmlDType::Q5_0, 4e-2),
        (GgmlDType::Q5_1, 4e-2),
        (GgmlDType::Q8_0, 4e-2),
    ];
    for (dtype, tolerance) in types {
        let file = tiny::llama(7, dtype);
        compare(&format!("{dtype:?}"), &file, tolerance);
    }
    for dtype in [GgmlDType::Q2K, GgmlDType::Q3K, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K] {
        // these have blocks of 256 values
        let file = Tiny::new(Architecture::Llama).wide().build(7, dtype);
        let is_packed = !matches!(dtype, GgmlDType::Q2K | GgmlDType::Q3K);
        compare(&format!("{dtype:?}"), &file, if is_packed { 4e-2 } else { 2e-3 });
    }
}

#[test]
fn the_fast_form_is_close_to_the_reference_for_every_architecture() {
    for arch in Architecture::ALL {
        // in a mixture an error also moves the experts' weights
        for (dtype, tolerance) in [(GgmlDType::F32, 4e-3), (GgmlDType::Q8_0, 6e-2)] {
            compare(arch.name(), &tiny::model(arch, 7, dtype), tolerance);
        }
    }
}

fn compare(what: &str, file: &Checkpoint, tolerance: f32) {
    let tokens: Vec<u32> = (0..40).map(|i| i * 29 % 64).collect();
    let expected = logits(&mut *load(file, Reference), &tokens, &[], &[]);
    for isa in Isa::all_here() {
        let found = logits(&mut *load(file, Cpu::with_isa(2, isa)), &tokens, &[], &[]);
        let error = error(&found, &expected);
        assert!(error < tolerance, "{what} on {}: relative error {error}", isa.name());
    }
    compare_on_cuda(&Arc::new(Emulated::default()), what, file, &tokens, &expected);
}

/// The tokens in one step, and the last one alone.
fn compare_on_cuda<D: Device>(device: &Arc<D>, what: &str, file: &Checkpoint, tokens: &[u32], expected: &[f32]) {
    for cuts in [&[][..], &[tokens.len() - 1]] {
        let found = logits(&mut *load(file, Cuda::new(device.clone(), false)), tokens, cuts, &[3, 5]);
        let error = error(&found, expected);
        assert!(error < 2e-2, "{what} on {}: relative error {error}", device.class());
    }
}

/// What the emulated device shows in every test run, on a real one.
#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs a GPU: benches/gpu/run.sh runs it"]
fn whole_models_on_a_gpu_are_close_to_the_reference() {
    let gpu = super::cuda::driver::Gpu::open(0).unwrap();
    // enough tokens for the products of many rows
    let tokens: Vec<u32> = (0..100).map(|i| i * 29 % 64).collect();
    for arch in Architecture::ALL {
        for dtype in [GgmlDType::BF16, GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q5_1, GgmlDType::Q8_0] {
            let file = tiny::model(arch, 7, dtype);
            let expected = logits(&mut *load(&file, Reference), &tokens, &[], &[]);
            compare_on_cuda(&gpu, &format!("{} {dtype:?}", arch.name()), &file, &tokens, &expected);
        }
    }
    for dtype in [GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K] {
        let file = Tiny::new(Architecture::Llama).wide().build(7, dtype);
        let expected = logits(&mut *load(&file, Reference), &tokens, &[], &[]);
        compare_on_cuda(&gpu, &format!("{dtype:?}"), &file, &tokens, &expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Law: a row's logits are the same bits however its tokens were cut into steps, whatever shared them, on 1 to 3 threads.
    #[test]
    fn logits_do_not_depend_on_company_chunks_or_threads(
        tokens in prop::collection::vec(0u32..64, 1..60),
        beside in prop::collection::vec(0u32..64, 0..20),
        mut cuts in prop::collection::vec(1usize..60, 0..4),
        threads in 1usize..4,
    ) {
        cuts.retain(|c| *c < tokens.len());
        cuts.sort_unstable();
        let types = [(GgmlDType::Q8_0, KvDtype::Int8), (GgmlDType::F16, KvDtype::Bf16)];
        let types = types.map(|(dtype, kv_dtype)| (Architecture::Llama, dtype, kv_dtype)).into_iter();
        for (arch, dtype, kv_dtype) in types.chain(Architecture::ALL.map(|arch| (arch, GgmlDType::Q4_1, KvDtype::F16))) {
            let file = tiny::model(arch, 7, dtype);
            let alone = logits(&mut *load_with(&file, Cpu::new(1), kv_dtype), &tokens, &[], &[]);
            let together = logits(&mut *load_with(&file, Cpu::new(threads), kv_dtype), &tokens, &cuts, &beside);
            let is_equal = alone.iter().zip(&together).all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(is_equal, "{} {dtype:?} {}", arch.name(), kv_dtype.name());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3))]

    /// The same law on CUDA's kernels, when it is asked for.
    #[test]
    fn logits_on_cuda_do_not_depend_on_company_or_chunks_when_they_must_not(
        tokens in prop::collection::vec(0u32..64, 1..60),
        beside in prop::collection::vec(0u32..64, 1..20),
        mut cuts in prop::collection::vec(1usize..60, 0..4),
    ) {
        cuts.retain(|c| *c < tokens.len());
        cuts.sort_unstable();
        let invariant = || Cuda::new(Arc::new(Emulated::default()), true);
        for (arch, dtype) in Architecture::ALL.into_iter().zip([GgmlDType::Q4_1, GgmlDType::BF16, GgmlDType::Q8_0].into_iter().cycle()) {
            let file = tiny::model(arch, 7, dtype);
            let alone = logits(&mut *load(&file, invariant()), &tokens, &[], &[]);
            let together = logits(&mut *load(&file, invariant()), &tokens, &cuts, &beside);
            let is_equal = alone.iter().zip(&together).all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(is_equal, "{} {dtype:?}", arch.name());
        }
    }
}

#[test]
fn every_way_to_keep_keys_and_values_is_close_to_the_reference_and_a_class_of_its_own() {
    let file = tiny::llama(7, GgmlDType::F32);
    let tokens: Vec<u32> = (0..40).map(|i| i * 29 % 64).collect();
    let expected = logits(&mut *load(&file, Reference), &tokens, &[], &[]);
    let class = load(&file, Cpu::new(1)).device_class();
    for (kv_dtype, tolerance, suffix) in
        [(KvDtype::F16, 2e-3, ""), (KvDtype::Bf16, 2e-2, "-kv-bf16"), (KvDtype::Int8, 3e-2, "-kv-int8")]
    {
        let mut model = load_with(&file, Cpu::new(1), kv_dtype);
        let error = error(&logits(&mut *model, &tokens, &[], &[]), &expected);
        assert!(error < tolerance, "{}: relative error {error}", kv_dtype.name());
        assert_eq!(model.device_class(), format!("{class}{suffix}"));
    }
}
