//! Who asks, by whatever it shows. What that one may do is the [`Principal`]'s to say.

mod principal;
mod keys;

use std::{fmt, os::unix::fs::PermissionsExt, path::Path, str::FromStr, sync::Arc, time::SystemTime};

use http::{HeaderName, header::AUTHORIZATION};
use pingora::protocols::http::ServerSession;
use tidegate_common::{
    config::Reader,
    contract::{ApiError, ErrorKind},
};

use self::keys::Keys;
pub(crate) use self::principal::{Credential, CredentialKind, Principal};
pub use self::{
    keys::{HashSecret, KeyEntry, KeyHash, KeyState, KeysFile, is_owner},
    principal::{Grant, KeyLimits, Scope, Scopes},
};
pub use crate::pattern::Pattern;

/// Where Anthropic's clients put their key.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// All that is known of credentials. Deliberately without `Debug`.
pub(crate) struct Auth {
    keys: Option<Keys>,
}

/// Seconds since 1970, shown as RFC 3339.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixSeconds(pub u64);

/// The end of the year 9999, after which RFC 3339 has no form.
const MOST_DISTANT: u64 = 253_402_300_799;

impl UnixSeconds {
    /// Now.
    pub fn now() -> Self {
        Self(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()))
    }

    /// So much later; none where no calendar goes.
    pub fn after(self, time: std::time::Duration) -> Option<Self> {
        self.0.checked_add(time.as_secs()).filter(|at| *at <= MOST_DISTANT).map(Self)
    }
}

impl fmt::Display for UnixSeconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(self.0.min(MOST_DISTANT));
        write!(f, "{}", humantime::format_rfc3339_seconds(at))
    }
}

impl FromStr for UnixSeconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let time = humantime::parse_rfc3339(text).ok().and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
        time.map(|t| Self(t.as_secs()))
            .ok_or_else(|| "a time such as 2030-01-31T00:00:00Z, or seconds since 1970".into())
    }
}

impl Auth {
    /// Reads `[balancer.auth]`; `None` when no credential is asked for.
    pub(crate) fn read(r: &Reader<'_>) -> Option<Self> {
        if r.is_present() && !r.has("keys_file") {
            r.problem("keys_file", "is missing", "name a file of keys, or remove the section to ask for none");
        }
        Keys::read(r).map(|keys| Self { keys: Some(keys) })
    }

    /// Who has sent this head.
    pub(crate) fn principal(&self, session: &ServerSession, now: UnixSeconds) -> Result<Arc<Principal>, ApiError> {
        let header = |name| session.get_header(name).map(|v| v.as_bytes());
        match header(AUTHORIZATION).and_then(bearer).or_else(|| header(API_KEY)) {
            Some(given) => self.bearer(given, now),
            None => {
                let message = "no API key was given; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'";
                Err(refusal("missing_api_key", message))
            }
        }
    }

    fn bearer(&self, given: &[u8], now: UnixSeconds) -> Result<Arc<Principal>, ApiError> {
        match &self.keys {
            Some(keys) => keys.principal(given, now),
            None => Err(refusal("invalid_api_key", "this API key is not known here")),
        }
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

/// The secret in an `Authorization` header.
fn bearer(header: &[u8]) -> Option<&[u8]> {
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
    use super::*;

    #[test]
    fn a_bearer_secret_is_what_stands_behind_the_scheme() {
        assert_eq!(bearer(b"Bearer one"), Some(&b"one"[..]));
        assert_eq!(bearer(b"bearer  two "), Some(&b"two"[..]));
        for none in [&b"Basic one"[..], b"Bearer ", b"B", b"Bearerone"] {
            assert_eq!(bearer(none), None);
        }
    }

    #[test]
    fn times_are_read_as_they_are_shown() {
        let time = UnixSeconds(1_893_456_000);
        assert_eq!(time.to_string(), "2030-01-01T00:00:00Z");
        assert_eq!(time.to_string().parse(), Ok(time));
        assert!("soon".parse::<UnixSeconds>().is_err());
        assert_eq!(time.after(std::time::Duration::from_secs(u64::MAX / 2)), None);
    }
}
