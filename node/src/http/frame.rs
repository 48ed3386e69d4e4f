//! A request's frame: what the balancer says about it in headers. Without a balancer, what it would have said.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;
use tidegate_common::{
    contract::{ApiError, ErrorKind, headers},
    ids::{Fingerprint, RequestId},
};

use crate::{
    sched::{Class, Owner},
    served::Loaded,
};

/// Longest tenant's name, in bytes; the rest of a longer one does not count.
const TENANT_BYTES_MAX: usize = 128;

/// The frame of one request.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) id: RequestId,
    /// Unix time in seconds.
    pub(super) created: u64,
    /// For requests that bring no seed of their own.
    pub(super) seed: u64,
    /// Whether the answer goes to a balancer: every event carries its tokens.
    pub(super) wire: bool,
    /// Whether another node had taken it and was lost.
    pub(super) moved: bool,
    /// Which nodes could go on with it, when some has begun.
    pub(super) fingerprint: Option<Fingerprint>,
    /// Whose request it is, for fair sharing.
    pub(super) owner: Owner,
    pub(super) arrived: Instant,
    pub(super) deadline: Instant,
}

impl Frame {
    /// Reads the headers; nothing in them can make a request fail.
    pub(super) fn read(map: &HeaderMap, timeout_max: Duration) -> Self {
        let text = |name: &str| map.get(name).and_then(|v| v.to_str().ok());
        let number = |name: &str| text(name).and_then(|v| v.parse::<u64>().ok());
        let arrived = Instant::now();
        let timeout = number(headers::DEADLINE_MS).map_or(timeout_max, |ms| Duration::from_millis(ms).min(timeout_max));
        Self {
            id: RequestId::from_client(text(headers::REQUEST_ID)),
            created: number(headers::CREATED).unwrap_or_else(unix_seconds),
            seed: number(headers::SEED).unwrap_or_else(rand::random),
            wire: text(headers::STREAM) == Some("1"),
            moved: is_moved(map),
            fingerprint: text(headers::FINGERPRINT).and_then(|v| v.parse().ok()),
            owner: owner(text(headers::TENANT), text(headers::PRIORITY)),
            arrived,
            deadline: arrived + timeout,
        }
    }

    /// Refuses to go on with what another node has begun and this one would have answered otherwise.
    pub(super) fn refuse_unlike(&self, loaded: &Loaded) -> Result<(), ApiError> {
        if self.fingerprint.is_none_or(|begun| begun == loaded.fingerprint) {
            return Ok(());
        }
        let text = "another node has begun this answer, and this one would go on otherwise: their models or configurations differ";
        Err(ApiError::new(ErrorKind::PreconditionFailed, "nodes_differ", text))
    }
}

/// Whether another node had taken the request with these headers and was lost.
pub(super) fn is_moved(map: &HeaderMap) -> bool {
    map.get(headers::MOVED).is_some_and(|value| value == "1")
}

fn owner(tenant: Option<&str>, priority: Option<&str>) -> Owner {
    let mut owner = Owner::default();
    if let Some(tenant) = tenant.map(str::trim).filter(|name| !name.is_empty()) {
        // a header's text is ASCII
        owner.tenant = tenant[..tenant.len().min(TENANT_BYTES_MAX)].into();
    }
    owner.class = priority.and_then(Class::of_word).unwrap_or_default();
    owner
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_say_is_anonymous_and_normal() {
        assert_eq!(owner(None, None), Owner::default());
        assert_eq!(owner(Some("  "), Some("urgent")), Owner::default());
        let alice = owner(Some("alice"), Some("high"));
        assert_eq!((&*alice.tenant, alice.class), ("alice", Class::High));
        assert_eq!(owner(Some(&"x".repeat(500)), None).tenant.len(), TENANT_BYTES_MAX);
    }
}
