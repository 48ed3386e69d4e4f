//! Every architecture and variant against candle-transformers' plain forward, which was written by others from the original models' code.
//!
//! Method: a tiny model of seeded random weights is written as GGUF and loaded as a real one; the same weights go to candle under Hugging
//! Face's names. candle computes the logits after each prefix of 40 tokens from nothing, without a cache. Ours come through paged
//! blocks: as one prefill, token by token, split at every place, and in batches of mixed lengths. Each row's relative error must stay
//! below 2e-4 on the reference (f32, other order of sums) and 4e-3 on the CPU (keys and values in f16).
//!
//! Where candle cannot express a variant, the test writes the plain formula and hands candle what it comes to: its Phi-3 takes any
//! frequencies, and a factor of queries, keys, embeddings or logits can stand in the weights.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, quantized::GgmlDType, quantized::gguf_file::Value};
use candle_nn::VarBuilder;
use candle_transformers::models::{gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe};
use serde_json::json;

use super::{
    Architecture, Capacity, Model, load,
    tiny::{EXPERTS_USED, LAYERS, QUERY_HEADS, Tiny, VOCAB},
};
use crate::{
    batch::Batch,
    kernels::{Backend, KvDtype, cpu::Cpu, reference::Reference},
    weights::Checkpoint,
};

const TOKENS: usize = 40;

const CAPACITY: Capacity = Capacity { batch_tokens_max: 128, context: 64, blocks: 12, kv_dtype: KvDtype::F16 };

/// Blocks of three sequences, in no order.
const BLOCKS: [[u32; 3]; 3] = [[7, 2, 9], [0, 11, 4], [5, 1, 10]];

/// Weights under Hugging Face's names.
type Weights = HashMap<String, Tensor>;

fn tokens() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| (i * i * 7 + i * 29 + 3) % VOCAB as u32).collect()
}

#[test]
fn llama() {
    let tiny = Tiny::new(Architecture::Llama);
    let config = config(&tiny, json!({"tie_word_embeddings": true}));
    check(&tiny, |_| {}, candle_llama(config));
}

#[test]
fn llama_3_with_factors_for_its_frequencies() {
    // as Llama 3.1 has them (arXiv:2407.21783), for an original context of 64: all three parts of the ramp occur among 8 pairs
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let tiny = Tiny::new(Architecture::Llama).with("rope.freq_base", Value::F32(500.0));
    let factors = (0..8).map(|i| {
        let wave = std::f64::consts::TAU * 500f64.powf(f64::from(i) / 8.0);
        let smooth = (64.0 / wave - 1.0) / 3.0;
        if wave < 16.0 {
            1.0
        } else if wave > 64.0 {
            8.0
        } else {
            1.0 / ((1.0 - smooth) / 8.0 + smooth)
        }
    });
    let by_tensor = tiny.clone().with_vector("rope_freqs.weight", factors.map(|f| f as f32).collect());
    let by_keys = tiny
        .with("rope.scaling.type", Value::String("llama3".into()))
        .with("rope.scaling.factor", Value::F32(8.0))
        .with("rope.scaling.low_freq_factor", Value::F32(1.0))
        .with("rope.scaling.high_freq_factor", Value::F32(4.0))
        .with("rope.scaling.original_context_length", Value::U32(64));
    for tiny in [by_tensor, by_keys] {
        let more = json!({"tie_word_embeddings": true, "rope_theta": 500.0, "rope_scaling": scaling});
        check(&tiny, |_| {}, candle_llama(config(&tiny, more)));
    }
}

#[test]
fn mistral_with_a_window_shorter_than_the_sequence() {
    // candle lets a row see one position more than Hugging Face and llama.cpp do for the same window
    for window in [1, 7, 16, 21] {
        let tiny = Tiny::new(Architecture::Llama).with("attention.sliding_window", Value::U32(window));
        let config = serde_json::from_value(config(&tiny, json!({"sliding_window": window - 1}))).unwrap();
        check(&tiny, |_| {}, move |weights, tokens| mistral::Model::new(&config, weights)?.forward(tokens, 0));
    }
}

