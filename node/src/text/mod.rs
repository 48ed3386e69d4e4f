//! From a request's words to tokens: chat template, then tokenizer.

mod bpe;
pub(crate) mod python;
mod template;
mod tokenizer;

pub use template::{ChatTemplate, Conversation, Message, TemplateError, fallback};
pub use tokenizer::Tokenizer;
