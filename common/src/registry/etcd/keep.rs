//! Keeping one key in etcd under a lease: grant, put, then at every beat keep the lease alive and look whether the key still stands.
//!
//! Each beat is a few short calls with an end; there is no long-lived stream that could fall silent.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, Error, PutOptions};
use tokio::{sync::watch, time};
use tracing::{debug, info, warn};

use super::link::{Backoff, Dialer, LinkError, jittered};

/// Keeps one key until it is told to let go.
pub(super) struct Keeper {
    dialer: Arc<Dialer>,
    key: String,
    wanted: watch::Receiver<Option<Vec<u8>>>,
    client: Option<Client>,
    lease: Option<i64>,
    backoff: Backoff,
}

/// A granted lease.
#[derive(Debug, Clone, Copy)]
struct Lease {
    id: i64,
    /// What etcd granted, which may be longer than what was asked.
    ttl: Duration,
}

/// What a beat found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beat {
    /// The key stands under the lease.
    Stands,
    /// The lease lives, and the key is gone, changed, or under another lease.
    Displaced,
    /// The lease is gone, as after an outage longer than it or a store that lost its data.
    Expired,
}

impl Keeper {
    /// Keeps `key` at the value `wanted` holds; `None` there takes it out.
    pub(super) fn new(dialer: Arc<Dialer>, key: String, wanted: watch::Receiver<Option<Vec<u8>>>) -> Self {
        Self { dialer, key, wanted, client: None, lease: None, backoff: Backoff::new() }
    }

    /// Keeps the key, then takes it out.
    pub(super) async fn run(mut self) {
        let mut released = self.wanted.clone();
        tokio::select! {
            () = self.hold() => {}
            _ = released.wait_for(Option::is_none) => {}
        }
        self.release().await;
    }

    /// Holds the key for ever.
    ///
    /// # Cancel safety
    /// Safe: a lease that was granted and not yet noted runs out by itself.
    async fn hold(&mut self) {
        loop {
            let Err(error) = self.session().await;
            self.client = None;
            if self.backoff.is_fresh() {
                warn!(key = self.key, %error, "etcd is out of reach; announcing again when it is back");
            } else {
                debug!(key = self.key, %error, "etcd is still out of reach");
            }
            time::sleep(self.backoff.pause()).await;
        }
    }

    /// One client, for as long as it serves.
    async fn session(&mut self) -> Result<std::convert::Infallible, LinkError> {
        let mut client = self.dialer.dial().await?;
        self.client = Some(client.clone());
        loop {
            let lease = self.grant(&mut client).await?;
            self.put(&mut client, lease).await?;
            info!(key = self.key, ttl = ?lease.ttl, "announced in etcd");
            self.backoff.reset();
            self.keep(&mut client, lease).await?;
            warn!(key = self.key, "the lease is gone; announcing again");
        }
    }

    async fn grant(&mut self, client: &mut Client) -> Result<Lease, LinkError> {
        let ttl_s = self.dialer.config().lease_ttl.as_secs_f64().ceil().max(1.0) as i64;
        let granted = self.dialer.bounded("grant", client.lease_grant(ttl_s, None)).await?;
        self.lease = Some(granted.id());
        Ok(Lease { id: granted.id(), ttl: Duration::from_secs(granted.ttl().max(1).unsigned_abs()) })
    }

    async fn put(&mut self, client: &mut Client, lease: Lease) -> Result<(), LinkError> {
        let Some(value) = self.value() else { return Ok(()) };
        let options = PutOptions::new().with_lease(lease.id);
        self.dialer.bounded("put", client.put(self.key.as_str(), value, Some(options))).await?;
        Ok(())
    }

    /// Beats until the lease is gone.
    async fn keep(&mut self, client: &mut Client, lease: Lease) -> Result<(), LinkError> {
        loop {
            let changed = time::timeout(jittered(lease.ttl / 3), self.wanted.changed()).await.is_ok();
            if changed {
                self.put(client, lease).await?;
                continue;
            }
            match self.beat(client, lease).await? {
                Beat::Stands => {}
                Beat::Expired => return Ok(()),
                Beat::Displaced => {
                    warn!(key = self.key, "someone else changed this key; does another process have the same id?");
                    self.put(client, lease).await?;
                }
            }
        }
    }

    async fn beat(&mut self, client: &mut Client, lease: Lease) -> Result<Beat, LinkError> {
        let alive = match self.dialer.bounded("keep alive", client.lease_keep_alive(lease.id)).await {
            // the client's own word for a time to live of zero
            Err(LinkError::Etcd(Error::LeaseKeepAliveError(_))) => false,
            answer => answer.map(|_| true)?,
        };
        if !alive {
            return Ok(Beat::Expired);
        }
        let found = self.dialer.bounded("verify", client.get(self.key.as_str(), None)).await?;
        let found = found.kvs().first().map(|kv| (kv.value(), kv.lease()));
        Ok(judge(found, self.value().as_deref(), lease.id))
    }

    fn value(&mut self) -> Option<Vec<u8>> {
        self.wanted.borrow_and_update().clone()
    }

    /// Revokes the lease, and the key goes with it. The key itself is not deleted by name: a successor of the same id may have put it
    /// again under a lease of its own.
    async fn release(&mut self) {
        let Some(lease) = self.lease else { return };
        let limit = self.dialer.config().timeout;
        match time::timeout(limit, self.revoke(lease)).await {
            Ok(()) => info!(key = self.key, "withdrawn from etcd"),
            Err(_) => warn!(key = self.key, ?limit, "not withdrawn from etcd in time; its lease will run out"),
        }
    }

    /// Tries the client at hand first, then other members, until one confirms.
    async fn revoke(&mut self, lease: i64) {
        loop {
            match self.try_revoke(lease).await {
                Ok(()) => return,
                Err(error) => debug!(key = self.key, %error, "withdrawing again"),
            }
            time::sleep(self.backoff.pause()).await;
        }
    }

    async fn try_revoke(&mut self, lease: i64) -> Result<(), LinkError> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => self.dialer.dial().await?,
        };
        match self.dialer.bounded("revoke", client.lease_revoke(lease)).await {
            // it ran out by itself, or the store lost its data
            Err(LinkError::Etcd(Error::GRpcStatus(status))) if status.message().contains("lease not found") => Ok(()),
            answer => answer.map(drop),
        }
    }
}

/// What the key's present value and lease mean to who keeps it.
fn judge(found: Option<(&[u8], i64)>, wanted: Option<&[u8]>, lease: i64) -> Beat {
    match (found, wanted) {
        (Some((value, under)), Some(wanted)) if value == wanted && under == lease => Beat::Stands,
        // it is about to be withdrawn
        (_, None) => Beat::Stands,
        _ => Beat::Displaced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stands_only_with_its_value_under_its_lease() {
        assert_eq!(judge(Some((b"v", 7)), Some(b"v"), 7), Beat::Stands);
        assert_eq!(judge(Some((b"v", 8)), Some(b"v"), 7), Beat::Displaced);
        assert_eq!(judge(Some((b"w", 7)), Some(b"v"), 7), Beat::Displaced);
        assert_eq!(judge(None, Some(b"v"), 7), Beat::Displaced);
        assert_eq!(judge(None, None, 7), Beat::Stands);
    }
}
