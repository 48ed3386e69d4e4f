//! Text to tokens, and each token's bytes. Tokens are turned back into text by [`crate::output`], which only needs the bytes.

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
};

use candle_core::quantized::gguf_file::Value;
use tokenizers::Tokenizer as Inner;

use super::{bpe, json, spelling::Spelling, spm};
use crate::weights::{Checkpoint, LoadError, whole_number};

/// Tokens that end an answer where a GGUF file names only one of them: what the families call the end of a turn, of a message or of a
/// text, after llama.cpp's list.
const END_TEXTS: [&str; 12] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
];

/// A model's tokenizer.
pub struct Tokenizer {
    inner: Inner,
    /// Bytes of each token, one after another; control tokens have none.
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<u32>,
    /// Tokens that begin every prompt without a template.
    prefix: Vec<u32>,
    end_tokens: Vec<u32>,
    token_bytes_max: usize,
    drops_first_blank: bool,
}

/// What each kind of tokenizer comes to.
struct Built {
    inner: Inner,
    spelling: Spelling,
    /// Tokens before every prompt, where the model does not say otherwise.
    prefix: Vec<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that comes with the model.
    ///
    /// # Errors
    /// When what describes it is incomplete, broken, or of a kind that is not supported.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        // the crate panics on some broken tokenizers
        let built = catch_unwind(AssertUnwindSafe(|| build(checkpoint)));
        let built = built.map_err(|_| checkpoint.broken("its tokenizer is broken beyond description"))??;
        let count = vocab(checkpoint, &built.inner)?;
        let added = built.inner.get_added_tokens_decoder();
        let (mut bytes, mut ends, mut token_bytes_max) = (Vec::new(), Vec::with_capacity(count), 1);
        for id in 0..count as u32 {
            let token = built.inner.id_to_token(id).unwrap_or_default();
            match added.get(&id) {
                Some(marked) if marked.special => {}
                Some(marked) => bytes.extend_from_slice(marked.content.as_bytes()),
                None => bytes.extend(built.spelling.bytes(&token)),
            }
            token_bytes_max = token_bytes_max.max(token.len());
            ends.push(
                u32::try_from(bytes.len()).map_err(|_| checkpoint.broken("its tokens have more than 4 GiB of text"))?,
            );
        }
        let prefix = match checkpoint.flag("tokenizer.ggml.add_bos_token") {
            None => built.prefix,
            Some(adds) => begin(checkpoint).filter(|_| adds).into_iter().collect(),
        };
        let fits = |id: &u32| (*id as usize) < count;
        Ok(Self {
            prefix: prefix.into_iter().filter(fits).collect(),
            end_tokens: end_tokens(checkpoint, &built.inner).into_iter().filter(fits).collect(),
            drops_first_blank: built.spelling == Spelling::Pieces { drops_first_blank: true },
            inner: built.inner,
            bytes,
            ends,
            // a normalizer may shorten text, by a third at the most for NFC
            token_bytes_max: token_bytes_max * 3,
        })
    }

    /// Tokens of a text. `bare` text gets the model's begin token, if it has one; a rendered chat template has written its own.
    ///
    /// # Errors
    /// When the tokenizer cannot split the text, or the text has a token that the model has no weights for.
    pub fn encode(&self, text: &str, bare: bool) -> Result<Vec<u32>, tokenizers::Error> {
        // a pattern from a model's files may exhaust the regular expression engine, which panics then
        let encoded = catch_unwind(AssertUnwindSafe(|| self.inner.encode_fast(text, false)));
        let encoding = encoded.map_err(|_| "the model's tokenizer fails on this text")??;
        if let Some(id) = encoding.get_ids().iter().find(|id| **id as usize >= self.vocab()) {
            let token = self.spelled(*id).unwrap_or_default();
            return Err(format!("the text has the token '{token}', which this model cannot read").into());
        }
        let prefix = if bare { self.prefix.as_slice() } else { &[] };
        Ok([prefix, encoding.get_ids()].concat())
    }

    /// Bytes that a token stands for; none for control tokens and ids outside the vocabulary.
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        let Some(end) = self.ends.get(token as usize) else { return &[] };
        let start = if token == 0 { 0 } else { self.ends[token as usize - 1] };
        &self.bytes[start as usize..*end as usize]
    }

    /// The bytes of a whole text, as a detokenizer gives them: without the blank that the tokenizer itself put before it.
    pub fn text_bytes(&self, tokens: &[u32]) -> Vec<u8> {
        let mut bytes: Vec<u8> = tokens.iter().flat_map(|token| self.token_bytes(*token)).copied().collect();
        if self.drops_first_blank && bytes.first() == Some(&b' ') {
            bytes.remove(0);
        }
        bytes
    }

    /// Whether the first blank of what comes after these tokens was put there by the tokenizer: nothing that they stand for is text.
    pub fn drops_blank_after(&self, tokens: &[u32]) -> bool {
        self.drops_first_blank && tokens.iter().all(|token| self.token_bytes(*token).is_empty())
    }

    /// Tokens that end an answer.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Bytes of text that one token can stand for at the most, control tokens spelled out.
    pub fn token_bytes_max(&self) -> usize {
        self.token_bytes_max
    }

    /// Number of tokens that the model has weights for.
    pub fn vocab(&self) -> usize {
        self.ends.len()
    }

    /// The token that the vocabulary spells so.
    pub fn id(&self, spelled: &str) -> Option<u32> {
        self.inner.token_to_id(spelled)
    }

    /// A token's text as the vocabulary spells it, for templates that name their begin and end tokens.
    pub fn spelled(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }
}

