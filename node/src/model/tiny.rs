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

use crate::weights::Checkpoint;

/// Vocabulary of the tiny models.
pub(crate) const VOCAB: usize = 64;

/// A Llama of two layers, width 64, 4 query and 2 key-value heads of 16, with weights of the given type.
pub(crate) fn llama(seed: u64, dtype: GgmlDType) -> Checkpoint {
    llama_with(seed, dtype, &[])
}

/// The same with more metadata.
pub(crate) fn llama_with(seed: u64, dtype: GgmlDType, more: &[(&str, Value)]) -> Checkpoint {
    Checkpoint::from_bytes(Path::new("tiny.gguf"), Bytes::from(file(seed, dtype, more))).unwrap()
}

/// Its bytes.
pub(crate) fn file(seed: u64, dtype: GgmlDType, more: &[(&str, Value)]) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tensor = |name: String, rows: usize, cols: usize, dtype: GgmlDType| {
        let scale = 1.0 / (cols as f32).sqrt();
        let values: Vec<f32> = (0..rows * cols).map(|_| (rng.random::<f32>() * 2.0 - 1.0) * scale * 1.7).collect();
        let dense = Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap();
        let dense = if rows == 1 { dense.flatten_all().unwrap() } else { dense };
        (name, QTensor::quantize(&dense, dtype).unwrap())
    };
    let mut tensors = vec![
        tensor("token_embd.weight".into(), VOCAB, 64, dtype),
        tensor("output_norm.weight".into(), 1, 64, GgmlDType::F32),
    ];
    for i in 0..2 {
        let parts = [
            ("attn_q", 64, 64),
            ("attn_k", 32, 64),
            ("attn_v", 32, 64),
            ("attn_output", 64, 64),
            ("ffn_gate", 128, 64),
            ("ffn_up", 128, 64),
            ("ffn_down", 64, 128),
        ];
        tensors.extend(parts.map(|(part, rows, cols)| tensor(format!("blk.{i}.{part}.weight"), rows, cols, dtype)));
        tensors.extend(
            ["attn_norm", "ffn_norm"].map(|part| tensor(format!("blk.{i}.{part}.weight"), 1, 64, GgmlDType::F32)),
        );
    }
    let numbers = [
        ("block_count", 2),
        ("embedding_length", 64),
        ("feed_forward_length", 128),
        ("context_length", 256),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ];
    let mut metadata: Vec<(String, Value)> =
        numbers.iter().map(|(k, v)| (format!("llama.{k}"), Value::U32(*v))).collect();
    metadata.push(("general.architecture".into(), Value::String("llama".into())));
    metadata.push((
        "tokenizer.ggml.tokens".into(),
        Value::Array((0..VOCAB).map(|i| Value::String(format!("t{i}"))).collect()),
    ));

    metadata.extend(more.iter().map(|(key, value)| (key.to_string(), value.clone())));

    let mut file = Cursor::new(Vec::new());
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    file.into_inner()
}
