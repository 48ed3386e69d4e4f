//! How one raw TOML value becomes a typed one. The error is what was expected, in words that follow "is not".

use std::{path::PathBuf, time::Duration};

use bytesize::ByteSize;
use toml::Value;

/// A type that can be read from one raw value.
pub trait FromValue: Sized {
    /// Reads `value`.
    ///
    /// # Errors
    /// What was expected instead, such as "a whole number from 0 to 65535".
    fn from_value(value: &Value) -> Result<Self, String>;
}

impl FromValue for String {
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(text.clone()),
            // an environment variable or flag may hold a bare number where a name is meant
            Value::Integer(n) => Ok(n.to_string()),
            _ => Err("text".into()),
        }
    }
}

impl FromValue for bool {
    fn from_value(value: &Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| "true or false".into())
    }
}

impl FromValue for f64 {
    fn from_value(value: &Value) -> Result<Self, String> {
        let number = value.as_float().or_else(|| value.as_integer().map(|n| n as f64));
        number.filter(|n| n.is_finite()).ok_or_else(|| "a number".into())
    }
}

macro_rules! whole_numbers {
    ($($type:ty),*) => {$(
        impl FromValue for $type {
            fn from_value(value: &Value) -> Result<Self, String> {
                let number = value.as_integer().and_then(|n| <$type>::try_from(n).ok());
                number.ok_or_else(|| format!("a whole number from {} to {}", <$type>::MIN, <$type>::MAX))
            }
        }
    )*};
}
whole_numbers!(u16, u32, u64, usize);

impl FromValue for PathBuf {
    fn from_value(value: &Value) -> Result<Self, String> {
        match value.as_str() {
            Some(text) if !text.is_empty() => Ok(Self::from(text)),
            _ => Err("a path".into()),
        }
    }
}

/// `"500ms"`, `"5s"`, `"2m 30s"`.
impl FromValue for Duration {
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = value.as_str().unwrap_or_default();
        humantime::parse_duration(text).map_err(|_| "a duration such as \"500ms\", \"5s\" or \"2m\"".into())
    }
}

/// `"2GiB"`, `"512MiB"`, or a number of bytes.
impl FromValue for ByteSize {
    fn from_value(value: &Value) -> Result<Self, String> {
        let size = match value {
            Value::String(text) => text.parse().ok(),
            Value::Integer(n) => u64::try_from(*n).ok().map(ByteSize),
            _ => None,
        };
        size.ok_or_else(|| "a size such as \"512MiB\" or \"2GiB\"".into())
    }
}

/// A list, or one text with commas between the items, as the environment gives it.
impl<T: FromValue> FromValue for Vec<T> {
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::Array(items) => items
                .iter()
                .map(T::from_value)
                .collect::<Result<_, _>>()
                .map_err(|e| format!("a list of which each item is {e}")),
            Value::String(text) if text.is_empty() => Ok(Vec::new()),
            Value::String(text) => {
                text.split(',').map(|item| T::from_value(&Value::String(item.trim().to_owned()))).collect()
            }
            _ => Err("a list".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_and_nonsense_is_not() {
        assert_eq!(Duration::from_value(&"1m 30s".into()), Ok(Duration::from_secs(90)));
        assert_eq!(ByteSize::from_value(&"2GiB".into()), Ok(ByteSize::gib(2)));
        assert_eq!(Vec::<String>::from_value(&"a, b".into()), Ok(vec!["a".to_owned(), "b".to_owned()]));
        assert!(Duration::from_value(&Value::Integer(5)).is_err());
        assert!(u16::from_value(&Value::Integer(70_000)).is_err());
        assert!(f64::from_value(&Value::Float(f64::NAN)).is_err());
    }
}
