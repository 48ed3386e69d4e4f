//! How many balancers are alive: each keeps a key under a lease, and counts them all again and again.
//!
//! A store that is out of reach says nothing, and what it said last holds: the balancers go on without it.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, GetOptions};
use tokio::{sync::watch, time};
use tracing::{debug, info};

use super::link::{Dialer, LinkError, jittered};

/// How often they are counted, at most.
const INTERVAL: Duration = Duration::from_secs(2);

/// Keeps `alive` at the number of keys below `prefix`, until nobody listens.
pub(super) async fn count(dialer: Arc<Dialer>, prefix: String, alive: watch::Sender<usize>) {
    let mut client = None;
    while !alive.is_closed() {
        match read(&dialer, &mut client, &prefix).await {
            Ok(said) => {
                if alive.send_if_modified(|known| std::mem::replace(known, said) != said) {
                    info!(balancers = said, "balancers of this cluster");
                }
            }
            Err(error) => {
                debug!(prefix, %error, "cannot count the balancers");
                client = None;
            }
        }
        time::sleep(jittered(INTERVAL)).await;
    }
}

async fn read(dialer: &Dialer, client: &mut Option<Client>, prefix: &str) -> Result<usize, LinkError> {
    let client = match client {
        Some(client) => client,
        none => none.insert(dialer.dial().await?),
    };
    let options = GetOptions::new().with_prefix().with_count_only();
    let found = dialer.bounded("count the balancers", client.get(prefix, Some(options))).await?;
    Ok(usize::try_from(found.count()).unwrap_or(0))
}
