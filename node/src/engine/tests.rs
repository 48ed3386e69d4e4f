//! The engine thread over tiny random models: the same answer whatever shares the batch, is preempted or resumed, and blocks come back.

use std::sync::LazyLock;

use candle_core::quantized::GgmlDType;
use tokio::runtime::{Builder, Runtime};

use super::*;
use crate::{
    kernels::{KvDtype, cpu::Cpu},
    model::{self, Architecture, Capacity, Output, tiny},
    sample::Penalties,
};

const LIMITS: Limits = Limits { batch_size_max: 8, batch_tokens_max: 24 };

fn engine(blocks: usize, queue_max: usize) -> Engine {
    engine_of(Architecture::Llama, blocks, queue_max, LIMITS.batch_tokens_max, 1)
}

fn engine_of(arch: Architecture, blocks: usize, queue_max: usize, batch_tokens_max: usize, threads: usize) -> Engine {
    speculating(Speculation::Off, arch, blocks, queue_max, batch_tokens_max, threads)
}

fn speculating(
    speculation: Speculation,
    arch: Architecture,
    blocks: usize,
    queue_max: usize,
    batch_tokens_max: usize,
    threads: usize,
) -> Engine {
    let limits = Limits { batch_tokens_max, ..LIMITS };
    let config = EngineConfig { limits, queue_max, queue_max_tenant: queue_max, blocks, speculation };
    start(tiny(arch, 3, blocks, batch_tokens_max, threads), None, config)
}

/// Starts an engine whose tokens are handed out on another thread.
fn start(model: Box<dyn Model>, draft: Option<Draft>, config: EngineConfig) -> Engine {
    static RUNTIME: LazyLock<Runtime> =
        LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).build().unwrap());
    let _within = RUNTIME.enter();
    Engine::start(model, draft, config).0
}

fn tiny(arch: Architecture, seed: u64, blocks: usize, batch_tokens_max: usize, threads: usize) -> Box<dyn Model> {
    let capacity = Capacity { batch_tokens_max, context: 128, blocks, kv_dtype: KvDtype::F16 };
    model::load(&tiny::model(arch, seed, GgmlDType::Q4_1), Cpu::new(threads), capacity).unwrap()
}

fn generation(i: u32, had: &[u32], tokens_max: usize) -> Generation {
    let prompt: Vec<u32> = (0..5 + i * 7 % 30).map(|k| (k * 11 + i * 5) % 64).collect();
    let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.9 };
    Generation {
        prompt_len: prompt.len(),
        tokens: [prompt.as_slice(), had].concat(),
        choice: i % 3,
        sampling: Sampling {
            temperature,
            top_p: 0.95,
            penalties: if i.is_multiple_of(3) {
                Penalties { presence: 0.3, frequency: 0.2, repetition: 1.1 }
            } else {
                Penalties::default()
            },
            bias: if i.is_multiple_of(4) { [(i, 2.0), (7, -100.0)].into() } else { [].into() },
            ..Sampling::greedy(42 + u64::from(i))
        },
        stop: StopRule { end_tokens: [].into(), tokens_max },
        guide: None,
        logprobs: Some(3),
        is_moved: false,
        wants: Wants::default(),
    }
}

/// Tokens and their log-probabilities, which are compared to the bit.
fn read_all(mut tokens: Tokens) -> Vec<Event> {
    let mut all = Vec::new();
    while let Some(event) = tokens.events.blocking_recv() {
        let is_last = event.finish.is_some();
        all.push(event);
        if is_last {
            break;
        }
    }
    all
}

fn read(tokens: Tokens) -> Vec<u32> {
    read_all(tokens).into_iter().map(|event| event.token).collect()
}

fn run(engine: &Engine, generation: Generation) -> Vec<Event> {
    read_all(engine.submit(&Owner::default(), vec![generation]).unwrap().remove(0))
}

fn alone(i: u32) -> Vec<u32> {
    run(&engine(64, 0), generation(i, &[], 40)).into_iter().map(|event| event.token).collect()
}

#[test]
fn company_chunks_threads_preemption_and_a_warm_cache_change_no_token_and_no_logprob() {
    Architecture::ALL.into_iter().for_each(nothing_changes_a_token_of);
}