#[test]
fn mixtral() {
    let tiny = Tiny::new(Architecture::Llama).with_experts(6);
    let more = json!({"sliding_window": 4096, "num_experts_per_tok": EXPERTS_USED, "num_local_experts": 6,
        "use_flash_attn": false});
    let config = serde_json::from_value(config(&tiny, more)).unwrap();
    check(&tiny, |_| {}, move |weights, tokens| mixtral::Model::new(&config, weights)?.forward(tokens, 0));
}

#[test]
fn qwen_2() {
    let tiny = Tiny::new(Architecture::Qwen2);
    let more = json!({"tie_word_embeddings": true, "sliding_window": 4096, "max_window_layers": 0, "use_sliding_window": false});
    let config = serde_json::from_value(config(&tiny, more)).unwrap();
    check(&tiny, |_| {}, move |weights, tokens| qwen2::ModelForCausalLM::new(&config, weights)?.forward(tokens, 0));
}

#[test]
fn qwen_3() {
    let tiny = Tiny::new(Architecture::Qwen3).with("rope.freq_base", Value::F32(1e6));
    let more = json!({"tie_word_embeddings": true, "max_window_layers": 0, "use_sliding_window": false,
        "attention_bias": false, "rope_theta": 1e6});
    let config = serde_json::from_value(config(&tiny, more)).unwrap();
    check(&tiny, |_| {}, move |weights, tokens| qwen3::ModelForCausalLM::new(&config, weights)?.forward(tokens, 0));
}

#[test]
fn biases_wherever_a_file_has_them() {
    let mut tiny = Tiny::new(Architecture::Qwen3);
    for i in 0..LAYERS {
        for (part, rows) in [("attn_q", 128), ("attn_k", 64), ("attn_v", 64), ("attn_output", 64)] {
            let bias = (0..rows).map(|k| ((k * 37 + i * 11) % 19) as f32 / 19.0 - 0.5).collect();
            tiny = tiny.with_vector(&format!("blk.{i}.{part}.bias"), bias);
        }
    }
    let more = json!({"tie_word_embeddings": true, "max_window_layers": 0, "use_sliding_window": false,
        "attention_bias": true});
    let config = serde_json::from_value(config(&tiny, more)).unwrap();
    check(&tiny, |_| {}, move |weights, tokens| qwen3::ModelForCausalLM::new(&config, weights)?.forward(tokens, 0));
}

#[test]
fn qwen_3_with_experts() {
    for is_normalized in [true, false] {
        let tiny = Tiny::new(Architecture::Qwen3Moe).with("expert_weights_norm", Value::Bool(is_normalized));
        let more = json!({"tie_word_embeddings": false, "max_window_layers": 0, "use_sliding_window": false,
            "attention_bias": false, "decoder_sparse_step": 1, "moe_intermediate_size": tiny.gate_width,
            "num_experts_per_tok": EXPERTS_USED, "num_experts": tiny.experts, "norm_topk_prob": is_normalized});
        let config = serde_json::from_value(config(&tiny, more)).unwrap();
        check(
            &tiny,
            |_| {},
            move |weights, tokens| qwen3_moe::ModelForCausalLM::new(&config, weights)?.forward(tokens, 0),
        );
    }
}

#[test]
fn gemma_3_with_local_and_global_layers() {
    let tiny = Tiny::new(Architecture::Gemma3);
    // a window of 7, see Mistral
    let more = json!({"attention_bias": false, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 32, "sliding_window": 6, "sliding_window_pattern": 2});
    let config = serde_json::from_value(config(&tiny, more)).unwrap();
    check(&tiny, |_| {}, move |weights, tokens| gemma3::Model::new(false, &config, weights)?.forward(tokens, 0));
}

#[test]
fn phi_3() {
    let tiny = Tiny::new(Architecture::Phi3);
    check(&tiny, |_| {}, candle_phi(config(&tiny, json!({}))));
}

