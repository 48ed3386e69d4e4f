//! Who may do what to what. A rule that denies wins; once there is any rule, what none allows is denied.
//!
//! Pure: a request is a few texts here. Who asks is everything that is known of it: `owner:alice`, `key:k-1f2e3d4c`, `role:analyst`, and its
//! address; what it does is an action such as `inference:chat`; what to, a resource such as `model:smollm2-135m` or `path:/metrics`.

use std::{fmt, net::IpAddr, str::FromStr};

use tidegate_common::{
    config::Reader,
    contract::{ApiError, ErrorKind, paths},
};

use crate::{
    accept::Network,
    auth::{Principal, Scope},
    pattern::{EmptyPattern, Pattern},
    route::Route,
};

/// The rules, in the order in which they are written.
#[derive(Debug, Clone, Default)]
pub struct Policies(Vec<Policy>);

#[derive(Debug, Clone)]
struct Policy {
    name: String,
    effect: Effect,
    actions: Vec<Pattern>,
    resources: Vec<Pattern>,
    principals: Vec<Term>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Allow,
    Deny,
}

/// Whom a rule is about.
#[derive(Debug, Clone)]
enum Term {
    /// `owner:al*`, or `*`.
    Named(Pattern),
    /// `address:10.0.0.0/8`.
    From(Network),
}

/// Why a text is none.
#[derive(Debug, thiserror::Error)]
enum InvalidTerm {
    #[error(transparent)]
    Empty(#[from] EmptyPattern),
    #[error("{0}")]
    Address(String),
    #[error("begins with none of owner:, key:, token:, oidc:, certificate:, role: and address:, and is not *")]
    Unknown,
}

/// What a credential may be named by.
const KINDS: [&str; 6] = ["owner:", "key:", "token:", "oidc:", "certificate:", "role:"];

impl FromStr for Term {
    type Err = InvalidTerm;

    fn from_str(text: &str) -> Result<Self, InvalidTerm> {
        if let Some(network) = text.strip_prefix("address:") {
            return network.parse().map(Self::From).map_err(InvalidTerm::Address);
        }
        if text == "*" || KINDS.iter().any(|kind| text.starts_with(kind)) {
            return Ok(Self::Named(text.parse()?));
        }
        Err(InvalidTerm::Unknown)
    }
}

/// Who asks, as rules see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Who {
    /// `owner:alice`, `key:k-1f2e3d4c`, `role:analyst`.
    pub names: Vec<String>,
    /// Where it comes from.
    pub address: Option<IpAddr>,
}

impl Who {
    pub(crate) fn new(principal: Option<&Principal>, address: Option<IpAddr>) -> Self {
        let names = principal.map(|principal| {
            let roles = principal.roles.iter().map(|role| format!("role:{role}"));
            roles.chain([format!("owner:{}", principal.owner), principal.credential.to_string()]).collect()
        });
        Self { names: names.unwrap_or_default(), address }
    }
}

/// What the rules say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// There is no rule.
    Unruled,
    /// By this rule, and none denies it.
    Allowed(String),
    /// By this rule, whatever others allow.
    Denied(String),
    /// No rule allows it.
    NotAllowed,
    /// It never comes to the rules, for this reason.
    Refused(String),
}

impl Decision {
    /// Whether the request goes on.
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Unruled | Self::Allowed(_))
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unruled => f.write_str("allowed: there are no policies"),
            Self::Allowed(name) => write!(f, "allowed by the policy '{name}', and none denies it"),
            Self::Denied(name) => write!(f, "denied by the policy '{name}'"),
            Self::NotAllowed => f.write_str("denied: no policy allows it"),
            Self::Refused(reason) => write!(f, "denied before any policy: {reason}"),
        }
    }
}

