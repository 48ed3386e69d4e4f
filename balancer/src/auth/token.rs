//! Signed tokens (JWT, RFC 7519): our own, made of an API key by `tidegate token`, and access tokens of identity providers (`oidc`).
//!
//! The algorithm is the key's, never what a token says of itself; what it must say is required, and times are judged by the clock that the
//! caller gives. The profile follows RFC 8725 and, for access tokens, RFC 9068.

use std::{collections::BTreeMap, fs, io, path::Path, sync::Arc, time::Duration};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, dangerous::insecure_decode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tidegate_common::{
    config::{Problems, Raw, Reader},
    contract::ApiError,
    replace::{SECRET, replace},
};

use super::{
    Credential, CredentialKind, Grant, Principal, Scope, Scopes, UnixSeconds, check_mode, keys::Keys, refusal,
};
use crate::pattern::Pattern;

/// Issuer and audience of our own tokens where the configuration names none.
pub const TIDEGATE: &str = "tidegate";

/// What one of our own tokens says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Who signed it.
    pub iss: String,
    /// Whom it is for.
    pub aud: String,
    /// Whose it is.
    pub sub: String,
    /// Its own name.
    pub jti: String,
    /// When it was made.
    pub iat: UnixSeconds,
    /// From when on it is good.
    pub nbf: UnixSeconds,
    /// Until when it is.
    pub exp: UnixSeconds,
    /// Id of the API key that it was made of, and that it ends with.
    pub key: String,
    /// Scopes, with spaces between them.
    pub scope: String,
    /// Models, where not all that the key allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
}

/// The claims of any token, checked as far as all tokens are.
pub(super) struct Verified(pub(super) Map<String, Value>);

/// A key that signatures are checked by.
#[derive(Clone)]
pub(super) struct VerifyKey {
    pub(super) algorithm: Algorithm,
    pub(super) key: DecodingKey,
}

/// What every token of one issuer must say.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) issuer: String,
    pub(super) audiences: Vec<String>,
    /// How far clocks may be apart.
    pub(super) leeway: Duration,
    /// How long a token may be good for in all.
    pub(super) lifetime_max: Option<Duration>,
}

/// Why a token is refused.
fn invalid(why: &str) -> ApiError {
    refusal("invalid_token", &format!("this token is not valid here: {why}"))
}

/// Whether a bearer's secret has the form of a token.
pub(super) fn is_token(given: &[u8]) -> bool {
    given.starts_with(b"eyJ") && given.iter().filter(|b| **b == b'.').count() == 2
}

/// What a token says before anybody has checked it: good for finding out who can.
pub(super) fn peek(given: &[u8]) -> Result<(Header, String), ApiError> {
    let peeked = insecure_decode::<Map<String, Value>>(given).map_err(|_| invalid("it cannot be read"))?;
    let issuer = peeked.claims.get("iss").and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok((peeked.header, issuer))
}

impl Rules {
    /// Checks signature, issuer, audience and times.
    pub(super) fn verify(&self, given: &[u8], key: &VerifyKey, now: UnixSeconds) -> Result<Verified, ApiError> {
        let mut validation = Validation::new(key.algorithm);
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&self.audiences);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        // times are judged below, by the caller's clock
        (validation.validate_exp, validation.validate_nbf) = (false, false);
        let decoded = jsonwebtoken::decode::<Map<String, Value>>(given, &key.key, &validation);
        let verified = Verified(decoded.map_err(|e| invalid(reason(e.kind())))?.claims);
        self.judge_times(&verified, now)?;
        Ok(verified)
    }

    fn judge_times(&self, claims: &Verified, now: UnixSeconds) -> Result<(), ApiError> {
        let (leeway, now) = (self.leeway.as_secs(), now.0);
        let exp = claims.time("exp").ok_or_else(|| invalid("it does not say until when it is good"))?;
        if now >= exp.saturating_add(leeway) {
            return Err(refusal("expired_token", "this token has expired"));
        }
        let from = claims.time("nbf").max(claims.time("iat"));
        if from.is_some_and(|from| from > now.saturating_add(leeway)) {
            return Err(refusal("token_not_yet_valid", "this token is not good yet; are the clocks right?"));
        }
        match (self.lifetime_max, claims.time("iat")) {
            (Some(most), Some(iat)) if exp.saturating_sub(iat) > most.as_secs() => {
                Err(invalid("it is good for too long"))
            }
            (Some(_), None) => Err(invalid("it does not say when it was made")),
            _ => Ok(()),
        }
    }
}

