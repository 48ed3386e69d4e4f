//! `tidegate balancer`: the edge as a process of its own.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use tidegate_balancer::{Balancer, BalancerConfig};
use tidegate_common::{
    config::{ClusterConfig, LogConfig, Problems, Raw, Reader, RegistryConfig},
    registry, shutdown, telemetry,
};

use crate::{
    exit::Failure,
    private,
    reload::{self, Source},
    settings::{self, ConfigFile},
    signals,
};

/// Run the edge: TLS, allowlist, keys, routing, health, and the relay that carries streams
#[derive(Debug, clap::Args)]
#[command(after_help = "SIGHUP has it read its configuration again, SIGTERM end after its streams.\n\n\
Examples:\n  tidegate balancer --config cluster.toml --listen 127.0.0.1:18789\n  \
tidegate balancer --config cluster.toml --upgrade      a new release in the place of the running one")]
pub(crate) struct Args {
    #[command(flatten)]
    file: ConfigFile,
    /// Address to serve clients on [default: balancer.listen, or 127.0.0.1:18789]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Address of the private listener [default: balancer.admin.listen, or 127.0.0.1:18790]
    #[arg(long, value_name = "ADDR")]
    admin_listen: Option<SocketAddr>,
    /// Take the place of the balancer that runs with this configuration: it goes on until this one serves, and leaves once its streams
    /// have ended
    #[arg(long)]
    upgrade: bool,
}

impl Source for Args {
    fn file(&self) -> Option<PathBuf> {
        self.file.config.clone()
    }

    fn raw(&self) -> Result<Raw, Problems> {
        let text = |address: Option<SocketAddr>| address.map(|a| a.to_string());
        Ok(self.file.read()?.with_flag("balancer.listen", "--listen", text(self.listen)).with_flag(
            "balancer.admin.listen",
            "--admin-listen",
            text(self.admin_listen),
        ))
    }

    fn checked(&self, raw: &Raw) -> Result<BalancerConfig, Problems> {
        check(raw).map(|(_, _, config)| config)
    }
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let raw = args.raw()?;
    let (cluster, log, config) = check(&raw)?;
    telemetry::init(&log);
    let started = (raw, config.files().to_vec());
    let balancer = if args.upgrade { Balancer::take_over(config)? } else { Balancer::bind(config)?.upgradable() };
    let reloads = balancer.reloads();
    let registry = registry::open(&cluster)?;
    let (trigger, drain) = shutdown::channel();
    let runtime = private::runtime()?;
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || ended.send(balancer.run(&cluster, Arc::clone(&registry), drain)));
    runtime.block_on(async {
        tokio::select! {
            outcome = end => outcome.map_err(|_| Failure::internal("the balancer's thread panicked"))?.map_err(Failure::from),
            failure = signals::drain_then_cut(trigger, std::future::pending(), signals::logged) => Err(failure),
            failure = reload::follow(args, started, reloads) => Err(failure),
        }
    })
}

fn check(raw: &Raw) -> Result<(ClusterConfig, LogConfig, BalancerConfig), Problems> {
    raw.check(|r| {
        settings::leave_to_others(r, "node");
        let cluster = ClusterConfig::read(r);
        refuse_memory(r, &cluster);
        (cluster, LogConfig::read(r), BalancerConfig::read(r))
    })
}

fn refuse_memory(root: &Reader<'_>, cluster: &ClusterConfig) {
    if matches!(cluster.registry, RegistryConfig::Memory) {
        let fix = "set it to \"etcd\" or \"static\"; on one machine, `tidegate up` runs balancer and nodes together";
        root.problem("cluster.registry.kind", "a balancer of its own never meets a node through \"memory\"", fix);
    }
}
