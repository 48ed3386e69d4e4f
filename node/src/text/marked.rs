//! Tokens that a text is searched for before anything else: control tokens, which are never text, and user-defined ones, which are text
//! that is never split.

use candle_core::quantized::gguf_file::Value;
use tokenizers::{AddedToken, Tokenizer};

use crate::weights::{Checkpoint, LoadError, whole_number};

/// GGML's token types, after SentencePiece's.
const NORMAL: usize = 1;
const UNKNOWN: usize = 2;
const CONTROL: usize = 3;
const USER_DEFINED: usize = 4;

/// The type of each token.
pub(super) struct Marked {
    kinds: Vec<usize>,
}

impl Marked {
    /// Reads the types; without them, all tokens are plain.
    pub(super) fn read(checkpoint: &Checkpoint, tokens: &[&str]) -> Result<Self, LoadError> {
        let key = "tokenizer.ggml.token_type";
        let Some(value) = checkpoint.value(key) else { return Ok(Self { kinds: vec![NORMAL; tokens.len()] }) };
        let kinds: Option<Vec<usize>> = match value {
            Value::Array(items) if items.len() == tokens.len() => items.iter().map(whole_number).collect(),
            _ => None,
        };
        let kinds = kinds.ok_or_else(|| checkpoint.broken(format!("'{key}' is not one type for each token")))?;
        Ok(Self { kinds })
    }

    pub(super) fn is_normal(&self, id: usize) -> bool {
        self.kinds[id] == NORMAL
    }

    pub(super) fn is_user_defined(&self, id: usize) -> bool {
        self.kinds[id] == USER_DEFINED
    }

    /// Tells the tokenizer of them; `spelled` is how its model spells each token.
    pub(super) fn add_to<S: AsRef<str>>(
        &self,
        tokenizer: &mut Tokenizer,
        spelled: &[S],
    ) -> Result<(), tokenizers::Error> {
        let of = |kinds: &'static [usize], special: bool| {
            let marked = spelled
                .iter()
                .zip(&self.kinds)
                .filter(move |(text, kind)| kinds.contains(kind) && !text.as_ref().is_empty());
            marked
                .map(move |(text, _)| AddedToken::from(text.as_ref().to_owned(), special).normalized(false))
                .collect::<Vec<_>>()
        };
        tokenizer.add_special_tokens(of(&[CONTROL, UNKNOWN], true))?;
        tokenizer.add_tokens(of(&[USER_DEFINED], false))?;
        Ok(())
    }
}
