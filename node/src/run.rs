//! The process's own life: listen, load, announce; and at the end withdraw, drain, hand over, leave.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use axum_server::{Handle, tls_rustls::RustlsConfig};
use tidegate_common::{
    contract::NodeRecord,
    holder,
    registry::Registry,
    reload::Watcher,
    shutdown::Shutdown,
    tls::{self, Clients, MinVersion, TlsError},
    trace::Tracer,
};
use tracing::{info, warn};

use crate::{
    admin,
    config::{NodeConfig, TlsFiles},
    duty::{Duties, Duty, Wishes},
    http::{App, router},
    record::Metrics,
    served::{Models, ServeError},
};

/// After the handover, how long balancers get to read the last events.
const HANDOVER_GRACE: Duration = Duration::from_millis(300);

/// How long the listener may take to end after that.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(200);

/// How long the registry may take to confirm that the node is withdrawn.
const WITHDRAW_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a node could not run, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The address cannot be served on.
    #[error("{key}: cannot listen on {address}: {source}{}", .holder.as_ref().map(|h| format!("; it is held by {h}")).unwrap_or_default())]
    Listen {
        /// The configuration's key that names it.
        key: &'static str,
        /// Which address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
        /// Which process has it, when it is in use and the system tells.
        holder: Option<String>,
    },
    /// Certificate or key cannot be used.
    #[error("node.tls: {0}")]
    Tls(#[from] TlsError),
    /// The model cannot be served.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A fault of ours.
    #[error("{0}")]
    Internal(String),
}

impl RunError {
    /// The address that `key` names cannot be served on.
    pub(crate) fn listen(key: &'static str, address: SocketAddr, source: io::Error) -> Self {
        let in_use = source.kind() == io::ErrorKind::AddrInUse;
        Self::Listen { key, address, holder: in_use.then(|| holder::of_port(address.port())).flatten(), source }
    }
}

/// Serves until `shutdown`; then withdraws, lets running answers finish for `drain_grace`, and hands over the rest. It does the same and
/// comes back for as long as an operator wants it drained.
///
/// # Errors
/// When the address, the certificate or the model cannot be used, or the engine fails.
pub async fn run(
    config: NodeConfig,
    registry: Arc<dyn Registry>,
    tracer: Option<Arc<Tracer>>,
    mut shutdown: Shutdown,
) -> Result<(), RunError> {
    let metrics = Metrics::new(config.models.iter().map(|model| model.name.as_str()))
        .map_err(|e| RunError::Internal(e.to_string()))?;
    let models = Models::new(&config)?;
    // read while the model loads, so that a node that is to be drained never announces itself
    let wishes = Wishes::new(registry.drained(&config.id).await);
    let app =
        Arc::new(App { models, metrics, duties: Duties::default(), wishes, tracer, started: Instant::now(), config });
    let handle = Handle::new();
    let tls = app.config.tls.as_ref().map(read_tls).transpose()?.map(RustlsConfig::from_config);
    let watcher = Watcher::new(app.config.tls.as_ref().map(TlsFiles::all).unwrap_or_default())
        .map_err(|e| RunError::Internal(format!("cannot listen for signals: {e}")))?;
    let server = serve(&app, tls.clone(), handle.clone())?;
    let mut server = tokio::spawn(server);
    let _admin = admin::serve(&app)?;

    tokio::select! {
        loaded = app.models.start() => loaded?,
        () = shutdown.wait() => return Ok(()),
    }
    info!(node = %app.config.id, seconds = app.started.elapsed().as_secs_f32(), "ready");
    let ended = tokio::select! {
        () = follow_wishes(&app, &registry) => Ok(()),
        () = follow_files(&app, watcher, tls) => Ok(()),
        () = shutdown.wait() => Ok(()),
        () = app.models.engine_death() => Err(RunError::Internal("the engine thread ended; the log says why".into())),
        served = &mut server => Err(RunError::Internal(format!("the listener ended: {served:?}"))),
    };
    drain(&app, &registry, if ended.is_ok() { app.config.drain_grace } else { Duration::ZERO }).await;
    handle.graceful_shutdown(Some(HANDOVER_GRACE));
    if !server.is_finished() {
        let _ = tokio::time::timeout(HANDOVER_GRACE + LEAVE_TIMEOUT, server).await;
    }
    info!(node = %app.config.id, "stopped");
    ended
}

