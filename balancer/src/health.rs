//! Active probes: one task per member asks its `/health`, or what a foreign upstream has in its place, on a fresh connection each time, so
//! that accepting is probed as well.
//!
//! A probe reports and decides nothing. Its pace is the interval with jitter, and a fifth of it while the next answer may decide
//! whether the member takes requests.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::BytesMut;
use pingora::{connectors::http::Connector, http::RequestHeader, upstreams::peer::HttpPeer};
use rand::RngExt;
use tidegate_common::{
    contract::{NodeRecord, headers, paths},
    ids::NodeId,
};
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    config::RelayConfig,
    live::{Current, Live},
    pool::{Incarnation, Probed, Signal},
    upstreams::{Foreign, Upstreams},
};

/// Largest `/health` body read.
const HEALTH_BYTES_MAX: usize = 64 * 1024;
/// Connections of probes never meet those of requests.
const PROBE_GROUP: u64 = 1;

/// Makes probes.
pub(crate) struct Prober {
    pub(crate) live: Current,
}

/// One member's probe; it stops when dropped.
pub(crate) struct Probe {
    soon: Arc<AtomicBool>,
    changed: Arc<Notify>,
    task: AbortHandle,
}

impl Probe {
    /// Whether the next probe should come soon.
    pub(crate) fn pace(&self, soon: bool) {
        if self.soon.swap(soon, Ordering::Relaxed) != soon {
            self.changed.notify_one();
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Prober {
    /// Begins to probe.
    pub(crate) fn start(
        self: Arc<Self>,
        record: NodeRecord,
        incarnation: Incarnation,
        signals: mpsc::Sender<Signal>,
    ) -> Probe {
        let (soon, changed) = (Arc::new(AtomicBool::new(true)), Arc::new(Notify::new()));
        let pace = (Arc::clone(&soon), Arc::clone(&changed));
        let task = tokio::spawn(async move {
            loop {
                let began = Instant::now();
                let outcome = self.probe(&record).await;
                let signal = Signal::Probed { id: record.id.clone(), incarnation, outcome };
                if signals.send(signal).await.is_err() {
                    return;
                }
                self.rest(&record.id, began, &pace.0, &pace.1).await;
            }
        });
        Probe { soon, changed, task: task.abort_handle() }
    }

    /// The members that are none of ours, and are asked in their own way.
    pub(crate) fn upstreams(&self) -> Arc<Upstreams> {
        Arc::clone(&self.live.load().upstreams)
    }

    async fn rest(&self, id: &NodeId, began: Instant, soon: &AtomicBool, changed: &Notify) {
        let interval = {
            let live = self.live.load();
            live.upstreams.get(id).map_or(live.config.health.interval, |foreign| foreign.health_interval())
        };
        let usual = interval.mul_f64(rand::rng().random_range(0.9..1.1));
        loop {
            let pause = if soon.load(Ordering::Relaxed) { usual / 5 } else { usual };
            tokio::select! {
                () = sleep_until(began + pause) => return,
                () = changed.notified() => {}
            }
        }
    }

    async fn probe(&self, record: &NodeRecord) -> Probed {
        let live = self.live.load_full();
        let foreign = live.upstreams.get(&record.id);
        let bound = foreign.map_or(live.config.health.timeout, |foreign| foreign.health_timeout());
        let asked = async {
            match foreign {
                None => ask(&live, record).await,
                Some(foreign) => reach(&live, record, foreign).await,
            }
        };
        match timeout(bound, asked).await {
            Ok(outcome) => outcome.unwrap_or_else(Probed::Failed),
            Err(_) => Probed::Failed(format!("no answer within {bound:?}")),
        }
    }
}

/// A node's own word.
async fn ask(live: &Live, record: &NodeRecord) -> Result<Probed, String> {
    // without a CA a node that speaks TLS cannot be verified
    if record.tls && live.config.upstream_tls.is_none() {
        return Err("the node speaks TLS, and balancer.upstream_tls.ca is not set".into());
    }
    let peer = peer(&live.config.relay, resolve(&record.address).await?, record);
    let mut request = head(paths::HEALTH, &record.address).map_err(|e| e.to_string())?;
    request.insert_header(headers::REQUEST_ID, "probe").map_err(|e| e.to_string())?;
    let (_, body) = fetch(&live.relay.connector, &peer, request).await.map_err(|e| e.to_string())?;
    let health = serde_json::from_slice(&body).map_err(|e| format!("{} answers with nonsense: {e}", paths::HEALTH))?;
    Ok(Probed::Answered { peer: Box::new(peer), health: Box::new(health) })
}

/// Whether a foreign upstream answers, and takes our key. One that has had enough for now is well.
async fn reach(live: &Live, record: &NodeRecord, foreign: &Foreign) -> Result<Probed, String> {
    let peer = peer(&live.config.relay, resolve(&record.address).await?, record);
    let path = foreign.health_path();
    let mut request = head(&path, foreign.authority()).map_err(|e| e.to_string())?;
    if let Some(authorization) = foreign.authorization() {
        request.insert_header("authorization", authorization.clone()).map_err(|e| e.to_string())?;
    }
    match fetch(&foreign.connector, &peer, request).await.map_err(|e| e.to_string())? {
        (200..300 | 429, _) => Ok(Probed::Reached { peer: Box::new(peer) }),
        (status, _) => Err(format!("{path} answers with {status}")),
    }
}

fn peer(relay: &RelayConfig, address: SocketAddr, record: &NodeRecord) -> HttpPeer {
    let host = record.address.rsplit_once(':').map_or(record.address.as_str(), |(host, _)| host);
    let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let mut peer = HttpPeer::new(address, record.tls, name);
    peer.options.connection_timeout = Some(relay.connect_timeout);
    peer.options.total_connection_timeout = Some(relay.connect_timeout * 2);
    peer.options.write_timeout = Some(relay.stall_timeout);
    peer
}

async fn resolve(address: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = address.parse() {
        return Ok(address);
    }
    let mut found = tokio::net::lookup_host(address).await.map_err(|e| format!("cannot resolve '{address}': {e}"))?;
    found.next().ok_or_else(|| format!("'{address}' has no address"))
}

fn head(path: &str, authority: &str) -> pingora::Result<RequestHeader> {
    let mut request = RequestHeader::build("GET", path.as_bytes(), Some(4))?;
    request.insert_header("host", authority)?;
    request.insert_header("connection", "close")?;
    Ok(request)
}

/// Status and body, over a connection of its own.
async fn fetch(connector: &Connector, peer: &HttpPeer, request: RequestHeader) -> pingora::Result<(u16, BytesMut)> {
    let mut peer = peer.clone();
    peer.group_key = PROBE_GROUP;
    let (mut session, _) = connector.get_http_session(&peer).await?;
    session.set_read_timeout(Some(Duration::from_secs(60))); // the whole probe has its own, shorter bound
    session.write_request_header(Box::new(request)).await?;
    session.finish_request_body().await?;
    session.read_response_header().await?;
    let status = session.response_header().map_or(0, |head| head.status.as_u16());
    let mut body = BytesMut::new();
    while let Some(part) = session.read_response_body().await? {
        body.extend_from_slice(&part);
        if body.len() > HEALTH_BYTES_MAX {
            break;
        }
    }
    Ok((status, body))
}
