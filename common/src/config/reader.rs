//! Reading checked values out of a raw table, noting every fault with its path instead of stopping at the first.

use std::{cell::RefCell, collections::BTreeSet, fmt, str::FromStr};

use toml::{Table, Value};

use super::FromValue;

/// One fault in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: `balancer.tls.cert`.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
    /// What to do about it.
    pub fix: String,
    /// Which source set the value, when it was not the file.
    pub origin: Option<String>,
}

impl Problem {
    /// A fault at `path`.
    pub fn new(path: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into(), fix: fix.into(), origin: None }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)?;
        if let Some(origin) = &self.origin {
            write!(f, " (set by {origin})")?;
        }
        write!(f, "\n    fix: {}", self.fix)
    }
}

/// All faults of one run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        writeln!(f, "{count} problem{} in the configuration", if count == 1 { "" } else { "s" })?;
        self.0.iter().try_for_each(|p| writeln!(f, "  {p}"))
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

/// A section of the raw table. Keys that nobody asked for by the time it is dropped are faults.
pub struct Reader<'a> {
    table: Option<&'a Table>,
    path: String,
    asked: RefCell<BTreeSet<String>>,
    problems: &'a RefCell<Vec<Problem>>,
}

impl<'a> Reader<'a> {
    pub(super) fn root<T>(table: &Table, read: impl FnOnce(&Reader<'_>) -> T) -> (T, Vec<Problem>) {
        let problems = RefCell::new(Vec::new());
        let reader = Reader { table: Some(table), path: String::new(), asked: RefCell::default(), problems: &problems };
        let value = read(&reader);
        drop(reader);
        (value, problems.into_inner())
    }

    /// Whether this section stands in the configuration at all.
    pub fn is_present(&self) -> bool {
        self.table.is_some()
    }

    /// Whether `key` is set here.
    pub fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|t| t.contains_key(key))
    }

    /// The full path of `key`.
    pub fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The section below `key`; an absent one reads as all defaults.
    pub fn section(&self, key: &str) -> Reader<'a> {
        let table = match self.take(key) {
            Some(Value::Table(table)) => Some(table),
            Some(other) => {
                self.wrong_type(key, "a section", other);
                None
            }
            None => None,
        };
        Reader { table, path: self.path_of(key), asked: RefCell::default(), problems: self.problems }
    }

    /// The list of sections below `key`, as `[[key]]` writes them.
    pub fn sections(&self, key: &str) -> Vec<Reader<'a>> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let Value::Array(items) = value else {
            self.wrong_type(key, "a list of sections", value);
            return Vec::new();
        };
        let mut readers = Vec::with_capacity(items.len());
        for (i, item) in items.iter().enumerate() {
            match item {
                Value::Table(table) => readers.push(Reader {
                    table: Some(table),
                    path: format!("{}[{i}]", self.path_of(key)),
                    asked: RefCell::default(),
                    problems: self.problems,
                }),
                other => self.wrong_type(&format!("{key}[{i}]"), "a section", other),
            }
        }
        readers
    }

    /// The value of `key`, when it is set and of the right kind.
    pub fn get<T: FromValue>(&self, key: &str) -> Option<T> {
        let value = self.take(key)?;
        T::from_value(value).map_err(|expected| self.wrong_type(key, &expected, value)).ok()
    }

    /// The value of `key`, or `default`.
    pub fn get_or<T: FromValue>(&self, key: &str, default: T) -> T {
        self.get(key).unwrap_or(default)
    }

    /// The value of `key`, when it is set and within `range`.
    pub fn get_in_range<T>(&self, key: &str, range: std::ops::RangeInclusive<T>) -> Option<T>
    where
        T: FromValue + PartialOrd + fmt::Display,
    {
        let value = self.get::<T>(key)?;
        if range.contains(&value) {
            return Some(value);
        }
        let (low, high) = (range.start(), range.end());
        self.problem(
            key,
            format!("{value} is outside {low} to {high}"),
            format!("choose a value from {low} to {high}"),
        );
        None
    }

    /// The value of `key`, which must be within `range`, or `default`.
    pub fn in_range<T>(&self, key: &str, range: std::ops::RangeInclusive<T>, default: T) -> T
    where
        T: FromValue + PartialOrd + fmt::Display,
    {
        self.get_in_range(key, range).unwrap_or(default)
    }

    /// A length of time that must not be zero, or `default`.
    pub fn duration_or(&self, key: &str, default: std::time::Duration) -> std::time::Duration {
        let value = self.get_or(key, default);
        if value.is_zero() {
            self.problem(key, "a duration of zero", "give a length of time such as \"500ms\" or \"5s\"");
            return default;
        }
        value
    }

    /// The value of `key` by its [`FromStr`].
    pub fn parse<T: FromStr>(&self, key: &str) -> Option<T>
    where
        T::Err: fmt::Display,
    {
        let text = self.get::<String>(key)?;
        text.parse().map_err(|e: T::Err| self.problem(key, format!("{e}"), "correct this value")).ok()
    }

    /// Each text of the list at `key` by its [`FromStr`]; one faulty item does not hide the others.
    pub fn parse_list<T: FromStr>(&self, key: &str) -> Option<Vec<T>>
    where
        T::Err: fmt::Display,
    {
        let texts = self.get::<Vec<String>>(key)?;
        let mut values = Vec::with_capacity(texts.len());
        for (i, text) in texts.iter().enumerate() {
            match text.parse() {
                Ok(value) => values.push(value),
                Err(e) => self.problem(&format!("{key}[{i}]"), format!("'{text}': {e}"), "correct this item"),
            }
        }
        Some(values)
    }

    /// One of the named choices, or `default`.
    pub fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)], default: T) -> T {
        let Some(text) = self.get::<String>(key) else { return default };
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
            return *value;
        }
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.problem(key, format!("'{text}' is not a choice here"), format!("use one of {}", names.join(", ")));
        default
    }

    /// Notes a fault at `key`.
    pub fn problem(&self, key: &str, message: impl Into<String>, fix: impl Into<String>) {
        self.problems.borrow_mut().push(Problem::new(self.path_of(key), message, fix));
    }

    fn take(&self, key: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.table.and_then(|t| t.get(key))
    }

    fn wrong_type(&self, key: &str, expected: &str, found: &Value) {
        let found = found.to_string();
        let short: String = found.chars().take(60).collect();
        self.problem(key, format!("{short} is not {expected}"), format!("give {expected}"));
    }

    fn nearest(&self, unknown: &str) -> Option<String> {
        let asked = self.asked.borrow();
        let near = asked.iter().map(|known| (distance(unknown, known), known)).min()?;
        (near.0 <= 1 + unknown.len() / 4).then(|| near.1.clone())
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let Some(table) = self.table else { return };
        for key in table.keys().filter(|key| !self.asked.borrow().contains(*key)) {
            let fix = match self.nearest(key) {
                Some(known) => format!("did you mean '{known}'?"),
                None => format!(
                    "remove it; known here: {}",
                    self.asked.borrow().iter().cloned().collect::<Vec<_>>().join(", ")
                ),
            };
            self.problem(key, "unknown key", fix);
        }
    }
}

