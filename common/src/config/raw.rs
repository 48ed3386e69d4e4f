//! The raw layer: one TOML table from three sources, later ones over earlier: file, environment, flags.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use toml::{Table, Value};

use super::{Problem, Problems, Reader};

/// Environment variables that begin so are configuration: `TIDEGATE__BALANCER__LISTEN` is `balancer.listen`.
pub const ENV_PREFIX: &str = "TIDEGATE__";

/// An unchecked configuration, and where each overridden value came from.
#[derive(Debug, Default, Clone)]
pub struct Raw {
    table: Table,
    origins: BTreeMap<String, String>,
    problems: Vec<Problem>,
}

impl Raw {
    /// Nothing set: every value is its default.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// When the file cannot be read or is not TOML; the text says which, and where.
    pub fn from_file(path: &Path) -> Result<Self, Problems> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Problem::new(
                path.display().to_string(),
                format!("cannot be read: {e}"),
                "give the path of a readable TOML file",
            )
        })?;
        Self::from_toml(&text, &path.display().to_string())
    }

    /// Reads TOML text; `name` stands in messages.
    ///
    /// # Errors
    /// When the text is not TOML, with line and column.
    pub fn from_toml(text: &str, name: &str) -> Result<Self, Problems> {
        let table = text.parse::<Table>().map_err(|e| {
            Problem::new(
                name.to_owned(),
                format!("is not valid TOML: {}", e.to_string().trim()),
                "mend the syntax at that line",
            )
        })?;
        Ok(Self { table, ..Self::default() })
    }

    /// Lays the variables that begin with [`ENV_PREFIX`] over what is there.
    #[must_use]
    pub fn with_env(mut self, vars: impl IntoIterator<Item = (String, String)>) -> Self {
        for (name, text) in vars {
            if let Some(rest) = name.strip_prefix(ENV_PREFIX) {
                let path = rest.to_lowercase().replace("__", ".");
                self.set(&path, &text, format!("environment variable {name}"));
            }
        }
        self
    }

    /// Lays one command-line flag over what is there.
    #[must_use]
    pub fn with_flag(mut self, path: &str, flag: &str, value: Option<String>) -> Self {
        if let Some(text) = value {
            self.set(path, &text, format!("flag {flag}"));
        }
        self
    }

    /// Sets a value only when no other source has.
    #[must_use]
    pub fn with_default(mut self, path: &str, text: &str) -> Self {
        if !self.has(path) {
            self.set(path, text, "built-in default".to_owned());
        }
        self
    }

    /// Whether any source sets `path`.
    pub fn has(&self, path: &str) -> bool {
        let mut keys = path.split('.');
        let Some(mut at) = keys.next().and_then(|k| self.table.get(k)) else { return false };
        for key in keys {
            match at.get(key) {
                Some(next) => at = next,
                None => return false,
            }
        }
        true
    }

    /// Paths of all values that are others here than there; a list is one value.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        differences(&self.table, &other.table, "", &mut found);
        found
    }

    /// Makes a checked value; all faults of the whole run come back together.
    ///
    /// # Errors
    /// Every problem found, each with its path and fix. Top-level sections that `read` never asked for are problems too.
    pub fn check<T>(&self, read: impl FnOnce(&Reader<'_>) -> T) -> Result<T, Problems> {
        let (value, mut found) = Reader::root(&self.table, read);
        found.extend(self.problems.iter().cloned());
        for problem in &mut found {
            problem.origin = self.origins.get(&problem.path).cloned();
        }
        if found.is_empty() { Ok(value) } else { Err(Problems(found)) }
    }

    fn set(&mut self, path: &str, text: &str, origin: String) {
        let mut keys: Vec<&str> = path.split('.').collect();
        let last = keys.pop().unwrap_or_default();
        let mut table = &mut self.table;
        for key in keys {
            let next = table.entry(key.to_owned()).or_insert_with(|| Value::Table(Table::new()));
            let Value::Table(inner) = next else {
                let fix = "remove one of the two";
                self.problems.push(Problem::new(
                    path.to_owned(),
                    format!("{origin} needs a section where '{key}' is a value"),
                    fix,
                ));
                return;
            };
            table = inner;
        }
        table.insert(last.to_owned(), parse(text));
        self.origins.insert(path.to_owned(), origin);
    }
}

fn differences(a: &Table, b: &Table, prefix: &str, found: &mut Vec<String>) {
    let empty = Table::new();
    let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    for key in keys {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match (a.get(key), b.get(key)) {
            (Some(Value::Table(a)), Some(Value::Table(b))) => differences(a, b, &path, found),
            (Some(Value::Table(only)), None) | (None, Some(Value::Table(only))) => {
                differences(only, &empty, &path, found);
            }
            (a, b) if a != b => found.push(path),
            _ => {}
        }
    }
}

/// What a person means by text without quotes: a number, truth value or list when it reads as one, else the text itself.
fn parse(text: &str) -> Value {
    match format!("v = {text}").parse::<Table>() {
        Ok(mut table) if table.len() == 1 => match table.remove("v") {
            Some(Value::Datetime(_)) | None => Value::String(text.to_owned()),
            Some(value) => value,
        },
        _ => Value::String(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(raw: &Raw) -> Result<u16, Problems> {
        raw.check(|r| r.section("balancer").get_or("port", 1))
    }

    #[test]
    fn flags_go_over_environment_goes_over_file() {
        let file = Raw::from_toml("[balancer]\nport = 2", "f").unwrap();
        assert_eq!(port(&file).unwrap(), 2);
        let env = file.with_env([("TIDEGATE__BALANCER__PORT".into(), "3".into()), ("HOME".into(), "x".into())]);
        assert_eq!(port(&env).unwrap(), 3);
        assert_eq!(port(&env.with_flag("balancer.port", "--port", Some("4".into()))).unwrap(), 4);
    }

    #[test]
    fn a_difference_is_named_by_its_path_whichever_side_lacks_it() {
        let read = |text: &str| Raw::from_toml(text, "f").unwrap();
        let a = read("[balancer]\nport = 1\nallow = [\"::1\"]\n[balancer.tls]\ncert = \"c\"\n[log]\nlevel = \"info\"");
        let b = read("[balancer]\nport = 1\nallow = [\"::2\"]\n[log]\nlevel = \"warn\"\n[node]\n");
        assert_eq!(a.differences(&b), ["balancer.allow", "balancer.tls.cert", "log.level"]);
        assert_eq!(b.differences(&a), a.differences(&b));
        assert!(a.differences(&a).is_empty());
    }

    #[test]
    fn a_fault_names_the_source_it_came_from() {
        let raw = Raw::empty().with_env([("TIDEGATE__BALANCER__PORT".into(), "many".into())]);
        let text = port(&raw).unwrap_err().to_string();
        assert!(text.contains("balancer.port") && text.contains("TIDEGATE__BALANCER__PORT"), "{text}");
    }

    #[test]
    fn text_without_quotes_is_what_it_looks_like() {
        assert_eq!(parse("8"), Value::Integer(8));
        assert_eq!(parse("true"), Value::Boolean(true));
        assert_eq!(parse("127.0.0.1:80"), Value::String("127.0.0.1:80".into()));
        assert_eq!(parse("a\nb = 1"), Value::String("a\nb = 1".into()));
    }
}
