//! `tidegate balancer`: the edge as a process of its own.

use std::{net::SocketAddr, sync::Arc};

use tidegate_balancer::{Balancer, BalancerConfig};
use tidegate_common::{
    config::{ClusterConfig, LogConfig, Raw, Reader, RegistryConfig},
    registry, shutdown, telemetry,
};

use crate::{
    exit::Failure,
    settings::{self, ConfigFile},
    signals,
};

/// Run the edge: TLS, allowlist, keys, routing, health, and the relay that carries streams
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  tidegate balancer --config cluster.toml --listen 127.0.0.1:18789")]
pub(crate) struct Args {
    #[command(flatten)]
    file: ConfigFile,
    /// Address to serve clients on [default: balancer.listen, or 127.0.0.1:18789]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Address of the private listener [default: balancer.admin.listen, or 127.0.0.1:18790]
    #[arg(long, value_name = "ADDR")]
    admin_listen: Option<SocketAddr>,
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let raw = args.file.read()?;
    let raw = raw.with_flag("balancer.listen", "--listen", args.listen.map(|a| a.to_string())).with_flag(
        "balancer.admin.listen",
        "--admin-listen",
        args.admin_listen.map(|a| a.to_string()),
    );
    let (cluster, log, config) = check(&raw)?;
    telemetry::init(&log);
    let balancer = Balancer::bind(config)?;
    let registry = registry::open(&cluster)?;
    let (trigger, drain) = shutdown::channel();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::internal(format!("cannot set up the runtime: {e}")))?;
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || ended.send(balancer.run(&cluster, Arc::clone(&registry), drain)));
    runtime.block_on(async {
        tokio::select! {
            outcome = end => outcome.map_err(|_| Failure::internal("the balancer's thread panicked"))?.map_err(Failure::from),
            failure = signals::drain_then_cut(trigger, std::future::pending(), signals::logged) => Err(failure),
        }
    })
}

fn check(raw: &Raw) -> Result<(ClusterConfig, LogConfig, BalancerConfig), Failure> {
    Ok(raw.check(|r| {
        settings::leave_to_others(r, "node");
        let cluster = ClusterConfig::read(r);
        refuse_memory(r, &cluster);
        (cluster, LogConfig::read(r), BalancerConfig::read(r))
    })?)
}

fn refuse_memory(root: &Reader<'_>, cluster: &ClusterConfig) {
    if matches!(cluster.registry, RegistryConfig::Memory) {
        let fix = "set it to \"etcd\" or \"static\"; on one machine, `tidegate up` runs balancer and nodes together";
        root.problem("cluster.registry.kind", "a balancer of its own never meets a node through \"memory\"", fix);
    }
}
