//! Access tokens of an identity provider (OpenID Connect, OAuth 2.0): checked by the keys that it publishes (JWKS, RFC 7517).
//!
//! Keys from a URL are fetched when a token first needs them, again after `refresh`, and when a token names one that is not known, but no
//! more often than [`PAUSE`]. Those in hand are used for as long as the provider cannot be reached, also by the configuration that a reload
//! puts in force.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, Header,
    jwk::{Jwk, JwkSet, PublicKeyUse},
};
use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use tidegate_common::{
    config::Reader,
    contract::{ApiError, ErrorKind},
};
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::{
    Credential, CredentialKind, Grant, KeyLimits, Principal, Scope, Scopes, UnixSeconds,
    keys::is_owner,
    refusal,
    token::{Rules, Verified, VerifyKey, read_leeway},
};
use crate::pattern::Pattern;

/// Least time between two tries to fetch keys.
const PAUSE: Duration = Duration::from_secs(10);
/// Bound of one fetch.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of a document.
const DOCUMENT_BYTES_MAX: usize = 1 << 20;
/// Longest owner that logs and headers carry.
const OWNER_BYTES_MAX: usize = 63;

/// An identity provider.
pub(super) struct Provider {
    id: String,
    rules: Rules,
    algorithms: Vec<Algorithm>,
    claims: ClaimNames,
    default_scopes: Scopes,
    source: Source,
    refresh: Duration,
    keys: Arc<KeySet>,
    files: Vec<PathBuf>,
}

/// Where a token says what.
struct ClaimNames {
    owner: String,
    scopes: String,
    scope_prefix: String,
    roles: Option<String>,
    models: Option<String>,
}

/// Where its keys are.
enum Source {
    File,
    Url { client: reqwest::Client, url: Option<String> },
}

/// Its keys as they were last read.
#[derive(Default)]
struct KeySet {
    known: ArcSwapOption<Known>,
    /// When a fetch was last begun; held while one is under way.
    tried: Mutex<Option<Instant>>,
}

struct Known {
    keys: Vec<(Option<String>, Jwk)>,
    at: Instant,
}

impl Provider {
    /// Reads each `[[balancer.auth.oidc]]`.
    pub(super) fn read_all(r: &Reader<'_>) -> Vec<Self> {
        let sections = r.sections("oidc");
        let providers: Vec<_> = sections.iter().filter_map(Self::read).collect();
        for (i, provider) in providers.iter().enumerate() {
            if providers[..i].iter().any(|p| p.id == provider.id || p.rules.issuer == provider.rules.issuer) {
                r.problem("oidc", format!("'{}' or its issuer stands here twice", provider.id), "keep one of them");
            }
        }
        providers
    }

    fn read(r: &Reader<'_>) -> Option<Self> {
        let (id, issuer) = (r.get::<String>("id"), r.get::<String>("issuer"));
        let audiences = r.get::<Vec<String>>("audience").unwrap_or_default();
        let claims = ClaimNames::read(r);
        let scopes = r.parse_list::<Scope>("default_scopes").unwrap_or_default();
        let algorithms =
            r.parse_list("algorithms").unwrap_or_else(|| vec![Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA]);
        let (leeway, refresh) = (read_leeway(r), r.duration_or("refresh", Duration::from_secs(600)));
        let (source, keys) = Source::read(r);
        for key in ["id", "issuer"].into_iter().filter(|key| !r.has(key)) {
            r.problem(key, "is missing", "every provider needs id, issuer and audience");
        }
        if audiences.is_empty() {
            r.problem("audience", "names nobody", "list what tokens for this service have in 'aud'");
        }
        if algorithms.iter().any(|algorithm| algorithm.family() == AlgorithmFamily::Hmac) {
            r.problem(
                "algorithms",
                "an HMAC is no signature: the provider's public key would be the secret",
                "use RS256, ES256 or EdDSA",
            );
        }
        let rules = Rules { issuer: issuer?, audiences, leeway, lifetime_max: None };
        let default_scopes = scopes.into_iter().collect();
        Some(Self {
            id: id?,
            rules,
            algorithms,
            claims,
            default_scopes,
            source: source?,
            refresh,
            keys: Arc::new(keys),
            files: ["jwks_file", "ca"].iter().filter_map(|key| r.get(key)).collect(),
        })
    }

