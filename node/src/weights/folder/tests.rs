//! Whole folders, written as Hugging Face lays them out, against the same model as a GGUF file.

use std::fs;

use candle_core::quantized::{GgmlDType, gguf_file::Value};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

use crate::{
    batch::Batch,
    kernels::{KvDtype, cpu::Cpu},
    model::{self, Capacity, tiny},
    weights::{Checkpoint, LoadError, Quantize, Recommended, whole_number},
};

const HEADS: [(&str, usize); 2] = [("q", 4), ("k", 2)];

/// A tensor of a folder: name, shape, values.
type Dense = (String, Vec<usize>, Vec<f32>);

fn config() -> Json {
    json!({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": true, "eos_token_id": [5, 6], "bos_token_id": 1})
}

/// The rows of a head from interleaved order to halves.
fn halves(values: &[f32], heads: usize) -> Vec<f32> {
    const WIDTH: usize = 64;
    let dim = values.len() / WIDTH / heads;
    let source = |row: usize| {
        let (head, i) = (row / dim, row % dim);
        head * dim + if i < dim / 2 { 2 * i } else { 2 * (i - dim / 2) + 1 }
    };
    (0..heads * dim).flat_map(|row| values[source(row) * WIDTH..][..WIDTH].to_vec()).collect()
}

/// The tensors of a tiny Llama as a folder has them.
fn tensors(gguf: &Checkpoint) -> Vec<Dense> {
    let mut tensors = Vec::new();
    let mut add = |ours: String, theirs: String| {
        let values = gguf.weight(&ours).unwrap().dequantize();
        let heads = HEADS.iter().find(|(part, _)| ours.ends_with(&format!("attn_{part}.weight")));
        let values = heads.map_or_else(|| values.clone(), |(_, heads)| halves(&values, *heads));
        tensors.push((theirs, gguf.dims(&ours).unwrap().to_vec(), values));
    };
    add("token_embd.weight".into(), "model.embed_tokens.weight".into());
    add("output_norm.weight".into(), "model.norm.weight".into());
    let parts = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    for i in 0..2 {
        for (ours, theirs) in parts {
            add(format!("blk.{i}.{ours}.weight"), format!("model.layers.{i}.{theirs}.weight"));
        }
    }
    tensors
}

fn file(tensors: &[Dense], dtype: Dtype) -> Vec<u8> {
    let bytes = |values: &[f32]| -> Vec<u8> {
        match dtype {
            Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        }
    };
    let data: Vec<_> = tensors.iter().map(|(name, dims, values)| (name, dims.clone(), bytes(values))).collect();
    let views = data.iter().map(|(name, dims, bytes)| (*name, TensorView::new(dtype, dims.clone(), bytes).unwrap()));
    serialize(views, None).unwrap()
}

/// A folder of two shards.
fn folder(tensors: &[Dense], dtype: Dtype) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        write(&name, &file(part, dtype));
        map.extend(part.iter().map(|(tensor, ..)| (tensor.clone(), json!(name))));
    }
    write("model.safetensors.index.json", json!({"metadata": {}, "weight_map": map}).to_string().as_bytes());
    write("config.json", config().to_string().as_bytes());
    let added = json!([{"id": 5, "content": "<end>"}, {"id": 1, "content": "<begin>"}]);
    write("tokenizer.json", json!({"added_tokens": added, "model": {}}).to_string().as_bytes());
    dir
}

fn logits(checkpoint: &Checkpoint) -> Vec<f32> {
    let capacity = Capacity { batch_tokens_max: 16, context: 64, blocks: 8, kv_dtype: KvDtype::F16 };
    let mut model = model::load(checkpoint, Cpu::new(1), capacity).unwrap();
    let mut batch = Batch::default();
    batch.push(&[3, 1, 4, 1, 5, 9, 2, 6], 0, &[0]);
    batch.logit_rows.push(7);
    model.forward(&batch, &|| {}).logits.to_vec()
}

fn message(result: Result<Checkpoint, LoadError>) -> String {
    result.map_or_else(|e| e.to_string(), |_| "passed".to_owned())
}

/// Query and key rows stand in another order in a GGUF file of this family, and the answer is the same.
#[test]
fn a_folder_computes_what_its_gguf_file_computes() {
    let gguf = tiny::llama(7, GgmlDType::F32);
    let dir = folder(&tensors(&gguf), Dtype::F32);
    let found = Checkpoint::open(dir.path()).unwrap();
    assert!(gguf.has_interleaved_rotary() && !found.has_interleaved_rotary());
    for (ours, theirs) in logits(&found).iter().zip(logits(&gguf)) {
        assert!((ours - theirs).abs() < 1e-4, "{ours} {theirs}");
    }
    assert!(!found.has("output.weight"));
    assert_eq!(found.number("tokenizer.ggml.bos_token_id"), Some(1));
}

#[test]
fn half_precision_and_quantization_stay_close() {
    let gguf = tiny::llama(7, GgmlDType::F32);
    let dir = folder(&tensors(&gguf), Dtype::BF16);
    let expected = logits(&gguf);
    let norm = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
    for (quantize, tolerance) in [(Quantize::None, 0.02), (Quantize::Int8, 0.03), (Quantize::Int4, 0.25)] {
        let ours = logits(&Checkpoint::open(dir.path()).unwrap().quantized(quantize).unwrap());
        let error = ours.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
        assert!(error / norm < tolerance, "{quantize:?}: {}", error / norm);
    }
}

