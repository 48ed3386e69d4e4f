//! The process's own life: listen, load, announce; and at the end withdraw, drain, hand over, leave.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, OnceLock},
    thread::JoinHandle,
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
    engine::{Engine, EngineConfig},
    guide::Guides,
    http::{App, Loaded, router},
    kernels::{Backend, cpu::Cpu},
    kv::BLOCK_TOKENS,
    model::{self, Capacity, Shape},
    models::{ModelError, Store},
    record::Metrics,
    sched::Limits,
    text::{ChatTemplate, Tokenizer},
    weights::{Gguf, LoadError},
};

/// After the handover, how long balancers get to read the last events.
const HANDOVER_GRACE: Duration = Duration::from_millis(500);

/// Share of the machine's available memory that the KV cache takes when the configuration names none.
const KV_SHARE_OF_MEMORY: u64 = 8;

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
    /// The model is not on this machine.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
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
    let app = Arc::new(App { loaded: OnceLock::new(), metrics, draining, handover, started: Instant::now(), config });
    let handle = Handle::new();
    let server = serve(&app, handle.clone())?;
    let mut server = tokio::spawn(server);

    let engine = tokio::select! {
        engine = load(app.clone()) => engine?,
        () = shutdown.wait() => return Ok(()),
    };
    let record = announcement(&app.config);
    registry.announce(record.clone()).await;
    let ended = tokio::select! {
        () = shutdown.wait() => Ok(()),
        () = engine_death(&engine) => Err(RunError::Internal("the engine thread ended; the log says why".into())),
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

/// Loads the model on a thread of its own, and starts the engine.
async fn load(app: Arc<App>) -> Result<JoinHandle<()>, RunError> {
    let inner = app.clone();
    let work = move || load_now(&inner.config);
    let (loaded, engine) = tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| RunError::Internal(format!("loading the model failed: {e}")))??;
    let device = loaded.device.clone();
    let _ = app.loaded.set(loaded);
    info!(node = %app.config.id, model = app.config.served_model_name, device, seconds = app.started.elapsed().as_secs_f32(), "ready");
    Ok(engine)
}

fn load_now(config: &NodeConfig) -> Result<(Loaded, JoinHandle<()>), RunError> {
    let path = Store::open(&config.data_dir).locate(&config.model)?;
    let gguf = Gguf::open(&path)?;
    let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf)?);
    let template = ChatTemplate::from_gguf(&gguf, &tokenizer)?;
    let shape = Shape::read(&gguf, model::architecture(&gguf)?)?;
    let capacity = capacity::<Cpu>(config, &shape)?;
    let mut model = model::load(&gguf, Cpu::new(config.engine.threads), capacity)?;
    let device = model.device_class();
    warm_up(&mut *model, &tokenizer, capacity.context);
    let limits =
        Limits { batch_size_max: config.engine.batch_size_max, batch_tokens_max: config.engine.batch_tokens_max };
    let (engine, thread) =
        Engine::start(model, EngineConfig { limits, queue_max: config.engine.queue_max, blocks: capacity.blocks });
    let end_tokens = tokenizer.end_tokens().into();
    let guides = Guides::new(tokenizer.clone());
    let loaded = Loaded { engine, tokenizer, guides, template, context: capacity.context, device, end_tokens };
    Ok((loaded, thread))
}

/// Sizes from the configuration, or sane ones from the machine: an eighth of the free memory for keys and values, but no less than one
/// sequence of full length, and no more than a whole batch of them.
fn capacity<B: Backend>(config: &NodeConfig, shape: &Shape) -> Result<Capacity, LoadError> {
    let limits = &config.engine;
    let context = limits.context_max.unwrap_or(shape.context).min(shape.context);
    let mut capacity = Capacity { batch_tokens_max: limits.batch_tokens_max, context, blocks: 0 };
    let least = capacity.blocks_per_sequence();
    let mib = |blocks: usize| (blocks as u64).saturating_mul(B::block_bytes(shape.cache(1)) as u64).div_ceil(1 << 20);
    let (free, needed) = (memory_available(), mib(least));
    if needed > free >> 20 {
        return Err(LoadError::Config(format!(
            "one sequence of {context} tokens takes {needed} MiB for keys and values, and {} MiB are free: lower node.max_context",
            free >> 20
        )));
    }
    capacity.blocks = match limits.kv_cache_bytes {
        Some(bytes) => shape.blocks_in::<B>(bytes),
        None => shape.blocks_in::<B>(free / KV_SHARE_OF_MEMORY).clamp(least, least * limits.batch_size_max),
    };
    // a slot's number must fit 32 bits
    capacity.blocks = capacity.blocks.min(u32::MAX as usize / BLOCK_TOKENS);
    let taken = mib(capacity.blocks);
    if capacity.blocks < least {
        return Err(LoadError::Config(format!(
            "node.kv_cache_memory holds {} blocks, and one sequence of {context} tokens takes {least}: raise it to {needed} MiB, or lower node.max_context",
            capacity.blocks
        )));
    }
    if taken > free >> 20 {
        return Err(LoadError::Config(format!(
            "node.kv_cache_memory is {taken} MiB, and {} MiB are free: lower it",
            free >> 20
        )));
    }
    info!(
        context,
        kv_blocks = capacity.blocks,
        kv_cache_mib = taken,
        threads = limits.threads,
        max_batch_size = limits.batch_size_max,
        "sizes"
    );
    Ok(capacity)
}

/// Bytes that the machine could give without swapping; 8 GiB where it does not say.
fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(8 << 30, |kib| kib << 10)
}

/// One step, so that the first request does not pay for cold pages and buffers.
fn warm_up(model: &mut dyn model::Model, tokenizer: &Tokenizer, context: usize) {
    let count = BLOCK_TOKENS.min(tokenizer.vocab()).min(context);
    let tokens: Vec<u32> = (0..count as u32).collect();
    let mut batch = crate::batch::Batch::default();
    batch.push(&tokens, 0, &[0]);
    batch.logit_rows.push(tokens.len() as u32 - 1);
    model.forward(&batch, &|| {});
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

async fn engine_death(engine: &JoinHandle<()>) {
    while !engine.is_finished() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Returns when every answer has been read to its end, at the latest after `drain_grace`.
async fn wait_until_idle(app: &App) {
    let deadline = Instant::now() + app.config.drain_grace;
    let Some(loaded) = app.loaded.get() else { return };
    while loaded.engine.open() > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if loaded.engine.open() > 0 {
        let streams = loaded.engine.open();
        warn!(node = %app.config.id, streams, "drain_grace is over; handing over what still runs");
    }
}
