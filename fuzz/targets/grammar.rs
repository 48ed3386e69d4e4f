//! A grammar of any text compiles or is refused, and then leads on: some token is always allowed until the end, in bounded time.
#![no_main]

use std::sync::{Arc, LazyLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tidegate_fuzz::{VOCABULARY, tokenizer};
use tidegate_node::guide::{Grammar, Guides};

static GUIDES: LazyLock<Guides> = LazyLock::new(|| Guides::new(Arc::new(tokenizer())));

/// The tokens that are followed.
const STEPS: usize = 24;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Schema(&'a str),
    Regex(&'a str),
    Lark(&'a str),
    Choice(Vec<&'a str>),
}

fuzz_target!(|input: (u8, Input<'_>)| {
    let (pick, input) = input;
    let grammar = match input {
        Input::Schema(text) => {
            let Ok(schema) = serde_json::from_str(text) else { return };
            Grammar::JsonSchema(schema)
        }
        Input::Regex(text) => Grammar::Regex(text.to_owned()),
        Input::Lark(text) => Grammar::Lark(text.to_owned()),
        Input::Choice(texts) => Grammar::Choice(texts.into_iter().map(str::to_owned).collect()),
    };
    let Ok(mut guide) = GUIDES.compile(&grammar) else { return };
    for step in 0..STEPS {
        let mut logits = vec![0.0f32; VOCABULARY as usize + 1];
        if guide.mask(&mut logits).is_err() {
            return;
        }
        let allowed: Vec<u32> =
            (0..).zip(&logits).filter(|(_, logit)| logit.is_finite()).map(|(token, _)| token).collect();
        assert!(!allowed.is_empty(), "nothing may come next");
        guide.accept(allowed[(usize::from(pick) + step * 7) % allowed.len()]);
    }
});
