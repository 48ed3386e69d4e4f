//! SentencePiece's BPE (Kudo & Richardson 2018, arXiv:1808.06226), as Llama 2, Mistral, Gemma and Phi-3 have it, from GGUF metadata.
//!
//! SentencePiece merges the neighbours whose union has the highest score, the leftmost of equals; what is in no piece falls back to
//! bytes. That is BPE with the merges in the order of their scores, so the `tokenizers` crate runs it. Blanks are written `▁`.

use candle_core::quantized::gguf_file::Value;
use tokenizers::{
    Tokenizer,
    models::bpe::{BPE, Vocab},
    normalizers::{NormalizerWrapper, Prepend, Replace, Sequence},
};

use super::{marked::Marked, spelling::BLANK};
use crate::weights::{Checkpoint, LoadError};

/// Pieces that are longer are never made by merging: SentencePiece itself makes none of more than a few dozen characters, and the ways
/// to split a piece grow with its length.
const MERGED_BYTES_MAX: usize = 256;

/// Builds the tokenizer that the metadata describes; also, whether it writes a blank before a text.
pub(super) fn build(checkpoint: &Checkpoint) -> Result<(Tokenizer, bool), LoadError> {
    let broken = |e: tokenizers::Error| checkpoint.broken(e.to_string());
    let tokens = checkpoint.texts("tokenizer.ggml.tokens")?;
    let scores = scores(checkpoint, tokens.len())?;
    let marked = Marked::read(checkpoint, &tokens)?;
    let spelled: Vec<String> = tokens.iter().enumerate().map(|(id, token)| spelled(&marked, id, token)).collect();
    let vocab: Vocab = spelled.iter().cloned().zip(0u32..).collect();
    let unknown = checkpoint.number("tokenizer.ggml.unknown_token_id").and_then(|id| spelled.get(id)).cloned();
    if unknown.is_none() && !vocab.contains_key("<0x00>") {
        return Err(checkpoint.broken("its tokenizer has neither bytes nor a token for what it does not know"));
    }
    let merges = merges(&spelled, &scores, &marked, &vocab);
    let mut bpe = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = unknown {
        bpe = bpe.unk_token(unknown);
    }
    let mut tokenizer = Tokenizer::new(bpe.build().map_err(broken)?);
    let adds_blank = checkpoint.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if adds_blank {
        steps.push(Prepend::new(BLANK.to_string()).into());
    }
    steps.push(Replace::new(" ", BLANK.to_string()).map_err(broken)?.into());
    tokenizer.with_normalizer(Some(Sequence::new(steps))).map_err(broken)?;
    marked.add_to(&mut tokenizer, &spelled).map_err(broken)?;
    Ok((tokenizer, adds_blank))
}

/// User-defined tokens are looked for in the text as it comes, so their blanks are blanks.
fn spelled(marked: &Marked, id: usize, token: &str) -> String {
    if marked.is_user_defined(id) { token.replace(BLANK, " ") } else { token.to_owned() }
}

fn scores(checkpoint: &Checkpoint, count: usize) -> Result<Vec<f32>, LoadError> {
    let score = |value: &Value| if let Value::F32(score) = value { Some(*score) } else { None };
    let scores: Option<Vec<f32>> = match checkpoint.value("tokenizer.ggml.scores") {
        Some(Value::Array(items)) if items.len() == count => items.iter().map(score).collect(),
        _ => None,
    };
    scores.ok_or_else(|| checkpoint.broken("'tokenizer.ggml.scores' is not one score for each token"))
}

/// Each way to make a plain piece of two others, best first.
fn merges(pieces: &[String], scores: &[f32], marked: &Marked, vocab: &Vocab) -> Vec<(String, String)> {
    let is_piece = |part: &str| vocab.get(part).is_some_and(|id| marked.is_normal(*id as usize));
    let mut ways: Vec<(f32, &str, &str)> = Vec::new();
    for (id, piece) in
        pieces.iter().enumerate().filter(|(id, piece)| marked.is_normal(*id) && piece.len() <= MERGED_BYTES_MAX)
    {
        let splits = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        ways.extend(splits.filter(|(a, b)| is_piece(a) && is_piece(b)).map(|(a, b)| (scores[id], a, b)));
    }
    ways.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    ways.into_iter().map(|(_, a, b)| (a.to_owned(), b.to_owned())).collect()
}
