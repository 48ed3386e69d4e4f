//! What a reload may change, as one value behind one pointer: a connection takes it when it comes, a request once its head is read, a
//! probe each time. Whoever has begun with one goes on with it to its end.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use arc_swap::ArcSwap;
use pingora::{
    connectors::{ConnectorOptions, http::Connector},
    listeners::tls::Acceptor,
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tidegate_common::{config::Problems, tls::TlsError};
use tokio::{sync::mpsc, time::Instant};
use tracing::{info, warn};

use crate::{
    auth::{Auth, KeyEntry},
    config::{BalancerConfig, UpstreamTls},
    limits::{Rules, Shared},
    pool::{PoolView, Signal},
    record::Books,
    relay::{Budget, Relay},
    upstreams::Upstreams,
};

/// Idle connections kept to nodes, for each worker thread.
const IDLE_UPSTREAMS_PER_THREAD: usize = 256;
/// Readings that wait for their turn.
const READINGS_MAX: usize = 4;

/// The configuration in force, and what is made of its files.
pub(crate) struct Live {
    pub(crate) config: BalancerConfig,
    pub(crate) acceptor: Option<Acceptor>,
    pub(crate) relay: Relay,
    pub(crate) upstreams: Arc<Upstreams>,
    /// Counts of all balancers together, where they are kept.
    pub(crate) shared: Option<Arc<Shared>>,
}

/// Where it is found.
pub(crate) type Current = Arc<ArcSwap<Live>>;

impl Live {
    /// Makes what the configuration asks for; connections to nodes are begun anew, since their certificates may be others.
    ///
    /// # Errors
    /// When a file that was good when the configuration was read is not any more.
    pub(crate) fn new(config: BalancerConfig, pool: &Arc<PoolView>) -> Result<Self, TlsError> {
        let relay = Relay {
            connector: Arc::new(connector(&config)?),
            budget: Budget::new(config.relay.moves_per_second, config.relay.moves_burst, Instant::now()),
            rules: config.relay.clone(),
            pool: Arc::clone(pool),
        };
        let upstreams = Upstreams::connect(&config.upstreams, IDLE_UPSTREAMS_PER_THREAD * config.threads)?;
        let acceptor = config.tls.as_ref().map(|tls| Acceptor::from_server_config(Arc::clone(&tls.config)));
        let shared = config.limits.quotas.shared.redis.clone().map(Shared::open);
        Ok(Self { config, acceptor, relay, upstreams: Arc::new(upstreams), shared })
    }
}

impl Live {
    /// The limits in force.
    pub(crate) fn rules(&self) -> Rules<'_> {
        Rules {
            quotas: &self.config.limits.quotas,
            shared: self.shared.as_ref(),
            life: self.config.relay.request_timeout,
        }
    }
}

fn connector(config: &BalancerConfig) -> Result<Connector, TlsError> {
    let mut options = ConnectorOptions::new(IDLE_UPSTREAMS_PER_THREAD * config.threads);
    // without a CA of our own nobody is trusted, rather than whoever the system trusts
    options.ca_file = Some("/dev/null".into());
    if let Some(upstream @ UpstreamTls { ca, identity }) = &config.upstream_tls {
        // Pingora panics on files it cannot read, so they are read once more just before
        upstream.check()?;
        options.ca_file = Some(ca.display().to_string());
        options.cert_key_file =
            identity.as_ref().map(|(cert, key)| (cert.display().to_string(), key.display().to_string()));
    }
    Ok(Connector::new(Some(options)))
}

/// Hands new readings of the configuration to a running balancer.
#[derive(Debug, Clone)]
pub struct Reloads(mpsc::Sender<Reading>);

/// A reading.
pub(crate) struct Reading {
    /// Checked, or what is wrong with it.
    config: Result<BalancerConfig, Problems>,
    /// Paths of the values that are others than before.
    changed: Vec<String>,
}

impl Reloads {
    /// A road for readings, and its end.
    pub(crate) fn new() -> (Self, mpsc::Receiver<Reading>) {
        let (sender, readings) = mpsc::channel(READINGS_MAX);
        (Self(sender), readings)
    }

