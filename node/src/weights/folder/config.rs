//! `config.json` of Hugging Face's model types, as the GGUF keys that llama.cpp's converter would write. What we would compute wrongly is
//! refused here, by the name of the key that asks for it.

use std::{collections::HashMap, path::PathBuf};

use candle_core::quantized::gguf_file::Value;
use serde_json::{Map, Value as Json};

use crate::weights::LoadError;

/// Model types that are built alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
    Phi3,
}

/// `model_type` in `config.json`.
const TYPES: [(&str, Family); 8] = [
    ("llama", Family::Llama),
    ("mistral", Family::Mistral),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("qwen3_moe", Family::Qwen3Moe),
    ("gemma3_text", Family::Gemma3),
    ("gemma3", Family::Gemma3),
    ("phi3", Family::Phi3),
];

/// What the configuration comes to.
#[derive(Debug)]
pub(super) struct Translated {
    pub(super) family: Family,
    pub(super) layers: usize,
    /// Whether the embedding is the head too, where the configuration says.
    pub(super) is_tied: Option<bool>,
    pub(super) metadata: HashMap<String, Value>,
    /// Vectors that GGUF keeps as tensors and Hugging Face in the configuration.
    pub(super) tensors: Vec<(String, Vec<f32>)>,
}

/// An object of `config.json`.
#[derive(Debug)]
pub(super) struct Config<'a> {
    path: PathBuf,
    json: &'a Map<String, Json>,
}

impl Family {
    /// GGUF's name of the architecture.
    pub(super) fn architecture(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::Gemma3 => "gemma3",
            Self::Phi3 => "phi3",
        }
    }

    /// What transformers takes where the configuration is silent.
    fn default(self, key: &str) -> Option<usize> {
        match (self, key) {
            (Self::Gemma3, "num_attention_heads") => Some(8),
            (Self::Gemma3, "num_key_value_heads") => Some(4),
            (Self::Gemma3, "head_dim") => Some(256),
            (Self::Gemma3, "max_position_embeddings") => Some(131_072),
            _ => None,
        }
    }

    fn activations(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Gemma3 => ("hidden_activation", &["gelu_pytorch_tanh"]),
            _ => ("hidden_act", &["silu", "swish"]),
        }
    }
}

impl<'a> Config<'a> {
    pub(super) fn new(path: PathBuf, json: &'a Json) -> Result<Self, LoadError> {
        match json.as_object() {
            Some(json) => Ok(Self { path, json }),
            None => Err(LoadError::Broken { path, reason: "it is no JSON object".to_owned() }),
        }
    }

    /// The whole configuration under GGUF's names.
    pub(super) fn translate(&self) -> Result<Translated, LoadError> {
        let family = self.family()?;
        if let Some(quantized) = self.present("quantization_config") {
            let how = quantized.get("quant_method").and_then(Json::as_str).unwrap_or("some method");
            return Err(self.unsupported(format!(
                "it is quantized already (quantization_config: {how}); name the unquantized folder, or a GGUF file"
            )));
        }
        let is_tied = self.flag("tie_word_embeddings")?;
        let config = match self.object("text_config")? {
            Some(text) if family == Family::Gemma3 => text,
            _ => Self { path: self.path.clone(), json: self.json },
        };
        config.refuse(family)?;
        let is_tied = is_tied.or(config.flag("tie_word_embeddings")?);
        let mut keys = Keys { family, metadata: HashMap::new(), tensors: Vec::new() };
        keys.set_global("general.architecture", Value::String(family.architecture().to_owned()));
        let layers = config.required(family, "num_hidden_layers")?;
        keys.shape(&config)?;
        keys.window(&config)?;
        keys.rope(&config)?;
        keys.experts(&config)?;
        Ok(Translated { family, layers, is_tied, metadata: keys.metadata, tensors: keys.tensors })
    }

    fn family(&self) -> Result<Family, LoadError> {
        let Some(name) = self.present("model_type").and_then(Json::as_str) else {
            return Err(self.broken("'model_type' is missing"));
        };
        let family = TYPES.iter().find(|(known, _)| *known == name).map(|(_, family)| *family);
        family.ok_or_else(|| {
            let known = TYPES.map(|(name, _)| name).join(", ");
            self.unsupported(format!("model type '{name:.100}' is not supported; supported: {known}"))
        })
    }