fn nothing_changes_a_token_of(arch: Architecture) {
    let alone = engine_of(arch, 64, 0, LIMITS.batch_tokens_max, 1);
    let expected: Vec<Vec<Event>> = (0..12).map(|i| run(&alone, generation(i, &[], 40))).collect();
    // 14 blocks hold about three of twelve sequences: the others wait, and some are preempted
    for (batch_tokens_max, threads) in [(24, 1), (9, 2), (64, 2)] {
        let crowded = engine_of(arch, 14, 16, batch_tokens_max, threads);
        for _ in 0..2 {
            let running = crowded.submit(&Owner::default(), (0..12).map(|i| generation(i, &[], 40)).collect()).unwrap();
            let found: Vec<Vec<Event>> = running.into_iter().map(read_all).collect();
            assert_eq!(found, expected, "{arch:?}: {batch_tokens_max} tokens a step, {threads} threads");
        }
        use std::sync::atomic::Ordering::Relaxed;
        let stats = crowded.stats();
        assert!(stats.preemptions.load(Relaxed) > 0, "the pool was meant to be too small");
        assert!(stats.prompt_tokens_cached.load(Relaxed) > 0, "the second round was meant to find its prompts");
    }
}

/// Prompts and answers that repeat themselves, so that there is much to guess, right and wrong.
fn repetitive(i: u32, had: &[u32], tokens_max: usize) -> Generation {
    let mut repetitive = generation(i, had, tokens_max);
    let prompt: Vec<u32> = (0..24 + i).map(|k| 3 + k % (4 + i % 3)).collect();
    repetitive.prompt_len = prompt.len();
    repetitive.tokens = [prompt.as_slice(), had].concat();
    // a few tokens far above the others, so that a seeded answer has them again and again
    repetitive.sampling.bias = (0..5).map(|k| (3 + k, 4.0)).collect();
    // some end in the middle of what was guessed
    repetitive.stop.end_tokens = if i.is_multiple_of(5) { [4].into() } else { [].into() };
    repetitive
}

#[test]
fn speculation_changes_no_token_and_no_logprob() {
    Architecture::ALL.into_iter().for_each(speculation_changes_nothing_of);
}

fn speculation_changes_nothing_of(arch: Architecture) {
    use std::sync::atomic::Ordering::Relaxed;
    let off = engine_of(arch, 64, 0, LIMITS.batch_tokens_max, 1);
    let all = || (0..12).map(|i| if i < 9 { repetitive(i, &[], 50) } else { generation(i, &[], 40) });
    let expected: Vec<Vec<Event>> = all().map(|generation| run(&off, generation)).collect();
    assert_eq!(off.stats().speculated_tokens.load(Relaxed), 0);
    // alone with room for every guess, crowded with little budget, and with a pool so small that some are preempted
    for (blocks, batch_tokens_max, threads) in [(200, 64, 1), (64, 12, 2), (14, 24, 2)] {
        let how = format!("{arch:?}: {blocks} blocks, {batch_tokens_max} tokens a step, {threads} threads");
        for speculation in [Speculation::Always, Speculation::Auto] {
            let on = speculating(speculation, arch, blocks, 16, batch_tokens_max, threads);
            let running = on.submit(&Owner::default(), all().collect()).unwrap();
            let found: Vec<Vec<Event>> = running.into_iter().map(read_all).collect();
            assert_eq!(found, expected, "{how}, {speculation:?}");
            // taken up in the middle, as after the loss of another node
            let rest = run(&on, repetitive(1, &expected[1].iter().map(|e| e.token).take(20).collect::<Vec<_>>(), 50));
            assert_eq!(rest, expected[1][20..], "{how}, {speculation:?}");
            let (guessed, right) =
                (on.stats().speculated_tokens.load(Relaxed), on.stats().accepted_tokens.load(Relaxed));
            assert!(right <= guessed);
            assert!(speculation == Speculation::Auto || (0 < right && right < guessed), "{right} of {guessed}: {how}");
            until_free(on.stats());
        }
    }
}

