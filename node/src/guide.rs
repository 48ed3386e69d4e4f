//! Which tokens may come next: grammars that hold an answer to a JSON schema, a regular expression or a list of choices. The grammar
//! engine is llguidance; here it meets our tokenizer and our sampler.
//!
//! A guide's state is a function of the tokens it has accepted, so a stream taken up on another node goes on under the same grammar.
//! When the grammar has come to its end, only the model's end tokens are allowed.

use std::sync::{Arc, OnceLock};

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{TokEnv, TokRxInfo, TokTrie, TokenizerEnv},
};
use serde_json::{Value, json};

use crate::text::Tokenizer;

/// Between the parts of a JSON answer; bounded, because a small model can write blanks for ever.
const JSON_BLANKS: &str = r"[ \n\t]{0,16}";

/// What an answer is held to.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON of this schema (JSON Schema, draft 2020-12, as far as llguidance implements it; what it does not is refused).
    JsonSchema(Value),
    /// Text that matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's notation, with llguidance's additions.
    Lark(String),
}

/// Why a grammar cannot be used; always the request's fault.
#[derive(Debug, thiserror::Error)]
pub enum GuideError {
    /// The grammar is broken, too large, or uses what is not implemented.
    #[error("{0}")]
    Grammar(String),
    /// The model has no end token, so a guided answer could not end.
    #[error("this model names no end token, so its answers cannot be held to a grammar")]
    Endless,
}

/// Compiles grammars for one tokenizer. What they share is built with the first.
pub struct Guides {
    tokenizer: Arc<Tokenizer>,
    factory: OnceLock<Result<ParserFactory, String>>,
}

/// One answer's place in its grammar. A clone goes its own way.
#[derive(Clone)]
pub struct Guide {
    matcher: Matcher,
}

impl Guides {
    /// For this tokenizer.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, factory: OnceLock::new() }
    }

    /// A guide at the beginning of `grammar`. Takes milliseconds, for large schemas more: not for a thread that serves others.
    ///
    /// # Errors
    /// When the grammar cannot be used.
    pub fn compile(&self, grammar: &Grammar) -> Result<Guide, GuideError> {
        if self.tokenizer.end_tokens().is_empty() {
            return Err(GuideError::Endless);
        }
        let factory = self.factory.get_or_init(|| factory(&self.tokenizer));
        let factory = factory.as_ref().map_err(|e| GuideError::Grammar(e.clone()))?;
        let parser = factory.create_parser(source(grammar)).map_err(|e| refusal(&format!("{e:#}")))?;
        let matcher = Matcher::new(Ok(parser));
        matcher.get_error().map_or(Ok(()), |e| Err(refusal(&e)))?;
        Ok(Guide { matcher })
    }
}

impl Guide {
    /// Takes a token of the answer. A token that the grammar does not allow makes the guide useless, which [`mask`](Self::mask) says.
    pub fn accept(&mut self, token: u32) {
        if !self.matcher.is_stopped() {
            let _ = self.matcher.consume_token(token);
        }
    }

    /// Makes the tokens that may not come next impossible, `logits[V]`.
    ///
    /// # Errors
    /// When the grammar cannot go on: a limit of its engine was met, or a token was accepted that it does not allow.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), GuideError> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|e| refusal(&e.to_string()))?;
        // a model's head may be wider than its tokenizer's vocabulary
        logits.iter_mut().skip(allowed.len()).for_each(|logit| *logit = f32::NEG_INFINITY);
        let known = allowed.len().min(logits.len());
        allowed.iter_unset_entries(|token| {
            if token < known {
                logits[token] = f32::NEG_INFINITY;
            }
        });
        Ok(())
    }
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guide")
    }
}

