//! What the fuzz targets share: a small model file head, made in memory, and the tokenizer in it.

use std::path::Path;

use tidegate_node::{text::Tokenizer, weights::Checkpoint};

/// Takes away libFuzzer's hook that ends the process at the first panic: some libraries' panics are caught and become errors. A panic
/// that reaches the target is a finding all the same.
pub fn panics_may_be_caught() {
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
}

/// A tokenizer of single bytes.
pub fn tokenizer() -> Tokenizer {
    let checkpoint = Checkpoint::from_bytes(Path::new("fuzz.gguf"), model_head(None).into()).expect("a sound head");
    Tokenizer::from_checkpoint(&checkpoint).expect("a sound tokenizer")
}

/// GGML's type of metadata that is a text.
const TEXT: u32 = 8;

/// Metadata that makes a tokenizer of single bytes, whose last token is the end token `<end>`; with a chat template, when given.
pub fn model_head(template: Option<&str>) -> Vec<u8> {
    let mut words: Vec<String> = byte_characters().map(String::from).collect();
    let end = words.len() as u32;
    words.push("<end>".to_owned());
    let types: Vec<u32> = (0..=end).map(|id| if id == end { 3 } else { 1 }).collect();
    let mut head = Head::default();
    head.text("general.architecture", "llama");
    head.text("tokenizer.ggml.model", "gpt2");
    head.text("tokenizer.ggml.pre", "default");
    head.texts("tokenizer.ggml.tokens", &words);
    head.texts("tokenizer.ggml.merges", &[]);
    head.numbers("tokenizer.ggml.token_type", &types);
    head.number("tokenizer.ggml.bos_token_id", end);
    head.number("tokenizer.ggml.eos_token_id", end);
    if let Some(template) = template {
        head.text("tokenizer.chat_template", template);
    }
    head.finish()
}

/// How many tokens that tokenizer has.
pub const VOCABULARY: u32 = 257;

/// The characters by which GPT-2's vocabulary writes the 256 bytes.
fn byte_characters() -> impl Iterator<Item = char> {
    let printable = (0x21..=0x7eu32).chain(0xa1..=0xac).chain(0xae..=0xff);
    printable.chain(0x100..=0x143).filter_map(char::from_u32)
}

/// A GGUF head under way (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
#[derive(Default)]
struct Head {
    entries: u64,
    bytes: Vec<u8>,
}

impl Head {
    fn key(&mut self, key: &str, kind: u32) {
        self.entries += 1;
        self.string(key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    fn text(&mut self, key: &str, text: &str) {
        self.key(key, TEXT);
        self.string(text);
    }

    fn number(&mut self, key: &str, number: u32) {
        self.key(key, 4);
        self.bytes.extend(number.to_le_bytes());
    }

    fn list(&mut self, key: &str, kind: u32, len: usize) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((len as u64).to_le_bytes());
    }

    fn texts(&mut self, key: &str, texts: &[String]) {
        self.list(key, TEXT, texts.len());
        texts.iter().for_each(|text| self.string(text));
    }

    fn numbers(&mut self, key: &str, numbers: &[u32]) {
        self.list(key, 4, numbers.len());
        numbers.iter().for_each(|number| self.bytes.extend(number.to_le_bytes()));
    }

    fn finish(self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(0u64.to_le_bytes());
        file.extend(self.entries.to_le_bytes());
        file.extend(self.bytes);
        file
    }
}