    /// What would make other numbers than ours.
    fn refuse(&self, family: Family) -> Result<(), LoadError> {
        let (key, known) = family.activations();
        if let Some(name) = self.present(key).and_then(Json::as_str).filter(|name| !known.contains(name)) {
            return Err(self.unsupported(format!("'{key}' is '{name:.100}'; supported: {}", known.join(", "))));
        }
        let flags = ["use_bidirectional_attention", "use_sliding_window"];
        for key in flags {
            if self.flag(key)? == Some(true) {
                return Err(self.unsupported(format!("'{key}' is not supported")));
            }
        }
        if self.present("mlp_only_layers").and_then(Json::as_array).is_some_and(|layers| !layers.is_empty())
            || self.number("decoder_sparse_step")?.is_some_and(|step| step != 1)
        {
            return Err(self.unsupported("dense layers beside mixtures of experts are not supported"));
        }
        Ok(())
    }

    /// A value that is there and not null.
    fn present(&self, key: &str) -> Option<&'a Json> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let read = |value: &Json| value.as_u64().and_then(|n| u32::try_from(n).ok()).map(|n| n as usize);
        let wrong = || self.broken(format!("'{key}' is no whole number below 2^32"));
        self.present(key).map(|value| read(value).ok_or_else(wrong)).transpose()
    }

    fn required(&self, family: Family, key: &str) -> Result<usize, LoadError> {
        self.number(key)?.or(family.default(key)).ok_or_else(|| self.broken(format!("'{key}' is missing")))
    }

    fn real(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let wrong = || self.broken(format!("'{key}' is no number"));
        self.present(key).map(|value| value.as_f64().ok_or_else(wrong)).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        let wrong = || self.broken(format!("'{key}' is neither true nor false"));
        self.present(key).map(|value| value.as_bool().ok_or_else(wrong)).transpose()
    }

    fn object(&self, key: &str) -> Result<Option<Self>, LoadError> {
        let Some(value) = self.present(key) else { return Ok(None) };
        match value.as_object() {
            Some(json) => Ok(Some(Self { path: self.path.clone(), json })),
            None => Err(self.broken(format!("'{key}' is no JSON object"))),
        }
    }

    fn reals(&self, key: &str) -> Result<Vec<f32>, LoadError> {
        let wrong = || self.broken(format!("'{key}' is missing or no list of numbers"));
        let items = self.present(key).and_then(Json::as_array).ok_or_else(wrong)?;
        items.iter().map(|item| item.as_f64().map(|x| x as f32).ok_or_else(wrong)).collect()
    }

    fn broken(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Broken { path: self.path.clone(), reason: reason.into() }
    }

    fn unsupported(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Unsupported(format!("{}: {}", self.path.display(), reason.into()))
    }
}

/// GGUF keys as they come together.
struct Keys {
    family: Family,
    metadata: HashMap<String, Value>,
    tensors: Vec<(String, Vec<f32>)>,
}

impl Keys {
    fn set_global(&mut self, key: &str, value: Value) {
        self.metadata.insert(key.to_owned(), value);
    }

    fn set(&mut self, key: &str, value: Value) {
        self.metadata.insert(format!("{}.{key}", self.family.architecture()), value);
    }

    fn set_number(&mut self, key: &str, number: usize) {
        self.set(key, Value::U32(u32::try_from(number).unwrap_or(u32::MAX)));
    }

    fn set_real(&mut self, key: &str, real: f64) {
        self.set(key, Value::F32(real as f32));
    }

    fn shape(&mut self, config: &Config<'_>) -> Result<(), LoadError> {
        let family = self.family;
        let width = config.required(family, "hidden_size")?;
        let heads = config.required(family, "num_attention_heads")?;
        let kv = config.number("num_key_value_heads")?.or(family.default("num_key_value_heads")).unwrap_or(heads);
        let dim = config.number("head_dim")?.or(family.default("head_dim")).or(width.checked_div(heads));
        let dim = dim.ok_or_else(|| config.broken("'num_attention_heads' is 0"))?;
        self.set_number("block_count", config.required(family, "num_hidden_layers")?);
        self.set_number("embedding_length", width);
        self.set_number("feed_forward_length", config.required(family, "intermediate_size")?);
        self.set_number("attention.head_count", heads);
        self.set_number("attention.head_count_kv", kv);
        self.set_number("attention.key_length", dim);
        self.set_number("attention.value_length", dim);
        let rotated = config.real("partial_rotary_factor")?.map_or(dim, |part| (dim as f64 * part) as usize);
        self.set_number("rope.dimension_count", rotated);
        self.set_real("attention.layer_norm_rms_epsilon", config.real("rms_norm_eps")?.unwrap_or(1e-6));
        if family == Family::Gemma3 {
            let scalar = config.real("query_pre_attn_scalar")?.unwrap_or(256.0);
            self.set_real("attention.scale", 1.0 / scalar.sqrt());
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(cap) = config.real(key)? {
                self.set_real(key, cap);
            }
        }
        Ok(())
    }

