//! Text to tokens, and each token's bytes. Tokens are turned back into text by [`crate::output`], which only needs the bytes.

use tokenizers::Tokenizer as Inner;

use crate::weights::{Checkpoint, LoadError};

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
}

impl Tokenizer {
    /// Builds the tokenizer that the file describes.
    ///
    /// # Errors
    /// When the metadata is incomplete, or of a kind that is not supported.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        let inner = super::bpe::from_checkpoint(checkpoint)?;
        let tokens = checkpoint.texts("tokenizer.ggml.tokens")?;
        let added = inner.get_added_tokens_decoder();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(tokens.len()));
        for (id, token) in tokens.iter().enumerate() {
            match added.get(&(id as u32)) {
                Some(marked) if marked.special => {}
                Some(marked) => bytes.extend_from_slice(marked.content.as_bytes()),
                None => bytes.extend(token.chars().flat_map(char_bytes)),
            }
            ends.push(bytes.len() as u32);
        }
        // a normalizer may shorten text, by a third at the most for NFC
        let token_bytes_max = tokens.iter().map(|t| t.len()).max().unwrap_or(1) * 3;
        let id = |key: &str| checkpoint.number(key).filter(|id| *id < tokens.len()).map(|id| id as u32);
        let begin = id("tokenizer.ggml.bos_token_id")
            .filter(|_| checkpoint.flag("tokenizer.ggml.add_bos_token").unwrap_or(false));
        let end_keys = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
        let end_tokens = end_keys.into_iter().filter_map(id).collect();
        Ok(Self { inner, bytes, ends, prefix: begin.into_iter().collect(), end_tokens, token_bytes_max })
    }

    /// Tokens of a text. `bare` text gets the model's begin token, if it has one; a rendered chat template has written its own.
    ///
    /// # Errors
    /// When the tokenizer cannot split the text.
    pub fn encode(&self, text: &str, bare: bool) -> Result<Vec<u32>, tokenizers::Error> {
        let encoding = self.inner.encode_fast(text, false)?;
        let prefix = if bare { self.prefix.as_slice() } else { &[] };
        Ok([prefix, encoding.get_ids()].concat())
    }

    /// Bytes that a token stands for; none for control tokens and ids outside the vocabulary.
    pub fn token_bytes(&self, token: u32) -> &[u8] {
        let Some(end) = self.ends.get(token as usize) else { return &[] };
        let start = if token == 0 { 0 } else { self.ends[token as usize - 1] };
        &self.bytes[start as usize..*end as usize]
    }

    /// Tokens that end an answer.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Bytes of text that one token can stand for at the most, control tokens spelled out.
    pub fn token_bytes_max(&self) -> usize {
        self.token_bytes_max
    }

    /// Number of tokens.
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

/// The bytes of one character of a byte-level vocabulary: GPT-2 writes each byte as a printable character, bytes that are printable
/// Latin-1 as themselves and the others as the characters from U+0100 on, in order. Any other character stands for itself.
fn char_bytes(c: char) -> Vec<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => vec![code as u8],
        // 0..=32, 127..=160 and 173 are the 68 bytes that are not printable
        0x100..=0x120 => vec![(code - 0x100) as u8],
        0x121..=0x142 => vec![(code - 0x121 + 127) as u8],
        0x143 => vec![173],
        _ => c.to_string().into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let one_byte = (0..0x144u32).filter_map(char::from_u32).map(char_bytes).filter(|b| b.len() == 1);
        let bytes: BTreeSet<u8> = one_byte.flatten().collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!(char_bytes('Ġ'), b" ");
        assert_eq!(char_bytes('Ċ'), b"\n");
        assert_eq!(char_bytes('…'), "…".as_bytes());
    }
}
