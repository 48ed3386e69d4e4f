//! Tokens against recorded ones. `sentencepiece.json`: a small model trained with SentencePiece 0.2.3, and what it makes of texts, with
//! and without its dummy prefix. `tokenizers.json`: two small `tokenizer.json` made with tokenizers 0.23.3, and what it makes of texts.
//! `real.json`: the catalogue's models, by SentencePiece over the pieces of the GGUF file and by a plain BPE over its merges.

use std::{collections::HashMap, path::Path};

use candle_core::quantized::gguf_file::{self, Value as Meta};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value as Json;

use super::*;
use crate::models::{ModelRef, Store};

type Vectors = Vec<(String, Vec<u32>, String)>;

#[derive(Deserialize)]
struct SentencePiece {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<u32>,
    with_prefix: Vectors,
    without_prefix: Vectors,
}

#[derive(Deserialize)]
struct HuggingFace {
    json: String,
    vectors: Vectors,
}

fn sentencepiece() -> SentencePiece {
    serde_json::from_str(include_str!("../fixtures/sentencepiece.json")).unwrap()
}

fn hugging_face(name: &str) -> HuggingFace {
    let mut both: HashMap<String, HuggingFace> =
        serde_json::from_str(include_str!("../fixtures/tokenizers.json")).unwrap();
    both.remove(name).unwrap()
}

fn checkpoint(metadata: &[(&str, Meta)]) -> Checkpoint {
    let mut file = std::io::Cursor::new(Vec::new());
    let metadata: Vec<(&str, &Meta)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut file, &metadata, &[]).unwrap();
    Checkpoint::from_bytes(Path::new("t.gguf"), file.into_inner().into()).unwrap()
}

fn texts(items: &[String]) -> Meta {
    Meta::Array(items.iter().map(|text| Meta::String(text.clone())).collect())
}

