//! Connections, before any request: how many there may be at all, how fast one address may open them, and how many requests one of them
//! may take back.
//!
//! Taking requests back costs an HTTP/2 client nothing and the edge a request each (rapid reset, CVE-2023-44487). The h2 library bounds
//! those that nobody has looked at yet; those that were already begun are counted here, and who does it all the time is cut off.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use tidegate_common::config::Reader;
use tokio::{sync::Notify, time::Instant};

use super::{
    ledger::{Ask, Charge, Ledger, Who},
    quota::Quota,
    rate::{Bucket, Rate},
};
use crate::ctx;

/// `[balancer.limits]`, as far as it is about connections.
#[derive(Debug, Clone)]
pub(crate) struct DoorsConfig {
    /// Connections at once.
    pub(crate) connections_max: usize,
    /// New connections of one address a second, if that is limited.
    pub(crate) new_per_address: Option<Rate>,
    /// Requests at once on one HTTP/2 connection.
    pub(crate) streams_max: u32,
    /// Requests that one HTTP/2 connection may take back at once, and each minute.
    pub(crate) resets_max: u32,
    /// Addresses counted at once.
    tracked_max: usize,
}

impl DoorsConfig {
    /// Counts no more addresses than `tracked_max`.
    pub(crate) fn read(r: &Reader<'_>, tracked_max: usize) -> Self {
        let per_second = r.get_in_range("new_connections_per_second_per_address", 0.01..=1e6);
        Self {
            connections_max: r.in_range("max_connections", 1..=10_000_000, 16_384),
            new_per_address: per_second.map(|per_second: f64| Rate { per_second, burst: (2.0 * per_second).ceil() }),
            streams_max: r.in_range("max_streams_per_connection", 1..=65_536, 100),
            resets_max: r.in_range("max_resets_per_connection", 1..=1_000_000, 200),
            tracked_max,
        }
    }

    fn resets(&self) -> Rate {
        let most = f64::from(self.resets_max);
        Rate { per_second: most / 60.0, burst: most }
    }
}

/// Why a connection is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turned {
    /// There are as many as may be.
    Full,
    /// Its address opens them too fast.
    TooFast,
}

impl Turned {
    /// The word in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Full => "max_connections",
            Self::TooFast => "new_connections",
        }
    }
}

/// The connections that there are.
#[derive(Debug)]
pub(crate) struct Doors {
    began: Instant,
    open: AtomicUsize,
    comings: Mutex<Ledger>,
    inside: Mutex<HashMap<SocketAddr, Arc<Inside>>>,
}

/// One connection, as far as it is watched.
#[derive(Debug, Default)]
struct Inside {
    resets: Mutex<Bucket>,
    cut: Notify,
}

impl Doors {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now(), open: AtomicUsize::new(0), comings: Mutex::default(), inside: Mutex::default() }
    }

    /// A place for one more connection, until the permit is dropped.
    pub(crate) fn enter(self: &Arc<Self>, peer: SocketAddr, config: &DoorsConfig) -> Result<Inhabitant, Turned> {
        if let Some(rate) = config.new_per_address {
            let quota = Quota { requests: Some(rate), ..Quota::default() };
            let charge = Charge { who: Who::Address(ctx::network(peer.ip().to_canonical())), quota, is_own: false };
            let ask = Ask { requests: 1.0, ..Ask::default() };
            let came = lock(&self.comings).admit(&[charge], ask, config.tracked_max, self.now_s());
            came.map_err(|_| Turned::TooFast)?;
        }
        let place = |open: usize| (open < config.connections_max).then_some(open + 1);
        self.open.fetch_update(SeqCst, SeqCst, place).map_err(|_| Turned::Full)?;
        let inside = Arc::new(Inside::default());
        lock(&self.inside).insert(peer, Arc::clone(&inside));
        Ok(Inhabitant { doors: Arc::clone(self), peer, inside })
    }

    /// A request on this connection was taken back by its client. One that does it too often is cut off; says whether it was.
    pub(crate) fn was_reset(&self, peer: SocketAddr, config: &DoorsConfig) -> bool {
        let Some(inside) = lock(&self.inside).get(&peer).map(Arc::clone) else { return false };
        let (rate, now_s) = (config.resets(), self.now_s());
        let mut resets = lock(&inside.resets);
        let is_too_often = resets.fits(rate, 1.0, now_s).is_err();
        if is_too_often {
            inside.cut.notify_one();
        }
        resets.add(rate, 1.0, now_s);
        is_too_often
    }

    fn now_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection's place.
#[derive(Debug)]
pub(crate) struct Inhabitant {
    doors: Arc<Doors>,
    peer: SocketAddr,
    inside: Arc<Inside>,
}

impl Inhabitant {
    /// Returns when the connection is to be cut off.
    pub(crate) async fn cut(&self) {
        self.inside.cut.notified().await;
    }
}

impl Drop for Inhabitant {
    fn drop(&mut self) {
        self.doors.open.fetch_sub(1, SeqCst);
        let mut inside = lock(&self.doors.inside);
        if inside.get(&self.peer).is_some_and(|own| Arc::ptr_eq(own, &self.inside)) {
            inside.remove(&self.peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> DoorsConfig {
        let new_per_address = Some(Rate { per_second: 0.01, burst: 2.0 });
        DoorsConfig { connections_max: 2, new_per_address, streams_max: 1, resets_max: 3, tracked_max: 100 }
    }

    fn peer(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn places_are_bounded_and_come_back() {
        let (doors, config) = (Arc::new(Doors::new()), config());
        let first = doors.enter(peer("10.0.0.1:1"), &config).unwrap();
        let _second = doors.enter(peer("10.0.0.2:1"), &config).unwrap();
        assert_eq!(doors.enter(peer("10.0.0.3:1"), &config).unwrap_err(), Turned::Full);
        drop(first);
        assert!(doors.enter(peer("10.0.0.3:1"), &config).is_ok());
        assert_eq!(lock(&doors.inside).len(), 1);
    }

    #[tokio::test]
    async fn an_address_may_not_come_too_fast_whichever_of_its_network() {
        let (doors, config) = (Arc::new(Doors::new()), config());
        assert!(doors.enter(peer("[2001:db8::1]:1"), &config).is_ok());
        assert!(doors.enter(peer("[2001:db8::2]:1"), &config).is_ok());
        assert_eq!(doors.enter(peer("[2001:db8::3]:1"), &config).unwrap_err(), Turned::TooFast);
        assert!(doors.enter(peer("[2001:db8:1::1]:1"), &config).is_ok());
        assert!(doors.enter(peer("10.0.0.1:1"), &config).is_ok());
    }

    #[tokio::test]
    async fn who_takes_back_too_much_is_cut_off() {
        let (doors, config) = (Arc::new(Doors::new()), config());
        let (one, other) = (peer("10.0.0.1:1"), peer("10.0.0.1:2"));
        let permit = doors.enter(one, &config).unwrap();
        let _other = doors.enter(other, &config).unwrap();
        assert!((0..3).all(|_| !doors.was_reset(one, &config)));
        assert!(doors.was_reset(one, &config));
        permit.cut().await;
        assert!(!doors.was_reset(other, &config));
    }
}
