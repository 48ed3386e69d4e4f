//! Putting the pieces together, and taking them apart again: sockets closed, streams ended, then out, without a fixed wait.
//!
//! Signals belong to the process, not to this crate: it ends when its `Shutdown` fires, so it can live in a thread of `tidegate up`.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use pingora::{
    apps::{HttpServerOptions, ServerApp},
    server::ListenFds,
    services::{Service as _, listening::Service},
};
use serde_json::json;
use tidegate_common::{
    config::ClusterConfig,
    logs::Logs,
    registry::Registry,
    shutdown::Shutdown,
    systemd,
    tls::TlsError,
    trace::{TelemetryError, Tracer},
};
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
    audit::Audit,
    bind::{self, Balancer},
    config::BalancerConfig,
    discover::Discover,
    drain::OpenRequests,
    health::Prober,
    limits::{Doors, Limits, Places},
    live::{self, Current, Live},
    metrics::Metrics,
    pool::PoolView,
    record::Books,
    remembered::Remembered,
    serve::Edge,
    tls::{Refused, Secured},
    upgrade::{Offer, Predecessor, Sockets, UpgradeSocket},
};

/// From closing the sockets, or the last request's end, to counting: what was on its way then is a request by the end of it.
const SETTLE: Duration = Duration::from_millis(50);
/// How long the registry may take to hear that this balancer is gone; it finds out by itself.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);
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
    /// No balancer gives its sockets to this one.
    #[error("no running balancer gives its sockets at {}: {source}", path.display())]
    NoPredecessor {
        /// The unix socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The configuration names no road to the running balancer.
    #[error("balancer.upgrade_socket is off, or without a name because balancer.admin.listen has port 0")]
    NoUpgradeSocket,
    /// The balancer before has members that are ready, and this one has none.
    #[error("no node became ready here within {within:?}, while the running balancer has some")]
    NotReady {
        /// How long it waited.
        within: Duration,
    },
    /// The sockets cannot be offered where the configuration says.
    #[error("balancer.upgrade_socket: {}: {source}", path.display())]
    UpgradeSocket {
        /// The unix socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Traces cannot be exported.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The audit log cannot be written.
    #[error("balancer.audit.dir: {}: {source}", path.display())]
    Audit {
        /// Its folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
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
    let metrics = Arc::new(Metrics::new());
    let instance = balancer.service.iter().find_map(|socket| socket.local_addr().ok()).map(|a| a.to_string());
    let instance = instance.unwrap_or_default();
    let tracer = Tracer::open(&cluster.telemetry, "balancer", &instance)?;
    let logs = Logs::open(&cluster.telemetry, "balancer", &instance)?;
    let audit = open_audit(&balancer.config, &metrics, logs)?;
    let kept = Kept { metrics, audit: audit.clone(), tracer: tracer.clone() };
    let started = start(&runtime, balancer, cluster, registry, kept);
    let outcome = started.and_then(|house| runtime.block_on(house.live(shutdown)));
    runtime.shutdown_timeout(LEAVE_TIMEOUT);
    // after the last request: those that were cut have their records too
    if let Some(audit) = audit {
        audit.record(
            "stop",
            &json!({"outcome": outcome.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned())}),
            None,
        );
        audit.close();
    }
    if let Some(tracer) = tracer {
        tracer.close();
    }
    outcome
}

/// What is opened before the runtime and closed after it.
struct Kept {
    metrics: Arc<Metrics>,
    audit: Option<Arc<Audit>>,
    tracer: Option<Arc<Tracer>>,
}

fn open_audit(
    config: &BalancerConfig,
    metrics: &Arc<Metrics>,
    logs: Option<Logs>,
) -> Result<Option<Arc<Audit>>, RunError> {
    let Some(config) = config.audit() else { return Ok(None) };
    let opened = Audit::open(config, metrics, logs);
    opened.map(|audit| Some(Arc::new(audit))).map_err(|source| RunError::Audit { path: config.folder().into(), source })
}

/// Everything that runs.
struct House {
    service: JoinHandle<()>,
    admin: JoinHandle<()>,
    discover: JoinHandle<()>,
    /// Closes the service's sockets and idle connections when set.
    closing: watch::Sender<bool>,
    /// The same of the private listener, which answers to the end where no other process does.
    admin_closing: watch::Sender<bool>,
    /// Lets both listeners accept.
    entering: watch::Sender<bool>,
    predecessor: Option<Predecessor>,
    offer: Option<(UpgradeSocket, PathBuf, Sockets)>,
    pool: Arc<PoolView>,
    open: Arc<OpenRequests>,
    live: Current,
    books: Arc<Books>,
    registry: Arc<dyn Registry>,
    /// By which other balancers count this one.
    id: String,
}

fn start(
    runtime: &Runtime,
    balancer: Balancer,
    cluster: &ClusterConfig,
    registry: Arc<dyn Registry>,
    Kept { metrics, audit, tracer }: Kept,
) -> Result<House, RunError> {
    let _within = runtime.enter();
    let Balancer { config, service, admin, readings, reloads: _, predecessor, is_upgradable } = balancer;
    let sockets = Sockets { public: service, private: vec![admin] };
    let offer = match config.upgrade_socket.path(config.admin).filter(|_| is_upgradable) {
        Some(path) => Some((config.upgrade_socket.clone(), path, sockets.try_clone().map_err(RunError::Setup)?)),
        None => None,
    };
    let (names, fds) = bind::hand_over(sockets.public).map_err(RunError::Setup)?;
    let (admin_names, admin_fds) = bind::hand_over(sockets.private).map_err(RunError::Setup)?;
    info!(cluster = %cluster.name, listen = ?names, tls = config.uses_tls(), admin = ?admin_names, "balancer listens");

    if let Some(audit) = &audit {
        let version = env!("CARGO_PKG_VERSION");
        audit.record("start", &json!({"version": version, "pid": std::process::id(), "listen": names}), None);
    }
    let open = Arc::new(OpenRequests::default());
    let rules = config.health.rules;
    let (pool, signals) = PoolView::new();
    let remembered = Remembered::open(&config.members_file, cluster);
    metrics.show_certificates(&config);
    let live = Arc::new(ArcSwap::from_pointee(Live::new(config, &pool)?));
    let books = Arc::new(Books { metrics: Arc::clone(&metrics), audit, tracer, live: Arc::clone(&live) });
    let prober = Prober { live: Arc::clone(&live) };
    let discover = Discover::new(rules, Arc::clone(&pool), Arc::new(prober), Arc::clone(&books), remembered)
        .run(Arc::clone(&registry), signals);
    let (limits, id) = (Arc::new(Limits::new(&metrics)), format!("{:016x}", rand::random::<u64>()));
    tokio::spawn(join(Arc::clone(&registry), id.clone(), Arc::clone(&limits)));
    let (closing, closed) = watch::channel(false);
    let (admin_closing, admin_closed) = watch::channel(false);
    let (entering, entered) = watch::channel(false);
    let public = public_service(&books, limits, &open);
    tokio::spawn(live::follow(readings, Arc::clone(&live), Arc::clone(&pool), Arc::clone(&books)));
    let private = Admin { pool: Arc::clone(&pool), metrics, open: Arc::clone(&open) };
    let private = Service::new("admin".into(), private);
    Ok(House {
        service: listen(public, &names, fds, entered.clone(), closed),
        admin: listen(private, &admin_names, admin_fds, entered, admin_closed),
        discover: tokio::spawn(discover),
        closing,
        admin_closing,
        entering,
        predecessor,
        offer,
        pool,
        open,
        live,
        books,
        registry,
        id,
    })
}

/// Tells the registry that this balancer is alive, and the limits how many are.
async fn join(registry: Arc<dyn Registry>, id: String, limits: Arc<Limits>) {
    let mut alive = registry.join(&id).await;
    loop {
        limits.count_balancers(*alive.borrow_and_update());
        if alive.changed().await.is_err() {
            return;
        }
    }
}

fn public_service(books: &Arc<Books>, limits: Arc<Limits>, open: &Arc<OpenRequests>) -> Service<Secured<Edge>> {
    let Books { live, metrics, .. } = &**books;
    let mut options = HttpServerOptions::default();
    options.h2_idle_timeout = Some(live.load().config.limits.idle_timeout);
    let doors = Arc::new(Doors::new());
    let edge = Edge {
        doors: Arc::clone(&doors),
        live: Arc::clone(live),
        places: Places::default(),
        limits,
        metrics: Arc::clone(metrics),
        books: Arc::clone(books),
        cache: Arc::default(),
        sessions: Arc::default(),
        open: Arc::clone(open),
        options,
        started: Instant::now(),
    };
    let refused = Refused {
        address: metrics.refused("allowlist"),
        per_address: metrics.refused("per_address"),
        handshake: metrics.refused("handshake"),
        doors: metrics.refused.clone(),
    };
    let secured = Secured::new(Arc::new(edge), Arc::clone(live), doors, Arc::clone(open), refused);
    let mut service = Service::new("edge".into(), secured);
    service.set_connection_filter(Arc::new(Gate { live: Arc::clone(live), refused: metrics.refused("allowlist") }));
    service
}

fn listen<A: ServerApp + Send + Sync + 'static>(
    mut service: Service<A>,
    names: &[String],
    fds: ListenFds,
    mut entered: watch::Receiver<bool>,
    closing: watch::Receiver<bool>,
) -> JoinHandle<()> {
    for name in names {
        service.add_tcp(name);
    }
    tokio::spawn(async move {
        // an error means that the house is gone
        if entered.wait_for(|entered| *entered).await.is_ok() {
            service.start_service(Some(fds), closing, 1).await;
        }
    })
}

