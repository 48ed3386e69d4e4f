//! A request's frame: what the balancer says about it in headers. Without a balancer, what it would have said.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;
use tidegate_common::{contract::headers, ids::RequestId};

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
            arrived,
            deadline: arrived + timeout,
        }
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
