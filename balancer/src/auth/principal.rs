//! Who a request comes from and what that one may do: the same whether a key, a token or a certificate said so.

use std::{fmt, str::FromStr, sync::Arc};

use serde::Serialize;
use tidegate_common::{
    config::Reader,
    contract::{ApiError, ErrorKind},
    ids::SiteName,
};

use crate::pattern::Pattern;

/// Who asks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Principal {
    /// By what it is known.
    pub(crate) credential: Credential,
    /// Whose it is: the tenant that shares, limits and records go by.
    pub(crate) owner: Arc<str>,
    /// What it may do.
    pub(crate) grant: Arc<Grant>,
    /// What the credential that this one was made of may do, which it cannot go beyond.
    pub(crate) bound: Option<Arc<Grant>>,
    /// What an identity provider says it is, for policies.
    pub(crate) roles: Vec<Arc<str>>,
}

/// What a request showed, never the secret itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Credential {
    pub(crate) kind: CredentialKind,
    /// The key's id, the token's `jti`, the certificate's name.
    pub(crate) id: Arc<str>,
}

/// Kinds of credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum CredentialKind {
    /// An API key.
    Key,
    /// A token of ours.
    Token,
    /// A token of an identity provider.
    Oidc,
    /// A certificate.
    Certificate,
}

impl CredentialKind {
    /// The word in logs, metrics and policies.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Token => "token",
            Self::Oidc => "oidc",
            Self::Certificate => "certificate",
        }
    }
}

/// `key:k-1f2e3d4c`
impl fmt::Display for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.kind.as_str(), self.id)
    }
}

/// What a credential allows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Grant {
    /// Kinds of requests.
    pub scopes: Scopes,
    /// Models, where not all of them.
    pub models: Option<Vec<Pattern>>,
    /// Sites that its requests may not leave, where there are any.
    pub sites: Option<Vec<SiteName>>,
    /// Limits of its own, in the place of those that hold for all.
    pub limits: KeyLimits,
}

/// One kind of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Generations, embeddings, the list of models.
    Inference,
    /// Figures.
    Metrics,
    /// Records of requests.
    Logs,
    /// The cluster's members and its control.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Inference, Self::Metrics, Self::Logs, Self::Admin];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Metrics => "metrics",
            Self::Logs => "logs",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("is not a scope; use inference, metrics, logs or admin")]
pub struct UnknownScope;

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(word: &str) -> Result<Self, UnknownScope> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == word).ok_or(UnknownScope)
    }
}

/// A set of scopes; `inference` alone where nothing is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scopes(u8);

impl Default for Scopes {
    fn default() -> Self {
        [Scope::Inference].into_iter().collect()
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |set, scope| set | 1 << scope as u8))
    }
}

impl Scopes {
    /// Whether it has this one.
    pub fn contains(self, scope: Scope) -> bool {
        self.0 & 1 << scope as u8 != 0
    }

    /// What both have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// All it has, in their order.
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.contains(*scope))
    }
}

/// What one key may ask for; where nothing is said, `[balancer.limits.per_key]` holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeyLimits {
    /// Steady rate of requests.
    pub requests_per_second: Option<f64>,
    /// Requests that may come at once after a pause.
    pub burst: Option<u32>,
    /// Steady rate of tokens, of prompts and answers together.
    pub tokens_per_minute: Option<u64>,
    /// Generations at the same time.
    pub concurrent_streams: Option<u32>,
}

impl Grant {
    /// Reads `scopes`, `models`, `sites` and `limits` of an entry.
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        let scopes = r.parse_list::<Scope>("scopes").map(|scopes| scopes.into_iter().collect()).unwrap_or_default();
        Self {
            scopes,
            models: read_some(r, "models"),
            sites: read_some(r, "sites"),
            limits: KeyLimits::read(&r.section("limits")),
        }
    }

    /// Whether a model of this name may be asked for.
    fn has_model(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.iter().any(|pattern| pattern.matches(model)))
    }
}

/// A list that allows something, or none that allows everything.
fn read_some<T: FromStr>(r: &Reader<'_>, key: &str) -> Option<Vec<T>>
where
    T::Err: fmt::Display,
{
    let list = r.parse_list(key);
    if list.as_ref().is_some_and(Vec::is_empty) {
        r.problem(key, "an empty list allows nothing", "name some, or remove the key to allow all");
    }
    list
}

impl KeyLimits {
    fn read(r: &Reader<'_>) -> Self {
        Self {
            requests_per_second: r.get_in_range("requests_per_second", 1e-3..=1e6),
            burst: r.get_in_range("burst", 1..=1_000_000),
            tokens_per_minute: r.get_in_range("tokens_per_minute", 1..=1_000_000_000_000),
            concurrent_streams: r.get_in_range("concurrent_streams", 1..=1_000_000),
        }
    }
}

impl Principal {
    fn grants(&self) -> impl Iterator<Item = &Grant> {
        [Some(&self.grant), self.bound.as_ref()].into_iter().flatten().map(Arc::as_ref)
    }

    /// Whether its requests may go to this site.
    pub(crate) fn may_go_to(&self, site: &SiteName) -> bool {
        self.grants().all(|grant| grant.sites.as_ref().is_none_or(|sites| sites.contains(site)))
    }

    /// Whether it may ask for a model of this name.
    pub(crate) fn has_model(&self, model: &str) -> bool {
        self.grants().all(|grant| grant.has_model(model))
    }

    /// Refuses a kind of requests that it may not make.
    pub(crate) fn demand(&self, scope: Scope) -> Result<(), ApiError> {
        if self.grants().all(|grant| grant.scopes.contains(scope)) {
            return Ok(());
        }
        let message = format!("this {} does not have the scope '{scope}'", self.credential.kind.as_str());
        Err(ApiError::new(ErrorKind::Forbidden, "insufficient_scope", message))
    }

    /// Refuses a model that it may not ask for.
    pub(crate) fn demand_model(&self, model: &str) -> Result<(), ApiError> {
        if self.has_model(model) {
            return Ok(());
        }
        let model: String = model.chars().take(200).collect();
        let message = format!("this {} may not ask for the model '{model}'", self.credential.kind.as_str());
        Err(ApiError::new(ErrorKind::Forbidden, "model_not_allowed", message).with_param("model"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_sets_and_say_inference_where_nothing_is_said() {
        let scopes: Scopes = [Scope::Admin, Scope::Inference].into_iter().collect();
        assert_eq!(scopes.iter().collect::<Vec<_>>(), [Scope::Inference, Scope::Admin]);
        assert_eq!(scopes.and(Scopes::default()), Scopes::default());
        assert!(!Scopes::default().contains(Scope::Metrics));
        assert!("root".parse::<Scope>().is_err());
    }

    #[test]
    fn a_grant_names_what_it_does_not_allow() {
        let grant = Grant { models: Some(vec!["smol*".parse().unwrap()]), ..Grant::default() };
        let credential = Credential { kind: CredentialKind::Key, id: "k-1".into() };
        let any = Arc::new(Grant::default());
        let (owner, grant) = ("alice".into(), Arc::new(grant));
        let principal = Principal { credential, owner, grant: any, bound: Some(grant), roles: Vec::new() };
        assert_eq!(principal.credential.to_string(), "key:k-1");
        assert!(principal.demand_model("smollm2-135m").is_ok() && principal.demand(Scope::Inference).is_ok());
        assert_eq!(principal.demand_model("other").unwrap_err().code, "model_not_allowed");
        assert_eq!(principal.demand(Scope::Metrics).unwrap_err().status(), 403);
    }
}
