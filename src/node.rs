//! `tidegate node`: one inference node as a process of its own, or as a child of `tidegate up`.

use std::{net::SocketAddr, path::PathBuf};

use tidegate_common::{
    config::{ClusterConfig, LogConfig, Raw},
    ids::NodeId,
    registry,
    shutdown::{self, Trigger},
    telemetry,
    trace::Tracer,
};
use tidegate_node::{NodeConfig, models::ModelRef};

use crate::{
    exit::Failure,
    settings::{self, ConfigFile},
    signals,
};

/// Run one inference node: continuous batching of one model or several behind an OpenAI API
#[derive(Debug, clap::Args)]
#[command(after_help = "The model must be on this machine: fetch it with `tidegate model pull`.\n\n\
Examples:\n  tidegate node                                       the default model on 127.0.0.1:18800\n  \
tidegate node --config cluster.toml --id n2 --listen 10.0.0.2:18800")]
pub(crate) struct Args {
    #[command(flatten)]
    file: ConfigFile,
    /// The node's id, unique in the cluster [default: node.id, or the host's name]
    #[arg(long, value_name = "NAME")]
    id: Option<NodeId>,
    /// Address to serve on [default: node.listen, or 127.0.0.1:18800]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Private address that `tidegate model load`, `unload` and `ps` ask, or `off` [default: node.admin.listen, or 127.0.0.1:18801 if it
    /// is free]
    #[arg(long, value_name = "ADDR")]
    admin_listen: Option<String>,
    /// Which model [default: node.model, or smollm2-135m]; see `tidegate model --help`
    #[arg(long, value_name = "REF")]
    model: Option<ModelRef>,
    /// Folder that models are kept in [default: node.data_dir, or $TIDEGATE_DATA_DIR, or tidegate in the user's data folder]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Threads that compute [default: node.threads, or all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// The model's name in the API
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Drain once standard input ends: how `tidegate up` holds its children
    #[arg(long, hide = true)]
    stop_on_stdin_eof: bool,
    /// How far the private listener's port is from the configured one: how `tidegate up` keeps its children apart
    #[arg(long, hide = true, default_value_t = 0)]
    admin_port_offset: u16,
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let (holds_on_to_stdin, admin_port_offset) = (args.stop_on_stdin_eof, args.admin_port_offset);
    let (cluster, log, mut config) = check(&lay_over(args.file.read()?, args))?;
    if let Some(admin) = config.admin.as_mut().filter(|admin| admin.listen.port() > 0) {
        admin.listen.set_port(admin.listen.port().saturating_add(admin_port_offset));
    }
    telemetry::init(&log);
    let registry = registry::open(&cluster)?;
    let tracer = Tracer::open(&cluster.telemetry, "node", config.id.as_str())?;
    let kept = tracer.clone();
    let (trigger, drain) = shutdown::channel();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::internal(format!("cannot set up the runtime: {e}")))?
        .block_on(async {
            tokio::select! {
                outcome = tidegate_node::run(config, registry, tracer, drain) => outcome.map_err(Failure::from),
                failure = stopped(trigger, holds_on_to_stdin) => Err(failure),
            }
        });
    if let Some(tracer) = kept {
        tracer.close();
    }
    outcome
}

fn lay_over(raw: Raw, args: Args) -> Raw {
    raw.with_flag("node.id", "--id", args.id.map(String::from))
        .with_flag("node.listen", "--listen", args.listen.map(|a| a.to_string()))
        .with_flag("node.admin.listen", "--admin-listen", args.admin_listen)
        .with_flag("node.model", "--model", args.model.map(|m| m.to_string()))
        .with_flag("node.data_dir", "--data-dir", settings::text_of(args.data_dir.as_deref()))
        .with_flag("node.threads", "--threads", args.threads.map(|n| n.to_string()))
        .with_flag("node.served_model_name", "--served-model-name", args.served_model_name)
}

fn check(raw: &Raw) -> Result<(ClusterConfig, LogConfig, NodeConfig), Failure> {
    Ok(raw.check(|r| {
        settings::leave_to_others(r, "balancer");
        (ClusterConfig::read(r), LogConfig::read(r), NodeConfig::read(r))
    })?)
}

async fn stopped(trigger: Trigger, at_end_of_stdin: bool) -> Failure {
    let end = async {
        if at_end_of_stdin {
            signals::end_of_stdin().await;
        } else {
            std::future::pending().await
        }
    };
    signals::drain_then_cut(trigger, end, signals::logged).await
}
