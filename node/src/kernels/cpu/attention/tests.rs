//! Goal: attention and the writing of its cache give what the reference gives, and one row the same bits whatever it is computed with.
//! Method: random heads, windows, lengths and steps through both backends; queries, keys and values are rows of one random table.

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use proptest::prelude::*;

use super::*;
use crate::{
    kernels::{
        Backend, CacheShape, HeadNorms, Norm, Rope,
        cpu::Cpu,
        cuda::{Cuda, Device, emulated::Emulated},
        reference::Reference,
    },
    kv::BLOCK_TOKENS,
    weights::Weight,
};

/// Positions that a sequence has room for.
const CONTEXT: usize = if cfg!(miri) { 3 } else { 45 } * BLOCK_TOKENS;

const LAYERS: usize = 2;

#[derive(Debug, Clone)]
struct Case {
    heads: Heads,
    window: Option<usize>,
    rope: Rope,
    has_norms: bool,
    dtype: KvDtype,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    seed: u64,
}

/// Which rows of which sequence a step computes.
type Step = Vec<(usize, Range<usize>)>;

impl Case {
    fn strategy(length_max: usize) -> impl Strategy<Value = Self> {
        let (kv, group, half): (usize, usize, usize) = if cfg!(miri) { (3, 3, 5) } else { (4, 10, 25) };
        let heads =
            (1..kv, 1..group, 1..half).prop_map(|(kv, group, half)| Heads { query: kv * group, kv, dim: 2 * half });
        let window = prop_oneof![Just(None), (1usize..300).prop_map(Some)];
        let dtype = prop_oneof![Just(KvDtype::F16), Just(KvDtype::Bf16), Just(KvDtype::Int8)];
        let lengths = prop::collection::vec(1..length_max, 1..4);
        let parts = (heads, window, any::<bool>(), any::<bool>(), any::<bool>(), dtype, lengths, any::<u64>());
        parts.prop_map(|(heads, window, interleaved, is_whole, has_norms, dtype, lengths, seed)| {
            let half = if is_whole { heads.dim / 2 } else { heads.dim / 4 };
            let inverse: Vec<f64> = (0..half).map(|i| 100f64.powf(-(i as f64) / half as f64)).collect();
            let rope = Rope::new(CONTEXT, &inverse, 1.0, interleaved);
            Self { heads, window, rope, has_norms, dtype, lengths, seed }
        })
    }

    /// Everything in one step.
    fn at_once(&self) -> Vec<Step> {
        vec![self.lengths.iter().map(|len| 0..*len).enumerate().collect()]
    }

    /// Each sequence cut at `cuts`, piece after piece.
    fn cut_at(&self, cuts: &[usize]) -> Vec<Step> {
        let pieces = |len: usize| {
            let ends: Vec<usize> = cuts.iter().copied().filter(|cut| *cut < len).chain([len]).collect();
            let starts = [0].into_iter().chain(ends.clone());
            starts.zip(ends).map(|(start, end)| start..end).collect::<Vec<_>>()
        };
        let pieces: Vec<Vec<Range<usize>>> = self.lengths.iter().map(|len| pieces(*len)).collect();
        let step = |i: usize| pieces.iter().enumerate().filter_map(|(s, p)| Some((s, p.get(i)?.clone()))).collect();
        (0..=cuts.len()).map(step).filter(|step: &Step| !step.is_empty()).collect()
    }

    /// What all rows of all sequences give, `[sum of lengths, H * D]`; the cache holds no numbers before.
    fn run<B: Backend>(&self, mut backend: B, steps: &[Step]) -> Vec<f32> {
        let Heads { dim, .. } = self.heads;
        let (width, out_width) = (self.heads.qkv_width(), self.heads.query_width());
        let blocks = self.lengths.len() * CONTEXT / BLOCK_TOKENS;
        let mut cache = backend.cache(CacheShape { layers: LAYERS, blocks, heads: self.heads, dtype: self.dtype });
        let table = self.table(width);
        let table = backend.matrix(vec![dense(&table, width)], Vec::new());
        let rope = backend.rope(self.rope.clone());
        let norms = self.has_norms.then(|| {
            let norm = |gain: f32| Norm { gains: (0..dim).map(|d| gain + d as f32 / 64.0).collect(), epsilon: 1e-5 };
            HeadNorms { query: backend.norm(norm(1.5)), key: backend.norm(norm(0.5)) }
        });
        let view = View { scale: 1.0 / (dim as f32).sqrt(), window: self.window };
        let (mut qkv, mut out) = (backend.rows(CONTEXT, width), backend.rows(CONTEXT, out_width));
        let firsts = self.firsts();
        let mut all = vec![0.0; self.lengths.iter().sum::<usize>() * out_width];
        for step in steps {
            let mut batch = Batch::default();
            for (s, rows) in step {
                let tokens: Vec<u32> = rows.clone().map(|i| (firsts[*s] + i) as u32).collect();
                batch.push(&tokens, rows.start, &self.blocks(*s));
            }
            backend.begin(&batch, &cache);
            for layer in 0..LAYERS {
                // the layers differ in their scale
                backend.embed(&table, &batch, 1.0 + layer as f32, &mut qkv);
                backend.rope_write(&mut qkv, norms.as_ref(), &rope, &batch, layer, &mut cache);
            }
            backend.attention(&qkv, view, &batch, LAYERS - 1, &cache, &mut out);
            for (token, row) in batch.tokens.iter().zip(backend.read(&mut out).chunks_exact(out_width)) {
                all[*token as usize * out_width..][..out_width].copy_from_slice(row);
            }
        }
        all
    }

