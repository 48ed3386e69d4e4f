//! A byte-level BPE tokenizer from GGUF metadata.

use tokenizers::{
    Tokenizer,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, Vocab},
    normalizers::NFC,
};

use super::{marked::Marked, split};
use crate::weights::{Checkpoint, LoadError};

/// Builds the tokenizer that the metadata describes; also, whether prompts begin with the begin token where it does not say.
pub(super) fn build(checkpoint: &Checkpoint) -> Result<(Tokenizer, bool), LoadError> {
    let broken = |e: tokenizers::Error| checkpoint.broken(e.to_string());
    let tokens = checkpoint.texts("tokenizer.ggml.tokens")?;
    let vocab: Vocab = tokens.iter().zip(0u32..).map(|(token, id)| (token.to_string(), id)).collect();
    let merges = checkpoint.texts("tokenizer.ggml.merges")?.into_iter().map(|merge| match merge.split_once(' ') {
        Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
        None => Err(checkpoint.broken(format!("'{merge:.100}' is not a merge of two tokens"))),
    });
    let rule = split::rule(checkpoint.text("tokenizer.ggml.pre").unwrap_or("default"))?;
    let bpe = BPE::builder().vocab_and_merges(vocab, merges.collect::<Result<Vec<_>, _>>()?);
    let ignores_merges = checkpoint.flag("tokenizer.ggml.ignore_merges").unwrap_or(rule.ignores_merges);
    let mut tokenizer = Tokenizer::new(bpe.ignore_merges(ignores_merges).build().map_err(broken)?);
    tokenizer.with_pre_tokenizer(Some(rule.splitter));
    if rule.composes {
        tokenizer.with_normalizer(Some(NFC)).map_err(broken)?;
    }
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, false)));
    Marked::read(checkpoint, &tokens)?.add_to(&mut tokenizer, &tokens).map_err(broken)?;
    Ok((tokenizer, rule.adds_begin))
}