#[test]
fn phi_3_with_partly_rotated_heads() {
    let tiny = Tiny::new(Architecture::Phi3).with("rope.dimension_count", Value::U32(12));
    check(&tiny, |_| {}, candle_phi(config(&tiny, json!({"partial_rotary_factor": 0.75}))));
}

#[test]
fn linear_scaling() {
    let tiny = scaled(Tiny::new(Architecture::Phi3), "linear", 4.0);
    check_frequencies(&tiny, 8, &[0.25; 8], 1.0);
}

#[test]
fn yarn() {
    // arXiv:2309.00071 as its authors and Hugging Face compute it: the ramp is straight over the pairs, between the pair that makes
    // beta_fast turns within the original context, rounded down, and the one that makes beta_slow, rounded up
    let tiny = scaled(Tiny::new(Architecture::Phi3), "yarn", 4.0)
        .with("rope.scaling.original_context_length", Value::U32(48))
        .with("rope.scaling.yarn_beta_fast", Value::F32(2.0))
        .with("rope.scaling.yarn_beta_slow", Value::F32(0.1));
    let pair = |turns: f64| 16.0 * (48.0 / (turns * std::f64::consts::TAU)).ln() / (2.0 * 10_000f64.ln());
    let (low, high) = (pair(2.0).floor(), pair(0.1).ceil());
    assert_eq!((low, high), (1.0, 4.0));
    let ratio = |i: f64| {
        let interpolated = ((i - low) / (high - low)).clamp(0.0, 1.0);
        interpolated / 4.0 + (1.0 - interpolated)
    };
    let ratios: Vec<f32> = (0..8).map(|i| ratio(f64::from(i)) as f32).collect();
    check_frequencies(&tiny, 8, &ratios, 0.1 * 4f32.ln() + 1.0);
}

#[test]
fn longrope_takes_the_factors_of_the_context_it_serves() {
    // arXiv:2402.13753; the magnitude from Phi-3's own code
    let (short, long): (Vec<f32>, Vec<f32>) = (0..6).map(|i| (1.0 + 0.1 * i as f32, 1.5 + 0.7 * i as f32)).unzip();
    for (original, factors) in [(32, &long), (128, &short)] {
        let tiny = Tiny::new(Architecture::Phi3)
            .with("rope.dimension_count", Value::U32(12))
            .with("rope.scaling.original_context_length", Value::U32(original))
            .with_vector("rope_factors_short.weight", short.clone())
            .with_vector("rope_factors_long.weight", long.clone());
        let ratios: Vec<f32> = factors.iter().map(|f| 1.0 / f).collect();
        let original = original as f32;
        check_frequencies(&tiny, 6, &ratios, (1.0 + (256.0 / original).ln() / original.ln()).sqrt());
    }
}

#[test]
fn scales_of_embedding_attention_and_logits() {
    let tiny = Tiny::new(Architecture::Phi3)
        .with("embedding_scale", Value::F32(3.0))
        .with("attention.scale", Value::F32(0.4))
        .with("logit_scale", Value::F32(0.25));
    let change = |weights: &mut Weights| {
        scale(weights, "model.embed_tokens.weight", |_| 3.0);
        scale(weights, "lm_head.weight", |_| 0.25);
        for i in 0..LAYERS {
            let queries = |row: usize| if row < QUERY_HEADS * 16 { 0.4 * 4.0 } else { 1.0 };
            scale(weights, &format!("model.layers.{i}.self_attn.qkv_proj.weight"), queries);
        }
    };
    check(&tiny, change, candle_phi(config(&tiny, json!({}))));
}