    /// The files that it was read from.
    pub(super) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Whether this is it.
    pub(super) fn is_issuer(&self, issuer: &str) -> bool {
        self.rules.issuer == issuer
    }

    /// Goes on with the keys that `before`, the same provider before a reload, has in hand.
    pub(super) fn inherit(&mut self, before: &Self) {
        let both_fetch = matches!((&self.source, &before.source), (Source::Url { url, .. }, Source::Url { url: other, .. }) if url == other);
        if both_fetch && self.rules.issuer == before.rules.issuer {
            self.keys = Arc::clone(&before.keys);
        }
    }

    /// Whose token this is, and until when.
    pub(super) async fn principal(
        &self,
        given: &[u8],
        header: &Header,
        now: UnixSeconds,
    ) -> Result<(Principal, UnixSeconds), ApiError> {
        let key = self.key(header).await?;
        let verified = self.rules.verify(given, &key, now)?;
        Ok((self.read_claims(&verified)?, verified.end()))
    }

    async fn key(&self, header: &Header) -> Result<VerifyKey, ApiError> {
        if !self.algorithms.contains(&header.alg) {
            return Err(refusal(
                "invalid_token",
                "this token is not valid here: its algorithm is not among those of its issuer",
            ));
        }
        let known = self.keys.known.load_full();
        if let Some((known, key)) = known.and_then(|known| known.find(header).map(|key| (known, key))) {
            if known.at.elapsed() > self.refresh {
                // this token need not wait for it
                self.fetch_aside();
            }
            return Ok(key);
        }
        self.fetch().await;
        let known = self.keys.known.load_full().ok_or_else(unavailable)?;
        known.find(header).ok_or_else(|| {
            refusal("invalid_token", "this token is not valid here: its issuer has no key of the id that it names")
        })
    }

    /// Has the keys fetched while others go on.
    fn fetch_aside(&self) {
        let Source::Url { client, url } = &self.source else { return };
        let (client, url, keys) = (client.clone(), url.clone(), Arc::clone(&self.keys));
        let issuer = self.rules.issuer.clone();
        tokio::spawn(async move { keys.fetch(&client, &issuer, url.as_deref()).await });
    }

    async fn fetch(&self) {
        if let Source::Url { client, url } = &self.source {
            self.keys.fetch(client, &self.rules.issuer, url.as_deref()).await;
        }
    }

    fn read_claims(&self, verified: &Verified) -> Result<Principal, ApiError> {
        let owner = verified
            .text(&self.claims.owner)
            .filter(|owner| !owner.is_empty())
            .ok_or_else(|| refusal("invalid_token", "this token is not valid here: it does not say whose it is"))?;
        let prefix = &self.claims.scope_prefix;
        let words = verified.words(&self.claims.scopes);
        let scopes =
            words.iter().flatten().filter_map(|word| word.strip_prefix(prefix.as_str())?.parse::<Scope>().ok());
        let named: Scopes = scopes.collect();
        let scopes = if named.iter().next().is_some() { named } else { self.default_scopes };
        let list = |claim: &Option<String>| claim.as_ref().and_then(|claim| verified.words(claim));
        let models =
            list(&self.claims.models).map(|m| m.into_iter().filter_map(|m| m.parse::<Pattern>().ok()).collect());
        let roles = list(&self.claims.roles).unwrap_or_default().into_iter().map(Arc::from).collect();
        let id = verified.text("jti").or_else(|| verified.text("sid")).unwrap_or("-");
        Ok(Principal {
            credential: Credential { kind: CredentialKind::Oidc, id: id.chars().take(128).collect::<String>().into() },
            owner: owner_name(&self.id, owner).into(),
            grant: Arc::new(Grant { scopes, models, sites: None, limits: KeyLimits::default() }),
            bound: None,
            roles,
        })
    }
}

