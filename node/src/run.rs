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
    shutdown::{self, Shutdown},
    tls::{self, MinVersion, TlsError},
};
use tracing::{info, warn};

use crate::{
    config::NodeConfig,
    http::{App, router},
    record::Metrics,
    served::{Models, ServeError},
};

/// After the handover, how long balancers get to read the last events.
const HANDOVER_GRACE: Duration = Duration::from_millis(500);

/// Why a node could not run, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The address cannot be served on.
    #[error("node.listen: cannot listen on {address}: {source}{}", .holder.as_ref().map(|h| format!("; it is held by {h}")).unwrap_or_default())]
    Listen {
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

/// Serves until `shutdown`; then withdraws, lets running answers finish for `drain_grace`, and hands over the rest.
///
/// # Errors
/// When the address, the certificate or the model cannot be used, or the engine fails.
pub async fn run(config: NodeConfig, registry: Arc<dyn Registry>, mut shutdown: Shutdown) -> Result<(), RunError> {
    let (drain, draining) = shutdown::channel();
    let (let_go, handover) = shutdown::channel();
    let metrics = Metrics::new(&config.served_model_name).map_err(|e| RunError::Internal(e.to_string()))?;
    let models = Models::new(&config);
    let app = Arc::new(App { models, metrics, draining, handover, started: Instant::now(), config });
    let handle = Handle::new();
    let server = serve(&app, handle.clone())?;
    let mut server = tokio::spawn(server);

    tokio::select! {
        loaded = app.models.start(&app.config) => loaded?,
        () = shutdown.wait() => return Ok(()),
    }
    info!(node = %app.config.id, seconds = app.started.elapsed().as_secs_f32(), "ready");
    let record = announcement(&app.config);
    registry.announce(record.clone()).await;
    let ended = tokio::select! {
        () = shutdown.wait() => Ok(()),
        () = app.models.engine_death() => Err(RunError::Internal("the engine thread ended; the log says why".into())),
        served = &mut server => Err(RunError::Internal(format!("the listener ended: {served:?}"))),
    };
    registry.withdraw(&record.id).await;
    drain.fire();
    if ended.is_ok() {
        wait_until_idle(&app).await;
    }
    let_go.fire();
    handle.graceful_shutdown(Some(HANDOVER_GRACE));
    if !server.is_finished() {
        let _ = tokio::time::timeout(HANDOVER_GRACE * 2, server).await;
    }
    info!(node = %app.config.id, "stopped");
    ended
}

/// Binds at once, so that a port in use is an error before anything is loaded.
fn serve(app: &Arc<App>, handle: Handle<SocketAddr>) -> Result<impl Future<Output = io::Result<()>> + use<>, RunError> {
    let address = app.config.listen;
    let listen = |source: io::Error| {
        let in_use = source.kind() == io::ErrorKind::AddrInUse;
        RunError::Listen { address, holder: in_use.then(|| holder::of_port(address.port())).flatten(), source }
    };
    let listener = TcpListener::bind(address).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let service = router(app.clone()).into_make_service();
    let tls = match &app.config.tls {
        None => None,
        Some(files) => {
            let identity = tls::Identity::read(&files.cert, &files.key)?;
            let config = tls::server_config(&identity, MinVersion::Tls13, files.client_ca.as_deref())?;
            Some(RustlsConfig::from_config(Arc::new(config)))
        }
    };
    let plain = tls.is_none().then(|| listener.try_clone()).transpose().map_err(listen)?;
    info!(node = %app.config.id, %address, tls = tls.is_some(), "listening");
    Ok(async move {
        match (plain, tls) {
            (Some(plain), _) => axum_server::from_tcp(plain)?.handle(handle).serve(service).await,
            (None, Some(tls)) => axum_server::from_tcp_rustls(listener, tls)?.handle(handle).serve(service).await,
            (None, None) => Ok(()),
        }
    })
}

fn announcement(config: &NodeConfig) -> NodeRecord {
    NodeRecord {
        tls: config.tls.is_some(),
        version: config.version.clone(),
        color: config.color.clone(),
        site: config.site.clone(),
        weight: config.weight,
        ..NodeRecord::new(config.id.clone(), config.address(), config.served_model_name.clone())
    }
}

/// Returns when every answer has been read to its end, at the latest after `drain_grace`.
async fn wait_until_idle(app: &App) {
    let deadline = Instant::now() + app.config.drain_grace;
    while app.models.open() > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let streams = app.models.open();
    if streams > 0 {
        warn!(node = %app.config.id, streams, "drain_grace is over; handing over what still runs");
    }
}
