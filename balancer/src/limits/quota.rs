//! `[balancer.limits.per_key]` and its like: how much one who asks may have.

use std::fmt;

use tidegate_common::config::Reader;

use super::{rate::Rate, shared::SharedConfig};
use crate::auth::KeyLimits;

/// Whose use is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Scope {
    /// One credential.
    Key,
    /// One owner, with all of its keys.
    Tenant,
    /// One address, of IPv6 the network of one site.
    Address,
    /// Everybody together.
    Total,
}

impl Scope {
    /// The word in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Tenant => "tenant",
            Self::Address => "address",
            Self::Total => "total",
        }
    }

    /// Its section below `balancer.limits`.
    fn section(self) -> &'static str {
        match self {
            Self::Key => "per_key",
            Self::Tenant => "per_tenant",
            Self::Address => "per_address",
            Self::Total => "total",
        }
    }

    /// Whose the limit is, for people.
    fn whose(self) -> &'static str {
        match self {
            Self::Key => "this key",
            Self::Tenant => "this tenant",
            Self::Address => "this address",
            Self::Total => "all clients together",
        }
    }
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Requests a second.
    Requests,
    /// Tokens a minute, of prompts and answers.
    Tokens,
    /// Streams at once.
    Streams,
}

impl Kind {
    /// The word in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Streams => "streams",
        }
    }

    /// The code of its refusals.
    pub(crate) fn code(self) -> &'static str {
        match self {
            Self::Requests => "requests_limit_exceeded",
            Self::Tokens => "tokens_limit_exceeded",
            Self::Streams => "streams_limit_exceeded",
        }
    }

    /// Its key in a section.
    pub(crate) fn knob(self) -> &'static str {
        match self {
            Self::Requests => "requests_per_second",
            Self::Tokens => "tokens_per_minute",
            Self::Streams => "concurrent_streams",
        }
    }
}

/// How much one may have; nothing said is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Quota {
    /// Requests a second, and at once.
    pub(crate) requests: Option<Rate>,
    /// Tokens a second, and at once, which is a minute's worth.
    pub(crate) tokens: Option<Rate>,
    /// Streams at once.
    pub(crate) streams: Option<usize>,
}

impl From<&KeyLimits> for Quota {
    fn from(limits: &KeyLimits) -> Self {
        let requests = limits.requests_per_second.map(|per_second| {
            let burst = limits.burst.map_or_else(|| per_second.ceil(), f64::from);
            Rate { per_second, burst }
        });
        let tokens = limits.tokens_per_minute.map(|per_minute| {
            let burst = per_minute as f64;
            Rate { per_second: burst / 60.0, burst }
        });
        Self { requests, tokens, streams: limits.concurrent_streams.map(|most| most as usize) }
    }
}

impl Quota {
    /// Reads a section of limits.
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        let per_second = r.get_in_range("requests_per_second", 0.001..=1e6);
        let burst = r.get_in_range("burst", 1..=1_000_000u32);
        if burst.is_some() && per_second.is_none() {
            r.problem(
                "burst",
                "says how many requests may come at once, and no rate is set",
                "set requests_per_second",
            );
        }
        Self::from(&KeyLimits {
            requests_per_second: per_second,
            burst,
            tokens_per_minute: r.get_in_range("tokens_per_minute", 1..=1_000_000_000_000),
            concurrent_streams: r.get_in_range("concurrent_streams", 1..=1_000_000),
        })
    }

    /// Whether nothing is limited.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// What is said here, and the rest as `other` has it.
    pub(crate) fn or(&self, other: &Self) -> Self {
        Self {
            requests: self.requests.or(other.requests),
            tokens: self.tokens.or(other.tokens),
            streams: self.streams.or(other.streams),
        }
    }

    /// One balancer's share of it among `balancers`; never so little that nothing at all could pass.
    pub(crate) fn share_of(&self, balancers: usize) -> Self {
        let n = balancers.max(1) as f64;
        let share = |rate: Rate| Rate { per_second: rate.per_second / n, burst: (rate.burst / n).max(1.0) };
        Self {
            requests: self.requests.map(share),
            tokens: self.tokens.map(share),
            streams: self.streams.map(|most| (most / balancers.max(1)).max(1)),
        }
    }
}

