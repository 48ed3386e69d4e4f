//! A model file of any bytes is an error or sound: its tensors lie within it, and a tokenizer and a template made of it work.
#![no_main]

use std::path::Path;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate_fuzz::panics_may_be_caught;
use tidegate_node::{
    model::Plan,
    text::{ChatTemplate, Tokenizer},
    weights::Checkpoint,
};

fuzz_target!(
    init: panics_may_be_caught(),
    |bytes: &[u8]| {
        let Ok(checkpoint) = Checkpoint::from_bytes(Path::new("fuzz.gguf"), Bytes::copy_from_slice(bytes)) else { return };
        let _ = Plan::read(&checkpoint);
        for name in ["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight"] {
            let _ = checkpoint.weight(name).map(|weight| (weight.rows() * weight.cols() < 1 << 16).then(|| weight.dequantize()));
        }
        let Ok(tokenizer) = Tokenizer::from_checkpoint(&checkpoint) else { return };
        let _ = ChatTemplate::from_checkpoint(&checkpoint, &tokenizer);
        if let Ok(tokens) = tokenizer.encode("Grüße, 12 world\n", true) {
            assert!(tokens.iter().all(|token| (*token as usize) < tokenizer.vocab()));
        }
        (0..tokenizer.vocab() as u32 + 2).for_each(|token| drop(tokenizer.token_bytes(token)));
    }
);