/// Levenshtein's edit distance, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitution = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Raw;

    #[test]
    fn every_problem_comes_in_one_run_with_its_path() {
        let raw =
            Raw::from_toml("[a]\nport = \"x\"\nlisten = true\ntimeuot = \"1s\"\n[[a.nodes]]\nid = []\n[zz]\n", "t")
                .unwrap();
        let problems = raw
            .check(|r| {
                let a = r.section("a");
                a.get_or("port", 1u16);
                a.get_or("listen", String::new());
                a.duration_or("timeout", Duration::from_secs(1));
                for node in a.sections("nodes") {
                    node.get::<String>("id");
                }
            })
            .unwrap_err()
            .0;
        let paths: BTreeSet<&str> = problems.iter().map(|p| p.path.as_str()).collect();
        assert_eq!(paths, BTreeSet::from(["a.port", "a.listen", "a.timeuot", "a.nodes[0].id", "zz"]));
        let typo = problems.iter().find(|p| p.path == "a.timeuot").unwrap();
        assert_eq!(typo.fix, "did you mean 'timeout'?");
    }

    #[test]
    fn a_number_outside_its_range_names_the_range() {
        let raw = Raw::from_toml("n = 0", "t").unwrap();
        let problems = raw.check(|r| r.in_range("n", 1..=64u32, 8)).unwrap_err();
        assert!(problems.to_string().contains("1 to 64"), "{problems}");
    }

    #[test]
    fn distance_counts_edits() {
        assert_eq!(distance("listen", "listen"), 0);
        assert_eq!(distance("lsiten", "listen"), 2);
        assert_eq!(distance("", "abc"), 3);
    }
}
