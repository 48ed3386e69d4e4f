//! From a request's words to tokens: chat template, then tokenizer.

pub(crate) mod python;
mod template;
mod tokenizer;
mod marked;
mod split;
mod bpe;
mod spm;
mod json;
mod spelling;

pub use template::{ChatTemplate, Conversation, Message, TemplateError, fallback};
pub use tokenizer::Tokenizer;