fn build(checkpoint: &Checkpoint) -> Result<Built, LoadError> {
    let begin_if = |adds: bool| begin(checkpoint).filter(|_| adds).into_iter().collect();
    match (checkpoint.text("tokenizer.ggml.model"), checkpoint.text("tokenizer.huggingface.json")) {
        (Some("gpt2"), _) => {
            let (inner, adds_begin) = bpe::build(checkpoint)?;
            Ok(Built { inner, spelling: Spelling::ByteLevel, prefix: begin_if(adds_begin) })
        }
        (Some("llama"), _) => {
            let (inner, drops_first_blank) = spm::build(checkpoint)?;
            Ok(Built { inner, spelling: Spelling::Pieces { drops_first_blank }, prefix: begin_if(true) })
        }
        (Some(other), _) => Err(LoadError::Unsupported(format!(
            "tokenizer '{other:.100}' is not supported; supported: gpt2 (byte-level BPE), llama (SentencePiece's BPE)"
        ))),
        (None, Some(json)) => {
            let (inner, prefix) = json::build(checkpoint, json)?;
            let spelling = Spelling::of(inner.get_decoder());
            let spelling =
                spelling.map_err(|what| LoadError::Unsupported(format!("this model's tokenizer.json: {what}")))?;
            Ok(Built { inner, spelling, prefix })
        }
        (None, None) => Err(checkpoint.broken("'tokenizer.ggml.model' is missing")),
    }
}

/// The embedding's rows. Some models have fewer rows than their tokenizer has tokens, some have more.
fn vocab(checkpoint: &Checkpoint, inner: &Inner) -> Result<usize, LoadError> {
    let tokens = inner.get_vocab_size(true);
    let rows = checkpoint.dims("token_embd.weight").and_then(|dims| dims.first()).copied().unwrap_or(tokens);
    if rows.max(tokens) > 1 << 26 {
        return Err(checkpoint.broken(format!("it has {} tokens", rows.max(tokens))));
    }
    Ok(rows)
}

fn token(checkpoint: &Checkpoint, key: &str) -> Option<u32> {
    checkpoint.number(&format!("tokenizer.ggml.{key}")).and_then(|id| u32::try_from(id).ok())
}

fn begin(checkpoint: &Checkpoint) -> Option<u32> {
    token(checkpoint, "bos_token_id")
}

fn end_tokens(checkpoint: &Checkpoint, inner: &Inner) -> BTreeSet<u32> {
    let named = ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(|key| token(checkpoint, key));
    let more: Vec<u32> = match checkpoint.value("tokenizer.ggml.eos_token_ids") {
        Some(Value::Array(ids)) => {
            ids.iter().filter_map(whole_number).filter_map(|id| u32::try_from(id).ok()).collect()
        }
        _ => {
            let added = inner.get_added_tokens_decoder();
            added.iter().filter(|(_, marked)| END_TEXTS.contains(&marked.content.as_str())).map(|(id, _)| *id).collect()
        }
    };
    named.chain(more).collect()
}

#[cfg(test)]
mod tests;