fn reason(kind: &jsonwebtoken::errors::ErrorKind) -> &'static str {
    use jsonwebtoken::errors::ErrorKind;
    match kind {
        ErrorKind::InvalidSignature => "its signature is wrong",
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => "its algorithm is not that of the key",
        ErrorKind::InvalidIssuer => "its issuer is another",
        ErrorKind::InvalidAudience => "it is for somebody else",
        ErrorKind::MissingRequiredClaim(_) => "it must say exp, iss, aud and sub",
        _ => "it cannot be read",
    }
}

impl Verified {
    /// A time in whole seconds; what comes after the point of others is cut off.
    fn time(&self, claim: &str) -> Option<u64> {
        let value = self.0.get(claim)?;
        value.as_u64().or_else(|| value.as_f64().filter(|at| *at >= 0.0).map(|at| at as u64))
    }

    /// When it ends.
    pub(super) fn end(&self) -> UnixSeconds {
        UnixSeconds(self.time("exp").unwrap_or_default())
    }

    /// The text at a path such as `sub` or `resource_access.tenant`.
    pub(super) fn text(&self, path: &str) -> Option<&str> {
        self.at(path)?.as_str()
    }

    /// The words at a path: a list of texts, or one text with spaces between them.
    pub(super) fn words(&self, path: &str) -> Option<Vec<&str>> {
        match self.at(path)? {
            Value::String(text) => Some(text.split_ascii_whitespace().collect()),
            Value::Array(items) => Some(items.iter().filter_map(Value::as_str).collect()),
            _ => None,
        }
    }

    fn at(&self, path: &str) -> Option<&Value> {
        // names with dots are rather a claim's whole name, as URLs are
        self.0.get(path).or_else(|| {
            let mut parts = path.split('.');
            let first = self.0.get(parts.next()?)?;
            parts.try_fold(first, |value, part| value.get(part))
        })
    }
}

/// Our own tokens.
pub(super) struct Tokens {
    rules: Rules,
    keys: BTreeMap<String, VerifyKey>,
    revoked: BTreeMap<String, UnixSeconds>,
}

impl Tokens {
    /// Reads `[balancer.auth.tokens]`.
    pub(super) fn read(r: &Reader<'_>) -> Option<Self> {
        let rules = Rules {
            issuer: r.get_or("issuer", TIDEGATE.to_owned()),
            audiences: vec![r.get_or("audience", TIDEGATE.to_owned())],
            leeway: read_leeway(r),
            lifetime_max: Some(r.duration_or("max_lifetime", Duration::from_secs(30 * 24 * 3600))),
        };
        let revoked =
            r.get::<std::path::PathBuf>("revoked_file").map(|path| read_revoked(r, &path)).unwrap_or_default();
        let paths = r.get::<Vec<String>>("public_keys").unwrap_or_default();
        if !r.is_present() {
            return None;
        }
        if paths.is_empty() {
            r.problem(
                "public_keys",
                "no key is named",
                "make a pair with: tidegate token init; and name token.pub here",
            );
        }
        let mut keys = BTreeMap::new();
        for (i, path) in paths.iter().enumerate() {
            match read_public_key(Path::new(path)) {
                Ok((id, key)) => drop(keys.insert(id, key)),
                Err(e) => r.problem(
                    &format!("public_keys[{i}]"),
                    format!("{path}: {e}"),
                    "name a file that `tidegate token init` made",
                ),
            }
        }
        Some(Self { rules, keys, revoked })
    }

    /// Whether this is their issuer.
    pub(super) fn is_issued_by(&self, issuer: &str) -> bool {
        self.rules.issuer == issuer
    }

    /// Whose token this is, of which API key it was made, and until when it is good.
    pub(super) fn principal(
        &self,
        given: &[u8],
        header: &Header,
        keys: &Keys,
        now: UnixSeconds,
    ) -> Result<(Principal, String, UnixSeconds), ApiError> {
        let key = header.kid.as_ref().and_then(|kid| self.keys.get(kid));
        let key = key.ok_or_else(|| invalid("no key has the id that it names"))?;
        let verified = self.rules.verify(given, key, now)?;
        let end = verified.end();
        let claims =
            serde_json::from_value::<Claims>(Value::Object(verified.0)).map_err(|_| invalid("claims are missing"))?;
        let source = keys.by_id(&claims.key, now)?;
        let principal = Principal {
            credential: Credential { kind: CredentialKind::Token, id: claims.jti.as_str().into() },
            owner: Arc::clone(&source.owner),
            grant: Arc::new(claims.grant(&source)),
            bound: Some(Arc::clone(&source.grant)),
            roles: Vec::new(),
        };
        Ok((principal, claims.key, end))
    }

