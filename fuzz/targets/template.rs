//! A chat template of any text, over messages of any text, renders or is refused, in bounded time.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tidegate_fuzz::model_head;
use tidegate_node::{
    text::{ChatTemplate, Message, Tokenizer},
    weights::Checkpoint,
};

fuzz_target!(|input: (&str, Vec<(&str, &str)>)| {
    let (source, messages) = input;
    let checkpoint = Checkpoint::from_bytes(Path::new("fuzz.gguf"), model_head(Some(source)).into()).expect("a sound head");
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).expect("a sound tokenizer");
    let Ok(template) = ChatTemplate::from_checkpoint(&checkpoint, &tokenizer) else { return };
    let message = |(role, content): &(&str, &str)| Message {
        role: (*role).to_owned(),
        content: (*content).to_owned(),
        extra: serde_json::Map::new(),
    };
    let _ = template.render(&messages.iter().map(message).collect::<Vec<_>>());
});
