//! What chat templates expect of Python: `json.dumps` with its blanks, and `strftime`.

use std::io;

use chrono::format::{Item, StrftimeItems};
use minijinja::{Error, ErrorKind, Value, value::Kwargs};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

/// Most blanks of one level of indent; more only makes prompts long.
const INDENT_MAX: usize = 16;

/// The filter `tojson` as Hugging Face defines it for chat templates: no HTML escapes, a blank after each comma and colon, `indent`.
pub(super) fn tojson(value: &Value, indent: Option<usize>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        None => kwargs.get::<Option<usize>>("indent")?,
        some => some,
    };
    // what else json.dumps takes changes nothing that a model must know
    for name in ["ensure_ascii", "separators", "sort_keys"] {
        let _ = kwargs.get::<Option<Value>>(name);
    }
    kwargs.assert_all_used()?;
    dumps(value, indent)
        .map(Value::from_safe_string)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, format!("cannot be written as JSON: {e}")))
}

/// JSON as Python writes it.
pub(crate) fn dumps(value: &impl Serialize, indent: Option<usize>) -> serde_json::Result<String> {
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced(CompactFormatter)))?,
        Some(indent) => {
            let blanks = " ".repeat(indent.min(INDENT_MAX));
            let formatter = PrettyFormatter::with_indent(blanks.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// Blanks after commas and colons.
struct Spaced(CompactFormatter);

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `strftime` of a Unix time, in UTC.
pub(super) fn strftime(seconds: u64, format: &str) -> Result<String, Error> {
    let refuse = |what: &str| Error::new(ErrorKind::InvalidOperation, format!("strftime_now('{format}'): {what}"));
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.contains(&Item::Error) {
        return Err(refuse("no such format"));
    }
    let time = i64::try_from(seconds).ok().and_then(|s| chrono::DateTime::from_timestamp(s, 0));
    let time = time.ok_or_else(|| refuse("no such time"))?;
    Ok(time.format_with_items(items.iter()).to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_is_written_as_python_writes_it() {
        let value = json!({"b": [1, 2.5, null, true], "a": {"x": "<é>", "y": {}}, "c": []});
        assert_eq!(dumps(&value, None).unwrap(), r#"{"b": [1, 2.5, null, true], "a": {"x": "<é>", "y": {}}, "c": []}"#);
        let expected = "{\n    \"b\": [\n        1\n    ],\n    \"c\": []\n}";
        assert_eq!(dumps(&json!({"b": [1], "c": []}), Some(4)).unwrap(), expected);
    }

    #[test]
    fn times_are_written_and_foreign_formats_refused() {
        assert_eq!(strftime(1_700_000_000, "%d %B %Y, %H:%M").unwrap(), "14 November 2023, 22:13");
        assert!(strftime(0, "%Q!").is_err());
    }
}