impl House {
    async fn live(mut self, mut shutdown: Shutdown) -> Result<(), RunError> {
        let offer = tokio::select! {
            entered = self.enter() => entered?,
            () = shutdown.wait() => return Ok(()),
        };
        let is_replaced = tokio::select! {
            () = shutdown.wait() => false,
            () = taken(offer, Arc::clone(&self.pool)) => true,
            _ = &mut self.service => return Err(RunError::Ended("listener")),
            _ = &mut self.admin => return Err(RunError::Ended("private listener")),
            _ = &mut self.discover => return Err(RunError::Ended("pool's writer")),
        };
        if is_replaced {
            self.record("upgrade", &json!({"step": "handed_over"}));
        }
        self.admin_closing.send_replace(is_replaced);
        self.leave().await;
        // a listener whose house goes without a word calls that an error
        self.admin_closing.send_replace(true);
        Ok(())
    }

    /// Begins to accept; in another balancer's place only once it can serve as well as that one, which leaves then.
    async fn enter(&mut self) -> Result<Option<Offer>, RunError> {
        let Some(predecessor) = self.predecessor.take() else {
            // before anyone is let in, so that nobody is cut off when it fails
            let offer = self.offer()?;
            self.entering.send_replace(true);
            systemd::ready();
            return Ok(offer);
        };
        predecessor.is_matched_by(&self.pool).await?;
        self.entering.send_replace(true);
        predecessor.dismiss();
        self.record("upgrade", &json!({"step": "taken_over"}));
        systemd::ready();
        // the one before has left, so this one stays whatever comes of it
        Ok(self.offer().unwrap_or_else(|error| {
            warn!(%error, "no other process can take this one's place");
            None
        }))
    }