impl Policies {
    /// Reads each `[[balancer.policies]]`.
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        let sections = r.sections("policies");
        let policies: Vec<_> = sections.iter().filter_map(Policy::read).collect();
        for (i, policy) in policies.iter().enumerate() {
            if policies[..i].iter().any(|other| other.name == policy.name) {
                r.problem("policies", format!("two have the name '{}'", policy.name), "give each a name of its own");
            }
        }
        Self(policies)
    }

    /// Whether `who` may do this.
    pub fn decide(&self, who: &Who, action: &str, resource: &str) -> Decision {
        let first = |effect| {
            let mut of_effect = self.0.iter().filter(|policy| policy.effect == effect);
            of_effect.find(|policy| policy.is_about(who, action, resource)).map(|policy| policy.name.clone())
        };
        if self.0.is_empty() {
            return Decision::Unruled;
        }
        match first(Effect::Deny) {
            Some(name) => Decision::Denied(name),
            None => first(Effect::Allow).map_or(Decision::NotAllowed, Decision::Allowed),
        }
    }

    /// Refuses what `who` may not do; the name of a rule is nothing for a client.
    pub(crate) fn demand(
        &self,
        who: impl FnOnce() -> Who,
        action: &str,
        resource: fmt::Arguments<'_>,
    ) -> Result<(), ApiError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let resource = resource.to_string();
        if self.decide(&who(), action, &resource).is_allowed() {
            return Ok(());
        }
        let resource: String = resource.chars().take(200).collect();
        let message = format!("the policies of this service do not allow {action} on {resource}");
        Err(ApiError::new(ErrorKind::Forbidden, "policy_denied", message))
    }
}

impl Policy {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let patterns = |key| r.parse_list::<Pattern>(key).unwrap_or_else(|| vec![Pattern::any()]);
        let effects = [("allow", Some(Effect::Allow)), ("deny", Some(Effect::Deny))];
        let (name, effect) = (r.get::<String>("name"), r.choice("effect", &effects, None));
        let (actions, resources) = (patterns("actions"), patterns("resources"));
        let principals = r.parse_list::<Term>("principals");
        for key in ["name", "effect", "principals"].into_iter().filter(|key| !r.has(key)) {
            r.problem(
                key,
                "is missing",
                "every policy needs name, effect (allow or deny) and principals; [\"*\"] is everybody",
            );
        }
        for (key, list) in [("actions", &actions), ("resources", &resources)] {
            if list.is_empty() {
                r.problem(key, "an empty list is about nothing", "name some, or remove the key for all of them");
            }
        }
        Some(Self { name: name?, effect: effect?, actions, resources, principals: principals? })
    }

    fn is_about(&self, who: &Who, action: &str, resource: &str) -> bool {
        let any = |patterns: &[Pattern], text: &str| patterns.iter().any(|pattern| pattern.matches(text));
        any(&self.actions, action) && any(&self.resources, resource) && self.principals.iter().any(|term| term.is(who))
    }
}

impl Term {
    fn is(&self, who: &Who) -> bool {
        match self {
            Self::Named(pattern) => pattern.is_any() || who.names.iter().any(|name| pattern.matches(name)),
            Self::From(network) => who.address.is_some_and(|address| network.contains(address)),
        }
    }
}

/// The scope that a credential needs for an action.
pub(crate) fn scope(action: &str) -> Scope {
    match action {
        METRICS_READ => Scope::Metrics,
        MEMBERS_READ => Scope::Admin,
        _ => Scope::Inference,
    }
}

const METRICS_READ: &str = "metrics:read";
const MEMBERS_READ: &str = "members:read";

