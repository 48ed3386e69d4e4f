//! The engine's speed without scheduler, sampling and HTTP: whole forward passes of one model, and how near they come to what the
//! machine can do at most.
//!
//! Timed is what llama.cpp times, so that `benches/compare/cpu.py` can set the two side by side:
//! - prefill (`llama-bench -p N`): one step of `N` tokens of one sequence from position 0; the head for the last token only.
//! - decode (`llama-batched-bench -npp BEHIND -ntg TOKENS -npl B`): `TOKENS` steps of `B` rows, each row the next token of a sequence of
//!   its own with `BEHIND` positions behind it at the start; the head for every row.
//!
//! Tokens are arbitrary, keys and values are in f16, nothing is sampled, and loading is not counted.
#![allow(clippy::print_stdout, reason = "a program that prints what it measured")]

mod limits;

use std::{error::Error, hint::black_box, process::ExitCode, time::Instant};

use clap::Parser;
use serde_json::{Value, json};
#[cfg(feature = "cuda")]
use tidegate_node::kernels::cuda::{Cuda, driver::Gpu};
use tidegate_node::{
    batch::Batch,
    kernels::{KvDtype, cpu::Cpu},
    kv::BLOCK_TOKENS,
    model::{self, Capacity, Model},
    models::{ModelRef, Store},
    weights::Checkpoint,
};

/// Tokens per second of whole forward passes, and the share of the machine's limits that they reach.
#[derive(Debug, Parser)]
struct Args {
    /// A model of `tidegate model list`, or the path of a GGUF file
    #[arg(long, default_value = "smollm2-135m")]
    model: ModelRef,
    /// Cores to compute on [default: all]
    #[arg(long)]
    threads: Option<usize>,
    /// The GPU to compute on, as the driver counts them, instead of cores
    #[cfg(feature = "cuda")]
    #[arg(long)]
    gpu: Option<usize>,
    /// On a GPU: compute every row as if it were alone
    #[cfg(feature = "cuda")]
    #[arg(long)]
    batch_invariant: bool,
    /// Lengths of prompts, each computed in one step
    #[arg(long, value_delimiter = ',', default_value = "16,128,512", value_parser = clap::value_parser!(u32).range(1..))]
    prefill: Vec<u32>,
    /// Numbers of sequences that decode together
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32", value_parser = clap::value_parser!(u32).range(1..))]
    decode: Vec<u32>,
    /// Positions that each decoding sequence has behind it
    #[arg(long, default_value_t = 128)]
    behind: usize,
    /// Tokens that each sequence decodes
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// How often each is measured, after once unmeasured
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Print JSON: every single measurement
    #[arg(long)]
    json: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the machine allows at most for this model, in tokens per second.
struct Limits {
    /// Bytes per second that all threads read from memory of the weights' size.
    read: f64,
    /// Bytes of weights that one step reads: all but an embedding that is not the head too.
    step_bytes: usize,
    /// int8 products per second of all threads; none where the machine has no instruction that we measure.
    int8: Option<f64>,
    /// Products of a token with all matrices of all layers; none for mixtures, where they depend on the router.
    token_macs: Option<usize>,
    /// Products of a row with the head.
    head_macs: usize,
}

impl Limits {
    /// Those of cores.
    fn measure(file: &Checkpoint, threads: usize) -> Self {
        Self::of(file, limits::read_bytes_per_s(threads, step_bytes(file)), limits::int8_macs_per_s(threads))
    }

    fn of(file: &Checkpoint, read: f64, int8: Option<f64>) -> Self {
        let cells = |name: &str| file.dims(name).map_or(0, |dims| dims.iter().product());
        let head = if file.has(HEAD) { HEAD } else { EMBEDDING };
        Self { read, step_bytes: step_bytes(file), int8, token_macs: layers_macs(file), head_macs: cells(head) }
    }

    /// One sequence can decode no faster than its weights come from memory.
    fn decode_alone(&self) -> f64 {
        self.read / self.step_bytes as f64
    }

    /// A prompt of `tokens` can be computed no faster than its int8 products; attention's, which are not int8, are left out.
    fn prefill(&self, tokens: u32) -> Option<f64> {
        let macs = self.token_macs? as f64 + self.head_macs as f64 / f64::from(tokens);
        Some(self.int8? / macs)
    }

    fn json(&self) -> Value {
        json!({
            "read_bytes_per_s": self.read, "step_bytes": self.step_bytes, "int8_macs_per_s": self.int8,
            "token_macs": self.token_macs, "head_macs": self.head_macs,
        })
    }
}

const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

/// Bytes of weights that one step reads.
fn step_bytes(file: &Checkpoint) -> usize {
    file.sizes().stored - untied_embedding_bytes(file)
}

/// Of an embedding that is not the head too, a step reads single rows.
fn untied_embedding_bytes(file: &Checkpoint) -> usize {
    let bytes = || file.weight(EMBEDDING).map_or(0, |embedding| embedding.rows() * embedding.row_bytes(0).len());
    if file.has(HEAD) { bytes() } else { 0 }
}

fn layers_macs(file: &Checkpoint) -> Option<usize> {
    let of_layers = file.names().filter(|name| name.starts_with("blk.")).filter_map(|name| file.dims(name));
    of_layers.map(|dims| if dims.len() > 2 { None } else { Some(macs(dims)) }).sum()
}

/// A vector is added or scales; only a matrix multiplies.
fn macs(dims: &[usize]) -> usize {
    if dims.len() < 2 { 0 } else { dims.iter().product() }
}

/// Tokens per second, one figure for each repeat.
struct Rates {
    size: u32,
    rates: Vec<f64>,
}

impl Rates {
    fn median(&self) -> f64 {
        let mut sorted = self.rates.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }
}

struct Bench {
    model: Box<dyn Model>,
    args: Args,
}

impl Bench {
    fn prefill(&mut self, tokens: u32) -> Rates {
        let step = [self.step(1, 0, tokens as usize)];
        Rates { size: tokens, rates: self.time(&step, f64::from(tokens)) }
    }