/// The same weights as a folder of Hugging Face's, configuration and all, for each architecture: the keys that it comes to must mean the
/// same to plans as those of GGUF files.
#[test]
fn each_architecture_reads_the_same_from_a_folder() {
    let (short, long): (Vec<f32>, Vec<f32>) = (0..6).map(|i| (1.0 + 0.1 * i as f32, 1.5 + 0.7 * i as f32)).unzip();
    let llama = Tiny::new(Architecture::Llama);
    let cases = [
        (
            scaled(llama.clone(), "llama3", 8.0).with("rope.scaling.original_context_length", Value::U32(64)),
            json!({"model_type": "llama", "tie_word_embeddings": true, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ),
        (
            llama.with("attention.sliding_window", Value::U32(7)),
            json!({"model_type": "mistral", "tie_word_embeddings": true, "sliding_window": 7}),
        ),
        (
            Tiny::new(Architecture::Qwen2),
            json!({"model_type": "qwen2", "tie_word_embeddings": true, "sliding_window": 7, "use_sliding_window": false,
                "max_window_layers": 1}),
        ),
        (Tiny::new(Architecture::Qwen3), json!({"model_type": "qwen3", "tie_word_embeddings": true})),
        (
            Tiny::new(Architecture::Qwen3Moe).with("expert_weights_norm", Value::Bool(false)),
            json!({"model_type": "qwen3_moe", "tie_word_embeddings": false, "num_experts": 5, "moe_intermediate_size": 128,
                "num_experts_per_tok": EXPERTS_USED, "norm_topk_prob": false, "decoder_sparse_step": 1}),
        ),
        (
            scaled(Tiny::new(Architecture::Gemma3), "linear", 8.0).with("attention.scale", Value::F32(0.25)),
            json!({"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 7,
                "sliding_window_pattern": 2, "query_pre_attn_scalar": 16, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ),
        (
            Tiny::new(Architecture::Phi3)
                .with("rope.dimension_count", Value::U32(12))
                .with("rope.scaling.original_context_length", Value::U32(32))
                .with_vector("rope_factors_short.weight", short.clone())
                .with_vector("rope_factors_long.weight", long.clone()),
            json!({"model_type": "phi3", "tie_word_embeddings": false, "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}),
        ),
        (
            scaled(Tiny::new(Architecture::Phi3), "yarn", 4.0)
                .with("rope.scaling.original_context_length", Value::U32(64)),
            json!({"model_type": "phi3", "tie_word_embeddings": false,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
        ),
    ];
    for (tiny, more) in cases {
        let file = tiny.build(11, GgmlDType::F32);
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, json: serde_json::Value| {
            std::fs::write(folder.path().join(name), json.to_string()).unwrap();
        };
        write("config.json", config(&tiny, more.clone()));
        write("tokenizer.json", json!({"added_tokens": [], "model": {}}));
        let weights = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&huggingface(&tiny, &file), weights).unwrap();

        let [mut expected, mut found] = [file, Checkpoint::open(folder.path()).unwrap()].map(|checkpoint| {
            let mut rows = Vec::new();
            let mut model = load(&checkpoint, Reference, CAPACITY).unwrap();
            step(&mut *model, &[(0, 0..TOKENS)], |_, logits| rows.push(logits.to_vec()));
            rows.into_iter()
        });
        for position in 0..TOKENS {
            let error = error(&found.next().unwrap(), &expected.next().unwrap());
            assert!(error < 2e-5, "{}, position {position}: relative error {error}", more["model_type"]);
        }
    }
}

fn scaled(tiny: Tiny, kind: &str, factor: f32) -> Tiny {
    tiny.with("rope.scaling.type", Value::String(kind.into())).with("rope.scaling.factor", Value::F32(factor))
}

/// Phi-3 whose plain frequencies are multiplied by `ratios`, and its rotated pairs by `magnitude`.
fn check_frequencies(tiny: &Tiny, pairs: usize, ratios: &[f32], magnitude: f32) {
    let more = json!({"partial_rotary_factor": pairs as f64 / 8.0,
        "rope_scaling": {"type": "longrope", "short_factor": ratios, "long_factor": ratios}});
    let change = |weights: &mut Weights| {
        for i in 0..LAYERS {
            let is_rotated = |row: usize| row < (QUERY_HEADS + tiny.kv_heads) * 16 && row % 16 < 2 * pairs;
            let factor = |row: usize| if is_rotated(row) { magnitude } else { 1.0 };
            scale(weights, &format!("model.layers.{i}.self_attn.qkv_proj.weight"), factor);
        }
    };
    check(tiny, change, candle_phi(config(tiny, more)));
}

/// Multiplies each row of a matrix.
fn scale(weights: &mut Weights, name: &str, factor: impl Fn(usize) -> f32) {
    let rows = weights[name].dims()[0];
    let factors = Tensor::from_vec((0..rows).map(factor).collect::<Vec<f32>>(), (rows, 1), &Device::Cpu).unwrap();
    weights.insert(name.into(), weights[name].broadcast_mul(&factors).unwrap());
}

fn candle_llama(config: serde_json::Value) -> impl Fn(VarBuilder, &Tensor) -> Result<Tensor> {
    let config: llama::LlamaConfig = serde_json::from_value(config).unwrap();
    let config = config.into_config(false);
    move |weights, tokens| {
        let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
        llama::Llama::load(weights, &config)?.forward(tokens, 0, &mut cache)
    }
}

fn candle_phi(config: serde_json::Value) -> impl Fn(VarBuilder, &Tensor) -> Result<Tensor> {
    let config: phi3::Config = serde_json::from_value(config).unwrap();
    move |weights, tokens| phi3::Model::new(&config, weights)?.forward(tokens, 0)
}

/// Hugging Face's `config.json` of a tiny model.
fn config(tiny: &Tiny, more: serde_json::Value) -> serde_json::Value {
    let mut config = json!({
        "vocab_size": VOCAB, "hidden_size": tiny.width, "intermediate_size": tiny.gate_width, "hidden_act": "silu",
        "num_hidden_layers": LAYERS, "num_attention_heads": QUERY_HEADS, "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_dim, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// Compares everything that a tiny model computes with `candle`, whose weights are the same but for `change`.
fn check(tiny: &Tiny, change: impl Fn(&mut Weights), candle: impl Fn(VarBuilder, &Tensor) -> Result<Tensor>) {
    let file = tiny.build(11, GgmlDType::F32);
    let mut weights = huggingface(tiny, &file);
    change(&mut weights);
    let weights = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let tokens = tokens();
    let after = |prefix: &[u32]| {
        let prefix = Tensor::new(prefix, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        candle(weights.clone(), &prefix).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let expected: Vec<Vec<f32>> = (1..=tokens.len()).map(|n| after(&tokens[..n])).collect();
    compare(Reference, &file, &expected, 2e-4);
    compare(Cpu::new(2), &file, &expected, 4e-3);
}

fn compare<B: Backend + 'static>(backend: B, file: &Checkpoint, expected: &[Vec<f32>], tolerance: f32) {
    let mut model = load(file, backend, CAPACITY).unwrap();
    let mut step = |what: &str, pieces: &[(usize, std::ops::Range<usize>)]| {
        step(&mut *model, pieces, |position, logits| {
            let error = error(logits, &expected[position]);
            assert!(error < tolerance, "{what}, position {position}: relative error {error}");
        });
    };
    step("prefill", &[(0, 0..TOKENS)]);
    (0..TOKENS).for_each(|i| step("decode", &[(1, i..i + 1)]));
    for split in 1..TOKENS {
        step("first part", &[(2, 0..split)]);
        step("second part", &[(2, split..TOKENS)]);
    }
    step("mixed", &[(0, 0..17), (1, 0..31)]);
    step("mixed", &[(2, 0..5), (0, 17..18), (1, 31..40)]);
    step("mixed", &[(0, 18..40), (2, 5..6)]);
}

/// One step of pieces of sequences, and each row's logits.
fn step(model: &mut dyn Model, pieces: &[(usize, std::ops::Range<usize>)], mut each: impl FnMut(usize, &[f32])) {
    let (tokens, mut batch) = (tokens(), Batch::default());
    for (sequence, range) in pieces {
        batch.push(&tokens[range.clone()], range.start, &BLOCKS[*sequence]);
    }
    batch.logit_rows = (0..batch.tokens.len() as u32).collect();
    let positions = batch.positions.clone();
    let logits = model.forward(&batch, &|| {}).logits;
    assert_eq!(logits.len(), positions.len() * VOCAB);
    for (position, logits) in positions.iter().zip(logits.chunks_exact(VOCAB)) {
        each(*position as usize, logits);
    }
}

fn error(found: &[f32], expected: &[f32]) -> f32 {
    let difference: f32 = found.iter().zip(expected).map(|(x, y)| (x - y).powi(2)).sum();
    let size: f32 = expected.iter().map(|y| y * y).sum();
    (difference / size).sqrt()
}

/// The weights of a file under Hugging Face's names and in its layout.
fn huggingface(tiny: &Tiny, file: &Checkpoint) -> Weights {
    let mut weights = Weights::new();
    let mut put = |from: &str, to: &str| {
        if file.has(from) {
            weights.insert(to.into(), tensor(tiny, file, from));
        }
    };
    put("token_embd.weight", "model.embed_tokens.weight");
    put("output_norm.weight", "model.norm.weight");
    put(if file.has("output.weight") { "output.weight" } else { "token_embd.weight" }, "lm_head.weight");
    let (is_gemma, is_fused) = (tiny.arch == Architecture::Gemma3, tiny.arch == Architecture::Phi3);
    let mixture = if tiny.arch == Architecture::Llama { "block_sparse_moe" } else { "mlp" };
    let router = format!("{mixture}.gate");
    let names = [
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", if is_gemma { "pre_feedforward_layernorm" } else { "post_attention_layernorm" }),
        ("post_attention_norm", "post_attention_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_qkv", "self_attn.qkv_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", if is_fused { "mlp.gate_up_proj" } else { "mlp.up_proj" }),
        ("ffn_down", "mlp.down_proj"),
        ("ffn_gate_inp", &router),
    ];
    for i in 0..LAYERS {
        for (from, to) in names {
            for kind in ["weight", "bias"] {
                put(&format!("blk.{i}.{from}.{kind}"), &format!("model.layers.{i}.{to}.{kind}"));
            }
        }
    }
    let parts = match tiny.arch {
        Architecture::Llama => [("ffn_gate_exps", "w1"), ("ffn_up_exps", "w3"), ("ffn_down_exps", "w2")],
        _ => [("ffn_gate_exps", "gate_proj"), ("ffn_up_exps", "up_proj"), ("ffn_down_exps", "down_proj")],
    };
    for (i, expert) in (0..LAYERS).flat_map(|i| (0..tiny.experts).map(move |expert| (i, expert))) {
        for (from, to) in parts {
            let weight = file.expert(&format!("blk.{i}.{from}.weight"), expert, tiny.experts).unwrap();
            let dense = Tensor::from_vec(weight.dequantize(), (weight.rows(), weight.cols()), &Device::Cpu).unwrap();
            weights.insert(format!("model.layers.{i}.{mixture}.experts.{expert}.{to}.weight"), dense);
        }
    }
    weights
}

fn tensor(tiny: &Tiny, file: &Checkpoint, name: &str) -> Tensor {
    let dims = file.dims(name).unwrap();
    let dense = Tensor::from_vec(file.weight(name).unwrap().dequantize(), dims, &Device::Cpu).unwrap();
    let is_rotated = name.contains("attn_q.") || name.contains("attn_k.");
    match tiny.arch {
        // the converter to GGUF puts pair i of a head, rows i and i + D/2, side by side
        Architecture::Llama if is_rotated => {
            let pairs = dense.reshape((dims[0] / tiny.head_dim, tiny.head_dim / 2, 2, dims[1])).unwrap();
            pairs.transpose(1, 2).unwrap().reshape(dims).unwrap()
        }
        // and adds the one of Gemma's norms to their gains
        Architecture::Gemma3 if dims.len() == 1 => (dense - 1.0).unwrap(),
        _ => dense,
    }
}