    /// Puts a good reading in force; a bad one is logged and counted, and what was in force stays. `changed` are the paths of the values
    /// that are others than before, for the record.
    pub async fn give(&self, config: Result<BalancerConfig, Problems>, changed: Vec<String>) {
        // an error means that the balancer has ended
        let _ = self.0.send(Reading { config, changed }).await;
    }
}

/// Puts readings in force, until nobody gives any.
pub(crate) async fn follow(
    mut readings: mpsc::Receiver<Reading>,
    live: Current,
    pool: Arc<PoolView>,
    books: Arc<Books>,
) {
    let mut known = files(&live.load().config);
    while let Some(Reading { config, changed }) = readings.recv().await {
        let next = config.map_err(|problems| problems.to_string());
        let mut reload = Reload { outcome: "applied", reason: None, changed, files: Vec::new(), keys: Vec::new() };
        let before = live.load_full();
        let next = next.and_then(|mut config| {
            config.inherit(&before.config);
            Live::new(config, &pool).map_err(|e| e.to_string())
        });
        match next {
            Ok(next) => {
                let now = files(&next.config);
                reload.files = differences(&known, &now);
                reload.keys = key_changes(before.config.auth.as_deref(), next.config.auth.as_deref());
                known = now;
                let reloaded =
                    Signal::Reloaded { rules: next.config.health.rules, upstreams: Arc::clone(&next.upstreams) };
                books.metrics.show_certificates(&next.config);
                live.store(Arc::new(next));
                // an error means that the pool's writer has ended, and with it the balancer
                let _ = pool.signals().send(reloaded).await;
                info!("the configuration is in force as it stands now");
            }
            Err(reason) => {
                warn!(reason, "the configuration is refused, and the one before stays in force");
                (reload.outcome, reload.reason) = ("refused", Some(reason));
            }
        }
        books.metrics.reloads.with_label_values(&[reload.outcome]).inc();
        if let Some(audit) = &books.audit {
            audit.record("reload", &reload, None);
        }
    }
}

/// A reading of the configuration, as it is recorded: names of what changed, and never a value.
#[derive(Serialize)]
struct Reload {
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Paths of values.
    changed: Vec<String>,
    /// Files with other content.
    files: Vec<String>,
    /// API keys that came, went or allow something else, each with that word.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    keys: Vec<String>,
}

fn key_changes(before: Option<&Auth>, now: Option<&Auth>) -> Vec<String> {
    let by_id = |auth: Option<&Auth>| -> BTreeMap<String, KeyEntry> {
        auth.into_iter().flat_map(Auth::key_entries).map(|key| (key.id.clone(), key.clone())).collect()
    };
    let (before, now) = (by_id(before), by_id(now));
    let ids: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let word = |id: &String| match (before.get(id), now.get(id)) {
        (None, Some(_)) => Some("added"),
        (Some(_), None) => Some("removed"),
        (Some(before), Some(now)) if before.revoked.is_none() && now.revoked.is_some() => Some("revoked"),
        (before, now) => (before != now).then_some("changed"),
    };
    ids.into_iter().filter_map(|id| Some(format!("{id} {}", word(id)?))).collect()
}

/// The files that a configuration names, by the hash of what is in them.
fn files(config: &BalancerConfig) -> BTreeMap<PathBuf, Option<[u8; 32]>> {
    let hash = |path: &PathBuf| std::fs::read(path).ok().map(|content| Sha256::digest(content).into());
    config.files().iter().map(|path| (path.clone(), hash(path))).collect()
}

fn differences(before: &BTreeMap<PathBuf, Option<[u8; 32]>>, now: &BTreeMap<PathBuf, Option<[u8; 32]>>) -> Vec<String> {
    let is_other = |path: &&PathBuf| before.get(*path) != now.get(*path);
    let paths: BTreeSet<&PathBuf> = before.keys().chain(now.keys()).collect();
    paths.into_iter().filter(is_other).map(|path| path.display().to_string()).collect()
}
