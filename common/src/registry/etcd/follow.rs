//! Following the nodes in etcd: list at a revision, watch from the next one, list again when the watch cannot be trusted.

use std::sync::Arc;

use etcd_client::{Client, Event, EventType, GetOptions, GetResponse, WatchOptions, WatchResponse, WatchStream};
use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tracing::{debug, info, warn};

use super::{
    known::{Change, Known},
    link::{Backoff, Dialer, LinkError},
};
use crate::registry::{Link, View};

/// Keeps the view as etcd says.
pub(super) struct Follower {
    dialer: Arc<Dialer>,
    known: Known,
    prefix: String,
    view: watch::Sender<View>,
    backoff: Backoff,
}

/// Why a watch is left for a new listing over the same client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relist {
    /// The interval is over; a watch that fell silent would not say so.
    Due,
    /// The history the watch needed is compacted, or the member cancelled it.
    Cancelled,
}

impl Follower {
    /// Follows the keys below `prefix`.
    pub(super) fn new(dialer: Arc<Dialer>, prefix: String, view: watch::Sender<View>) -> Self {
        Self { dialer, known: Known::new(prefix.clone()), prefix, view, backoff: Backoff::new() }
    }

    /// Follows for ever.
    pub(super) async fn run(mut self) {
        loop {
            let Err(error) = self.session().await;
            self.lose(&error);
            time::sleep(self.backoff.pause()).await;
        }
    }

    /// One client, for as long as it serves.
    async fn session(&mut self) -> Result<std::convert::Infallible, LinkError> {
        let mut client = self.dialer.dial().await?;
        loop {
            let revision = self.list(&mut client).await?;
            let mut stream = self.open(&mut client, revision + 1).await?;
            let why = self.hear(&mut stream).await?;
            debug!(?why, "listing the registry again");
            if why == Relist::Cancelled {
                time::sleep(self.backoff.pause()).await;
            }
        }
    }

    /// Lists everything, and returns the revision it stood at.
    async fn list(&mut self, client: &mut Client) -> Result<i64, LinkError> {
        let options = GetOptions::new().with_prefix();
        let listing = self.dialer.bounded("list", client.get(self.prefix.as_str(), Some(options))).await?;
        let differs = self.known.replace(listing.kvs().iter().map(|kv| (kv.key(), kv.value())));
        if differs && self.view.borrow().link == Link::Live {
            debug!("the registry's listing differs from what its watch told");
        }
        self.publish();
        Ok(revision_of(&listing))
    }

    async fn open(&mut self, client: &mut Client, revision: i64) -> Result<WatchStream, LinkError> {
        let options = WatchOptions::new().with_prefix().with_start_revision(revision);
        self.dialer.bounded("watch", client.watch(self.prefix.as_str(), Some(options))).await
    }

    /// Takes events until it is time to list again.
    async fn hear(&mut self, stream: &mut WatchStream) -> Result<Relist, LinkError> {
        let due = Instant::now() + self.dialer.config().resync_interval;
        loop {
            let Ok(message) = time::timeout_at(due, stream.message()).await else { return Ok(Relist::Due) };
            let message = message?.ok_or(LinkError::Ended)?;
            if is_cancelled(&message) {
                return Ok(Relist::Cancelled);
            }
            // only a watch that was accepted shows that all is well; a listing alone may be followed by a cancel
            self.backoff.reset();
            self.take(&message);
        }
    }

    fn take(&mut self, message: &WatchResponse) {
        if message.events().is_empty() {
            return;
        }
        message.events().iter().filter_map(change_of).for_each(|change| self.known.apply(change));
        self.publish();
    }

    fn publish(&self) {
        let nodes = self.known.nodes();
        self.view.send_if_modified(|view| {
            if view.link == Link::Live && view.nodes == *nodes {
                return false;
            }
            if view.link != Link::Live {
                info!(nodes = nodes.len(), "the view follows etcd");
            }
            *view = View { nodes: nodes.clone(), link: Link::Live };
            true
        });
    }

    /// The last known nodes stay; only the link is told to be lost.
    fn lose(&self, error: &LinkError) {
        let news = self.view.send_if_modified(|view| std::mem::replace(&mut view.link, Link::Lost) != Link::Lost);
        if news {
            warn!(%error, "etcd is out of reach; going on with the nodes last known");
        } else {
            debug!(%error, "etcd is still out of reach");
        }
    }
}

fn revision_of(listing: &GetResponse) -> i64 {
    listing.header().map_or(0, etcd_client::ResponseHeader::revision)
}

fn is_cancelled(message: &WatchResponse) -> bool {
    message.canceled() || message.compact_revision() > 0
}

fn change_of(event: &Event) -> Option<Change<'_>> {
    let kv = event.kv()?;
    Some(match event.event_type() {
        EventType::Put => Change::Put { key: kv.key(), value: kv.value() },
        EventType::Delete => Change::Delete { key: kv.key() },
    })
}
