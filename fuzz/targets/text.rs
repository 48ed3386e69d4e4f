//! Any tokens in give the same text out however it is taken, and never more than what stands before the first stop string.
#![no_main]

use std::{path::Path, sync::LazyLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tidegate_fuzz::{VOCABULARY, model_head};
use tidegate_node::{output::Text, stop::Finish, text::Tokenizer, weights::Checkpoint};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let checkpoint = Checkpoint::from_bytes(Path::new("fuzz.gguf"), model_head(None).into()).expect("a sound head");
    Tokenizer::from_checkpoint(&checkpoint).expect("a sound tokenizer")
});

#[derive(Arbitrary, Debug)]
struct Input {
    tokens: Vec<u16>,
    stops: Vec<String>,
}

fuzz_target!(|input: Input| {
    let stops: Vec<String> = input.stops.into_iter().take(16).collect();
    let (mut text, mut taken, mut bytes) = (Text::new(&stops), String::new(), Vec::new());
    let last = input.tokens.len().saturating_sub(1);
    for (i, token) in input.tokens.iter().enumerate() {
        let token = u32::from(*token) % (VOCABULARY + 2);
        bytes.extend_from_slice(TOKENIZER.token_bytes(token));
        text.push(&TOKENIZER, token, (i == last).then_some(Finish::Length));
        taken.push_str(text.take());
    }
    assert_eq!(taken, text.whole());
    let all = String::from_utf8_lossy(&bytes);
    assert!(all.starts_with(text.whole()));
    match text.finish() {
        Some(Finish::Length) => assert_eq!(text.whole(), all),
        Some(_) => assert!(stops.iter().any(|stop| all[text.whole().len()..].starts_with(stop.as_str()))),
        None => assert!(input.tokens.is_empty()),
    }
    let inner = stops.iter().filter(|stop| !stop.is_empty());
    assert!(inner.into_iter().all(|stop| !text.whole().contains(stop.as_str())));
});
