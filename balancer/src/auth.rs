//! Who asks: a bearer key, known here only by its SHA-256 and compared in constant time.

use std::{os::unix::fs::PermissionsExt, path::Path, sync::Arc, time::SystemTime};

use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use tidegate_common::{
    config::{FromValue, Raw, Reader},
    contract::{ApiError, ErrorKind},
};
use toml::Value;

/// The known keys. Deliberately without `Debug`.
pub(crate) struct Keys(Vec<Key>);

struct Key {
    sha256: [u8; 32],
    owner: Arc<str>,
    expires: Option<UnixSeconds>,
}

/// Seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct UnixSeconds(pub(crate) u64);

impl UnixSeconds {
    pub(crate) fn now() -> Self {
        Self(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()))
    }
}

/// A time as RFC 3339 in UTC, quoted or not, or as seconds since 1970.
impl FromValue for UnixSeconds {
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = match value {
            Value::Integer(n) => return u64::try_from(*n).map(Self).map_err(|_| "a time after 1970".into()),
            Value::Datetime(time) => time.to_string(),
            Value::String(text) => text.clone(),
            _ => String::new(),
        };
        let time = humantime::parse_rfc3339(&text).ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
        time.map(|t| Self(t.as_secs()))
            .ok_or_else(|| "a time such as 2030-01-31T00:00:00Z, or seconds since 1970".into())
    }
}

impl Keys {
    /// Reads `[balancer.auth]`; `None` when no key is asked for.
    pub(crate) fn read(r: &Reader<'_>) -> Option<Self> {
        let path = r.get::<std::path::PathBuf>("keys_file");
        if path.is_none() && r.is_present() && !r.has("keys_file") {
            r.problem("keys_file", "is missing", "name a file of keys, or remove the section to ask for none");
        }
        let path = path?;
        check_mode(r, "keys_file", &path);
        match Raw::from_file(&path).and_then(|raw| raw.check(Self::read_file)) {
            Ok(keys) => Some(keys),
            Err(problems) => {
                for problem in problems.0 {
                    r.problem("keys_file", format!("{}: {}", problem.path, problem.message), problem.fix);
                }
                None
            }
        }
    }

    fn read_file(root: &Reader<'_>) -> Self {
        let sections = root.sections("keys");
        if sections.is_empty() {
            root.problem("keys", "no key is listed", "add [[keys]] with id, sha256 and owner");
        }
        Self(sections.iter().filter_map(Key::read).collect())
    }

    /// Whose key this is.
    pub(crate) fn owner(&self, given: Option<&[u8]>, now: UnixSeconds) -> Result<Arc<str>, ApiError> {
        let Some(given) = given else {
            let message = "no API key was given; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'";
            return Err(refusal("missing_api_key", message));
        };
        match self.find(&Sha256::digest(given).into()) {
            None => Err(refusal("invalid_api_key", "this API key is not known here")),
            Some(key) if key.expires.is_some_and(|at| at <= now) => {
                Err(refusal("expired_api_key", "this API key has expired"))
            }
            Some(key) => Ok(Arc::clone(&key.owner)),
        }
    }

    /// Compares with every key, so that the time taken says nothing about which one matched.
    fn find(&self, sha256: &[u8; 32]) -> Option<&Key> {
        let (mut found, mut at) = (Choice::from(0), 0u64);
        for (i, key) in self.0.iter().enumerate() {
            let equal = key.sha256.ct_eq(sha256);
            at.conditional_assign(&(i as u64), equal);
            found |= equal;
        }
        if bool::from(found) { self.0.get(at as usize) } else { None }
    }
}

