//! Tiny models with seeded random weights, as whole GGUF files in memory: what tests load through the same path as real ones.

use std::{io::Cursor, path::Path};

use bytes::Bytes;
use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::Architecture;
use crate::weights::Checkpoint;

/// Vocabulary of the tiny models.
pub(crate) const VOCAB: usize = 64;

/// A model of the architecture, with weights of the given type.
pub(crate) fn model(arch: Architecture, seed: u64, dtype: GgmlDType) -> Checkpoint {
    Tiny::new(arch).build(seed, dtype)
}

/// A Llama.
pub(crate) fn llama(seed: u64, dtype: GgmlDType) -> Checkpoint {
    model(Architecture::Llama, seed, dtype)
}

/// The bytes of a Llama's file with more metadata.
pub(crate) fn file(seed: u64, dtype: GgmlDType, more: &[(&str, Value)]) -> Vec<u8> {
    let metadata = more.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
    Tiny { metadata, ..Tiny::new(Architecture::Llama) }.file(seed, dtype)
}

/// What a tiny model is built from: two layers, width 64, 4 query and 2 key-value heads, of which Gemma has but one, as its small ones do.
#[derive(Debug, Clone)]
pub(crate) struct Tiny {
    pub(crate) arch: Architecture,
    pub(crate) width: usize,
    pub(crate) gate_width: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) experts: usize,
    metadata: Vec<(String, Value)>,
    vectors: Vec<(String, Vec<f32>)>,
}

pub(crate) const LAYERS: usize = 2;
pub(crate) const QUERY_HEADS: usize = 4;

/// Experts that each row uses.
pub(crate) const EXPERTS_USED: usize = 2;

impl Tiny {
    pub(crate) fn new(arch: Architecture) -> Self {
        // heads of Qwen 3 and Gemma are wider than the width over the number of heads
        let (head_dim, experts) = match arch {
            Architecture::Llama | Architecture::Qwen2 | Architecture::Phi3 => (16, 0),
            Architecture::Qwen3 | Architecture::Gemma3 => (32, 0),
            Architecture::Qwen3Moe => (32, 5),
        };
        let kv_heads = if arch == Architecture::Gemma3 { 1 } else { 2 };
        let (metadata, vectors) = (Vec::new(), Vec::new());
        let tiny = Self { arch, width: 64, gate_width: 128, kv_heads, head_dim, experts, metadata, vectors };
        match arch {
            Architecture::Gemma3 => tiny
                .with("attention.sliding_window", Value::U32(7))
                .with("attention.sliding_window_pattern", Value::U32(2)),
            _ => tiny,
        }
    }

    /// The same, wide enough for types whose blocks have 256 values.
    pub(crate) fn wide(self) -> Self {
        Self { width: 256, gate_width: 256, head_dim: 64, ..self }
    }

    /// The same as a mixture of experts.
    pub(crate) fn with_experts(self, experts: usize) -> Self {
        Self { experts, ..self }
    }