/// `provider:subject`, so that no provider can speak for another or for the owner of a key. A subject that logs and headers cannot carry is
/// told by a hash.
fn owner_name(provider: &str, subject: &str) -> String {
    let plain = format!("{provider}:{subject}");
    if is_owner(&plain) {
        return plain;
    }
    let hash: String = Sha256::digest(subject.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let room = OWNER_BYTES_MAX - hash.len() - 1;
    let start: String = plain.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).take(room).collect();
    format!("{start}-{hash}")
}

fn unavailable() -> ApiError {
    ApiError::new(
        ErrorKind::Unavailable,
        "identity_provider_unavailable",
        "the keys of this token's issuer cannot be had now",
    )
    .with_retry_after(PAUSE)
}

impl ClaimNames {
    fn read(r: &Reader<'_>) -> Self {
        Self {
            owner: r.get_or("owner_claim", "sub".to_owned()),
            scopes: r.get_or("scope_claim", "scope".to_owned()),
            scope_prefix: r.get_or("scope_prefix", String::new()),
            roles: r.get("roles_claim"),
            models: r.get("models_claim"),
        }
    }
}

impl Source {
    fn read(r: &Reader<'_>) -> (Option<Self>, KeySet) {
        let (file, url, ca) = (r.get::<PathBuf>("jwks_file"), r.get::<String>("jwks_url"), r.get::<PathBuf>("ca"));
        if let Some(path) = file {
            if url.is_some() || ca.is_some() {
                r.problem(
                    "jwks_file",
                    "stands beside jwks_url or ca",
                    "read the keys from a file or from a URL, not both",
                );
            }
            return (Some(Self::File), KeySet::of(read_file(r, &path)));
        }
        let issuer = r.get::<String>("issuer").unwrap_or_default();
        let asked = url.as_deref().unwrap_or(&issuer);
        if !asked.starts_with("https://") && !is_loopback(asked) {
            let key = if url.is_some() { "jwks_url" } else { "issuer" };
            r.problem(
                key,
                "keys would come over plain HTTP, where anybody could put others in their place",
                "use https",
            );
        }
        let client = client(ca.as_deref()).map_err(|e| r.problem("ca", e, "give the PEM file of the provider's CA"));
        (client.ok().map(|client| Self::Url { client, url }), KeySet::default())
    }
}

fn is_loopback(url: &str) -> bool {
    ["http://127.0.0.1:", "http://[::1]:", "http://localhost:"].iter().any(|start| url.starts_with(start))
}

fn client(ca: Option<&std::path::Path>) -> Result<reqwest::Client, String> {
    let mut builder = reqwest::Client::builder().timeout(FETCH_TIMEOUT).redirect(reqwest::redirect::Policy::none());
    if let Some(path) = ca {
        let text = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let certificates =
            reqwest::Certificate::from_pem_bundle(&text).map_err(|e| format!("{}: {e}", path.display()))?;
        builder = builder.tls_certs_only(certificates);
    }
    builder.build().map_err(|e| e.to_string())
}

fn read_file(r: &Reader<'_>, path: &std::path::Path) -> JwkSet {
    let text = std::fs::read(path).map_err(|e| e.to_string());
    let set = text.and_then(|text| serde_json::from_slice::<JwkSet>(&text).map_err(|e| e.to_string()));
    set.unwrap_or_else(|e| {
        r.problem("jwks_file", format!("{}: {e}", path.display()), "save what the provider's jwks_uri answers");
        JwkSet { keys: Vec::new() }
    })
}

/// What a provider says of itself (OpenID Connect Discovery 1.0).
#[derive(Deserialize)]
struct Discovered {
    issuer: String,
    jwks_uri: String,
}