impl Key {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let id = r.get::<String>("id");
        let sha256 = r.get::<String>("sha256");
        let owner = r.get::<String>("owner");
        let expires = r.get("expires");
        for (key, missing) in [("id", !r.has("id")), ("sha256", !r.has("sha256")), ("owner", !r.has("owner"))] {
            if missing {
                r.problem(key, "is missing", "every key needs id, sha256 and owner");
            }
        }
        let decoded = sha256.as_deref().map(decode_hex);
        if matches!(decoded, Some(None)) {
            r.problem("sha256", "is not 64 hexadecimal digits", "write the output of: printf %s KEY | sha256sum");
        }
        if owner.as_ref().is_some_and(|o| o.is_empty() || !o.bytes().all(|b| b.is_ascii_graphic())) {
            r.problem("owner", "is not a name of printable ASCII without spaces", "choose a short name");
            return None;
        }
        id?;
        Some(Self { sha256: decoded??, owner: owner?.into(), expires })
    }
}

/// Notes at `key` when others than its owner can reach a file of secrets.
pub(crate) fn check_mode(r: &Reader<'_>, key: &str, path: &Path) {
    let Ok(metadata) = std::fs::metadata(path) else { return };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let message = format!("{} has mode {mode:o}: others than its owner can reach it", path.display());
        r.problem(key, message, format!("chmod 600 {}", path.display()));
    }
}

fn decode_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

/// The key in an `Authorization` header.
pub(crate) fn bearer(header: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, key) = header.split_at_checked(SCHEME.len())?;
    let key = key.trim_ascii();
    (scheme.eq_ignore_ascii_case(SCHEME) && !key.is_empty()).then_some(key)
}

fn refusal(code: &'static str, message: &str) -> ApiError {
    ApiError::new(ErrorKind::Unauthenticated, code, message)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;

    // SHA-256 of "one" and "two"
    const ONE: &str = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";
    const TWO: &str = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3";

    fn read(text: &str, mode: u32) -> Result<Option<Keys>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        fs::set_permissions(file.path(), Permissions::from_mode(mode)).unwrap();
        let config = format!("keys_file = {:?}", file.path());
        Raw::from_toml(&config, "t").unwrap().check(Keys::read).map_err(|e| e.to_string())
    }

    fn keys() -> Keys {
        let text = format!(
            "[[keys]]\nid = \"a\"\nsha256 = \"{ONE}\"\nowner = \"alice\"\n[[keys]]\nid = \"b\"\nsha256 = \"{TWO}\"\nowner = \"bob\"\n\
             expires = 2030-01-01T00:00:00Z\n"
        );
        read(&text, 0o600).ok().flatten().unwrap()
    }

    #[test]
    fn a_known_key_has_an_owner_until_it_expires() {
        let keys = keys();
        let (before, after) = (UnixSeconds(1_893_455_999), UnixSeconds(1_893_456_000));
        assert_eq!(&*keys.owner(bearer(b"Bearer one"), after).unwrap(), "alice");
        assert_eq!(&*keys.owner(bearer(b"bearer two"), before).unwrap(), "bob");
        assert_eq!(keys.owner(bearer(b"Bearer two"), after).unwrap_err().code, "expired_api_key");
        assert_eq!(keys.owner(bearer(b"Bearer three"), before).unwrap_err().code, "invalid_api_key");
        for none in [None, Some(&b"Basic one"[..]), Some(b"Bearer "), Some(b"B")] {
            assert_eq!(keys.owner(none.and_then(bearer), before).unwrap_err().code, "missing_api_key");
        }
    }

    #[test]
    fn a_file_that_others_can_read_and_each_bad_key_is_a_problem() {
        let good = format!("[[keys]]\nid = \"a\"\nsha256 = \"{ONE}\"\nowner = \"alice\"\n");
        assert!(read(&good, 0o644).err().unwrap().contains("mode 644"));
        let text =
            read("[[keys]]\nid = \"a\"\nsha256 = \"xyz\"\nowner = \"a b\"\nexpires = \"soon\"", 0o600).err().unwrap();
        for part in ["keys[0].sha256", "keys[0].owner", "keys[0].expires"] {
            assert!(text.contains(part), "{part} not in {text}");
        }
    }
}