    /// The same with another value under the architecture's key.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Self {
        let key = format!("{}.{key}", self.arch.name());
        self.metadata.retain(|(own, _)| *own != key);
        self.metadata.push((key, value));
        self
    }

    /// The same with one more vector.
    pub(crate) fn with_vector(mut self, name: &str, values: Vec<f32>) -> Self {
        self.vectors.push((name.into(), values));
        self
    }

    pub(crate) fn build(&self, seed: u64, dtype: GgmlDType) -> Checkpoint {
        Checkpoint::from_bytes(Path::new("tiny.gguf"), Bytes::from(self.file(seed, dtype))).unwrap()
    }

    /// Its bytes.
    pub(crate) fn file(&self, seed: u64, dtype: GgmlDType) -> Vec<u8> {
        let (metadata, tensors) = (self.metadata(), self.tensors(seed, dtype));
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut file = Cursor::new(Vec::new());
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
        file.into_inner()
    }

    fn metadata(&self) -> Vec<(String, Value)> {
        let mut numbers = vec![
            ("block_count", LAYERS),
            ("embedding_length", self.width),
            ("feed_forward_length", self.gate_width),
            ("context_length", 256),
            ("attention.head_count", QUERY_HEADS),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
        ];
        if self.experts > 0 {
            numbers.extend([("expert_count", self.experts), ("expert_used_count", EXPERTS_USED)]);
        }
        let numbers = numbers.into_iter().map(|(k, v)| (format!("{}.{k}", self.arch.name()), Value::U32(v as u32)));
        let tokens = Value::Array((0..VOCAB).map(|i| Value::String(format!("t{i}"))).collect());
        let texts = [
            ("general.architecture".to_owned(), Value::String(self.arch.name().into())),
            ("tokenizer.ggml.tokens".to_owned(), tokens),
        ];
        // what a test adds comes last: it goes over what stands here
        let all = numbers.chain(texts).filter(|(key, _)| self.metadata.iter().all(|(own, _)| own != key));
        all.chain(self.metadata.iter().cloned()).collect()
    }

    fn tensors(&self, seed: u64, dtype: GgmlDType) -> Vec<(String, QTensor)> {
        let mut random = Random { rng: StdRng::seed_from_u64(seed), dtype, tensors: Vec::new() };
        random.matrix("token_embd", &[VOCAB, self.width]);
        random.gains("output_norm", self.width);
        if matches!(self.arch, Architecture::Qwen3Moe | Architecture::Phi3) {
            random.matrix("output", &[VOCAB, self.width]);
        }
        (0..LAYERS).for_each(|i| self.layer(&format!("blk.{i}"), &mut random));
        for (name, values) in &self.vectors {
            random.push(name.clone(), values.clone(), &[values.len()], GgmlDType::F32);
        }
        random.tensors
    }

    fn layer(&self, at: &str, random: &mut Random) {
        let (width, gate_width) = (self.width, self.gate_width);
        let (query, kv) = (QUERY_HEADS * self.head_dim, self.kv_heads * self.head_dim);
        for part in ["attn_norm", "ffn_norm"] {
            random.gains(&format!("{at}.{part}"), width);
        }
        let is_fused = self.arch == Architecture::Phi3;
        match is_fused {
            true => random.matrix(&format!("{at}.attn_qkv"), &[query + 2 * kv, width]),
            false => [("attn_q", query), ("attn_k", kv), ("attn_v", kv)]
                .iter()
                .for_each(|(part, rows)| random.matrix(&format!("{at}.{part}"), &[*rows, width])),
        }
        random.matrix(&format!("{at}.attn_output"), &[width, query]);
        match self.arch {
            Architecture::Qwen2 => [("attn_q", query), ("attn_k", kv), ("attn_v", kv)]
                .iter()
                .for_each(|(part, rows)| random.vector(&format!("{at}.{part}.bias"), *rows, 0.0)),
            Architecture::Qwen3 | Architecture::Qwen3Moe | Architecture::Gemma3 => ["attn_q_norm", "attn_k_norm"]
                .iter()
                .for_each(|part| random.gains(&format!("{at}.{part}"), self.head_dim)),
            Architecture::Llama | Architecture::Phi3 => {}
        }
        if self.arch == Architecture::Gemma3 {
            ["post_attention_norm", "post_ffw_norm"]
                .iter()
                .for_each(|part| random.gains(&format!("{at}.{part}"), width));
        }
        let gated = match (self.experts, is_fused) {
            (0, true) => vec![("ffn_up", vec![2 * gate_width, width]), ("ffn_down", vec![width, gate_width])],
            (0, false) => vec![
                ("ffn_gate", vec![gate_width, width]),
                ("ffn_up", vec![gate_width, width]),
                ("ffn_down", vec![width, gate_width]),
            ],
            (n, _) => vec![
                ("ffn_gate_inp", vec![n, width]),
                ("ffn_gate_exps", vec![n, gate_width, width]),
                ("ffn_up_exps", vec![n, gate_width, width]),
                ("ffn_down_exps", vec![n, width, gate_width]),
            ],
        };
        gated.iter().for_each(|(part, dims)| random.matrix(&format!("{at}.{part}"), dims));
    }
}

/// Where weights come from, and where they go.
struct Random {
    rng: StdRng,
    dtype: GgmlDType,
    tensors: Vec<(String, QTensor)>,
}

impl Random {
    fn matrix(&mut self, name: &str, dims: &[usize]) {
        let scale = 1.7 / (dims[dims.len() - 1] as f32).sqrt();
        let values = self.values(dims.iter().product(), 0.0, scale);
        self.push(format!("{name}.weight"), values, dims, self.dtype);
    }

    fn gains(&mut self, name: &str, width: usize) {
        self.vector(&format!("{name}.weight"), width, 1.0);
    }

    fn vector(&mut self, name: &str, width: usize, middle: f32) {
        let values = self.values(width, middle, 0.5);
        self.push(name.into(), values, &[width], GgmlDType::F32);
    }

    fn values(&mut self, count: usize, middle: f32, reach: f32) -> Vec<f32> {
        (0..count).map(|_| middle + (self.rng.random::<f32>() * 2.0 - 1.0) * reach).collect()
    }

    fn push(&mut self, name: String, values: Vec<f32>, dims: &[usize], dtype: GgmlDType) {
        let dense = Tensor::from_vec(values, dims, &Device::Cpu).unwrap();
        self.tensors.push((name, QTensor::quantize(&dense, dtype).unwrap()));
    }
}
