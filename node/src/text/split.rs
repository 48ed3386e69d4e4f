//! How texts are cut into words before byte-level BPE merges within them. GGUF names the rule (`tokenizer.ggml.pre`) without spelling it
//! out, so the rules are here; each is the pre-tokenizer of that family's published `tokenizer.json`.

use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::weights::LoadError;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words begin with upper case and go on with lower case; contractions belong to the word.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_CODER: [&str; 5] =
    [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u{4e00}-\u{9fa5}\u{0800}-\u{4e00}\u{ac00}-\u{d7ff}]+", r"\p{N}"];
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// A rule, and what goes with it in the families that use it.
pub(super) struct Rule {
    pub(super) splitter: PreTokenizerWrapper,
    /// A word that is a token as a whole is that token, whatever the merges make of it.
    pub(super) ignores_merges: bool,
    /// Whether prompts begin with the begin token where the file does not say.
    pub(super) adds_begin: bool,
    /// Whether text is brought to Unicode's composed form first.
    pub(super) composes: bool,
}

/// The rule of that name.
///
/// # Errors
/// When we do not know it: another rule would make other tokens than the model was trained on.
pub(super) fn rule(name: &str) -> Result<Rule, LoadError> {
    let words: PreTokenizerWrapper = ByteLevel::new(false, true, true).into();
    let bytes: PreTokenizerWrapper = ByteLevel::new(false, true, false).into();
    let then_bytes = |patterns: &[&str]| -> Result<Vec<PreTokenizerWrapper>, LoadError> {
        let split = |pattern: &&str| {
            let split = Split::new(SplitPattern::Regex((*pattern).to_owned()), SplitDelimiterBehavior::Isolated, false);
            split
                .map(PreTokenizerWrapper::from)
                .map_err(|e| LoadError::Unsupported(format!("splitting rule '{name}': {e}")))
        };
        patterns.iter().map(split).chain([Ok(bytes.clone())]).collect()
    };
    let parts = match name {
        "gpt-2" | "default" | "phi-2" | "mpt" | "olmo" | "jais" | "roberta-bpe" => vec![words],
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            vec![Digits::new(true).into(), words]
        }
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" | "dbrx" | "glm4" | "chatglm-bpe" | "falcon3" | "pixtral"
        | "lfm2" => then_bytes(&[LLAMA3])?,
        "qwen2" | "deepseek-r1-qwen" | "megrez" => then_bytes(&[QWEN2])?,
        "gpt-4o" | "llama4" => then_bytes(&[GPT4O])?,
        "tekken" => then_bytes(&[TEKKEN])?,
        "deepseek-coder" => then_bytes(&DEEPSEEK_CODER)?,
        "deepseek-v3" => then_bytes(&DEEPSEEK_V3)?,
        other => {
            let text = format!("the tokenizer's splitting rule '{other:.100}' ('tokenizer.ggml.pre') is not supported");
            return Err(LoadError::Unsupported(text));
        }
    };
    let is_llama3 = matches!(name, "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" | "lfm2" | "tekken");
    Ok(Rule {
        splitter: Sequence::new(parts).into(),
        ignores_merges: is_llama3,
        adds_begin: is_llama3,
        composes: name == "qwen2",
    })
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    fn words(name: &str, text: &str) -> Vec<String> {
        let mut split = PreTokenizedString::from(text);
        rule(name).unwrap().splitter.pre_tokenize(&mut split).unwrap();
        let splits = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    }

    /// One text that each rule cuts in its own way: contractions, digits, line ends, runs of blanks, upper case within words.
    #[test]
    fn each_rule_cuts_where_its_family_does() {
        let text = "It'S 1234 camelCase--\n\n  x";
        let cases: [(&str, &[&str]); 8] = [
            ("gpt-2", &["It", "'", "S", " 1234", " camelCase", "--", "\n\n ", " x"]),
            ("smollm", &["It", "'", "S", " ", "1", "2", "3", "4", " camelCase", "--", "\n\n ", " x"]),
            ("llama-bpe", &["It", "'S", " ", "123", "4", " camelCase", "--\n\n", " ", " x"]),
            ("qwen2", &["It", "'S", " ", "1", "2", "3", "4", " camelCase", "--\n\n", " ", " x"]),
            ("gpt-4o", &["It'S", " ", "123", "4", " camel", "Case", "--\n\n", " ", " x"]),
            ("tekken", &["It", "'S", " ", "1", "2", "3", "4", " camel", "Case", "--\n\n", " ", " x"]),
            ("deepseek-coder", &["It", "'", "S", " ", "1", "2", "3", "4", " camelCase", "--", "\n", "\n", " ", " x"]),
            ("deepseek-v3", &["It", "'S", " ", "123", "4", " camelCase", "--\n\n", " ", " x"]),
        ];
        for (name, expected) in cases {
            assert_eq!(words(name, text), expected, "{name}");
        }
        assert_eq!(words("deepseek-v3", "日本go"), ["日本", "go"]);
        assert_eq!(words("deepseek-coder", "go日 x"), ["go", "日", " x"]);
    }

    #[test]
    fn an_unknown_rule_is_refused_by_name() {
        assert!(rule("klingon").err().unwrap().to_string().contains("'klingon'"));
    }
}
