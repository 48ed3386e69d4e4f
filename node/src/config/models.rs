//! Which models a node serves: `[[node.models]]`, or `node.model` alone.

use bytesize::ByteSize;
use tidegate_common::config::Reader;

use crate::{kernels::KvDtype, models::ModelRef, weights::Quantize};

/// Most models of one node; each is a line of `/health`, and a value of a label in its metrics.
pub(crate) const MODELS_MAX: usize = 64;

/// Longest name of a model in the API, in bytes.
const NAME_BYTES_MAX: usize = 200;

/// One model that a node serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelConfig {
    /// Its name in the API.
    pub name: String,
    /// Which it is.
    pub model: ModelRef,
    /// When it is loaded.
    pub load: LoadWhen,
    /// Never unloaded to make room for another.
    pub pinned: bool,
    /// `max_context`: most tokens of prompt and answer; the model's own when not given.
    pub context_max: Option<usize>,
    /// `kv_cache_memory`: bytes for keys and values; a share of the machine's free memory when not given.
    pub kv_cache_bytes: Option<u64>,
    /// `kv_cache_dtype`: how keys and values are kept; as the node's others when not given.
    pub kv_dtype: Option<KvDtype>,
    /// Whether its matrices are quantized as they are loaded; as the node's others when not given.
    pub quantize: Option<Quantize>,
    /// `draft_model`: a smaller model of the same vocabulary that guesses next tokens.
    pub draft: Option<ModelRef>,
}

/// When a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadWhen {
    /// Before the node is ready.
    Start,
    /// With the first request for it.
    FirstUse,
}

impl LoadWhen {
    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::FirstUse => "first_use",
        }
    }
}

impl ModelConfig {
    /// A model under its own name, loaded at start, with no bounds of its own.
    pub fn new(model: ModelRef) -> Self {
        Self {
            name: model.served_name(),
            model,
            load: LoadWhen::Start,
            pinned: false,
            context_max: None,
            kv_cache_bytes: None,
            kv_dtype: None,
            quantize: None,
            draft: None,
        }
    }

    fn read(r: &Reader<'_>) -> Self {
        let model = r.parse::<ModelRef>("model");
        if !r.has("model") {
            r.problem("model", "is missing", "name a model, such as \"smollm2-135m\"; see `tidegate model --help`");
        }
        let mut entry = Self::new(model.unwrap_or_default());
        entry.name = r.get("name").unwrap_or(entry.name);
        entry.load = r.choice("load", &[("start", LoadWhen::Start), ("first_use", LoadWhen::FirstUse)], entry.load);
        entry.pinned = r.get_or("pinned", false);
        entry.context_max = r.get_in_range("max_context", 2..=16_777_216);
        entry.kv_cache_bytes = r.get::<ByteSize>("kv_cache_memory").map(|size| size.0);
        let kv_dtype = super::kv_dtype(r);
        entry.kv_dtype = r.has("kv_cache_dtype").then_some(kv_dtype);
        let quantize = super::quantize(r);
        entry.quantize = r.has("quantize").then_some(quantize);
        entry.draft = r.parse("draft_model");
        entry
    }
}

/// Why `name` cannot be a model's name in the API.
///
/// # Errors
/// In words that follow the name.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(format!("must have 1 to {NAME_BYTES_MAX} bytes and no control characters"));
    }
    Ok(())
}