/// Steps that twelve answers took, which are those without a draft model; of the draft, `seed` makes its weights.
fn steps_with_a_draft(seed: u64, (blocks, drafted_blocks): (usize, usize), batch_tokens_max: usize) -> u64 {
    use std::sync::atomic::Ordering::Relaxed;
    let off = engine(64, 0);
    let all = || (0..12).map(|i| if i < 4 { repetitive(i, &[], 50) } else { generation(i, &[], 40) });
    let expected: Vec<Vec<Event>> = all().map(|generation| run(&off, generation)).collect();
    let limits = Limits { batch_tokens_max, ..LIMITS };
    let mut steps = 0;
    for speculation in [Speculation::Auto, Speculation::Always] {
        // its pool is so small that sequences drive each other out, and some do not fit at all
        let capacity = Capacity { batch_tokens_max: 16, context: 64, blocks: drafted_blocks, kv_dtype: KvDtype::F16 };
        let draft = Draft { model: tiny(Architecture::Llama, seed, drafted_blocks, 16, 1), capacity };
        let config = EngineConfig { limits, queue_max: 16, queue_max_tenant: 16, blocks, speculation };
        let on = start(tiny(Architecture::Llama, 3, blocks, batch_tokens_max, 2), Some(draft), config);
        let running = on.submit(&Owner::default(), all().collect()).unwrap();
        let found: Vec<Vec<Event>> = running.into_iter().map(read_all).collect();
        assert_eq!(found, expected, "{blocks} blocks, {drafted_blocks} of the draft, {speculation:?}");
        until_free(on.stats());
        steps = on.stats().steps.load(Relaxed);
    }
    steps
}

#[test]
fn a_draft_model_changes_no_answer_whatever_it_is_worth() {
    // a draft that is the model itself is always right
    let (own, other) = (steps_with_a_draft(3, (200, 200), 64), steps_with_a_draft(4, (200, 200), 64));
    assert!(own < other, "{own} steps with a draft that is right, {other} with one that is not");
    steps_with_a_draft(3, (14, 6), 24);
    steps_with_a_draft(4, (64, 3), 12);
}

fn until_free(stats: &Stats) {
    use std::sync::atomic::Ordering::Relaxed;
    while stats.blocks_free.load(Relaxed) < stats.blocks_total {
        std::thread::yield_now();
    }
}

#[test]
fn an_answer_that_repeats_itself_takes_fewer_steps() {
    use std::sync::atomic::Ordering::Relaxed;
    let steps = |speculation| {
        let engine = speculating(speculation, Architecture::Llama, 64, 0, 64, 1);
        let greedy = Generation { sampling: Sampling::greedy(0), ..repetitive(1, &[], 80) };
        let answer = run(&engine, greedy);
        // what is counted after the last token is counted by then
        until_free(engine.stats());
        (answer.len(), engine.stats().generated_tokens.load(Relaxed), engine.stats().steps.load(Relaxed))
    };
    let (off, on) = (steps(Speculation::Off), steps(Speculation::Always));
    assert_eq!(((off.0, off.1), off.2), ((80, 80), 80));
    assert_eq!((on.0, on.1), (80, 80));
    assert!(on.2 < 60, "{} steps", on.2);
}

/// The prompt of `i`, its log-probabilities, and its vector; nothing is generated.
fn measure(engine: &Engine, i: u32, pooling: Pooling) -> (Vec<u32>, Vec<Logprobs>, Vec<f32>) {
    let ((scores, scored), (vectors, vector)) = (oneshot::channel(), oneshot::channel());
    let wants = Wants { prompt_logprobs: Some((2, scores)), embedding: Some((pooling, vectors)) };
    let generation = Generation { wants, ..generation(i, &[], 0) };
    let prompt = generation.tokens.clone();
    let tokens = engine.submit(&Owner::default(), vec![generation]).unwrap().remove(0);
    let measured = (prompt, scored.blocking_recv().unwrap(), vector.blocking_recv().unwrap());
    assert_eq!(read_all(tokens), []);
    measured
}