    /// Refuses a token that was taken back.
    pub(super) fn demand_unrevoked(&self, jti: &str) -> Result<(), ApiError> {
        if self.revoked.contains_key(jti) {
            return Err(refusal("revoked_token", "this token has been revoked"));
        }
        Ok(())
    }
}

impl Claims {
    /// What a token says, believed without a look at its signature.
    pub fn peek(token: &str) -> Option<Self> {
        insecure_decode(token).ok().map(|decoded| decoded.claims)
    }

    fn grant(&self, source: &Principal) -> Grant {
        let scopes: Scopes =
            self.scope.split_ascii_whitespace().filter_map(|word| word.parse::<Scope>().ok()).collect();
        let models =
            self.models.as_ref().map(|models| models.iter().filter_map(|m| m.parse::<Pattern>().ok()).collect());
        Grant { scopes: scopes.and(source.grant.scopes), models, ..(*source.grant).clone() }
    }
}

/// How far clocks may be apart: `leeway`, thirty seconds, five minutes at most.
pub(super) fn read_leeway(r: &Reader<'_>) -> Duration {
    let leeway = r.get_or("leeway", Duration::from_secs(30));
    if leeway > Duration::from_secs(300) {
        r.problem("leeway", "is more than five minutes", "set the clocks, and choose at most \"5m\"");
    }
    leeway
}

/// The public half of a key that signs our tokens (PEM, SubjectPublicKeyInfo): Ed25519 or ECDSA over P-256; and the id that it goes by.
fn read_public_key(path: &Path) -> Result<(String, VerifyKey), String> {
    let text = fs::read(path).map_err(|e| e.to_string())?;
    let ed = DecodingKey::from_ed_pem(&text).map(|key| (Algorithm::EdDSA, key));
    let (algorithm, key) = ed
        .or_else(|_| DecodingKey::from_ec_pem(&text).map(|key| (Algorithm::ES256, key)))
        .map_err(|_| "holds no public key of Ed25519 or P-256 (PEM)".to_owned())?;
    let der = pem_content(&text).ok_or("is no PEM file")?;
    Ok((key_id(&der), VerifyKey { algorithm, key }))
}

fn pem_content(text: &[u8]) -> Option<Vec<u8>> {
    use rustls::pki_types::{SubjectPublicKeyInfoDer, pem::PemObject};
    Some(SubjectPublicKeyInfoDer::from_pem_slice(text).ok()?.to_vec())
}

/// The id of a key by the DER form of its public half.
fn key_id(public_key: &[u8]) -> String {
    Sha256::digest(public_key).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// A key that signs tokens. Deliberately without `Debug`.
pub struct SigningKey {
    id: String,
    algorithm: Algorithm,
    key: EncodingKey,
}

/// Why a token cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The PEM holds no key that signs tokens.
    #[error("holds no private key of Ed25519 or P-256 (PKCS #8, PEM)")]
    NotAKey,
    /// The library refuses.
    #[error("cannot sign: {0}")]
    Refused(String),
}

impl SigningKey {
    /// The private half (PKCS #8, PEM) of the key whose public half is this, in DER.
    ///
    /// # Errors
    /// When there is no such key in it.
    pub fn new(pem: &[u8], public_key: &[u8]) -> Result<Self, SignError> {
        let ed = EncodingKey::from_ed_pem(pem).map(|key| (Algorithm::EdDSA, key));
        let either = ed.or_else(|_| EncodingKey::from_ec_pem(pem).map(|key| (Algorithm::ES256, key)));
        let (algorithm, key) = either.map_err(|_| SignError::NotAKey)?;
        Ok(Self { id: key_id(public_key), algorithm, key })
    }

    /// Signs.
    ///
    /// # Errors
    /// When the key is not what it seemed to be.
    pub fn sign(&self, claims: &Claims) -> Result<String, SignError> {
        let mut header = Header::new(self.algorithm);
        header.kid = Some(self.id.clone());
        jsonwebtoken::encode(&header, claims, &self.key).map_err(|e| SignError::Refused(e.to_string()))
    }
}

/// Judges a token by a key that has signed nothing.
#[cfg(fuzzing)]
pub(super) fn judge_by_strangers_key(given: &[u8], header: &Header) -> ApiError {
    let rules =
        Rules { issuer: TIDEGATE.into(), audiences: vec![TIDEGATE.into()], leeway: Duration::ZERO, lifetime_max: None };
    let algorithm = if header.alg == Algorithm::ES256 { Algorithm::ES256 } else { Algorithm::EdDSA };
    let key = VerifyKey { algorithm, key: DecodingKey::from_ed_der(&[7; 32]) };
    match rules.verify(given, &key, UnixSeconds(1_900_000_000)) {
        Ok(_) => unreachable!("nobody has signed it"),
        Err(error) => error,
    }
}