impl Route {
    /// The action that it is.
    pub(crate) fn action(self) -> &'static str {
        match self {
            Self::Health => "health:read",
            Self::Models => "models:list",
            Self::Document(_) => "docs:read",
            Self::Private(paths::METRICS) => METRICS_READ,
            Self::Private(_) => MEMBERS_READ,
            Self::Generation(paths::COMPLETIONS) => "inference:completions",
            Self::Generation(paths::EMBEDDINGS) => "inference:embeddings",
            Self::Generation(paths::TOKENIZE | paths::DETOKENIZE) => "inference:tokenize",
            Self::Generation(_) => "inference:chat",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tidegate_common::config::{Problems, Raw};

    use super::*;

    fn read(text: &str) -> Result<Policies, Problems> {
        Raw::from_toml(text, "t").unwrap().check(Policies::read)
    }

    fn who(names: &[&str], address: &str) -> Who {
        Who { names: names.iter().map(ToString::to_string).collect(), address: address.parse().ok() }
    }

    const RULES: &str = r#"
        [[policies]]
        name = "staff"
        effect = "allow"
        actions = ["inference:*", "models:list"]
        resources = ["model:smol*", "path:*"]
        principals = ["owner:alice", "role:analyst"]
        [[policies]]
        name = "operators"
        effect = "allow"
        principals = ["key:k-ops"]
        [[policies]]
        name = "not from the guests' network"
        effect = "deny"
        actions = ["inference:*"]
        principals = ["address:10.9.0.0/16"]
    "#;

    #[test]
    fn a_rule_that_denies_wins_and_what_none_allows_is_denied() {
        let rules = read(RULES).unwrap();
        let (alice, analyst) = (who(&["owner:alice"], "10.1.0.1"), who(&["owner:bob", "role:analyst"], ""));
        let (guest, ops) = (who(&["owner:alice"], "10.9.3.1"), who(&["key:k-ops"], "10.9.3.1"));
        let denied = Decision::Denied("not from the guests' network".into());
        for (who, action, resource, expected) in [
            (&alice, "inference:chat", "model:smollm2", Decision::Allowed("staff".into())),
            (&alice, "inference:chat", "model:other", Decision::NotAllowed),
            (&alice, "metrics:read", "path:/metrics", Decision::NotAllowed),
            (&analyst, "models:list", "path:/v1/models", Decision::Allowed("staff".into())),
            (&guest, "inference:chat", "model:smollm2", denied.clone()),
            (&guest, "models:list", "path:/v1/models", Decision::Allowed("staff".into())),
            (&ops, "inference:chat", "model:smollm2", denied),
            (&ops, "metrics:read", "path:/metrics", Decision::Allowed("operators".into())),
            (&Who::default(), "models:list", "path:/v1/models", Decision::NotAllowed),
        ] {
            assert_eq!(rules.decide(who, action, resource), expected, "{who:?} {action} {resource}");
        }
        assert_eq!(Policies::default().decide(&alice, "a", "r"), Decision::Unruled);
    }

    #[test]
    fn each_fault_is_told_where_it_stands() {
        let faulty = "[[policies]]\neffect = \"maybe\"\nprincipals = [\"alice\", \"address:moon\"]\nactions = []\n";
        let said = read(faulty).unwrap_err().to_string();
        for part in ["[0].name", "[0].effect", "principals[0]", "principals[1]", "[0].actions"] {
            assert!(said.contains(part), "{part} not in {said}");
        }
    }

    proptest! {
        /// Adding a rule that denies never allows more; adding one that allows never denies what was allowed.
        #[test]
        fn rules_only_add_up(effects in prop::collection::vec(any::<bool>(), 1..6), owners in prop::collection::vec(0..3usize, 6)) {
            let names = ["owner:a", "owner:b", "*"];
            let policy = |(i, allow): (usize, &bool)| {
                let (effect, owner) = (if *allow { "allow" } else { "deny" }, names[owners[i]]);
                format!("[[policies]]\nname = \"{i}\"\neffect = \"{effect}\"\nprincipals = [\"{owner}\"]\n")
            };
            let text: Vec<String> = effects.iter().enumerate().map(policy).collect();
            let asker = who(&["owner:a"], "");
            let allowed = |n: usize| read(&text[..n].concat()).unwrap().decide(&asker, "x", "y").is_allowed();
            for n in 2..=text.len() {
                if effects[n - 1] {
                    prop_assert!(!allowed(n - 1) || allowed(n));
                } else {
                    prop_assert!(allowed(n - 1) || !allowed(n));
                }
            }
        }
    }
}