impl KeySet {
    fn of(set: JwkSet) -> Self {
        let this = Self::default();
        this.put(set);
        this
    }

    fn put(&self, set: JwkSet) {
        let is_for_signatures = |jwk: &Jwk| !matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption));
        let keys = set.keys.into_iter().filter(is_for_signatures).map(|jwk| (jwk.common.key_id.clone(), jwk)).collect();
        self.known.store(Some(Arc::new(Known { keys, at: Instant::now() })));
    }

    /// Fetches the keys, unless that was tried just now. Whoever comes meanwhile waits for the one fetch.
    async fn fetch(&self, client: &reqwest::Client, issuer: &str, url: Option<&str>) {
        let mut tried = self.tried.lock().await;
        if tried.is_some_and(|at| at.elapsed() < PAUSE) {
            return;
        }
        *tried = Some(Instant::now());
        match fetch(client, issuer, url).await {
            Ok(set) => {
                info!(issuer, keys = set.keys.len(), "keys of the identity provider");
                self.put(set);
            }
            Err(error) => warn!(issuer, error, "the identity provider's keys cannot be had; those in hand stay"),
        }
    }
}

async fn fetch(client: &reqwest::Client, issuer: &str, url: Option<&str>) -> Result<JwkSet, String> {
    if let Some(url) = url {
        return document(client, url).await;
    }
    let at = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
    let discovered: Discovered = document(client, &at).await?;
    if discovered.issuer != issuer {
        return Err(format!("{at} is about the issuer {}", discovered.issuer));
    }
    if !discovered.jwks_uri.starts_with("https://") && !is_loopback(&discovered.jwks_uri) {
        return Err(format!("{at} names keys at {}, which is not https", discovered.jwks_uri));
    }
    document(client, &discovered.jwks_uri).await
}

async fn document<T: DeserializeOwned>(client: &reqwest::Client, url: &str) -> Result<T, String> {
    let response = client.get(url).send().await.and_then(reqwest::Response::error_for_status);
    let mut response = response.map_err(|e| e.to_string())?;
    let mut text = Vec::new();
    while let Some(part) = response.chunk().await.map_err(|e| e.to_string())? {
        text.extend_from_slice(&part);
        if text.len() > DOCUMENT_BYTES_MAX {
            return Err(format!("{url} answers with more than {DOCUMENT_BYTES_MAX} bytes"));
        }
    }
    serde_json::from_slice(&text).map_err(|e| format!("{url}: {e}"))
}

impl Known {
    /// The key that a token names; the only one that fits where it names none.
    fn find(&self, header: &Header) -> Option<VerifyKey> {
        let mut fitting = self.keys.iter().filter(|(kid, jwk)| {
            header.kid.as_ref().is_none_or(|wanted| kid.as_ref() == Some(wanted)) && fits(jwk, header.alg)
        });
        let (_, jwk) = fitting.next()?;
        if header.kid.is_none() && fitting.next().is_some() {
            return None;
        }
        DecodingKey::from_jwk(jwk).ok().map(|key| VerifyKey { algorithm: header.alg, key })
    }
}

/// Whether a key is for this algorithm: by what it says, and by its own kind.
fn fits(jwk: &Jwk, algorithm: Algorithm) -> bool {
    let said = jwk.common.key_algorithm;
    let is_said = said.is_none_or(|said| said.to_string() == format!("{algorithm:?}"));
    is_said && DecodingKey::from_jwk(jwk).is_ok_and(|key| key.family() == algorithm.family())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_carry_their_provider_and_stay_apart() {
        assert_eq!(owner_name("idp", "alice"), "idp:alice");
        let (one, other) = (owner_name("idp", "alice smith"), owner_name("idp", "alice_smith"));
        assert!(is_owner(&one) && one != other && one.starts_with("idp:alice_smith-"), "{one}");
        let long = owner_name("idp", &"ü".repeat(200));
        assert!(is_owner(&long), "{long}");
    }
}