    fn window(&mut self, config: &Config<'_>) -> Result<(), LoadError> {
        let window = config.number("sliding_window")?;
        let layers = layers_with_window(config)?;
        let has_window = match (self.family, &layers) {
            (Family::Gemma3, Some(layers)) => {
                let flags = layers.iter().map(|has| Value::Bool(*has)).collect();
                self.set("attention.sliding_window_pattern", Value::Array(flags));
                true
            }
            (Family::Gemma3, None) => {
                let period = config.number("sliding_window_pattern")?.or(config.number("_sliding_window_pattern")?);
                self.set_number("attention.sliding_window_pattern", period.unwrap_or(6));
                true
            }
            // its window counts only where `use_sliding_window` says so, which is refused
            (Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe, _) => false,
            (_, Some(layers)) if layers.iter().all(|has| *has) => true,
            (_, Some(layers)) if !layers.contains(&true) => false,
            (_, Some(_)) => return Err(config.unsupported("'layer_types' mixes layers with and without a window")),
            (_, None) => true,
        };
        if let Some(window) = window.filter(|_| has_window) {
            self.set_number("attention.sliding_window", window);
        }
        Ok(())
    }

    fn rope(&mut self, config: &Config<'_>) -> Result<(), LoadError> {
        let parameters = match config.object("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => config.object("rope_scaling")?,
        };
        let (parameters, local) = match parameters {
            Some(both) if both.present("full_attention").is_some() => {
                (both.object("full_attention")?, both.object("sliding_attention")?)
            }
            one => (one, None),
        };
        let within = |part: &Option<Config<'_>>| part.as_ref().map_or(Ok(None), |part| part.real("rope_theta"));
        let default = if self.family == Family::Gemma3 { 1e6 } else { 1e4 };
        let base = within(&parameters)?.or(config.real("rope_theta")?).unwrap_or(default);
        self.set_real("rope.freq_base", base);
        if self.family == Family::Gemma3 {
            let base = within(&local)?.or(config.real("rope_local_base_freq")?).unwrap_or(1e4);
            self.set_real("rope.freq_base_swa", base);
        }
        let context = config.required(self.family, "max_position_embeddings")?;
        let stretched = parameters.map_or(Ok(None), |scaling| self.scaling(config, &scaling))?;
        self.set_number("context_length", stretched.map_or(context, |length| length.max(context)));
        Ok(())
    }

    /// The context that the scaling alone makes, where it says.
    fn scaling(&mut self, config: &Config<'_>, scaling: &Config<'_>) -> Result<Option<usize>, LoadError> {
        let kind = scaling.present("rope_type").or(scaling.present("type")).and_then(Json::as_str).unwrap_or("default");
        let kind = match kind {
            "default" => return Ok(None),
            "su" => "longrope",
            "linear" | "llama3" | "yarn" | "longrope" => kind,
            other => {
                return Err(config.unsupported(format!(
                    "rotary positions scaled by '{other:.100}' are not supported; supported: linear, llama3, yarn, longrope"
                )));
            }
        };
        self.set("rope.scaling.type", Value::String(kind.to_owned()));
        let key = "original_max_position_embeddings";
        let original = scaling.number(key)?.or(config.number(key)?);
        if let Some(original) = original {
            self.set_number("rope.scaling.original_context_length", original);
        }
        let factor = scaling.real("factor")?;
        if let Some(factor) = factor {
            self.set_real("rope.scaling.factor", factor);
        }
        let reals = [
            ("low_freq_factor", "rope.scaling.low_freq_factor"),
            ("high_freq_factor", "rope.scaling.high_freq_factor"),
            ("beta_fast", "rope.scaling.yarn_beta_fast"),
            ("beta_slow", "rope.scaling.yarn_beta_slow"),
        ];
        for (key, place) in reals {
            if let Some(real) = scaling.real(key)? {
                self.set_real(place, real);
            }
        }
        match kind {
            "yarn" => self.yarn(scaling, factor.unwrap_or(1.0)),
            "longrope" => self.longrope(scaling),
            _ => Ok(()),
        }?;
        let reach = |(original, factor): (usize, f64)| (original as f64 * factor) as usize;
        Ok(original.zip(factor).filter(|_| kind == "yarn").map(reach))
    }

