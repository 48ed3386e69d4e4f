//! A tokenizer as Hugging Face writes it, `tokenizer.json`: the `tokenizers` crate reads it and runs it.

use tokenizers::Tokenizer;

use crate::weights::{Checkpoint, LoadError};

/// Reads the tokenizer; also, the tokens that its post-processor puts before a text.
pub(super) fn build(checkpoint: &Checkpoint, json: &str) -> Result<(Tokenizer, Vec<u32>), LoadError> {
    let broken = |e: tokenizers::Error| checkpoint.broken(format!("tokenizer.json: {e}"));
    let mut tokenizer = Tokenizer::from_bytes(json.as_bytes()).map_err(broken)?;
    // a model's maximum is the scheduler's business, and one text is not a batch
    tokenizer.with_truncation(None).map_err(broken)?.with_padding(None);
    let prefix = prefix(&tokenizer).map_err(broken)?;
    Ok((tokenizer, prefix))
}

/// What stands before a text's own tokens.
fn prefix(tokenizer: &Tokenizer) -> Result<Vec<u32>, tokenizers::Error> {
    let bare = tokenizer.encode_fast("a", false)?;
    let whole = tokenizer.encode_fast("a", true)?;
    let own = whole.get_ids().windows(bare.len().max(1)).position(|part| part == bare.get_ids());
    Ok(whole.get_ids()[..own.unwrap_or(0)].to_vec())
}