/// `[balancer.limits]`, as far as it says how much each may have.
#[derive(Debug, Clone)]
pub(crate) struct Quotas {
    pub(crate) per_key: Quota,
    pub(crate) per_tenant: Quota,
    pub(crate) per_address: Quota,
    pub(crate) total: Quota,
    /// What a request that sets no bound of its own is reserved for its answer, in tokens.
    pub(crate) answer_tokens: u32,
    /// Whether and how several balancers count together.
    pub(crate) shared: SharedConfig,
    /// How many keys, tenants and addresses are counted at once.
    pub(crate) tracked_max: usize,
}

impl Quotas {
    /// Reads the sections.
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        let section = |scope: Scope| Quota::read(&r.section(scope.section()));
        Self {
            per_key: section(Scope::Key),
            per_tenant: section(Scope::Tenant),
            per_address: section(Scope::Address),
            total: section(Scope::Total),
            answer_tokens: r.in_range("reserve_tokens", 0..=1_000_000, 512),
            shared: SharedConfig::read(&r.section("shared")),
            tracked_max: r.in_range("max_tracked", 16..=100_000_000, 100_000),
        }
    }
}

/// Which limit was met.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Knob {
    pub(crate) scope: Scope,
    pub(crate) kind: Kind,
    /// Whether the credential has limits of its own.
    pub(crate) is_own: bool,
}

/// What a client reads of it.
impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whose, knob) = (self.scope.whose(), self.kind.knob());
        match self.kind {
            Kind::Requests => write!(f, "too many requests a second of {whose}")?,
            Kind::Tokens => write!(f, "too many tokens a minute of {whose}, those of prompts and answers together")?,
            Kind::Streams => write!(f, "too many requests of {whose} at once")?,
        }
        match self.is_own {
            true => write!(f, " ({knob} of the key itself, or of balancer.limits.per_key)"),
            false => write!(f, " (balancer.limits.{}.{knob})", self.scope.section()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;

    fn read(text: &str) -> Result<Quotas, Vec<String>> {
        let raw = Raw::from_toml(text, "t").unwrap();
        raw.check(Quotas::read).map_err(|problems| problems.0.into_iter().map(|p| p.path).collect())
    }

    #[test]
    fn nothing_said_limits_nothing() {
        let quotas = read("").unwrap();
        assert!([quotas.per_key, quotas.per_tenant, quotas.per_address, quotas.total].iter().all(Quota::is_none));
    }

    #[test]
    fn a_section_is_read_and_its_faults_are_named() {
        let text = "[per_key]\nrequests_per_second = 0.5\ntokens_per_minute = 600\nconcurrent_streams = 3\n\
                    [total]\nrequests_per_second = 10\nburst = 20";
        let quotas = read(text).unwrap();
        assert_eq!(quotas.per_key.requests, Some(Rate { per_second: 0.5, burst: 1.0 }));
        assert_eq!(quotas.per_key.tokens, Some(Rate { per_second: 10.0, burst: 600.0 }));
        assert_eq!((quotas.per_key.streams, quotas.total.streams), (Some(3), None));
        assert_eq!(quotas.total.requests, Some(Rate { per_second: 10.0, burst: 20.0 }));
        let faulty = "[per_key]\nburst = 2\n[per_tenant]\nrequests_per_second = -1\nconcurrent_streams = 0\ntoken = 1";
        let mut paths = read(faulty).unwrap_err();
        paths.sort();
        let expected =
            ["per_key.burst", "per_tenant.concurrent_streams", "per_tenant.requests_per_second", "per_tenant.token"];
        assert_eq!(paths, expected);
    }

    #[test]
    fn shares_make_the_whole_and_leave_everybody_something() {
        let rate = Some(Rate { per_second: 9.0, burst: 2.0 });
        let whole = Quota { requests: rate, tokens: None, streams: Some(4) };
        let third = whole.share_of(3);
        assert_eq!(third.requests, Some(Rate { per_second: 3.0, burst: 1.0 }));
        assert_eq!((third.streams, whole.share_of(9).streams, whole.share_of(0)), (Some(1), Some(1), whole));
    }

    #[test]
    fn a_keys_own_limits_go_over_the_configurations_one_by_one() {
        let of = |streams| Quota { streams, ..Quota::default() };
        let configured = Quota { tokens: Some(Rate { per_second: 1.0, burst: 60.0 }), ..of(Some(2)) };
        assert_eq!(of(Some(5)).or(&configured), Quota { streams: Some(5), ..configured });
        assert_eq!(Quota::default().or(&configured), configured);
    }
}
