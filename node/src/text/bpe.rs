//! A byte-level BPE tokenizer from GGUF metadata. GGUF names the splitting rule (`tokenizer.ggml.pre`) without spelling it out, so the
//! rules are here; each is the pre-tokenizer of that family's published `tokenizer.json`.

use candle_core::quantized::gguf_file::Value;
use tokenizers::{
    AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    models::bpe::{BPE, Vocab},
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::weights::{Checkpoint, LoadError, whole_number};

/// GGML's token types that are not plain text.
const CONTROL: usize = 3;
const USER_DEFINED: usize = 4;

const SPLIT_LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SPLIT_QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Builds the tokenizer that the file describes.
///
/// # Errors
/// When the metadata is incomplete, or of a kind that is not supported.
pub(super) fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Tokenizer, LoadError> {
    match checkpoint.text("tokenizer.ggml.model") {
        Some("gpt2") => {}
        Some(other) => {
            return Err(LoadError::Unsupported(format!(
                "tokenizer '{other}' is not supported yet; supported: gpt2 (byte-level BPE)"
            )));
        }
        None => return Err(checkpoint.broken("'tokenizer.ggml.model' is missing")),
    }
    let tokens = checkpoint.texts("tokenizer.ggml.tokens")?;
    let vocab: Vocab = tokens.iter().zip(0u32..).map(|(token, id)| (token.to_string(), id)).collect();
    let merges = checkpoint.texts("tokenizer.ggml.merges")?.into_iter().map(|merge| match merge.split_once(' ') {
        Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
        None => Err(checkpoint.broken(format!("'{merge}' is not a merge of two tokens"))),
    });
    let bpe = BPE::builder().vocab_and_merges(vocab, merges.collect::<Result<Vec<_>, _>>()?);
    let bpe = bpe.ignore_merges(checkpoint.flag("tokenizer.ggml.ignore_merges").unwrap_or(false)).build();
    let mut tokenizer = Tokenizer::new(bpe.map_err(|e| checkpoint.broken(e.to_string()))?);
    let rule = checkpoint.text("tokenizer.ggml.pre").unwrap_or("default");
    tokenizer.with_pre_tokenizer(Some(splitting_rule(rule)?));
    if rule == "qwen2" {
        tokenizer.with_normalizer(Some(NFC)).map_err(|e| checkpoint.broken(e.to_string()))?;
    }
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    add_marked_tokens(checkpoint, &tokens, &mut tokenizer)?;
    Ok(tokenizer)
}

fn splitting_rule(name: &str) -> Result<PreTokenizerWrapper, LoadError> {
    let bytes_by_gpt2_words: PreTokenizerWrapper = ByteLevel::new(false, true, true).into();
    let bytes: PreTokenizerWrapper = ByteLevel::new(false, true, false).into();
    let by_regex = |pattern: &str| {
        let split = Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false);
        split.map_err(|e| LoadError::Unsupported(format!("splitting rule '{name}': {e}")))
    };
    let parts = match name {
        "gpt-2" | "default" => vec![bytes_by_gpt2_words],
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
            vec![Digits::new(true).into(), bytes_by_gpt2_words]
        }
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => vec![by_regex(SPLIT_LLAMA3)?.into(), bytes],
        "qwen2" => vec![by_regex(SPLIT_QWEN2)?.into(), bytes],
        other => {
            return Err(LoadError::Unsupported(format!(
                "the tokenizer's splitting rule '{other}' is not supported yet"
            )));
        }
    };
    Ok(Sequence::new(parts).into())
}

/// Control tokens are never text; user-defined ones are text that is never split.
fn add_marked_tokens(checkpoint: &Checkpoint, tokens: &[&str], tokenizer: &mut Tokenizer) -> Result<(), LoadError> {
    let Some(Value::Array(types)) = checkpoint.value("tokenizer.ggml.token_type") else { return Ok(()) };
    let of_type = |wanted: usize| {
        let marked = tokens.iter().zip(types).filter(move |(_, t)| whole_number(t) == Some(wanted));
        marked.map(move |(text, _)| AddedToken::from(text.to_string(), wanted == CONTROL)).collect::<Vec<_>>()
    };
    tokenizer.add_special_tokens(of_type(CONTROL)).map_err(|e| checkpoint.broken(e.to_string()))?;
    tokenizer.add_tokens(of_type(USER_DEFINED)).map_err(|e| checkpoint.broken(e.to_string()))?;
    Ok(())
}
