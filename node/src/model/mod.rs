//! Models: tensors and [`Batch`], never requests. One forward pass over [`Backend`], and a file for each architecture that says in what
//! it differs.

mod decoder;
mod plan;
mod rope;
mod llama;
mod qwen;
mod gemma;
mod phi;

use crate::{
    batch::Batch,
    kernels::{Backend, KvDtype},
    kv::BLOCK_TOKENS,
    weights::{Checkpoint, LoadError},
};

use self::{decoder::Decoder, plan::Source};
pub use plan::{Plan, Shape};

/// What the engine asks of a model.
pub trait Model: Send {
    /// Computes one step. Calls `beat` after each layer.
    fn forward(&mut self, batch: &Batch, beat: &dyn Fn()) -> Output<'_>;

    /// Whether it chooses tokens by itself where [`Batch::picks`] say how. Else they must be empty.
    fn picks(&self) -> bool {
        false
    }

    /// Width of a hidden state, `E`.
    fn width(&self) -> usize;

    /// Vocabulary, `V`.
    fn vocab(&self) -> usize;

    /// Device class of the backend it runs on, and how keys and values are kept when not in f16: answers are equal within one.
    fn device_class(&self) -> String;
}

/// What one step computed.
#[derive(Debug, Clone, Copy)]
pub struct Output<'a> {
    /// Logits after those of the batch's `logit_rows` that have no pick, `[S, V]`.
    pub logits: &'a [f32],
    /// The tokens chosen after those that have one.
    pub tokens: &'a [u32],
    /// Normed hidden states of the batch's `hidden_rows`, `[P, E]`.
    pub hidden: &'a [f32],
}

/// Sizes that a model is loaded for.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Most tokens in a step.
    pub batch_tokens_max: usize,
    /// Most positions of a sequence.
    pub context: usize,
    /// KV blocks.
    pub blocks: usize,
    /// How keys and values are kept.
    pub kv_dtype: KvDtype,
}

impl Capacity {
    /// Blocks that one sequence of full length takes.
    pub fn blocks_per_sequence(&self) -> usize {
        self.context.div_ceil(BLOCK_TOKENS)
    }
}

/// The architectures that we compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM 2, Mistral, Mixtral.
    Llama,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
    /// Qwen 3 with a mixture of experts.
    Qwen3Moe,
    /// Gemma 3, text.
    Gemma3,
    /// Phi-3, Phi-3.5, Phi-4-mini.
    Phi3,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Qwen3Moe, Self::Gemma3, Self::Phi3];

    /// The name in model files, which their keys begin with.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
        }
    }

    /// The architecture of a file.
    ///
    /// # Errors
    /// When it is missing, or none of ours.
    pub fn of(file: &Checkpoint) -> Result<Self, LoadError> {
        let Some(name) = file.text("general.architecture") else {
            return Err(file.broken("'general.architecture' is missing"));
        };
        let supported = || Self::ALL.map(Self::name).join(", ");
        let other = || format!("architecture '{name}' is not supported; supported: {}", supported());
        Self::ALL.into_iter().find(|arch| arch.name() == name).ok_or_else(|| LoadError::Unsupported(other()))
    }

    fn plan(self, source: &Source) -> Result<Plan, LoadError> {
        match self {
            Self::Llama => llama::plan(source),
            Self::Qwen2 | Self::Qwen3 | Self::Qwen3Moe => qwen::plan(source),
            Self::Gemma3 => gemma::plan(source),
            Self::Phi3 => phi::plan(source),
        }
    }
}

/// Loads the model of a file onto a backend.
///
/// # Errors
/// When the file is of no architecture of ours, lacks a tensor, or one has the wrong shape.
pub fn load<B: Backend + 'static>(
    file: &Checkpoint,
    backend: B,
    capacity: Capacity,
) -> Result<Box<dyn Model>, LoadError> {
    Ok(Box::new(Decoder::load(file, &Plan::read(file)?, backend, capacity)?))
}

#[cfg(test)]
pub(crate) mod tiny;

