//! Names with stars, as lists of models and policies write them: `smollm2*`, `*`, `inference:*`.

use std::{fmt, str::FromStr};

/// A text in which each `*` stands for any characters, none too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

/// A text that is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("is empty; write a name, or * for all of them")]
pub struct EmptyPattern;

impl FromStr for Pattern {
    type Err = EmptyPattern;

    fn from_str(text: &str) -> Result<Self, EmptyPattern> {
        if text.is_empty() { Err(EmptyPattern) } else { Ok(Self(text.to_owned())) }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Pattern {
    /// `*`.
    pub(crate) fn any() -> Self {
        Self("*".into())
    }

    /// Whether it stands for every name.
    pub(crate) fn is_any(&self) -> bool {
        self.0 == "*"
    }

    /// Whether it stands for `name`.
    pub(crate) fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        for part in parts {
            // the earliest place leaves the most for what follows
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().matches(name)
    }

    /// By trying each length of what the first star stands for.
    fn plainly(pattern: &[u8], name: &[u8]) -> bool {
        match pattern.split_first() {
            None => name.is_empty(),
            Some((b'*', rest)) => (0..=name.len()).any(|n| plainly(rest, &name[n..])),
            Some((c, rest)) => name.first() == Some(c) && plainly(rest, &name[1..]),
        }
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, name, is_match) in
            [("*", "", true), ("a", "a", true), ("a", "ab", false), ("a*b", "ab", true), ("a*a", "a", false)]
        {
            assert_eq!(matches(pattern, name), is_match, "{pattern} {name}");
        }
        assert!("".parse::<Pattern>().is_err());
    }

    proptest! {
        #[test]
        fn it_agrees_with_the_plain_way(pattern in "[ab*]{1,6}", name in "[ab]{0,8}") {
            prop_assert_eq!(matches(&pattern, &name), plainly(pattern.as_bytes(), name.as_bytes()));
        }
    }
}