fn source(grammar: &Grammar) -> TopLevelGrammar {
    match grammar {
        Grammar::JsonObject => TopLevelGrammar::from_json_schema(with_blanks(json!({"type": "object"}))),
        Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_blanks(schema.clone())),
        Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
        Grammar::Choice(choices) => {
            let quoted = choices.iter().map(|choice| Value::from(choice.as_str()).to_string());
            TopLevelGrammar::from_lark(format!("start: {}", quoted.collect::<Vec<_>>().join(" | ")))
        }
        Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
    }
}

/// A schema that says itself what may stand between the parts of an answer keeps its word.
pub fn with_blanks(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        object.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_BLANKS}));
    }
    schema
}

fn factory(tokenizer: &Arc<Tokenizer>) -> Result<ParserFactory, String> {
    let words: Vec<Vec<u8>> = (0..tokenizer.vocab() as u32).map(|token| word(tokenizer, token)).collect();
    let ends = tokenizer.end_tokens();
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, ends[0]), &words).with_eos_tokens(ends);
    let environment: TokEnv = Arc::new(Environment { tokenizer: tokenizer.clone(), trie });
    let mut factory = ParserFactory::new_simple(&environment).map_err(|e| format!("{e:#}"))?;
    factory.quiet();
    // what a client sends must not show up in an error with the whole state of the parser
    factory.limits_mut().verbose_errors = false;
    Ok(factory)
}

/// A token's bytes; control tokens by name, behind the mark by which grammars tell them from text.
fn word(tokenizer: &Tokenizer, token: u32) -> Vec<u8> {
    match tokenizer.token_bytes(token) {
        [] => {
            let name = tokenizer.spelled(token).unwrap_or_else(|| format!("<[{token}]>"));
            [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat()
        }
        bytes => bytes.to_vec(),
    }
}

struct Environment {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        let encode = |text: &str| {
            self.tokenizer.encode(text, false).unwrap_or_else(|_| self.trie.greedy_tokenize(text.as_bytes()))
        };
        self.trie.tokenize_with_greedy_fallback(bytes, encode)
    }
}

