//! The engine thread over tiny random models: the same answer whatever shares the batch, is preempted or resumed, and blocks come back.

use candle_core::quantized::GgmlDType;

use super::*;
use crate::{
    kernels::cpu::Cpu,
    model::{self, Capacity, Output, tiny},
};

const LIMITS: Limits = Limits { batch_size_max: 8, batch_tokens_max: 24 };

fn engine(blocks: usize, queue_max: usize) -> Engine {
    let capacity = Capacity { batch_tokens_max: LIMITS.batch_tokens_max, context: 128, blocks };
    let model = model::load(&tiny::llama(3, GgmlDType::Q4_1), Cpu::new(1), capacity).unwrap();
    Engine::start(model, EngineConfig { limits: LIMITS, queue_max, blocks }).0
}

fn generation(i: u32, had: &[u32], tokens_max: usize) -> Generation {
    let prompt: Vec<u32> = (0..5 + i * 7 % 30).map(|k| (k * 11 + i * 5) % 64).collect();
    let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.9 };
    Generation {
        prompt_len: prompt.len(),
        tokens: [prompt.as_slice(), had].concat(),
        choice: i % 3,
        sampling: Sampling { temperature, top_p: 0.95, ..Sampling::greedy(42 + u64::from(i)) },
        stop: StopRule { end_tokens: [].into(), tokens_max },
        guide: None,
        logprobs: None,
        wants: Wants::default(),
    }
}

fn read(mut tokens: Tokens) -> Vec<u32> {
    let mut all = Vec::new();
    while let Some(event) = tokens.events.blocking_recv() {
        all.push(event.token);
        if event.finish.is_some() {
            break;
        }
    }
    all
}

fn alone(i: u32) -> Vec<u32> {
    read(engine(64, 0).submit(vec![generation(i, &[], 40)]).unwrap().remove(0))
}

#[test]
fn company_preemption_and_a_warm_cache_change_no_token() {
    let expected: Vec<Vec<u32>> = (0..12).map(alone).collect();
    // 14 blocks hold about three of twelve sequences: the others wait, and some are preempted
    let crowded = engine(14, 16);
    for _ in 0..2 {
        let running = crowded.submit((0..12).map(|i| generation(i, &[], 40)).collect()).unwrap();
        let found: Vec<Vec<u32>> = running.into_iter().map(read).collect();
        assert_eq!(found, expected);
    }
    use std::sync::atomic::Ordering::Relaxed;
    assert!(crowded.stats().preemptions.load(Relaxed) > 0, "the pool was meant to be too small");
    assert!(crowded.stats().prompt_tokens_cached.load(Relaxed) > 0, "the second round was meant to find its prompts");
}

#[test]
fn a_sequence_taken_up_from_its_tokens_goes_on_the_same() {
    for i in 0..4 {
        let whole = alone(i);
        for had in [1, 17, 39] {
            let rest = read(engine(64, 0).submit(vec![generation(i, &whole[..had], 40)]).unwrap().remove(0));
            assert_eq!(rest, whole[had..]);
        }
    }
}

#[test]
fn over_the_queue_is_refused_whole_and_a_reader_that_leaves_makes_room() {
    let engine = engine(64, 1);
    let long = || generation(1, &[], 90);
    let first = engine.submit((0..9).map(|_| long()).collect()).unwrap();
    assert!(matches!(engine.submit(vec![long()]), Err(Refused::Full)));
    drop(first);
    let stats = engine.stats();
    // what has left is swept out by the next step
    let mut taken = loop {
        match engine.submit(vec![generation(2, &[], 5)]) {
            Err(Refused::Full) => std::thread::yield_now(),
            settled => break settled.unwrap(),
        }
    };
    let answer = read(taken.remove(0));
    assert_eq!(answer.len(), 5);
    while stats.blocks_free.load(std::sync::atomic::Ordering::Relaxed) < stats.blocks_total {
        std::thread::yield_now();
    }
}

/// A model that fails on one token, and otherwise likes token 1 best.
struct Poisoned;

impl Model for Poisoned {
    fn forward(&mut self, batch: &crate::batch::Batch, _: &dyn Fn()) -> Output<'_> {
        assert!(!batch.tokens.contains(&63), "the poison");
        Output { logits: &[0.0, 1.0][..2 * batch.logit_rows.len()], hidden: &[] }
    }

    fn vocab(&self) -> usize {
        2
    }

    fn width(&self) -> usize {
        1
    }

    fn device_class(&self) -> String {
        "test".into()
    }
}

#[test]
fn a_step_that_panics_ends_its_sequences_and_the_engine_lives() {
    let limits = Limits { batch_size_max: 1, batch_tokens_max: 24 };
    let (engine, _) = Engine::start(Box::new(Poisoned), EngineConfig { limits, queue_max: 4, blocks: 16 });
    let prompt = |token: u32| Generation { tokens: vec![token; 3], prompt_len: 3, ..generation(0, &[], 4) };
    let running = engine.submit(vec![prompt(63), prompt(5)]).unwrap();
    let answers: Vec<Vec<u32>> = running.into_iter().map(read).collect();
    assert_eq!(answers, [vec![], vec![1; 4]]);
    assert_eq!(engine.open(), 0);
}
