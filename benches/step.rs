//! One engine step of the default model: how decode grows with the batch, and what a prompt costs.
//!
//! Needs the default model on this machine (`tidegate model pull smollm2-135m`); says so and measures nothing without it.

use std::{hint::black_box, path::PathBuf};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tidegate_node::{
    batch::Batch,
    kernels::cpu::Cpu,
    kv::BLOCK_TOKENS,
    model::{self, Capacity, Model},
    models::{ModelRef, Store},
    weights::Checkpoint,
};

/// Positions that each decoding sequence has behind it.
const BEHIND: usize = 128;

const CAPACITY: Capacity = Capacity { batch_tokens_max: 512, context: 1024, blocks: 64 * 32 };

fn default_model() -> Option<PathBuf> {
    let reference: ModelRef = "smollm2-135m".parse().ok()?;
    Store::open(&Store::default_data_dir().ok()?).locate(&reference).ok()
}

/// `sequences` sequences, each with `tokens` tokens to compute from position `start` on.
fn batch(sequences: usize, start: usize, tokens: usize) -> Batch {
    let blocks_each = (start + tokens).div_ceil(BLOCK_TOKENS) as u32;
    let mut batch = Batch::default();
    for i in 0..sequences as u32 {
        let blocks: Vec<u32> = (i * blocks_each..(i + 1) * blocks_each).collect();
        let ids: Vec<u32> = (0..tokens as u32).map(|t| 100 + t * 7 + i).collect();
        batch.push(&ids, start, &blocks);
        batch.logit_rows.push(batch.tokens.len() as u32 - 1);
    }
    batch
}

fn steps(c: &mut Criterion) {
    let Some(path) = default_model() else {
        eprintln!("skipped: the default model is not here; run `tidegate model pull smollm2-135m`");
        return;
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let checkpoint = Checkpoint::open(&path).expect("the default model can be opened");
    let mut model = model::load(&checkpoint, Cpu::new(threads), CAPACITY).expect("the default model can be loaded");
    let mut group = c.benchmark_group("step");
    group.sample_size(20);
    for sequences in [1, 2, 4, 8, 16, 32] {
        measure(&mut group, &mut *model, "decode", sequences, &batch(sequences, BEHIND, 1));
    }
    for tokens in [16, 128, 512] {
        measure(&mut group, &mut *model, "prefill", tokens, &batch(1, 0, tokens));
    }
    group.finish();
}

fn measure(
    group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>,
    model: &mut dyn Model,
    name: &str,
    size: usize,
    batch: &Batch,
) {
    group.throughput(Throughput::Elements(batch.tokens.len() as u64));
    group.bench_function(BenchmarkId::new(name, size), |b| {
        b.iter(|| black_box(model.forward(batch, &|| {}).logits).len())
    });
}

criterion_group!(benches, steps);
criterion_main!(benches);