fn pieces_with(model: &SentencePiece, more: &[(&'static str, Meta)]) -> Result<Tokenizer, LoadError> {
    let mut metadata = vec![
        ("tokenizer.ggml.model", Meta::String("llama".into())),
        ("tokenizer.ggml.tokens", texts(&model.tokens)),
        ("tokenizer.ggml.scores", Meta::Array(model.scores.iter().map(|x| Meta::F32(*x)).collect())),
        ("tokenizer.ggml.token_type", Meta::Array(model.types.iter().map(|x| Meta::U32(*x)).collect())),
        ("tokenizer.ggml.bos_token_id", Meta::U32(1)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(2)),
        ("tokenizer.ggml.unknown_token_id", Meta::U32(0)),
    ];
    metadata.retain(|(key, _)| more.iter().all(|(other, _)| key != other));
    metadata.extend(more.iter().cloned());
    Tokenizer::from_checkpoint(&checkpoint(&metadata))
}

fn pieces(adds_blank: bool) -> Tokenizer {
    pieces_with(&sentencepiece(), &[("tokenizer.ggml.add_space_prefix", Meta::Bool(adds_blank))]).unwrap()
}

fn from_json(json: &str) -> Result<Tokenizer, LoadError> {
    Tokenizer::from_checkpoint(&checkpoint(&[("tokenizer.huggingface.json", Meta::String(json.to_owned()))]))
}

#[test]
fn sentencepiece_s_tokens_are_ours() {
    let model = sentencepiece();
    let without = pieces(false);
    for (text, expected, decoded) in &model.without_prefix {
        assert_eq!(without.encode(text, false).unwrap(), *expected, "{text:?}");
        assert_eq!(without.text_bytes(expected), decoded.as_bytes(), "{text:?}");
    }
    let with = pieces(true);
    // a user-defined token is a border for the prefix in llama.cpp and transformers, and none in SentencePiece
    for (text, expected, decoded) in
        model.with_prefix.iter().filter(|(text, ..)| !text.contains("<|tool|>") && !text.contains("\n\n"))
    {
        assert_eq!(with.encode(text, false).unwrap(), *expected, "{text:?}");
        assert_eq!(with.text_bytes(expected), decoded.as_bytes(), "{text:?}");
    }
}

#[test]
fn tokenizer_json_s_tokens_are_ours() {
    for (name, prefix, suffix) in [("byte_level", &[0][..], &[1][..]), ("pieces", &[1], &[])] {
        let recorded = hugging_face(name);
        let tokenizer = from_json(&recorded.json).unwrap();
        for (text, ids, decoded) in &recorded.vectors {
            let own = &ids[prefix.len()..ids.len() - suffix.len()];
            assert_eq!(tokenizer.encode(text, false).unwrap(), own, "{text:?}");
            assert_eq!(tokenizer.encode(text, true).unwrap(), [prefix, own].concat(), "{text:?}");
            assert_eq!(String::from_utf8(tokenizer.text_bytes(own)).unwrap(), *decoded, "{text:?}");
        }
    }
}

/// Needs the models on this machine; `tidegate model pull NAME` puts them there.
#[test]
fn the_catalogue_s_tokenizers_make_the_recorded_tokens() {
    let recorded: HashMap<String, Vec<(String, Vec<u32>)>> =
        serde_json::from_str(include_str!("../fixtures/real.json")).unwrap();
    for (name, key) in [("smollm2-135m", "smollm2"), ("gemma3-270m", "gemma3")] {
        let path = name
            .parse::<ModelRef>()
            .ok()
            .and_then(|model| Store::open(&Store::default_data_dir().ok()?).locate(&model).ok());
        let Some(path) = path else {
            eprintln!("skipped: {name} is not on this machine");
            continue;
        };
        let tokenizer = Tokenizer::from_checkpoint(&Checkpoint::open(&path).unwrap()).unwrap();
        for (text, expected) in &recorded[key] {
            assert_eq!(tokenizer.encode(text, false).unwrap(), *expected, "{name} {text:?}");
        }
    }
}

/// The blank before the first word is the tokenizer's own where nothing but control tokens comes before.
#[test]
fn the_first_blank_of_a_text_goes_and_that_of_an_answer_stays() {
    let (with, without) = (pieces(true), pieces(false));
    let (begin, word) = (1, with.encode("Hello world", false).unwrap());
    assert_eq!(with.text_bytes(&word), b"Hello world");
    assert!(with.drops_blank_after(&[]) && with.drops_blank_after(&[begin]));
    assert!(!with.drops_blank_after(&[begin, word[0]]) && !without.drops_blank_after(&[]));
}

#[test]
fn the_begin_token_follows_the_file_then_the_kind() {
    let model = sentencepiece();
    let first = |more: &[(&'static str, Meta)]| pieces_with(&model, more).unwrap().encode("a", true).unwrap()[0];
    assert_eq!(first(&[]), 1);
    assert_ne!(first(&[("tokenizer.ggml.add_bos_token", Meta::Bool(false))]), 1);
    let bytes = |rule: &str| {
        checkpoint(&[
            ("tokenizer.ggml.model", Meta::String("gpt2".into())),
            ("tokenizer.ggml.pre", Meta::String(rule.into())),
            ("tokenizer.ggml.tokens", texts(&["a".into(), "<b>".into()])),
            ("tokenizer.ggml.merges", Meta::Array(vec![])),
            ("tokenizer.ggml.bos_token_id", Meta::U32(1)),
        ])
    };
    let encoded = |rule: &str| Tokenizer::from_checkpoint(&bytes(rule)).unwrap().encode("a", true).unwrap();
    assert_eq!((encoded("llama-bpe"), encoded("qwen2")), (vec![1, 0], vec![0]));
}

#[test]
fn every_end_token_that_is_named_or_known_ends_an_answer() {
    let mut model = sentencepiece();
    model.tokens[3] = "<end_of_turn>".into();
    let ends = |more: &[(&'static str, Meta)]| pieces_with(&model, more).unwrap().end_tokens().to_vec();
    assert_eq!(ends(&[]), [2, 3]);
    assert_eq!(
        ends(&[("tokenizer.ggml.eot_token_id", Meta::U32(9)), ("tokenizer.ggml.eom_token_id", Meta::U32(99_999))]),
        [2, 3, 9]
    );
    let list = Meta::Array(vec![Meta::U32(7), Meta::U32(8)]);
    assert_eq!(ends(&[("tokenizer.ggml.eos_token_ids", list)]), [2, 7, 8]);
}

#[test]
fn broken_vocabularies_are_refused_with_their_key() {
    let model = sentencepiece();
    let refusal = |key: &'static str, value: Meta| {
        pieces_with(&model, &[(key, value)]).err().map_or_else(|| "passed".to_owned(), |e| e.to_string())
    };
    assert!(refusal("tokenizer.ggml.scores", Meta::Array(vec![Meta::F32(0.0)])).contains("tokenizer.ggml.scores"));
    assert!(
        refusal("tokenizer.ggml.token_type", Meta::Array(vec![Meta::U32(1)])).contains("tokenizer.ggml.token_type")
    );
    assert!(refusal("tokenizer.ggml.tokens", Meta::U32(1)).contains("tokenizer.ggml.tokens"));
    assert!(refusal("tokenizer.ggml.model", Meta::String("t5".into())).contains("'t5'"));
    // the merge of the two longest is no token; the crate would read past its buffer
    let merges = Tokenizer::from_checkpoint(&checkpoint(&[
        ("tokenizer.ggml.model", Meta::String("gpt2".into())),
        ("tokenizer.ggml.tokens", texts(&["aa".into(), "bb".into()])),
        ("tokenizer.ggml.merges", texts(&["aa bb".into()])),
    ]));
    assert!(merges.is_err());
}

/// A tokenizer may know more tokens than the embedding has rows.
#[test]
fn a_token_without_weights_is_an_error_and_not_a_row_out_of_bounds() {
    let mut tokenizer = pieces(false);
    let word = tokenizer.encode("Hello", false).unwrap();
    tokenizer.ends.truncate(word[0] as usize);
    assert!(tokenizer.encode("Hello", false).unwrap_err().to_string().contains("cannot read"));
}

/// Puts a value in the place that the steps lead to, as far as they lead.
fn replace(place: &mut Json, path: &[usize], value: Json) {
    let next = match (place, path) {
        (Json::Object(map), [step, ..]) if !map.is_empty() => {
            let step = step % map.len();
            map.values_mut().nth(step)
        }
        (Json::Array(items), [step, ..]) if !items.is_empty() => {
            let step = step % items.len();
            items.get_mut(step)
        }
        (place, _) => {
            *place = value;
            return;
        }
    };
    if let Some(next) = next {
        replace(next, &path[1..], value);
    }
}

proptest! {
    /// Whatever the text, its tokens' bytes are its own.
    #[test]
    fn pieces_join_to_the_whole(text in "[\\PC\n\t ]{0,40}") {
        static TOKENIZERS: std::sync::OnceLock<[Tokenizer; 2]> = std::sync::OnceLock::new();
        let [with, without] = TOKENIZERS.get_or_init(|| [pieces(true), pieces(false)]);
        prop_assume!(!text.contains('▁') && !text.contains("<") && !text.contains("\n\n"));
        for tokenizer in [with, without] {
            let tokens = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(String::from_utf8(tokenizer.text_bytes(&tokens)).unwrap(), text.as_str());
        }
    }

    #[test]
    fn bytes_join_to_the_whole(text in "[\\PC\n\t ]{0,40}") {
        static TOKENIZER: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
        let tokenizer = TOKENIZER.get_or_init(|| from_json(&hugging_face("byte_level").json).unwrap());
        prop_assume!(!text.contains("<"));
        let tokens = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(String::from_utf8(tokenizer.text_bytes(&tokens)).unwrap(), text);
    }

    /// A spoilt `tokenizer.json` is an error, or a tokenizer that can be used.
    #[test]
    fn spoilt_tokenizers_never_panic(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte in 32u8..127, name in "byte_level|pieces") {
        let json = hugging_face(&name).json;
        let cut = (0..=cut.index(json.len())).rev().find(|i| json.is_char_boundary(*i)).unwrap();
        prop_assert!(from_json(&json[..cut]).is_err());
        let mut spoilt = json.into_bytes();
        let at = at.index(spoilt.len());
        spoilt[at] = byte;
        if let Ok(tokenizer) = from_json(&String::from_utf8_lossy(&spoilt)) {
            let _ = tokenizer.encode("Hello  world", true).map(|tokens| tokenizer.text_bytes(&tokens));
        }
    }

    /// Values of the wrong kind in any place.
    #[test]
    fn twisted_tokenizers_never_panic(path in proptest::collection::vec(0usize..30, 1..6), kind in 0usize..5, name in "byte_level|pieces") {
        let mut json: Json = serde_json::from_str(&hugging_face(&name).json).unwrap();
        let value = [Json::Null, Json::from(u32::MAX), Json::from(-1), Json::from("x"), Json::Array(vec![])][kind].clone();
        replace(&mut json, &path, value);
        if let Ok(tokenizer) = from_json(&json.to_string()) {
            let _ = tokenizer.encode("Hello  world", true).map(|tokens| tokenizer.text_bytes(&tokens));
        }
    }
}