#[cfg(test)]
mod against_candle;

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, gguf_file::Value};
    use proptest::{prelude::*, sample::select};

    use super::*;
    use crate::kernels::cpu::Cpu;
    use tiny::Tiny;

    fn refusal(tiny: Tiny) -> String {
        Plan::read(&tiny.build(1, GgmlDType::F32)).unwrap_err().to_string()
    }

    /// A model that would be computed wrongly is refused when it is loaded.
    #[test]
    fn variants_that_are_not_supported_are_refused_by_name() {
        let llama = || Tiny::new(Architecture::Llama);
        let cases = [
            ("rope.scaling.type", Value::String("dynamic".into()), "'dynamic'"),
            ("final_logit_softcapping", Value::F32(30.0), "soft caps on logits"),
            ("expert_shared_count", Value::U32(1), "shared experts"),
            ("residual_scale", Value::F32(0.2), "scaled residuals"),
        ];
        for (key, value, expected) in cases {
            let text = refusal(llama().with(key, value));
            assert!(text.contains(expected), "{text}");
        }
        assert!(Plan::read(&tiny::llama(1, GgmlDType::F32)).is_ok());
        assert!(Plan::read(&llama().with("final_logit_softcapping", Value::F32(0.0)).build(1, GgmlDType::F32)).is_ok());
    }

    #[test]
    fn a_foreign_architecture_is_refused_with_the_ones_we_have() {
        let file = tiny::file(1, GgmlDType::F32, &[("general.architecture", Value::String("rwkv".into()))]);
        let file = Checkpoint::from_bytes(std::path::Path::new("m.gguf"), file.into()).unwrap();
        let text = Plan::read(&file).unwrap_err().to_string();
        assert!(text.contains("'rwkv'") && text.contains("qwen3moe") && text.contains("gemma3"), "{text}");
    }

    #[test]
    fn absurd_values_are_refused_by_their_key() {
        let cases = [
            ("attention.head_count_kv", Value::U32(3)),
            ("attention.head_count_kv", Value::Array(vec![Value::U32(2), Value::U32(4)])),
            ("attention.head_count", Value::U32(0)),
            ("attention.key_length", Value::U32(7)),
            ("attention.value_length", Value::U32(8)),
            ("block_count", Value::U32(u32::MAX)),
            ("embedding_length", Value::U64(u64::MAX)),
            ("context_length", Value::I32(-1)),
            ("rope.dimension_count", Value::U32(32)),
            ("rope.freq_base", Value::F32(f32::NAN)),
            ("attention.layer_norm_rms_epsilon", Value::F32(-1.0)),
            ("attention.sliding_window", Value::String("4096".into())),
            ("attention.scale", Value::F32(f32::INFINITY)),
        ];
        for (key, value) in cases {
            let text = refusal(Tiny::new(Architecture::Llama).with(key, value.clone()));
            let named = key.split('.').next_back().unwrap();
            assert!(text.contains(named) || text.contains("do not fit together"), "{key} = {value:?}: {text}");
        }
        let more_used_than_there = Tiny::new(Architecture::Qwen3Moe).with("expert_used_count", Value::U32(9));
        assert!(refusal(more_used_than_there).contains("expert_used_count"));
    }

    /// A head that lies about sizes meets tensors that do not, before anything is allocated for it.
    #[test]
    fn a_size_that_the_tensors_do_not_have_is_an_error_that_names_one() {
        let capacity = Capacity { batch_tokens_max: 8, context: 32, blocks: 2, kv_dtype: KvDtype::F16 };
        for arch in Architecture::ALL {
            for (key, value) in [("feed_forward_length", 1 << 20), ("block_count", 1000), ("embedding_length", 1 << 16)]
            {
                let file = Tiny::new(arch).with(key, Value::U32(value)).build(1, GgmlDType::F32);
                let error = load(&file, Cpu::new(1), capacity).err().unwrap().to_string();
                assert!(error.contains("tensor '"), "{} {key}: {error}", arch.name());
            }
        }
    }

    /// What nothing reads would make a difference that we do not know.
    #[test]
    fn a_tensor_without_a_place_is_refused_by_name() {
        let capacity = Capacity { batch_tokens_max: 8, context: 32, blocks: 2, kv_dtype: KvDtype::F16 };
        let load = |name: &str| {
            let file = Tiny::new(Architecture::Llama).with_vector(name, vec![0.5; 64]).build(1, GgmlDType::F32);
            load(&file, Cpu::new(1), capacity).map(drop).map_err(|e| e.to_string())
        };
        for name in ["blk.1.attn_norm.bias", "blk.1.attn_sinks.weight", "output_norm.bias", "blk.2.attn_norm.weight"] {
            assert!(load(name).unwrap_err().contains(&format!("'{name}'")));
        }
        // one bias of three
        assert!(load("blk.1.attn_q.bias").unwrap_err().contains("'blk.1.attn_k.bias' is missing"));
        assert!(load("blk.1.attn_rot_embd.weight").is_ok());
    }

    /// All keys that plans read.
    const KEYS: [&str; 29] = [
        "attention.causal",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "embedding_scale",
        "expert_count",
        "expert_feed_forward_length",
        "expert_used_count",
        "expert_weights_norm",
        "feed_forward_length",
        "logit_scale",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.type",
    ];

    fn values() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<u32>().prop_map(Value::U32),
            (0u32..300).prop_map(Value::U32),
            any::<u64>().prop_map(Value::U64),
            any::<i32>().prop_map(Value::I32),
            any::<f32>().prop_map(Value::F32),
            any::<bool>().prop_map(Value::Bool),
            select(vec!["yarn", "linear", "llama3", "longrope", "none", ""]).prop_map(|s| Value::String(s.into())),
            prop::collection::vec(any::<bool>().prop_map(Value::Bool), 0..4).prop_map(Value::Array),
        ]
    }

    proptest! {
        /// Law: whatever stands under a key, a model loads and computes, or gives an error.
        #[test]
        fn no_value_makes_a_panic(
            arch in select(Architecture::ALL.to_vec()),
            changes in prop::collection::vec((select(KEYS.to_vec()), values()), 1..4),
        ) {
            let tiny = changes.into_iter().fold(Tiny::new(arch), |tiny, (key, value)| tiny.with(key, value));
            let capacity = Capacity { batch_tokens_max: 8, context: 32, blocks: 2, kv_dtype: KvDtype::F16 };
            if let Ok(mut model) = load(&tiny.build(1, GgmlDType::Q4_0), Cpu::new(1), capacity) {
                let mut batch = Batch::default();
                batch.push(&[3, 1, 2], 0, &[1]);
                batch.logit_rows.push(2);
                prop_assert_eq!(model.forward(&batch, &|| {}).logits.len(), tiny::VOCAB);
            }
        }
    }

    #[test]
    fn gemma_stretches_only_the_frequencies_of_layers_that_see_everything() {
        let tiny = Tiny::new(Architecture::Gemma3);
        let [plain, scaled] = [
            tiny.clone(),
            tiny.with("rope.scaling.type", Value::String("linear".into())).with("rope.scaling.factor", Value::F32(8.0)),
        ]
        .map(|tiny| Plan::read(&tiny.build(1, GgmlDType::F32)).unwrap().ropes);
        let angles = |rope: &rope::RopePlan| rope.table(2).sin.iter().map(|s| s.asin()).collect::<Vec<f32>>();
        let (plain_global, scaled_global) = (angles(&plain[0]), angles(&scaled[0]));
        // 16 pairs, position 0 and then 1, whose sine is still that of an angle below a quarter turn
        assert!(plain_global[16..].iter().zip(&scaled_global[16..]).all(|(a, b)| (a / b - 8.0).abs() < 1e-3));
        assert_eq!(angles(&plain[1]), angles(&scaled[1]));
    }

    #[test]
    fn a_window_stands_in_every_layer_and_zero_is_none() {
        for (arch, value, expected) in [
            (Architecture::Phi3, 2047, Some(2047)),
            (Architecture::Phi3, 0, None),
            (Architecture::Llama, 4096, Some(4096)),
        ] {
            let tiny = Tiny::new(arch).with("attention.sliding_window", Value::U32(value));
            let plan = Plan::read(&tiny.build(1, GgmlDType::F32)).unwrap();
            assert!(plan.layers.iter().all(|layer| layer.view.window == expected));
        }
    }

    /// The window of Gemma 3 by its default: five layers have it, the sixth has not, and turns by another base.
    #[test]
    fn gemma_sees_everything_in_each_sixth_layer() {
        let tiny = Tiny::new(Architecture::Gemma3).with("attention.sliding_window_pattern", Value::U32(6));
        let plan = Plan::read(&tiny.with("block_count", Value::U32(12)).build(1, GgmlDType::F32)).unwrap();
        let global: Vec<usize> = (0..12).filter(|i| plan.layers[*i].view.window.is_none()).collect();
        assert_eq!(global, [5, 11]);
        assert!(plan.layers.iter().all(|layer| (layer.rope == 0) == layer.view.window.is_none()));
        assert_eq!(plan.layers[0].view.window, Some(7));
    }
}
