//! `random:SHAPE`: a model of a known shape with seeded random weights in bf16, for benchmarks where real weights cannot be had. It takes
//! the time and the memory of the real one, and says nothing that makes sense.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    thread,
};

use super::{ModelError, Progress};

/// Sizes of a model.
#[derive(Debug, PartialEq, Eq)]
pub struct RandomShape {
    /// What follows `random:`.
    pub name: &'static str,
    arch: &'static str,
    layers: usize,
    width: usize,
    gate_width: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    context: usize,
    rope_base: u32,
    /// Whether the embedding is the head too.
    is_tied: bool,
}

/// All shapes, from their makers' `config.json` files; the first is for tests.
pub const RANDOM_SHAPES: &[RandomShape] = &[
    RandomShape {
        name: "tiny",
        arch: "llama",
        layers: 2,
        width: 64,
        gate_width: 128,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        vocab: 512,
        context: 1024,
        rope_base: 10_000,
        is_tied: true,
    },
    RandomShape {
        name: "qwen3-0.6b",
        arch: "qwen3",
        layers: 28,
        width: 1024,
        gate_width: 3072,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        vocab: 151_936,
        context: 40_960,
        rope_base: 1_000_000,
        is_tied: true,
    },
    RandomShape {
        name: "llama-3.2-1b",
        arch: "llama",
        layers: 16,
        width: 2048,
        gate_width: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocab: 128_256,
        context: 131_072,
        rope_base: 500_000,
        is_tied: true,
    },
    RandomShape {
        name: "llama-3.1-8b",
        arch: "llama",
        layers: 32,
        width: 4096,
        gate_width: 14_336,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 128_256,
        context: 131_072,
        rope_base: 500_000,
        is_tied: false,
    },
    RandomShape {
        name: "qwen3-8b",
        arch: "qwen3",
        layers: 36,
        width: 4096,
        gate_width: 12_288,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 151_936,
        context: 40_960,
        rope_base: 1_000_000,
        is_tied: false,
    },
];

/// Alignment of tensors in a GGUF file that does not name another.
const ALIGN: usize = 32;

/// Words of 64 bits that one thread makes at a time.
const PIECE_WORDS: usize = 1 << 20;

/// A tensor; its values are random in bf16, or ones in f32.
struct Tensor {
    name: String,
    /// Inputs and, of a matrix, outputs.
    dims: Vec<usize>,
}

impl Tensor {
    fn cells(&self) -> usize {
        self.dims.iter().product()
    }

    fn is_matrix(&self) -> bool {
        self.dims.len() == 2
    }

    fn bytes(&self) -> usize {
        self.cells() * if self.is_matrix() { 2 } else { 4 }
    }
}

impl RandomShape {
    /// The shape of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        RANDOM_SHAPES.iter().find(|shape| shape.name == name)
    }

    fn tensors(&self) -> Vec<Tensor> {
        let (width, gate, q, kv) =
            (self.width, self.gate_width, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = Vec::new();
        let mut add = |name: String, dims: &[usize]| tensors.push(Tensor { name, dims: dims.to_vec() });
        add("token_embd.weight".into(), &[width, self.vocab]);
        add("output_norm.weight".into(), &[width]);
        if !self.is_tied {
            add("output.weight".into(), &[width, self.vocab]);
        }
        for i in 0..self.layers {
            let mut add = |part: &str, dims: &[usize]| add(format!("blk.{i}.{part}.weight"), dims);
            add("attn_norm", &[width]);
            add("attn_q", &[width, q]);
            add("attn_k", &[width, kv]);
            add("attn_v", &[width, kv]);
            add("attn_output", &[q, width]);
            add("ffn_norm", &[width]);
            add("ffn_gate", &[width, gate]);
            add("ffn_up", &[width, gate]);
            add("ffn_down", &[gate, width]);
            if self.arch == "qwen3" {
                add("attn_q_norm", &[self.head_dim]);
                add("attn_k_norm", &[self.head_dim]);
            }
        }
        tensors
    }

    /// Writes the model as a GGUF file.
    pub(super) fn write(&self, path: &Path, progress: &dyn Progress) -> Result<(), ModelError> {
        let tensors = self.tensors();
        let total: usize = tensors.iter().map(Tensor::bytes).sum();
        progress.begin(&format!("making random weights of {}", self.name), Some(total as u64));
        let made = || {
            let mut out = BufWriter::new(File::create(path)?);
            let header = self.header(&tensors);
            out.write_all(&header)?;
            pad(&mut out, header.len())?;
            let mut done = 0;
            for (i, tensor) in tensors.iter().enumerate() {
                match tensor.is_matrix() {
                    true => write_random(&mut out, i as u64, tensor.cells())?,
                    false => (0..tensor.cells()).try_for_each(|_| out.write_all(&1f32.to_le_bytes()))?,
                }
                pad(&mut out, tensor.bytes())?;
                done += tensor.bytes();
                progress.at(done as u64);
            }
            out.into_inner()?.sync_all()
        };
        made().map_err(ModelError::io(path, "write"))
    }

    /// Everything before the tensors' values (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
    fn header(&self, tensors: &[Tensor]) -> Vec<u8> {
        let number = |key: &str, value: usize| (format!("{}.{key}", self.arch), Value::U32(value as u32));
        let text = |key: &str, value: &str| (key.to_owned(), Value::Text(value.to_owned()));
        let keys = [
            text("general.architecture", self.arch),
            text("general.name", self.name),
            number("block_count", self.layers),
            number("context_length", self.context),
            number("embedding_length", self.width),
            number("feed_forward_length", self.gate_width),
            number("attention.head_count", self.heads),
            number("attention.head_count_kv", self.kv_heads),
            number("attention.key_length", self.head_dim),
            number("attention.value_length", self.head_dim),
            number("rope.dimension_count", self.head_dim),
            (format!("{}.rope.freq_base", self.arch), Value::F32(self.rope_base as f32)),
            (format!("{}.attention.layer_norm_rms_epsilon", self.arch), Value::F32(1e-5)),
            text("tokenizer.ggml.model", "gpt2"),
            text("tokenizer.ggml.pre", "gpt-2"),
            ("tokenizer.ggml.tokens".into(), Value::Texts(self.tokens())),
            ("tokenizer.ggml.merges".into(), Value::Texts(Vec::new())),
            ("tokenizer.ggml.eos_token_id".into(), Value::U32(self.vocab as u32 - 1)),
            text("tokenizer.chat_template", "{% for message in messages %}{{ message.content }}\n{% endfor %}"),
        ];
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend((keys.len() as u64).to_le_bytes());
        for (key, value) in &keys {
            put_text(&mut out, key);
            value.put(&mut out);
        }
        let mut at = 0;
        for tensor in tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
            const F32: u32 = 0;
            const BF16: u32 = 30;
            out.extend(if tensor.is_matrix() { BF16 } else { F32 }.to_le_bytes());
            out.extend((at as u64).to_le_bytes());
            at += tensor.bytes().next_multiple_of(ALIGN);
        }
        out
    }

    /// Every byte in the letters of byte-level BPE, then words that no text holds.
    fn tokens(&self) -> Vec<String> {
        let mut strange = 0;
        let byte = |b: u8| match b {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b),
            _ => {
                strange += 1;
                char::from_u32(255 + strange).expect("these are letters")
            }
        };
        let bytes = (0..=255).map(byte).map(String::from).collect::<Vec<_>>();
        bytes.into_iter().chain((256..self.vocab).map(|i| format!("<{i}>"))).collect()
    }
}