    /// GGUF's factor multiplies what YaRN computes by itself, Hugging Face's takes its place.
    fn yarn(&mut self, scaling: &Config<'_>, factor: f64) -> Result<(), LoadError> {
        if scaling.real("mscale")?.or(scaling.real("mscale_all_dim")?).is_some() {
            return Err(scaling.unsupported("'mscale' of rotary scaling is not supported"));
        }
        if let Some(attention) = scaling.real("attention_factor")? {
            let own = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
            self.set_real("rope.scaling.attn_factor", attention / own);
        }
        Ok(())
    }

    fn longrope(&mut self, scaling: &Config<'_>) -> Result<(), LoadError> {
        for (key, name) in [("long_factor", "rope_factors_long.weight"), ("short_factor", "rope_factors_short.weight")]
        {
            self.tensors.push((name.to_owned(), scaling.reals(key)?));
        }
        if let Some(attention) = scaling.real("attention_factor")? {
            self.set_real("rope.scaling.attn_factor", attention);
        }
        Ok(())
    }

    fn experts(&mut self, config: &Config<'_>) -> Result<(), LoadError> {
        if self.family != Family::Qwen3Moe {
            return Ok(());
        }
        self.set_number("expert_count", config.required(self.family, "num_experts")?);
        self.set_number("expert_used_count", config.required(self.family, "num_experts_per_tok")?);
        self.set_number("expert_feed_forward_length", config.required(self.family, "moe_intermediate_size")?);
        self.set("expert_weights_norm", Value::Bool(config.flag("norm_topk_prob")?.unwrap_or(false)));
        Ok(())
    }
}

