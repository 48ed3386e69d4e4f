//! The tokenizer's files, and the sampling that a model's makers recommend, under GGUF's names.
//!
//! `tokenizer.json` goes whole under `tokenizer.huggingface.json`. Ids are found here, because Hugging Face names tokens by their text.
//! GGUF has one key for each kind of end token; a folder lists them, so the list has a key of its own, `tokenizer.ggml.eos_token_ids`.

use std::collections::{BTreeSet, HashMap};

use candle_core::quantized::gguf_file::Value;
use serde::Deserialize;
use serde_json::Value as Json;

use super::files::Folder;
use crate::weights::LoadError;

const GENERATION: [(&str, &str); 5] = [
    ("temperature", "general.sampling.temp"),
    ("top_p", "general.sampling.top_p"),
    ("top_k", "general.sampling.top_k"),
    ("min_p", "general.sampling.min_p"),
    ("repetition_penalty", "general.sampling.penalty_repeat"),
];

#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// Keys of tokenizer, chat template and sampling; `config` is `config.json`.
pub(super) fn metadata(folder: &Folder, config: &Json) -> Result<HashMap<String, Value>, LoadError> {
    let Some(tokenizer) = folder.text("tokenizer.json")? else {
        let text = "it holds no tokenizer.json; transformers writes one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)";
        return Err(folder.broken(text));
    };
    let parsed: TokenizerJson = serde_json::from_str(&tokenizer)
        .map_err(|e| folder.broken(format!("'tokenizer.json' is no tokenizer: {e}")))?;
    let ids: HashMap<&str, u32> = parsed.added_tokens.iter().map(|added| (added.content.as_str(), added.id)).collect();
    let settings = folder.json("tokenizer_config.json")?.unwrap_or_default();
    let generation = folder.json("generation_config.json")?.unwrap_or_default();
    let mut keys: HashMap<String, Value> = HashMap::new();
    let begin = special(&settings, "bos_token", &ids).unwrap_or_else(|| first_id(config, "bos_token_id"));
    let end = special(&settings, "eos_token", &ids).unwrap_or_else(|| first_id(config, "eos_token_id"));
    let mut set = |key: &str, value: Option<Value>| drop(value.and_then(|value| keys.insert(key.to_owned(), value)));
    set("tokenizer.ggml.bos_token_id", begin.map(Value::U32));
    set("tokenizer.ggml.eos_token_id", end.map(Value::U32));
    set("tokenizer.ggml.eos_token_ids", Some(end_ids(end, &generation, config)));
    set("tokenizer.ggml.add_bos_token", settings.get("add_bos_token").and_then(Json::as_bool).map(Value::Bool));
    for (name, template) in templates(folder, &settings)? {
        let name = if name == "default" { String::new() } else { format!(".{name}") };
        set(&format!("tokenizer.chat_template{name}"), Some(Value::String(template)));
    }
    let is_sampled = generation.get("do_sample").and_then(Json::as_bool) != Some(false);
    for (key, place) in GENERATION.iter().filter(|_| is_sampled) {
        set(place, generation.get(key).and_then(Json::as_f64).map(|x| Value::F32(x as f32)));
    }
    set("tokenizer.huggingface.json", Some(Value::String(tokenizer)));
    Ok(keys)
}

/// A token that the settings name: none of it when they do not speak of it, no token when they say null.
fn special(settings: &Json, key: &str, ids: &HashMap<&str, u32>) -> Option<Option<u32>> {
    let text = match settings.get(key)? {
        Json::String(text) => text.as_str(),
        Json::Object(token) => token.get("content").and_then(Json::as_str).unwrap_or_default(),
        _ => return Some(None),
    };
    Some(ids.get(text).copied())
}

/// The ids under a key that holds one or a list.
fn listed(json: &Json, key: &str) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match json.get(key) {
        Some(Json::Array(items)) => items.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

fn first_id(config: &Json, key: &str) -> Option<u32> {
    listed(config, key).first().copied()
}

/// The tokenizer's own end token and those that generation ends at, which `config.json` names where `generation_config.json` does not.
fn end_ids(end: Option<u32>, generation: &Json, config: &Json) -> Value {
    let mut ids = listed(generation, "eos_token_id");
    if ids.is_empty() {
        ids = listed(config, "eos_token_id");
    }
    let ids: BTreeSet<u32> = ids.into_iter().chain(end).collect();
    Value::Array(ids.into_iter().map(Value::U32).collect())
}

/// Chat templates by name.
fn templates(folder: &Folder, settings: &Json) -> Result<Vec<(String, String)>, LoadError> {
    let default = |text: String| vec![("default".to_owned(), text)];
    if let Some(text) = folder.text("chat_template.jinja")? {
        return Ok(default(text));
    }
    let older = folder.json("chat_template.json")?.unwrap_or_default();
    match settings.get("chat_template").or(older.get("chat_template")) {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::String(text)) => Ok(default(text.clone())),
        Some(Json::Array(named)) => named.iter().map(|item| named_template(folder, item)).collect(),
        Some(_) => Err(folder.broken("'chat_template' is neither a text nor a list of named ones")),
    }
}

fn named_template(folder: &Folder, item: &Json) -> Result<(String, String), LoadError> {
    let text = |key: &str| item.get(key).and_then(Json::as_str).map(str::to_owned);
    text("name").zip(text("template")).ok_or_else(|| folder.broken("a chat template of the list lacks name or text"))
}