    fn decode(&mut self, sequences: u32) -> Rates {
        let (behind, tokens) = (self.args.behind, self.args.tokens);
        for i in 0..sequences {
            let mut prompt = Batch::default();
            self.push(&mut prompt, i, 0, behind);
            self.model.forward(&prompt, &|| {});
        }
        let steps: Vec<Batch> = (behind..behind + tokens).map(|at| self.step(sequences, at, 1)).collect();
        Rates { size: sequences, rates: self.time(&steps, f64::from(sequences) * tokens as f64) }
    }

    /// `sequences` sequences, each with `tokens` tokens to compute from position `start` on, and the head for the last of them.
    fn step(&self, sequences: u32, start: usize, tokens: usize) -> Batch {
        let mut batch = Batch::default();
        for i in 0..sequences {
            self.push(&mut batch, i, start, tokens);
            batch.logit_rows.push(batch.tokens.len() as u32 - 1);
        }
        batch
    }

    fn push(&self, batch: &mut Batch, sequence: u32, start: usize, tokens: usize) {
        let blocks_each = blocks_each(&self.args);
        let blocks: Vec<u32> = (sequence * blocks_each..(sequence + 1) * blocks_each).collect();
        let token = |position: usize| ((position * 7919 + sequence as usize * 104_729) % self.model.vocab()) as u32;
        let ids: Vec<u32> = (start..start + tokens).map(token).collect();
        batch.push(&ids, start, &blocks);
    }

    /// Runs `steps` once unmeasured, then for each repeat.
    fn time(&mut self, steps: &[Batch], tokens: f64) -> Vec<f64> {
        let mut run = || {
            let began = Instant::now();
            for step in steps {
                black_box(self.model.forward(step, &|| {}).logits);
            }
            tokens / began.elapsed().as_secs_f64()
        };
        run();
        (0..self.args.repeats.max(1)).map(|_| run()).collect()
    }
}

fn longest(args: &Args) -> usize {
    let prompt = args.prefill.iter().copied().max().unwrap_or(0) as usize;
    prompt.max(args.behind + args.tokens)
}

fn blocks_each(args: &Args) -> u32 {
    longest(args).div_ceil(BLOCK_TOKENS) as u32
}

fn capacity(args: &Args) -> Capacity {
    let sequences = args.decode.iter().copied().max().unwrap_or(1);
    Capacity {
        batch_tokens_max: longest(args).max(sequences as usize),
        context: longest(args),
        blocks: (sequences * blocks_each(args)) as usize,
        kv_dtype: KvDtype::F16,
    }
}

fn print(prefill: &[Rates], decode: &[Rates], limits: &Limits) {
    let row = |name: &str, rates: &Rates, limit: Option<f64>| {
        let (rate, size) = (rates.median(), rates.size);
        let share = limit.map_or(String::new(), |limit| format!("  {:.0} % of {limit:.0}", 100.0 * rate / limit));
        println!("{name:<8} {size:>5} {rate:>10.1} tokens/s{share}");
    };
    prefill.iter().for_each(|rates| row("prefill", rates, limits.prefill(rates.size)));
    decode.iter().for_each(|rates| row("decode", rates, (rates.size == 1).then(|| limits.decode_alone())));
    let int8 = limits.int8.map_or("not measured here".to_owned(), |rate| format!("{:.0} GMAC/s", rate / 1e9));
    println!("limits   memory {:.1} GB/s for {} bytes a step, int8 {int8}", limits.read / 1e9, limits.step_bytes);
}

fn json(prefill: &[Rates], decode: &[Rates], limits: &Limits, model: &dyn Model, threads: usize) -> Value {
    let list =
        |all: &[Rates]| all.iter().map(|r| (r.size.to_string(), json!(r.rates))).collect::<serde_json::Map<_, _>>();
    json!({
        "threads": threads, "device_class": model.device_class(), "prefill": list(prefill), "decode": list(decode),
        "limits": limits.json(),
    })
}

/// The model on what is asked for, and the limits of that.
fn load(file: &Checkpoint, args: &Args, threads: usize) -> Result<(Box<dyn Model>, Limits), Box<dyn Error>> {
    #[cfg(feature = "cuda")]
    if let Some(index) = args.gpu {
        let gpu = Gpu::open(index)?;
        let limits = Limits::of(file, gpu.copied_bytes_per_s()?, None);
        return Ok((model::load(file, Cuda::new(gpu, args.batch_invariant), capacity(args))?, limits));
    }
    Ok((model::load(file, Cpu::new(threads), capacity(args))?, Limits::measure(file, threads)))
}

fn run(args: Args) -> Result<(), Box<dyn Error>> {
    let path = Store::open(&Store::default_data_dir()?).locate(&args.model)?;
    let threads = args.threads.or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    let file = Checkpoint::open(&path)?;
    let (model, limits) = load(&file, &args, threads)?;
    let (prefill, decode) = (args.prefill.clone(), args.decode.clone());
    let mut bench = Bench { model, args };
    let prefill: Vec<Rates> = prefill.into_iter().map(|tokens| bench.prefill(tokens)).collect();
    let decode: Vec<Rates> = decode.into_iter().map(|sequences| bench.decode(sequences)).collect();
    if bench.args.json {
        println!("{}", json(&prefill, &decode, &limits, &*bench.model, threads));
    } else {
        print(&prefill, &decode, &limits);
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("engine: {error}");
            ExitCode::from(69)
        }
    }
}