/// Which layers see only a window, where the configuration lists it.
fn layers_with_window(config: &Config<'_>) -> Result<Option<Vec<bool>>, LoadError> {
    let Some(types) = config.present("layer_types") else { return Ok(None) };
    let wrong = || config.broken("'layer_types' holds other than 'full_attention' and 'sliding_attention'");
    let has_window = |kind: &Json| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(wrong()),
    };
    types.as_array().ok_or_else(wrong)?.iter().map(has_window).collect::<Result<_, _>>().map(Some)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn translated(json: &Json) -> Result<Translated, String> {
        let config = Config::new(Path::new("m/config.json").to_owned(), json).map_err(|e| e.to_string())?;
        config.translate().map_err(|e| e.to_string())
    }

    fn llama(more: Json) -> Json {
        let mut json = json!({
            "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "tie_word_embeddings": true, "rope_theta": 500_000.0,
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json
    }

    fn text(t: &Translated, key: &str) -> String {
        t.metadata.get(key).map_or_else(
            || "none".to_owned(),
            |value| match value {
                Value::U32(n) => n.to_string(),
                Value::F32(x) => x.to_string(),
                Value::String(s) => s.clone(),
                Value::Bool(b) => b.to_string(),
                other => format!("{other:?}"),
            },
        )
    }

    #[track_caller]
    fn has(t: &Translated, expected: &[(&str, &str)]) {
        for (key, value) in expected {
            assert_eq!(text(t, key), *value, "{key}");
        }
    }

    /// The values of Llama 3.2 1B.
    #[test]
    fn a_llama_3_has_its_shape_and_its_scaling() {
        let scaling = json!({"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"});
        let t = translated(&llama(json!({"rope_scaling": scaling, "head_dim": 64}))).unwrap();
        assert_eq!((t.layers, t.is_tied), (16, Some(true)));
        has(
            &t,
            &[
                ("general.architecture", "llama"),
                ("llama.block_count", "16"),
                ("llama.attention.head_count_kv", "8"),
                ("llama.attention.key_length", "64"),
                ("llama.rope.dimension_count", "64"),
                ("llama.rope.freq_base", "500000"),
                ("llama.rope.scaling.type", "llama3"),
                ("llama.rope.scaling.factor", "32"),
                ("llama.rope.scaling.original_context_length", "8192"),
                ("llama.rope.scaling.low_freq_factor", "1"),
                ("llama.context_length", "131072"),
                ("llama.attention.sliding_window", "none"),
            ],
        );
    }

    #[test]
    fn windows_count_where_their_family_says() {
        let with = |kind: &str, more: Json| {
            let mut json = llama(json!({"model_type": kind, "sliding_window": 4096}));
            json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            translated(&json)
        };
        has(&with("mistral", json!({})).unwrap(), &[("llama.attention.sliding_window", "4096")]);
        has(&with("mistral", json!({"sliding_window": null})).unwrap(), &[("llama.attention.sliding_window", "none")]);
        has(
            &with("qwen2", json!({"use_sliding_window": false})).unwrap(),
            &[("qwen2.attention.sliding_window", "none")],
        );
        assert!(with("qwen2", json!({"use_sliding_window": true})).unwrap_err().contains("use_sliding_window"));
        let mixed = json!({"layer_types": ["sliding_attention", "full_attention"]});
        assert!(with("mistral", mixed).unwrap_err().contains("layer_types"));
    }

    /// The multimodal form nests the text part and leaves out what transformers has by default.
    #[test]
    fn a_gemma_3_takes_what_its_configuration_leaves_out() {
        let t = translated(&json!({"model_type": "gemma3", "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}))
        .unwrap();
        has(
            &t,
            &[
                ("gemma3.attention.head_count", "8"),
                ("gemma3.attention.head_count_kv", "4"),
                ("gemma3.attention.key_length", "256"),
                ("gemma3.attention.scale", "0.0625"),
                ("gemma3.rope.freq_base", "1000000"),
                ("gemma3.rope.freq_base_swa", "10000"),
                ("gemma3.rope.scaling.type", "linear"),
                ("gemma3.attention.sliding_window", "1024"),
                ("gemma3.attention.sliding_window_pattern", "6"),
                ("gemma3.context_length", "131072"),
            ],
        );
        let newer = json!({"model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 2,
            "rope_parameters": {"full_attention": {"rope_theta": 2e6}, "sliding_attention": {"rope_theta": 3e4}},
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512});
        let t = translated(&newer).unwrap();
        has(&t, &[("gemma3.rope.freq_base", "2000000"), ("gemma3.rope.freq_base_swa", "30000")]);
        assert!(text(&t, "gemma3.attention.sliding_window_pattern").contains("Bool(true), Bool(false)"));
    }

    #[test]
    fn a_phi_3_brings_its_factors_and_a_yarn_its_reach() {
        let long = json!({"type": "su", "long_factor": [1.0, 2.0], "short_factor": [1.0, 1.5]});
        let more = json!({"model_type": "phi3", "rope_scaling": long, "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75});
        let t = translated(&llama(more)).unwrap();
        has(
            &t,
            &[
                ("phi3.rope.scaling.type", "longrope"),
                ("phi3.rope.scaling.original_context_length", "4096"),
                ("phi3.rope.dimension_count", "48"),
            ],
        );
        assert_eq!(t.tensors[0], ("rope_factors_long.weight".to_owned(), vec![1.0, 2.0]));
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768});
        let more = json!({"model_type": "qwen3", "rope_scaling": yarn, "max_position_embeddings": 40_960});
        has(
            &translated(&llama(more)).unwrap(),
            &[("qwen3.context_length", "131072"), ("qwen3.rope.scaling.factor", "4")],
        );
    }

    #[test]
    fn what_would_be_computed_wrongly_is_refused_by_its_key() {
        for (more, word) in [
            (json!({"model_type": "mamba"}), "mamba"),
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
            (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "dynamic"),
            (json!({"hidden_size": -1}), "hidden_size"),
            (json!({"num_hidden_layers": 1e30}), "num_hidden_layers"),
            (json!({"num_attention_heads": 0, "head_dim": null}), "num_attention_heads"),
            (json!({"rope_scaling": {"type": "longrope", "long_factor": "x"}}), "long_factor"),
            (json!({"rope_scaling": 3}), "rope_scaling"),
        ] {
            let error = translated(&llama(more)).unwrap_err();
            assert!(error.contains(word) && error.contains("config.json"), "{error}");
        }
        assert!(translated(&json!([])).unwrap_err().contains("no JSON object"));
    }
}
