//! Who asks, by whatever it shows. What that one may do is the `Principal`'s to say.

mod principal;
mod keys;
mod token;
mod oidc;
mod certificate;

use std::{
    fmt,
    num::NonZeroUsize,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use http::{HeaderName, header::AUTHORIZATION};
use lru::LruCache;
use pingora::protocols::http::ServerSession;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tidegate_common::{
    config::Reader,
    contract::{ApiError, ErrorKind},
};

use self::{certificate::Certificates, keys::Keys, oidc::Provider, token::Tokens};
pub(crate) use self::{
    certificate::ReadCertificate,
    principal::{Credential, CredentialKind, Principal},
};
pub use self::{
    keys::{HashSecret, KeyEntry, KeyHash, KeyState, KeysFile, is_owner},
    principal::{Grant, KeyLimits, Scope, Scopes},
    token::{Claims, RevokedFile, SignError, SigningKey, TIDEGATE},
};
pub use crate::pattern::Pattern;

/// Where Anthropic's clients put their key.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// All that is known of credentials. Deliberately without `Debug`.
pub(crate) struct Auth {
    keys: Option<Keys>,
    tokens: Option<Tokens>,
    providers: Vec<Provider>,
    certificates: Certificates,
    verified: Mutex<LruCache<[u8; 32], Cached>>,
    files: Vec<PathBuf>,
}

/// Tokens whose signatures are not checked again for as long as they are good.
const VERIFIED_MAX: NonZeroUsize = NonZeroUsize::new(10_000).expect("a constant is not zero");

/// A token that was verified before.
#[derive(Clone)]
struct Cached {
    principal: Arc<Principal>,
    /// The API key that it was made of.
    key: Option<String>,
    ends: UnixSeconds,
}

/// Seconds since 1970, shown as RFC 3339.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// What is known of each API key.
    pub(crate) fn key_entries(&self) -> impl Iterator<Item = &KeyEntry> {
        self.keys.iter().flat_map(Keys::entries)
    }

    /// Reads `[balancer.auth]`; `None` when no credential is asked for. `takes_certificates` is whether clients can show any.
    pub(crate) fn read(r: &Reader<'_>, takes_certificates: bool) -> Option<Self> {
        let tokens_section = r.section("tokens");
        let (tokens, providers, certificates) =
            (Tokens::read(&tokens_section), Provider::read_all(r), Certificates::read(r));
        let keys = Keys::read(r);
        if !r.is_present() {
            return None;
        }
        if keys.is_none() && !r.has("keys_file") && providers.is_empty() && certificates.is_empty() {
            r.problem("keys_file", "is missing", "name a file of keys, or remove the section to ask for no credential");
        }
        if tokens.is_some() && !r.has("keys_file") {
            r.problem("keys_file", "is missing, and tokens are made of API keys", "name the file of those keys");
        }
        if !certificates.is_empty() && !takes_certificates {
            r.problem("certificates", "nobody can show a certificate", "set balancer.tls.client_ca to who signs them");
        }
        let files = named_files(r, &tokens_section, &providers);
        Some(Self { keys, tokens, providers, certificates, verified: Mutex::new(LruCache::new(VERIFIED_MAX)), files })
    }

    /// Every file that it was read from.
    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Goes on with what `before` has fetched.
    pub(crate) fn inherit(&mut self, before: &Self) {
        for provider in &mut self.providers {
            before.providers.iter().for_each(|before| provider.inherit(before));
        }
    }

    /// Who has sent this head.
    pub(crate) async fn principal(
        &self,
        session: &ServerSession,
        now: UnixSeconds,
    ) -> Result<Arc<Principal>, ApiError> {
        let header = |name| session.get_header(name).map(|v| v.as_bytes());
        match header(AUTHORIZATION).and_then(bearer).or_else(|| header(API_KEY)) {
            Some(given) if token::is_token(given) => self.token(given, now).await,
            Some(given) => match &self.keys {
                Some(keys) => keys.principal(given, now),
                None => Err(refusal("invalid_api_key", "this API key is not known here")),
            },
            None => self.certificates.principal(session).ok_or_else(|| {
                let message = "no API key was given; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'";
                refusal("missing_api_key", message)
            }),
        }
    }

    /// Who has the API key of this id.
    pub(crate) fn key(&self, id: &str, now: UnixSeconds) -> Result<Arc<Principal>, ApiError> {
        match &self.keys {
            Some(keys) => keys.by_id(id, now),
            None => Err(refusal("invalid_api_key", "there is no file of keys")),
        }
    }

    async fn token(&self, given: &[u8], now: UnixSeconds) -> Result<Arc<Principal>, ApiError> {
        let hash = Sha256::digest(given).into();
        let cached = self.verified().get(&hash).cloned();
        let cached = match cached.filter(|cached| now < cached.ends) {
            Some(cached) => cached,
            None => {
                let verified = self.verify(given, now).await?;
                self.verified().put(hash, verified.clone());
                verified
            }
        };
        // what may have changed since its signature was checked
        if let (Some(key), Some(keys), Some(tokens)) = (&cached.key, &self.keys, &self.tokens) {
            keys.by_id(key, now)?;
            tokens.demand_unrevoked(&cached.principal.credential.id)?;
        }
        Ok(cached.principal)
    }

    async fn verify(&self, given: &[u8], now: UnixSeconds) -> Result<Cached, ApiError> {
        let (header, issuer) = token::peek(given)?;
        if let (Some(tokens), Some(keys)) = (self.tokens.as_ref().filter(|t| t.is_issued_by(&issuer)), &self.keys) {
            let (principal, key, ends) = tokens.principal(given, &header, keys, now)?;
            return Ok(Cached { principal: Arc::new(principal), key: Some(key), ends });
        }
        let provider = self.providers.iter().find(|provider| provider.is_issuer(&issuer));
        let provider =
            provider.ok_or_else(|| refusal("invalid_token", "this token is not valid here: its issuer is another"))?;
        let (principal, ends) = provider.principal(given, &header, now).await?;
        Ok(Cached { principal: Arc::new(principal), key: None, ends })
    }

    fn verified(&self) -> MutexGuard<'_, LruCache<[u8; 32], Cached>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn named_files(r: &Reader<'_>, tokens: &Reader<'_>, providers: &[Provider]) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = ["keys_file", "hash_secret_file"].iter().filter_map(|key| r.get(key)).collect();
    files.extend(tokens.get::<PathBuf>("revoked_file"));
    files.extend(tokens.get::<Vec<String>>("public_keys").unwrap_or_default().into_iter().map(PathBuf::from));
    files.extend(providers.iter().flat_map(Provider::files).cloned());
    files
}

/// What becomes of a token whose issuer is ours or nobody, and whose key nobody has.
#[cfg(fuzzing)]
pub(crate) fn judge_unsigned(bytes: &[u8]) -> ApiError {
    let _ = token::is_token(bytes);
    match token::peek(bytes) {
        Ok((header, _)) => token::judge_by_strangers_key(bytes, &header),
        Err(error) => error,
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