/// Serves, and drains whenever somebody wants it so. It does not end.
///
/// # Cancel safety
/// Safe: who goes on from here drains the node.
async fn follow_wishes(app: &Arc<App>, registry: &Arc<dyn Registry>) {
    loop {
        tokio::select! {
            biased;
            () = app.wishes.until(true) => {}
            () = keep_announced(app, registry) => {}
        }
        tokio::select! {
            () = drain_and_rest(app, registry) => {}
            () = app.wishes.until(false) => {}
        }
        app.duties.set(Duty::Serving);
        info!(node = %app.config.id, "takes requests again");
    }
}

async fn drain_and_rest(app: &App, registry: &Arc<dyn Registry>) {
    drain(app, registry, app.config.drain_grace).await;
    info!(node = %app.config.id, "drained");
    std::future::pending().await
}

/// Withdraws, then takes nothing new, and lets go of what still runs after `grace`.
async fn drain(app: &App, registry: &Arc<dyn Registry>, grace: Duration) {
    let deadline = Instant::now() + grace;
    info!(node = %app.config.id, running = app.models.open(), ?grace, "draining");
    // a registry that is out of reach does not hold up the end: whoever asks for the node's health hears of it
    if tokio::time::timeout(WITHDRAW_TIMEOUT, registry.withdraw(&app.config.id)).await.is_err() {
        warn!(node = %app.config.id, "the registry has not confirmed in time that the node is withdrawn");
    }
    app.duties.set(Duty::Draining);
    if tokio::time::timeout_at(deadline.into(), until_idle(app)).await.is_err() {
        warn!(node = %app.config.id, streams = app.models.open(), "drain_grace is over; handing over what still runs");
    }
    app.duties.set(Duty::LettingGo);
}

/// A listener that a runtime can take over.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Binds at once, so that a port in use is an error before anything is loaded.
fn serve(
    app: &Arc<App>,
    tls: Option<RustlsConfig>,
    handle: Handle<SocketAddr>,
) -> Result<impl Future<Output = io::Result<()>> + use<>, RunError> {
    let address = app.config.listen;
    let listener = bind(address).map_err(|source| RunError::listen("node.listen", address, source))?;
    let service = router(app.clone()).into_make_service();
    info!(node = %app.config.id, %address, tls = tls.is_some(), "listening");
    Ok(async move {
        match tls {
            None => axum_server::from_tcp(listener)?.handle(handle).serve(service).await,
            Some(tls) => axum_server::from_tcp_rustls(listener, tls)?.handle(handle).serve(service).await,
        }
    })
}

/// TLS as its files are now.
fn read_tls(files: &TlsFiles) -> Result<Arc<tls::ServerConfig>, TlsError> {
    let identity = tls::Identity::read(&files.cert, &files.key)?;
    let clients = files.client_ca.as_deref().map(Clients::of);
    tls::server_config(identity.resolver()?, MinVersion::Tls13, clients.as_ref()).map(Arc::new)
}

/// Reads the certificates again at SIGHUP, and when one of their files changes. It does not end.
async fn follow_files(app: &App, mut watcher: Watcher, tls: Option<RustlsConfig>) {
    loop {
        let why = watcher.changed().await;
        let (Some(files), Some(tls)) = (&app.config.tls, &tls) else {
            info!(why, "a node without TLS has nothing to read again; all else changes with the next start");
            continue;
        };
        let outcome = match read_tls(files) {
            Ok(config) => {
                tls.reload_from_config(config);
                info!(why, "new connections are served with the certificates as they are now");
                "applied"
            }
            Err(error) => {
                warn!(why, %error, "the certificates are refused, and those before stay in force");
                "refused"
            }
        };
        app.metrics.reloads.with_label_values(&[outcome]).inc();
    }
}

/// Announces the node, and again whenever the set of its models is another. It does not end.
async fn keep_announced(app: &App, registry: &Arc<dyn Registry>) {
    let (mut changes, mut said) = (app.models.changes(), None);
    loop {
        changes.mark_unchanged();
        let record = announcement(app);
        if said.as_ref() != Some(&record) {
            registry.announce(record.clone()).await;
            said = Some(record);
        }
        // the table lives in `app`
        let _ = changes.changed().await;
    }
}

fn announcement(app: &App) -> NodeRecord {
    let config = &app.config;
    NodeRecord {
        tls: config.tls.is_some(),
        models: app.models.offered().into_iter().map(|(name, _)| name).collect(),
        version: config.version.clone(),
        color: config.color.clone(),
        site: config.site.clone(),
        weight: config.weight,
        ..NodeRecord::new(config.id.clone(), config.address(), config.default_model().name.clone())
    }
}

/// Returns when every answer has been read to its end.
pub(crate) async fn until_idle(app: &App) {
    while app.models.open() > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