/// A value of the header.
enum Value {
    U32(u32),
    F32(f32),
    Text(String),
    Texts(Vec<String>),
}

impl Value {
    fn put(&self, out: &mut Vec<u8>) {
        const TEXT: u32 = 8;
        let mut put = |kind: u32, bytes: &[u8]| {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        };
        match self {
            Self::U32(value) => put(4, &value.to_le_bytes()),
            Self::F32(value) => put(6, &value.to_le_bytes()),
            Self::Text(text) => {
                put(TEXT, &[]);
                put_text(out, text);
            }
            Self::Texts(texts) => {
                put(9, &TEXT.to_le_bytes());
                out.extend((texts.len() as u64).to_le_bytes());
                texts.iter().for_each(|text| put_text(out, text));
            }
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn pad(out: &mut impl Write, len: usize) -> io::Result<()> {
    out.write_all(&[0; ALIGN][..len.next_multiple_of(ALIGN) - len])
}

/// Writes `cells` values of bf16 between 2^-6 and 2^-5, half of them negative; `seed` is the tensor's own.
fn write_random(out: &mut impl Write, seed: u64, cells: usize) -> io::Result<()> {
    let words = cells.div_ceil(4);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut pieces = vec![vec![0u8; 8 * PIECE_WORDS.min(words)]; threads.min(words.div_ceil(PIECE_WORDS))];
    let mut left = 2 * cells;
    for first in (0..words).step_by(PIECE_WORDS * pieces.len()) {
        thread::scope(|scope| {
            for (i, piece) in pieces.iter_mut().enumerate() {
                scope.spawn(move || fill(piece, seed, (first + i * PIECE_WORDS) as u64));
            }
        });
        for piece in &pieces {
            let len = left.min(piece.len());
            out.write_all(&piece[..len])?;
            left -= len;
        }
    }
    Ok(())
}

fn fill(piece: &mut [u8], seed: u64, first: u64) {
    for (i, word) in piece.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        // SplitMix64 of the place (Steele, Lea, Flood 2014)
        let mut z = (seed << 40).wrapping_add(first + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // signs and mantissas are random, exponents are those of 2^-6
        *word = (z & 0x807f_807f_807f_807f | 0x3c80_3c80_3c80_3c80).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernels::cpu::Cpu,
        model::{self, Capacity, Plan},
        models::Silent,
        text::Tokenizer,
        weights::Checkpoint,
    };

    #[test]
    fn every_shape_is_a_model_that_can_be_planned_and_the_tiny_one_computed() {
        let folder = tempfile::tempdir().unwrap();
        for shape in RANDOM_SHAPES {
            let header = shape.header(&shape.tensors());
            assert!(header.len() > 1000, "{}", shape.name);
        }
        let (first, again) = (folder.path().join("a.gguf"), folder.path().join("b.gguf"));
        RANDOM_SHAPES[0].write(&first, &Silent).unwrap();
        RANDOM_SHAPES[0].write(&again, &Silent).unwrap();
        assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&again).unwrap());
        let file = Checkpoint::open(&first).unwrap();
        let capacity = Capacity { batch_tokens_max: 16, context: 64, blocks: 4, kv_dtype: Default::default() };
        assert_eq!(Plan::read(&file).unwrap().shape.vocab, 512);
        assert_eq!(Tokenizer::from_checkpoint(&file).unwrap().vocab(), 512);
        let mut model = model::load(&file, Cpu::new(1), capacity).unwrap();
        let mut batch = crate::batch::Batch::default();
        batch.push(&[1, 2, 3], 0, &[0]);
        batch.logit_rows.push(2);
        let logits = model.forward(&batch, &|| {}).logits;
        let (least, most) = logits.iter().fold((f32::MAX, f32::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
        assert!(least.is_finite() && most - least > 0.1, "{least} to {most}");
    }
}