    /// First row of each sequence in the table.
    fn firsts(&self) -> Vec<usize> {
        let sum = |sum: &mut usize, len: &usize| Some(std::mem::replace(sum, *sum + len));
        self.lengths.iter().scan(0, sum).collect()
    }

    /// Blocks of a sequence, not in order.
    fn blocks(&self, sequence: usize) -> Vec<u32> {
        let (each, stride) = (CONTEXT / BLOCK_TOKENS, self.lengths.len());
        (0..each).map(|i| ((i * 7 % each) * stride + sequence) as u32).collect()
    }

    /// Values that bf16 has too.
    fn table(&self, width: usize) -> Vec<f32> {
        let mut state = self.seed | 1;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            half::bf16::from_f32((state >> 40) as f32 / (1 << 22) as f32 - 2.0).to_f32()
        };
        std::iter::repeat_with(next).take(self.lengths.iter().sum::<usize>() * width).collect()
    }
}

fn dense(values: &[f32], cols: usize) -> Weight {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Weight::new(GgmlDType::F32, values.len() / cols, cols, bytes.into()).unwrap()
}

fn error(found: &[f32], expected: &[f32]) -> f32 {
    let difference: f32 = found.iter().zip(expected).map(|(x, y)| (x - y).powi(2)).sum();
    let size: f32 = expected.iter().map(|y| y * y).sum();
    (difference / size).sqrt()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Cases, and the most rows of a sequence. Miri is a thousand times as slow.
const SIZES: (u32, usize) = if cfg!(miri) { (2, 20) } else { (48, 200) };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(SIZES.0))]

    #[test]
    fn attention_is_close_to_the_reference(case in Case::strategy(SIZES.1)) {
        let expected = case.run(Reference, &case.at_once());
        let tolerance = match case.dtype {
            KvDtype::F16 => 2e-3,
            KvDtype::Bf16 => 2e-2,
            KvDtype::Int8 => 3e-2,
        };
        for isa in Isa::all_here() {
            let error = error(&case.run(Cpu::with_isa(2, isa), &case.at_once()), &expected);
            prop_assert!(error < tolerance, "{}: relative error {error}", isa.name());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 0 } else { 5 }))]

    /// The CUDA form, on a CPU in a GPU's place.
    #[test]
    fn attention_on_cuda_is_close_to_the_reference(
        case in Case::strategy(SIZES.1),
        long in 512usize..CONTEXT,
        mut cuts in prop::collection::vec(1usize..CONTEXT, 0..4),
    ) {
        // one long enough that its last row is computed in parts
        let case = Case { lengths: vec![case.lengths[0], long], ..case };
        cuts.push(long - 1);
        cuts.sort_unstable();
        cuts.dedup();
        compare_on_cuda(&Arc::new(Emulated::default()), &case, &case.cut_at(&cuts))?;
    }
}

#[cfg(feature = "cuda")]
proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    #[ignore = "needs a GPU: benches/gpu/run.sh runs it"]
    fn attention_on_a_gpu_is_close_to_the_reference(
        case in Case::strategy(SIZES.1),
        mut cuts in prop::collection::vec(1usize..CONTEXT, 0..6),
    ) {
        cuts.sort_unstable();
        cuts.dedup();
        compare_on_cuda(&crate::kernels::cuda::driver::Gpu::open(0).unwrap(), &case, &case.cut_at(&cuts))?;
    }
}

