//! How a vocabulary spells bytes, and each token's bytes from it.

use tokenizers::{Decoder, DecoderWrapper, pre_tokenizers::metaspace::PrependScheme};

/// SentencePiece's way to write a blank, U+2581.
pub(super) const BLANK: char = '▁';

/// How tokens are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's: each byte is a printable character.
    ByteLevel,
    /// SentencePiece's: blanks are `▁`, and a byte that is no character is `<0xNN>`.
    Pieces {
        /// Whether a text's first blank was put there by the tokenizer, and goes again.
        drops_first_blank: bool,
    },
}

impl Spelling {
    /// The spelling that a decoder undoes.
    ///
    /// # Errors
    /// When it does what we do not do after it; the text says what.
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Result<Self, String> {
        match decoder {
            None => Err("it has no decoder".to_owned()),
            Some(DecoderWrapper::Sequence(sequence)) => {
                let mut found = Self::Pieces { drops_first_blank: false };
                for part in sequence.get_decoders() {
                    found = found.with(part)?;
                }
                Ok(found)
            }
            Some(one) => Self::Pieces { drops_first_blank: false }.with(one),
        }
    }

    fn with(self, part: &DecoderWrapper) -> Result<Self, String> {
        let dropping = Ok(Self::Pieces { drops_first_blank: true });
        match part {
            DecoderWrapper::ByteLevel(_) => Ok(Self::ByteLevel),
            DecoderWrapper::ByteFallback(_) | DecoderWrapper::Fuse(_) => Ok(self),
            DecoderWrapper::Metaspace(m) if m.get_replacement() == BLANK => match m.get_prepend_scheme() {
                PrependScheme::Never => Ok(self),
                _ => dropping,
            },
            DecoderWrapper::Strip(strip) if (strip.content, strip.start, strip.stop) == (' ', 1, 0) => dropping,
            DecoderWrapper::Replace(_)
                if part.decode_chain(vec![BLANK.to_string()]).is_ok_and(|text| text == [" "]) =>
            {
                Ok(self)
            }
            other => Err(format!("its decoder '{}' is not supported", name(other))),
        }
    }

    /// The bytes that a token stands for.
    pub(super) fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => token.chars().flat_map(char_bytes).collect(),
            Self::Pieces { .. } => {
                byte_token(token).map_or_else(|| token.replace(BLANK, " ").into_bytes(), |byte| vec![byte])
            }
        }
    }
}

fn name(decoder: &DecoderWrapper) -> String {
    format!("{decoder:?}").chars().take_while(|c| c.is_alphanumeric()).collect()
}

/// The byte that `<0xNN>` names.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The bytes of one character of a byte-level vocabulary: GPT-2 writes each byte as a printable character, bytes that are printable
/// Latin-1 as themselves and the others as the characters from U+0100 on, in order. Any other character stands for itself.
fn char_bytes(c: char) -> Vec<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => vec![code as u8],
        // 0..=32, 127..=160 and 173 are the 68 bytes that are not printable
        0x100..=0x120 => vec![(code - 0x100) as u8],
        0x121..=0x142 => vec![(code - 0x121 + 127) as u8],
        0x143 => vec![173],
        _ => c.to_string().into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let one_byte = (0..0x144u32).filter_map(char::from_u32).map(char_bytes).filter(|b| b.len() == 1);
        let bytes: BTreeSet<u8> = one_byte.flatten().collect();
        assert_eq!(bytes.len(), 256);
        assert_eq!(char_bytes('Ġ'), b" ");
        assert_eq!(char_bytes('Ċ'), b"\n");
        assert_eq!(char_bytes('…'), "…".as_bytes());
    }

    #[test]
    fn pieces_are_blanks_bytes_and_text() {
        let pieces = Spelling::Pieces { drops_first_blank: false };
        assert_eq!(pieces.bytes("▁a▁"), b" a ");
        assert_eq!(pieces.bytes("<0x0A>"), b"\n");
        for plain in ["<0x+A>", "<0x0>", "<0x0AB>", "<0xé>"] {
            assert_eq!(pieces.bytes(plain), plain.as_bytes());
        }
    }

    #[test]
    fn decoders_say_the_spelling_or_are_refused_by_name() {
        let of = |json: &str| Spelling::of(Some(&serde_json::from_str(json).unwrap()));
        let llama = r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},
            {"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#;
        assert_eq!(of(llama), Ok(Spelling::Pieces { drops_first_blank: true }));
        let gemma = r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"}]}"#;
        assert_eq!(of(gemma), Ok(Spelling::Pieces { drops_first_blank: false }));
        let bytes = r#"{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}"#;
        assert_eq!(of(bytes), Ok(Spelling::ByteLevel));
        let meta = r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true}"#;
        assert_eq!(of(meta), Ok(Spelling::Pieces { drops_first_blank: true }));
        let other = of(r#"{"type":"WordPiece","prefix":"+","cleanup":true}"#).unwrap_err();
        assert!(other.contains("'WordPiece'"), "{other}");
        assert!(of(r#"{"type":"Replace","pattern":{"String":"x"},"content":"y"}"#).is_err());
    }
}