#[test]
fn what_is_measured_of_a_prompt_does_not_depend_on_steps_or_company() {
    let crowded = engine_of(Architecture::Llama, 14, 16, 9, 2);
    for pooling in [Pooling::Mean, Pooling::Last] {
        for i in [1, 4, 10] {
            let expected = measure(&engine(64, 0), i, pooling);
            assert_eq!(expected.1.len() + 1, expected.0.len(), "one for each token after the first");
            let beside = crowded.submit(&Owner::default(), (0..10).map(|i| generation(i, &[], 40)).collect()).unwrap();
            // twice, so that the prompt's blocks are there the second time
            for _ in 0..2 {
                assert_eq!(measure(&crowded, i, pooling), expected);
            }
            drop(beside);
        }
    }
}

#[test]
fn the_logprobs_of_an_answer_are_those_of_the_same_tokens_as_a_prompt() {
    let engine = engine(64, 0);
    let mut asked = generation(1, &[], 30);
    asked.sampling.temperature = 0.9;
    let prompt = asked.tokens.clone();
    let answer = run(&engine, asked);
    let (scores, scored) = oneshot::channel();
    let tokens: Vec<u32> = prompt.iter().copied().chain(answer.iter().map(|event| event.token)).collect();
    let wants = Wants { prompt_logprobs: Some((3, scores)), embedding: None };
    let whole = Generation { prompt_len: tokens.len(), tokens, wants, ..generation(1, &[], 0) };
    let _reader = engine.submit(&Owner::default(), vec![whole]).unwrap();
    let scored = scored.blocking_recv().unwrap();
    let found: Vec<Logprobs> = answer.into_iter().map(|event| *event.logprobs.unwrap()).collect();
    assert_eq!(scored[prompt.len() - 1..], found);
}

#[test]
fn a_sequence_taken_up_from_its_tokens_goes_on_the_same() {
    for i in 0..4 {
        let whole = alone(i);
        for had in [1, 17, 39] {
            let rest = read(
                engine(64, 0).submit(&Owner::default(), vec![generation(i, &whole[..had], 40)]).unwrap().remove(0),
            );
            assert_eq!(rest, whole[had..]);
        }
    }
}

#[test]
fn over_the_queue_is_refused_whole_and_a_reader_that_leaves_makes_room() {
    let engine = engine(64, 1);
    let long = || generation(1, &[], 90);
    let first = engine.submit(&Owner::default(), (0..9).map(|_| long()).collect()).unwrap();
    assert!(matches!(engine.submit(&Owner::default(), vec![long()]), Err(Refused::Full)));
    let moved = Generation { is_moved: true, ..generation(2, &[3, 1], 5) };
    let moved = engine.submit(&Owner::default(), vec![moved]).expect("a lost node's sequence has a place of its own");
    drop(first);
    assert_eq!(moved.into_iter().map(read).map(|rest| rest.len()).collect::<Vec<_>>(), [3]);
    let stats = engine.stats();
    // what has left is swept out by the next step
    let mut taken = loop {
        match engine.submit(&Owner::default(), vec![generation(2, &[], 5)]) {
            Err(Refused::Full) => std::thread::yield_now(),
            settled => break settled.unwrap(),
        }
    };
    let answer = read(taken.remove(0));
    assert_eq!(answer.len(), 5);
    until_free(stats);
}

/// A model that fails on one token, and otherwise likes token 1 best.
struct Poisoned;

impl Model for Poisoned {
    fn forward(&mut self, batch: &crate::batch::Batch, _: &dyn Fn()) -> Output<'_> {
        assert!(!batch.tokens.contains(&63), "the poison");
        Output { logits: &[0.0, 1.0][..2 * batch.logit_rows.len()], tokens: &[], hidden: &[] }
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
    let config =
        EngineConfig { limits, queue_max: 4, queue_max_tenant: 4, blocks: 16, speculation: Speculation::Always };
    let engine = start(Box::new(Poisoned), None, config);
    let prompt = |token: u32| Generation {
        tokens: vec![token; 3],
        prompt_len: 3,
        sampling: Sampling::greedy(0),
        logprobs: None,
        ..generation(0, &[], 4)
    };
    let running = engine.submit(&Owner::default(), vec![prompt(63), prompt(5)]).unwrap();
    let answers: Vec<Vec<u32>> = running.into_iter().map(read).collect();
    assert_eq!(answers, [vec![], vec![1; 4]]);
    assert_eq!(engine.open(), 0);
}