#[test]
fn folders_that_lie_are_refused_with_file_and_reason() {
    let gguf = tiny::llama(7, GgmlDType::F32);
    let spoilt = |name: &str, spoil: &dyn Fn(Vec<u8>) -> Option<Vec<u8>>| {
        let dir = folder(&tensors(&gguf), Dtype::BF16);
        let path = dir.path().join(name);
        match spoil(fs::read(&path).unwrap()) {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let text = message(Checkpoint::open(dir.path()));
        assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
        text
    };
    let edited = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| Some(String::from_utf8(bytes).unwrap().replace(from, to).into_bytes())
    };
    let (shard, index) = ("model-00002-of-00002.safetensors", "model.safetensors.index.json");
    let shard_of = |to: &'static str| edited("model-00002-of-00002.safetensors", to);
    assert!(spoilt("config.json", &|_| None).contains("no config.json"));
    assert!(spoilt("tokenizer.json", &|_| None).contains("no tokenizer.json"));
    assert!(spoilt(index, &|_| None).contains("neither model.safetensors nor"));
    assert!(spoilt(index, &|_| Some(b"{".to_vec())).contains("no index of tensors"));
    assert!(spoilt(index, &shard_of("../out.safetensors")).contains("no plain file name"));
    assert!(spoilt(index, &shard_of("none.safetensors")).contains("'none.safetensors' is missing"));
    assert!(
        spoilt(index, &edited("model.layers.1.mlp.up_proj", "model.layers.1.mlp.no_proj")).contains("which lacks it")
    );
    assert!(spoilt(shard, &|_| None).contains("is missing"));
    assert!(spoilt(shard, &|bytes| Some(bytes[..bytes.len() - 7].to_vec())).contains("cut off"));
    let first = |bytes: Vec<u8>| Some([&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat());
    assert!(spoilt(shard, &first).contains(shard));
    assert!(
        spoilt("config.json", &edited("\"num_hidden_layers\":2", "\"num_hidden_layers\":1"))
            .contains("beside 1 layers")
    );
    assert!(
        spoilt("config.json", &edited("\"tie_word_embeddings\":true", "\"tie_word_embeddings\":false"))
            .contains("lm_head")
    );
}

#[test]
fn one_safetensors_file_is_not_a_model() {
    let gguf = tiny::llama(7, GgmlDType::F32);
    let dir = folder(&tensors(&gguf), Dtype::BF16);
    let text = message(Checkpoint::open(&dir.path().join("model-00001-of-00002.safetensors")));
    assert!(text.contains("the folder that it lies in"), "{text}");
}

/// Ids by their text, end tokens of all files, templates by name, and what the makers recommend.
#[test]
fn the_tokenizer_s_files_take_gguf_s_keys() {
    let dir = folder(&tensors(&tiny::llama(7, GgmlDType::F32)), Dtype::F32);
    let write = |name: &str, json: &Json| fs::write(dir.path().join(name), json.to_string()).unwrap();
    let end_ids = |checkpoint: &Checkpoint| match checkpoint.value("tokenizer.ggml.eos_token_ids") {
        Some(Value::Array(ids)) => ids.iter().filter_map(whole_number).collect::<Vec<_>>(),
        _ => Vec::new(),
    };
    let bare = Checkpoint::open(dir.path()).unwrap();
    assert_eq!((end_ids(&bare), bare.recommended()), (vec![5, 6], Recommended::default()));
    let templates = json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]);
    let token = json!({"content": "<end>"});
    write(
        "tokenizer_config.json",
        &json!({"bos_token": null, "eos_token": token, "add_bos_token": false, "chat_template": templates}),
    );
    write(
        "generation_config.json",
        &json!({"eos_token_id": 9, "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 7.0}),
    );
    let found = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(end_ids(&found), [5, 9]);
    assert_eq!(
        (found.number("tokenizer.ggml.bos_token_id"), found.number("tokenizer.ggml.eos_token_id")),
        (None, Some(5))
    );
    assert_eq!(found.flag("tokenizer.ggml.add_bos_token"), Some(false));
    let template = |key: &str| found.text(&format!("tokenizer.chat_template{key}")).map(str::to_owned);
    assert_eq!((template(""), template(".tool_use")), (Some("d".into()), Some("t".into())));
    let expected = Recommended { temperature: Some(0.6), top_k: Some(20), ..Recommended::default() };
    assert_eq!(found.recommended(), expected);
    fs::write(dir.path().join("chat_template.jinja"), "j").unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().text("tokenizer.chat_template"), Some("j"));
}

/// Each expert has a file's tensor of its own; GGUF stacks them.
#[test]
fn experts_are_found_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let json = json!({"model_type": "qwen3_moe", "hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 8,
        "moe_intermediate_size": 2, "num_experts": 3, "num_experts_per_tok": 1, "norm_topk_prob": true, "num_attention_heads": 1,
        "max_position_embeddings": 16});
    let expert = |e: usize| (format!("model.layers.0.mlp.experts.{e}.up_proj.weight"), vec![2, 4], vec![e as f32; 8]);
    fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let write = |experts: &[usize]| {
        let tensors: Vec<Dense> = experts.iter().map(|e| expert(*e)).collect();
        fs::write(dir.path().join("model.safetensors"), file(&tensors, Dtype::F32)).unwrap();
        Checkpoint::open(dir.path())
    };
    let found = write(&[0, 1, 2]).unwrap();
    let name = "blk.0.ffn_up_exps.weight";
    assert_eq!(found.dims(name), Some(&[3, 2, 4][..]));
    assert_eq!(found.expert(name, 2, 3).unwrap().dequantize(), vec![2.0; 8]);
    assert!(found.expert(name, 3, 3).is_err() && found.expert(name, 0, 4).is_err());
    assert_eq!(found.number("qwen3moe.expert_feed_forward_length"), Some(2));
    assert!(message(write(&[0, 2])).contains("without a gap"));
}
