//! From a request's words to tokens: chat template, then tokenizer.

mod bpe;
mod template;
mod tokenizer;

pub use template::{ChatTemplate, Message, TemplateError};
pub use tokenizer::Tokenizer;