    /// Offers the sockets to a process that is to take this one's place. Only a path that was asked for must be had.
    fn offer(&mut self) -> Result<Option<Offer>, RunError> {
        let Some((asked, path, sockets)) = self.offer.take() else { return Ok(None) };
        match Offer::open(&path, sockets) {
            Ok(offer) => Ok(Some(offer)),
            Err(source) if matches!(asked, UpgradeSocket::At(_)) => Err(RunError::UpgradeSocket { path, source }),
            Err(error) => {
                warn!(path = %path.display(), %error, "no other process can take this one's place; set balancer.upgrade_socket");
                Ok(None)
            }
        }
    }

    async fn leave(&self) {
        let grace = self.live.load().config.drain_grace;
        info!(open = self.open.count(), ?grace, "balancer drains");
        self.record("drain", &json!({"open": self.open.count()}));
        self.open.drain();
        self.closing.send_replace(true);
        let (settled, _) =
            tokio::join!(timeout(grace, self.settled()), timeout(GOODBYE_TIMEOUT, self.registry.leave(&self.id)));
        match settled {
            Ok(()) => info!("balancer leaves, every request has ended"),
            Err(_) => warn!(cut = self.open.count(), "balancer leaves, requests are cut short"),
        }
    }

    fn record(&self, event: &'static str, fields: &serde_json::Value) {
        if let Some(audit) = &self.books.audit {
            audit.record(event, fields, None);
        }
    }

    /// Returns once no request is open, and none was on its way.
    async fn settled(&self) {
        loop {
            sleep(SETTLE).await;
            if self.open.count() == 0 {
                return;
            }
            self.open.idle().await;
        }
    }
}

/// Returns once another process serves in this one's place.
async fn taken(offer: Option<Offer>, pool: Arc<PoolView>) {
    if let Some(offer) = offer {
        match offer.taken(pool).await {
            Ok(()) => return,
            Err(error) => warn!(%error, "no other process can take this one's place any more"),
        }
    }
    std::future::pending().await
}