fn compare_on_cuda<D: Device>(device: &Arc<D>, case: &Case, steps: &[Step]) -> Result<(), TestCaseError> {
    let expected = case.run(Reference, steps);
    for is_invariant in [false, true] {
        let found = case.run(Cuda::new(device.clone(), is_invariant), steps);
        let error = error(&found, &expected);
        let tolerance = if case.dtype == KvDtype::F16 { 6e-3 } else { 3e-2 };
        prop_assert!(error < tolerance, "{} on {}: relative error {error}", case.dtype.name(), device.class());
        if is_invariant {
            let at_once = case.run(Cuda::new(device.clone(), true), &case.at_once());
            prop_assert!(bits(&found) == bits(&at_once), "{}: other bits when cut", case.dtype.name());
        }
    }
    Ok(())
}

proptest! {
    // portable forms of fused products are slow where the machine's own are not used
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Law: a row gives the same bits however its sequence is cut, beside whatever others, on any number of threads and on every
    /// instruction set.
    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn a_row_is_the_same_bits_however_it_is_computed(
        case in Case::strategy(600),
        long in 512usize..CONTEXT,
        mut cuts in prop::collection::vec(1usize..CONTEXT, 0..8),
        threads in 1usize..5,
    ) {
        // one long enough that its last rows are shared out among threads
        let case = Case { lengths: vec![case.lengths[0], long], ..case };
        cuts.extend([long - 1, long - 3]);
        cuts.sort_unstable();
        cuts.dedup();
        let expected = bits(&case.run(Cpu::new(1), &case.at_once()));
        for isa in Isa::all_here() {
            let threads = if isa == Isa::Portable { 2 } else { threads };
            let found = bits(&case.run(Cpu::with_isa(threads, isa), &case.cut_at(&cuts)));
            prop_assert!(found == expected, "{} on {threads} threads", isa.name());
        }
    }
}

/// What a row does not see never reaches it, not even as zero times infinity.
#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn what_a_row_does_not_see_may_be_anything() {
    let heads = Heads { query: 6, kv: 2, dim: 32 };
    let rope = Rope::new(CONTEXT, &[1.0], 1.0, true);
    for (dtype, window) in [(KvDtype::F16, None), (KvDtype::Bf16, Some(20)), (KvDtype::Int8, Some(150))] {
        let shape = CacheShape { layers: 1, blocks: CONTEXT / BLOCK_TOKENS, heads, dtype };
        let view = View { scale: 0.2, window };
        let row = |seed: f32, i: usize| (i as f32 * 0.37 + seed).sin();
        let rows = |from: usize, count: usize| {
            let values = (from..from + count).flat_map(|r| (0..heads.qkv_width()).map(move |i| row(r as f32, i)));
            Rows { width: heads.qkv_width(), values: values.collect() }
        };
        let blocks: Vec<u32> = (0..shape.blocks as u32).collect();
        let answer = |is_poisoned: bool| {
            let mut cpu = Cpu::new(2);
            let (mut cache, mut out) = (cpu.cache(shape), cpu.rows(0, 0));
            if is_poisoned {
                let mut batch = Batch::default();
                batch.push(&[0; CONTEXT], 0, &blocks);
                let mut nothing = rows(0, CONTEXT);
                nothing.values.fill(f32::NAN);
                cpu.rope_write(&mut nothing, None, &rope, &batch, 0, &mut cache);
            }
            let mut answers = Vec::new();
            for (start, count) in [(0, 137), (137, 1), (138, 30)] {
                let (mut batch, mut qkv) = (Batch::default(), rows(start, count));
                batch.push(&vec![0; count], start, &blocks);
                cpu.rope_write(&mut qkv, None, &rope, &batch, 0, &mut cache);
                cpu.attention(&qkv, view, &batch, 0, &cache, &mut out);
                answers.extend(bits(cpu.read(&mut out)));
            }
            answers
        };
        assert!(answer(true) == answer(false), "{}", dtype.name());
        assert!(answer(true).iter().all(|x| f32::from_bits(*x).is_finite()));
    }
}

#[test]
fn a_block_takes_what_its_type_says() {
    let heads = Heads { query: 9, kv: 3, dim: 64 };
    let bytes = |dtype| Cpu::block_bytes(CacheShape { layers: 30, blocks: 1, heads, dtype });
    let values = 30 * 3 * 2 * 64 * BLOCK_TOKENS;
    assert_eq!(bytes(KvDtype::F16), 2 * values);
    assert_eq!(bytes(KvDtype::Bf16), 2 * values);
    assert_eq!(bytes(KvDtype::Int8), values + 30 * 3 * 2 * 4 * BLOCK_TOKENS);
}
