//! A chat template of any text, over messages of any text, renders or is refused, in bounded time.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use serde_json::json;
use tidegate_fuzz::{model_head, panics_may_be_caught};
use tidegate_node::{
    text::{ChatTemplate, Conversation, Message, Tokenizer},
    weights::Checkpoint,
};

fuzz_target!(
    init: panics_may_be_caught(),
    |input: (&str, Vec<(&str, &str)>)| {
        let (source, messages) = input;
        let checkpoint = Checkpoint::from_bytes(Path::new("fuzz.gguf"), model_head(Some(source)).into()).expect("a sound head");
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint).expect("a sound tokenizer");
        let Ok(template) = ChatTemplate::from_checkpoint(&checkpoint, &tokenizer) else { return };
        let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content, "name": role});
        let messages = messages.iter().map(message).map(serde_json::from_value::<Message>);
        let messages: Vec<Message> = messages.collect::<Result<_, _>>().expect("texts make a message");
        let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})];
        let _ = template.render(&Conversation { messages: &messages, tools: Some(&tools), variables: None, now: 1_700_000_000 });
    }
);