/// Never empty; the first is the one that requests get which name none.
pub(super) fn read(r: &Reader<'_>) -> Vec<ModelConfig> {
    let sections = r.sections("models");
    let mut alone = ModelConfig::new(r.parse("model").unwrap_or_default());
    alone.name = r.get("served_model_name").unwrap_or(alone.name);
    alone.draft = r.parse("draft_model");
    if sections.is_empty() {
        refuse_bad_name(r, "served_model_name", &alone.name);
        return vec![alone];
    }
    for key in ["model", "served_model_name", "draft_model"].into_iter().filter(|key| r.has(key)) {
        r.problem(key, "stands beside [[node.models]]", "keep one of the two: [[node.models]] lists every model");
    }
    if sections.len() > MODELS_MAX {
        r.problem("models", format!("{} models", sections.len()), format!("list at most {MODELS_MAX}"));
    }
    let mut models: Vec<ModelConfig> = Vec::with_capacity(sections.len());
    for section in &sections {
        let model = ModelConfig::read(section);
        refuse_bad_name(section, "name", &model.name);
        if models.iter().any(|earlier| earlier.name == model.name) {
            section.problem("name", format!("'{}' stands here twice", model.name), "give one of them another name");
        }
        models.push(model);
    }
    models
}

fn refuse_bad_name(r: &Reader<'_>, key: &str, name: &str) {
    if let Err(reason) = check_name(name) {
        r.problem(key, format!("a model's name {reason}"), "choose a shorter, plain name");
    }
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;
    use crate::config::NodeConfig;

    fn read(text: &str) -> Result<Vec<ModelConfig>, String> {
        let raw = Raw::from_toml(text, "t").unwrap();
        raw.check(NodeConfig::read).map(|config| config.models).map_err(|e| e.to_string())
    }

    #[test]
    fn one_model_needs_no_list() {
        let models = read("[node]\nmodel = \"./a/big.gguf\"\nserved_model_name = \"big\"").unwrap();
        assert_eq!(models.len(), 1);
        assert_eq!((models[0].name.as_str(), models[0].load), ("big", LoadWhen::Start));
        assert_eq!((read("").unwrap()[0].name.as_str(), &read("").unwrap()[0].draft), ("smollm2-135m", &None));
        let drafted = read("[node]\nmodel = \"./big.gguf\"\ndraft_model = \"./small.gguf\"").unwrap().remove(0);
        assert_eq!(drafted.draft, Some("./small.gguf".parse().unwrap()));
    }

    #[test]
    fn the_first_of_several_is_the_default_and_each_has_its_own_bounds() {
        let models = read(
            "[[node.models]]\nmodel = \"smollm2-135m\"\nmax_context = 512\npinned = true\n\
             draft_model = \"./small.gguf\"\n\
             [[node.models]]\nmodel = \"smollm2-135m\"\nname = \"second\"\nload = \"first_use\"\nkv_cache_memory = \"1MiB\"\n\
             kv_cache_dtype = \"int8\"",
        )
        .unwrap();
        let [first, second] = models.as_slice() else { panic!("two models") };
        assert_eq!((first.name.as_str(), first.context_max, first.pinned), ("smollm2-135m", Some(512), true));
        assert_eq!((first.draft.is_some(), second.draft.is_some()), (true, false));
        assert_eq!((second.load, second.kv_cache_bytes, second.pinned), (LoadWhen::FirstUse, Some(1 << 20), false));
        assert_eq!((first.kv_dtype, second.kv_dtype), (None, Some(KvDtype::Int8)));
    }

    #[test]
    fn all_faults_of_the_list_come_together_with_their_paths() {
        let error = read(
            "[node]\nmodel = \"smollm2-135m\"\n[[node.models]]\nname = \"a\"\nmax_context = 1\n\
             [[node.models]]\nname = \"a\"\nmodel = \"smollm2-135m\"\nload = \"never\"\npined = true\nkv_cache_dtype = \"int4\"\n\
             [[node.models]]\nname = \"\"\nmodel = \"smollm2-135m\"",
        )
        .unwrap_err();
        for part in [
            "node.model: stands beside",
            "node.models[0].model: is missing",
            "node.models[0].max_context",
            "node.models[1].name: 'a' stands here twice",
            "node.models[1].load: 'never'",
            "node.models[1].kv_cache_dtype: 'int4' is not a choice here",
            "did you mean 'pinned'?",
            "node.models[2].name: a model's name must",
        ] {
            assert!(error.contains(part), "{part} is missing in {error}");
        }
    }
}
