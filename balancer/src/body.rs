//! The few things the edge must know of a generation's body. Everything else in it passes to the node untouched.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use tidegate_common::contract::{ApiError, Resume};

/// More choices than any node accepts; bounds what a stream's memory is sized by.
pub(crate) const CHOICES_MAX: u32 = 128;

/// What the edge reads of a body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    /// The model asked for, if one is named.
    pub(crate) model: Option<String>,
    /// Whether the client wants a stream.
    pub(crate) stream: bool,
    /// Whether the client chose the seed itself.
    pub(crate) seeded: bool,
    /// Whether nothing is drawn.
    pub(crate) is_greedy: bool,
    /// How many answers it wants.
    pub(crate) choices: u32,
    /// The longest that each of them may be, in tokens, if it says so.
    pub(crate) tokens_max: Option<u32>,
}

#[derive(Deserialize)]
struct RawWish<'a> {
    #[serde(borrow)]
    model: Option<Field<Cow<'a, str>>>,
    stream: Option<Field<bool>>,
    n: Option<Field<u32>>,
    // each API has its own word for it
    max_tokens: Option<Field<u32>>,
    max_completion_tokens: Option<Field<u32>>,
    max_output_tokens: Option<Field<u32>>,
    seed: Option<IgnoredAny>,
    temperature: Option<Field<f64>>,
    tidegate_resume: Option<IgnoredAny>,
}

/// A field of the right type, or of another; the difference is told by its name instead of failing the whole body.
#[derive(Deserialize)]
#[serde(untagged)]
enum Field<T> {
    Right(T),
    Wrong(IgnoredAny),
}

impl<T> Field<T> {
    fn right(this: Option<Self>, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        match this {
            None => Ok(None),
            Some(Self::Right(value)) => Ok(Some(value)),
            Some(Self::Wrong(_)) => Err(ApiError::invalid(name, format!("'{name}' must be {expected}"))),
        }
    }
}

impl Wish {
    /// Reads a body.
    pub(crate) fn read(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|e| {
            broken(format!("broken JSON: the body is not UTF-8 after its first {} bytes", e.valid_up_to()))
        })?;
        if !text.trim_start().starts_with('{') {
            return Err(broken("broken JSON: the body must be one JSON object".into()));
        }
        let raw: RawWish<'_> = serde_json::from_str(text).map_err(|e| broken(format!("broken JSON: {e}")))?;
        if raw.tidegate_resume.is_some() {
            return Err(ApiError::invalid(Resume::FIELD, format!("'{}' is not for clients", Resume::FIELD)));
        }
        Ok(Self {
            model: Field::right(raw.model, "model", "text")?.map(Cow::into_owned),
            stream: Field::right(raw.stream, "stream", "true or false")?.unwrap_or(false),
            seeded: raw.seed.is_some(),
            // a wrong temperature is the node's to refuse
            is_greedy: matches!(raw.temperature, Some(Field::Right(t)) if t == 0.0),
            // a wrong n is the node's to refuse
            tokens_max: [raw.max_completion_tokens, raw.max_output_tokens, raw.max_tokens]
                .into_iter()
                .find_map(|field| Field::right(field, "", "").ok().flatten()),
            choices: Field::right(raw.n, "n", "").ok().flatten().unwrap_or(1).clamp(1, CHOICES_MAX),
        })
    }
}

/// The body with one more field. It is known to be a JSON object, so the field goes right behind its first brace.
pub(crate) fn with_field(body: &Bytes, name: &str, value: &impl Serialize) -> Bytes {
    let brace = memchr::memchr(b'{', body).map_or(0, |at| at + 1);
    let (open, rest) = body.split_at(brace);
    let is_empty = rest.trim_ascii_start().starts_with(b"}");
    let value = serde_json::to_vec(value).unwrap_or_default(); // lists of numbers and texts always serialize
    let mut out = BytesMut::with_capacity(body.len() + value.len() + name.len() + 4);
    out.put_slice(open);
    out.put_slice(b"\"");
    out.put_slice(name.as_bytes());
    out.put_slice(b"\":");
    out.put_slice(&value);
    if !is_empty {
        out.put_slice(b",");
    }
    out.put_slice(rest);
    out.freeze()
}

impl Wish {
    /// How many tokens a body of this length and what is asked for will be, as far as one can say without counting: four bytes make
    /// one in most languages, and an answer is as long as it may.
    pub(crate) fn tokens_estimate(&self, body_bytes: usize, answer_tokens: u32) -> u64 {
        let answer = u64::from(self.tokens_max.unwrap_or(answer_tokens));
        prompt_estimate(body_bytes) + u64::from(self.choices) * answer
    }
}

/// The same of the prompt alone.
pub(crate) fn prompt_estimate(body_bytes: usize) -> u64 {
    body_bytes as u64 / 4
}

fn broken(message: String) -> ApiError {
    ApiError { param: None, code: "invalid_json", ..ApiError::invalid("", message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_edge_needs_is_read_and_the_rest_ignored() {
        let wish =
            Wish::read(br#" {"messages":[{"x":[1]}],"model":"m\u0041","stream":true,"seed":0,"n":2,"max_tokens":7} "#)
                .unwrap();
        let expected = Wish {
            model: Some("mA".into()),
            stream: true,
            seeded: true,
            is_greedy: false,
            choices: 2,
            tokens_max: Some(7),
        };
        assert_eq!(wish, expected);
        let wish = Wish::read(br#"{"model":null,"stream":null,"seed":null,"n":"many","max_tokens":-1}"#).unwrap();
        assert_eq!(
            wish,
            Wish { model: None, stream: false, seeded: false, is_greedy: false, choices: 1, tokens_max: None }
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (&b"{"[..], None),
            (b"[]", None),
            (b"", None),
            (b"{\"a\":\"\xff\"}", None),
            (b"{} {}", None),
            (br#"{"model":7}"#, Some("model")),
            (br#"{"model":"m","stream":"yes"}"#, Some("stream")),
            (br#"{"model":"m","tidegate_resume":{"tokens":[]}}"#, Some("tidegate_resume")),
        ] {
            let error = Wish::read(body).unwrap_err();
            assert_eq!((error.status(), error.param.as_deref()), (400, param), "{}", String::from_utf8_lossy(body));
        }
    }
}
