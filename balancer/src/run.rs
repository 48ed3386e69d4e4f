//! Putting the pieces together, and taking them apart again: sockets closed, streams ended, then out, without a fixed wait.
//!
//! Signals belong to the process, not to this crate: it ends when its `Shutdown` fires, so it can live in a thread of `tidegate up`.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use pingora::{
    apps::{HttpServerOptions, ServerApp},
    server::ListenFds,
    services::{Service as _, listening::Service},
};
use tidegate_common::{config::ClusterConfig, registry::Registry, shutdown::Shutdown, tls::TlsError};
use tokio::{
    runtime::Runtime,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    accept::Gate,
    admin::Admin,
    bind::{self, Balancer},
    config::BalancerConfig,
    discover::Discover,
    drain::OpenRequests,
    health::Prober,
    limits::Places,
    live::{self, Current, Live},
    metrics::Metrics,
    pool::PoolView,
    remembered::Remembered,
    serve::Edge,
    tls::{Refused, Secured},
};

/// From closing the sockets to counting: what was on its way then is a request by the end of it.
const SETTLE: Duration = Duration::from_millis(50);
/// How long the runtime may take to drop what is left after the drain.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why the balancer could not run, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Somebody else listens there.
    #[error("{address} is in use{}", .holder.as_ref().map(|h| format!(" by {h}")).unwrap_or_default())]
    AddressInUse {
        /// Where.
        address: SocketAddr,
        /// Process name and id, when `/proc` tells.
        holder: Option<String>,
    },
    /// The address cannot be listened on for another reason.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// A certificate or key that was good when the configuration was read is not any more.
    #[error("balancer.upstream_tls: {0}")]
    Tls(#[from] TlsError),
    /// The system refuses threads or descriptors.
    #[error("cannot set up the runtime: {0}")]
    Setup(io::Error),
    /// A part that must live as long as the process has ended.
    #[error("the {0} ended unexpectedly")]
    Ended(&'static str),
}

/// Serves until `shutdown` fires and the open requests have ended, or `drain_grace` has passed. Blocks; call it on its own thread,
/// outside any tokio runtime. Installs no signal handler and never exits the process.
///
/// # Errors
/// When an address is in use, TLS cannot be set up, or a part ends unexpectedly.
pub fn run(
    config: BalancerConfig,
    cluster: &ClusterConfig,
    registry: Arc<dyn Registry>,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    Balancer::bind(config)?.run(cluster, registry, shutdown)
}

pub(crate) fn serve(
    balancer: Balancer,
    cluster: &ClusterConfig,
    registry: Arc<dyn Registry>,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(balancer.config.threads)
        .thread_name("balancer")
        .enable_all()
        .build()
        .map_err(RunError::Setup)?;
    let outcome = start(&runtime, balancer, cluster, registry).and_then(|house| runtime.block_on(house.live(shutdown)));
    runtime.shutdown_timeout(LEAVE_TIMEOUT);
    outcome
}

/// Everything that runs.
struct House {
    service: JoinHandle<()>,
    admin: JoinHandle<()>,
    discover: JoinHandle<()>,
    /// Closes the service's sockets and idle connections when set.
    closing: watch::Sender<bool>,
    /// Kept, so that the private listener answers to the end.
    _admin_closing: watch::Sender<bool>,
    open: Arc<OpenRequests>,
    live: Current,
}

fn start(
    runtime: &Runtime,
    balancer: Balancer,
    cluster: &ClusterConfig,
    registry: Arc<dyn Registry>,
) -> Result<House, RunError> {
    let _within = runtime.enter();
    let Balancer { config, service, admin, readings, reloads: _ } = balancer;
    let (names, fds) = bind::hand_over(service).map_err(RunError::Setup)?;
    let (admin_names, admin_fds) = bind::hand_over(vec![admin]).map_err(RunError::Setup)?;
    info!(cluster = %cluster.name, listen = ?names, tls = config.uses_tls(), admin = ?admin_names, "balancer listens");

    let metrics = Arc::new(Metrics::new());
    let open = Arc::new(OpenRequests::default());
    let rules = config.health.rules;
    let (pool, signals) = PoolView::new();
    let remembered = Remembered::open(&config.members_file, cluster);
    let live = Arc::new(ArcSwap::from_pointee(Live::new(config, &pool)?));
    let prober = Prober { live: Arc::clone(&live) };
    let discover = Discover::new(rules, Arc::clone(&pool), Arc::new(prober), Arc::clone(&metrics), remembered)
        .run(registry, signals);
    let (closing, closed) = watch::channel(false);
    let (admin_closing, admin_closed) = watch::channel(false);
    let public = public_service(&live, &metrics, &open);
    tokio::spawn(live::follow(readings, Arc::clone(&live), Arc::clone(&pool), Arc::clone(&metrics)));
    let private = Admin { pool, metrics, open: Arc::clone(&open) };
    Ok(House {
        service: listen(public, &names, fds, closed),
        admin: listen(Service::new("admin".into(), private), &admin_names, admin_fds, admin_closed),
        discover: tokio::spawn(discover),
        closing,
        _admin_closing: admin_closing,
        open,
        live,
    })
}

fn public_service(live: &Current, metrics: &Arc<Metrics>, open: &Arc<OpenRequests>) -> Service<Secured<Edge>> {
    let mut options = HttpServerOptions::default();
    options.h2_idle_timeout = Some(live.load().config.limits.idle_timeout);
    let edge = Edge {
        live: Arc::clone(live),
        places: Places::default(),
        metrics: Arc::clone(metrics),
        open: Arc::clone(open),
        options,
        started: Instant::now(),
    };
    let refused = Refused { per_address: metrics.refused("per_address"), handshake: metrics.refused("handshake") };
    let secured = Secured::new(Arc::new(edge), Arc::clone(live), refused);
    let mut service = Service::new("edge".into(), secured);
    service.set_connection_filter(Arc::new(Gate { live: Arc::clone(live), refused: metrics.refused("allowlist") }));
    service
}

fn listen<A: ServerApp + Send + Sync + 'static>(
    mut service: Service<A>,
    names: &[String],
    fds: ListenFds,
    closing: watch::Receiver<bool>,
) -> JoinHandle<()> {
    for name in names {
        service.add_tcp(name);
    }
    tokio::spawn(async move { service.start_service(Some(fds), closing, 1).await })
}

impl House {
    async fn live(mut self, mut shutdown: Shutdown) -> Result<(), RunError> {
        tokio::select! {
            () = shutdown.wait() => {}
            _ = &mut self.service => return Err(RunError::Ended("listener")),
            _ = &mut self.admin => return Err(RunError::Ended("private listener")),
            _ = &mut self.discover => return Err(RunError::Ended("pool's writer")),
        }
        self.leave().await;
        Ok(())
    }

    async fn leave(&self) {
        let grace = self.live.load().config.drain_grace;
        info!(open = self.open.count(), ?grace, "balancer drains");
        self.open.drain();
        self.closing.send_replace(true);
        sleep(SETTLE).await;
        match timeout(grace, self.open.idle()).await {
            Ok(()) => info!("balancer leaves, every request has ended"),
            Err(_) => warn!(cut = self.open.count(), "balancer leaves, requests are cut short"),
        }
    }
}