/// What says something to the sender of a grammar.
fn refusal(error: &str) -> GuideError {
    GuideError::Grammar(error.lines().take(3).collect::<Vec<_>>().join(" ").chars().take(500).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use candle_core::quantized::gguf_file::{self, Value as Meta};

    use super::*;
    use crate::weights::Checkpoint;

    /// A tokenizer of printable ASCII, a few longer tokens, and an end token, all from the same loader as real ones.
    pub(crate) fn guides() -> (Guides, Arc<Tokenizer>) {
        let mut tokens: Vec<String> = (0x21..0x7fu8).map(|b| char::from(b).to_string()).collect();
        tokens.extend(["Ġ", "Ċ", "tr", "\"a", "</s>"].map(str::to_owned));
        let kinds = (0..tokens.len()).map(|i| Meta::I32(if i + 1 == tokens.len() { 3 } else { 1 })).collect();
        let end = tokens.len() as u32 - 1;
        let metadata = [
            ("tokenizer.ggml.model", Meta::String("gpt2".into())),
            ("tokenizer.ggml.merges", Meta::Array(vec![Meta::String("t r".into()), Meta::String("\" a".into())])),
            ("tokenizer.ggml.tokens", Meta::Array(tokens.into_iter().map(Meta::String).collect())),
            ("tokenizer.ggml.token_type", Meta::Array(kinds)),
            ("tokenizer.ggml.eos_token_id", Meta::U32(end)),
        ];
        let mut file = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut file, &metadata.each_ref().map(|(k, v)| (*k, v)), &[]).unwrap();
        let checkpoint = Checkpoint::from_bytes(Path::new("t.checkpoint"), file.into_inner().into()).unwrap();
        let tokenizer = Arc::new(Tokenizer::from_checkpoint(&checkpoint).unwrap());
        (Guides::new(tokenizer.clone()), tokenizer)
    }

    /// Writes what a model would that wants to say `wish` and leaves out what it may not; at its end it takes the first token allowed.
    pub(crate) fn write(guide: &mut Guide, tokenizer: &Tokenizer, wish: &str) -> String {
        let mut bytes = Vec::new();
        let mut wishes = tokenizer.encode(wish, false).unwrap().into_iter();
        for _ in 0..200 {
            let mut logits: Vec<f32> = vec![0.0; tokenizer.vocab()];
            guide.mask(&mut logits).unwrap();
            let mut allowed = (0..tokenizer.vocab() as u32).filter(|token| logits[*token as usize] == 0.0);
            let token =
                wishes.by_ref().find(|token| logits[*token as usize] == 0.0).or_else(|| allowed.next()).unwrap();
            if tokenizer.end_tokens().contains(&token) {
                return String::from_utf8(bytes).unwrap();
            }
            guide.accept(token);
            bytes.extend_from_slice(tokenizer.token_bytes(token));
        }
        panic!("no end after {}", String::from_utf8_lossy(&bytes));
    }

    fn guided(grammar: &Grammar, wish: &str) -> String {
        let (guides, tokenizer) = guides();
        write(&mut guides.compile(grammar).unwrap(), &tokenizer, wish)
    }

    #[test]
    fn an_answer_keeps_to_its_grammar_whatever_the_model_likes() {
        let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "maximum": 9}}, "required": ["ok", "n"], "additionalProperties": false});
        let answer = guided(&Grammar::JsonSchema(schema), "Sure! {\"ok\":true,\"n\":7} I hope");
        let value: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(value, json!({"ok": true, "n": 7}));
        assert_eq!(guided(&Grammar::Choice(vec!["yes".into(), "no \"\\ way".into()]), "no "), "no \"\\ way");
        assert_eq!(guided(&Grammar::Regex("[0-9]{3}-[ab]+z".into()), "12x4-bz"), "124-bz");
        assert!(
            serde_json::from_str::<serde_json::Map<String, Value>>(&guided(&Grammar::JsonObject, "{\"a\":1}")).is_ok()
        );
        assert_eq!(guided(&Grammar::Lark("start: \"<\" /[a-c]+/ \">\"".into()), "<cab>"), "<cab>");
    }

    #[test]
    fn a_guide_taken_up_from_its_tokens_goes_on_the_same() {
        let (guides, tokenizer) = guides();
        let grammar = Grammar::JsonSchema(json!({"type": "array", "items": {"enum": ["a", "tree"]}, "minItems": 3}));
        let whole = write(&mut guides.compile(&grammar).unwrap(), &tokenizer, "[\"tree\",\"a\",\"tree\"]");
        let tokens = tokenizer.encode(&whole, false).unwrap();
        for had in 0..tokens.len() {
            let mut guide = guides.compile(&grammar).unwrap();
            tokens[..had].iter().for_each(|token| guide.accept(*token));
            let done: Vec<u8> = tokens[..had].iter().flat_map(|t| tokenizer.token_bytes(*t).to_vec()).collect();
            let done = String::from_utf8(done).unwrap();
            assert_eq!(done.clone() + &write(&mut guide, &tokenizer, &whole[done.len()..]), whole);
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_and_what_does_not_fit_is_an_error() {
        let (guides, tokenizer) = guides();
        let broken = [
            Grammar::Regex("(".into()),
            Grammar::Lark("start: nothing".into()),
            Grammar::JsonSchema(json!({"type": "no such type"})),
            Grammar::JsonSchema(json!(7)),
        ];
        for grammar in broken {
            let refused = guides.compile(&grammar);
            assert!(matches!(refused, Err(GuideError::Grammar(_))), "{grammar:?} passed");
        }
        let mut guide = guides.compile(&Grammar::Choice(vec!["yes".into()])).unwrap();
        guide.accept(tokenizer.encode("q", false).unwrap()[0]);
        assert!(guide.mask(&mut vec![0.0; tokenizer.vocab()]).is_err());
    }
}