/// The file of tokens that were taken back, each with the time at which it would have ended by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RevokedFile(pub BTreeMap<String, UnixSeconds>);

impl RevokedFile {
    /// Reads it; one that is not there has none.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn read(path: &Path) -> Result<Self, Problems> {
        if matches!(fs::exists(path), Ok(false)) {
            return Ok(Self::default());
        }
        Raw::from_file(path)?.check(|root| {
            let entries = root.sections("revoked");
            let entry = |r: &Reader<'_>| Some((r.get::<String>("jti")?, r.get::<UnixSeconds>("until")?));
            Self(entries.iter().filter_map(entry).collect())
        })
    }

    /// Writes it in the place of the one at `path`, without what has ended by itself.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path, now: UnixSeconds) -> io::Result<()> {
        let alive = self.0.iter().filter(|(_, until)| **until >= now);
        let text: String = alive.map(|(jti, until)| format!("[[revoked]]\njti = {jti:?}\nuntil = {until}\n")).collect();
        replace(path, text.as_bytes(), SECRET)
    }
}

fn read_revoked(r: &Reader<'_>, path: &Path) -> BTreeMap<String, UnixSeconds> {
    check_mode(r, "revoked_file", path);
    let fail = |problems: Problems| {
        for problem in problems.0 {
            r.problem("revoked_file", format!("{}: {}", problem.path, problem.message), problem.fix);
        }
    };
    RevokedFile::read(path).map_err(fail).map(|file| file.0).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixSeconds = UnixSeconds(1_900_000_000);

    fn rules() -> Rules {
        Rules {
            issuer: "i".into(),
            audiences: vec!["a".into()],
            leeway: Duration::from_secs(30),
            lifetime_max: Some(Duration::from_secs(1000)),
        }
    }

    fn code(claims: Value) -> Option<&'static str> {
        let Value::Object(claims) = claims else { unreachable!("claims are an object") };
        rules().judge_times(&Verified(claims), NOW).err().map(|e| e.code)
    }

    #[test]
    fn times_are_judged_with_leeway_on_both_sides_and_no_further() {
        let n = NOW.0;
        for (claims, expected) in [
            (serde_json::json!({"exp": n - 29, "iat": n - 100}), None),
            (serde_json::json!({"exp": n - 30, "iat": n - 100}), Some("expired_token")),
            (serde_json::json!({"exp": n + 100, "iat": n + 30}), None),
            (serde_json::json!({"exp": n + 100, "iat": n + 31}), Some("token_not_yet_valid")),
            (serde_json::json!({"exp": n + 100, "iat": n, "nbf": n + 31}), Some("token_not_yet_valid")),
            (serde_json::json!({"exp": n + 1000, "iat": n}), None),
            (serde_json::json!({"exp": n + 1001, "iat": n}), Some("invalid_token")),
            (serde_json::json!({"exp": n + 10}), Some("invalid_token")),
            (serde_json::json!({"exp": "soon", "iat": n}), Some("invalid_token")),
            (serde_json::json!({"exp": (n + 10) as f64 + 0.5, "iat": n as f64}), None),
            (serde_json::json!({"iat": n}), Some("invalid_token")),
        ] {
            assert_eq!(code(claims.clone()), expected, "{claims}");
        }
    }

    #[test]
    fn claims_are_found_by_name_or_by_path() {
        let claims = serde_json::json!({"a.b": "whole", "a": {"b": "part", "c": ["x", 1, "y"]}, "scope": "p q"});
        let Value::Object(claims) = claims else { unreachable!("claims are an object") };
        let claims = Verified(claims);
        assert_eq!((claims.text("a.b"), claims.text("a.z")), (Some("whole"), None));
        assert_eq!(claims.words("a.c"), Some(vec!["x", "y"]));
        assert_eq!(claims.words("scope"), Some(vec!["p", "q"]));
    }

    #[test]
    fn what_was_taken_back_is_forgotten_once_it_has_ended_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("revoked.toml");
        let (gone, alive) = (("gone".to_owned(), UnixSeconds(NOW.0 - 1)), ("alive".to_owned(), NOW));
        RevokedFile([gone, alive.clone()].into()).write(&path, NOW).unwrap();
        assert_eq!(RevokedFile::read(&path).unwrap(), RevokedFile([alive].into()));
    }
}
