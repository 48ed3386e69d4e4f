//! `tidegate up`: the whole cluster on one machine. The balancer runs in this process, each node is a child of it, and the registry
//! is a table in memory; nothing else is needed.
//!
//! Stopping goes against the stream of requests: first the balancer takes nothing new and lets what runs end, then the nodes go.

mod backoff;
mod child;

use std::{iter, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tidegate_balancer::{Balancer, RunError};
use tidegate_common::{
    config::{ClusterConfig, Raw, RegistryConfig},
    contract::NodeRecord,
    registry::{MemoryRegistry, Registry},
    shutdown::{self, Shutdown, Trigger},
    telemetry,
};
use tidegate_node::{
    NodeConfig,
    models::{ModelRef, Store},
};
use tokio::{sync::oneshot, task::JoinSet, time::sleep};

use crate::{
    exit::Failure,
    progress::Shown,
    settings::{self, All, ConfigFile},
    signals,
};
use child::Node;

/// How often readiness is asked for before the first answer.
const READY_POLL: Duration = Duration::from_millis(100);

/// Run a balancer and nodes on this machine, with nothing else installed
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The model is fetched when it is not on this machine. Nodes are child processes on free ports of 127.0.0.1, \
started again when they end.\nThe first Ctrl-C lets running answers end, the second ends at once.\n\n\
Examples:\n  tidegate up\n  tidegate up --nodes 1 --listen 127.0.0.1:8080\n  tidegate up --model hf:owner/repository/file.gguf"
)]
pub(crate) struct Args {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: u16,
    /// Address to serve on [default: 127.0.0.1:18789]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Address of the private listener that `tidegate status` asks [default: the next port, on 127.0.0.1]
    #[arg(long, value_name = "ADDR")]
    admin_listen: Option<SocketAddr>,
    /// Which model [default: smollm2-135m]; see `tidegate model --help`
    #[arg(long, value_name = "REF")]
    model: Option<ModelRef>,
    /// Folder that models and logs are kept in [default: $TIDEGATE_DATA_DIR, or tidegate in the user's data folder]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    file: ConfigFile,
}

pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let config_file = args.file.config.clone();
    let nodes = args.nodes;
    let raw = lay_over(args.file.read()?, args);
    let all = check(&raw)?;
    telemetry::init(&all.log);
    let uses_tls = all.balancer.uses_tls();
    let asks_for_keys = raw.has("balancer.auth.keys_file");
    // before the model is fetched: whoever starts a second cluster by mistake need not wait for that
    let balancer = Balancer::bind(all.balancer)?;
    let store = Store::open(&all.node.data_dir);
    for model in all.node.models.iter().flat_map(|model| iter::once(&model.model).chain(&model.draft)) {
        store.pull(model, &Shown::new())?;
    }

    let cluster = Cluster {
        plan: Plan {
            count: nodes,
            config_file,
            own_threads: raw.has("node.threads"),
            lists_models: raw.has("node.models"),
        },
        config: all.node,
        address: balancer.listen_addresses().first().copied(),
        admin: balancer.admin_address(),
        uses_tls,
        asks_for_keys,
    };
    cluster.say_hello();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|e| Failure::internal(format!("cannot set up the runtime: {e}")))?;
    runtime.block_on(cluster.live(balancer, &all.cluster))
}

fn lay_over(raw: Raw, args: Args) -> Raw {
    let admin = args.admin_listen.or_else(|| args.listen.and_then(next_port));
    raw.with_flag("balancer.listen", "--listen", args.listen.map(|a| a.to_string()))
        .with_flag("balancer.admin.listen", "--admin-listen", admin.map(|a| a.to_string()))
        .with_flag("node.model", "--model", args.model.map(|m| m.to_string()))
        .with_flag("node.data_dir", "--data-dir", settings::text_of(args.data_dir.as_deref()))
        // a terminal is for people: each request's line stays away unless asked for
        .with_default("log.level", "warn")
}

/// So that a second cluster on this machine needs only one other address.
fn next_port(listen: SocketAddr) -> Option<SocketAddr> {
    let port = listen.port().checked_add(1).filter(|port| *port > 1)?;
    Some(SocketAddr::from(([127, 0, 0, 1], port)))
}

fn check(raw: &Raw) -> Result<All, Failure> {
    let all = All::check(raw)?;
    if matches!(all.cluster.registry, RegistryConfig::Memory) {
        return Ok(all);
    }
    Err(Failure::usage(
        "cluster.registry.kind: `tidegate up` keeps its members in memory, and the configuration names another registry\n  \
         fix: run `tidegate balancer` and `tidegate node` with this file, or remove [cluster.registry]",
    ))
}

/// How the children differ from what the configuration says.
struct Plan {
    count: u16,
    config_file: Option<PathBuf>,
    own_threads: bool,
    /// Whether the file has `[[node.models]]`.
    lists_models: bool,
}

/// Everything `up` knows once its sockets are open and its model is there.
struct Cluster {
    plan: Plan,
    config: NodeConfig,
    address: Option<SocketAddr>,
    admin: Option<SocketAddr>,
    uses_tls: bool,
    asks_for_keys: bool,
}

impl Cluster {
    async fn live(self, balancer: Balancer, cluster: &ClusterConfig) -> Result<(), Failure> {
        let registry: Arc<dyn Registry> = Arc::new(MemoryRegistry::default());
        let (stop_edge, edge_stops) = shutdown::channel();
        let (stop_nodes, nodes_stop) = shutdown::channel();
        let edge = run_edge(balancer, cluster.clone(), Arc::clone(&registry), edge_stops);
        let nodes = self.start_nodes(&registry, &nodes_stop);
        tokio::select! {
            outcome = edge_then_nodes(edge, stop_nodes, nodes) => outcome,
            failure = signals::drain_then_cut(stop_edge, std::future::pending(), tell) => Err(failure),
            never = self.say_ready() => never,
        }
    }

    fn start_nodes(&self, registry: &Arc<dyn Registry>, stop: &Shutdown) -> JoinSet<Result<(), Failure>> {
        let mut nodes = JoinSet::new();
        for number in 1..=self.plan.count {
            nodes.spawn(self.node(number, Arc::clone(registry)).supervise(stop.clone()));
        }
        nodes
    }

    fn node(&self, number: u16, registry: Arc<dyn Registry>) -> Node {
        let id = format!("node-{number}");
        let config = &self.config;
        let mut record = NodeRecord::new(
            id.parse().expect("'node-' with a number is a valid name"),
            String::new(),
            config.default_model().name.clone(),
        );
        record.models = config.models.iter().map(|model| model.name.clone()).collect();
        record.version.clone_from(&config.version);
        record.color = config.color.clone();
        record.site = config.site.clone();
        record.weight = config.weight;
        let log = self.log(number);
        Node { record, arguments: self.arguments(&id, number), log, drain_grace: config.drain_grace, registry }
    }

    fn arguments(&self, id: &str, number: u16) -> Vec<String> {
        let mut words = vec!["--id".to_owned(), id.to_owned()];
        let mut give = |flag: &str, value: String| words.extend([flag.to_owned(), value]);
        // several stand in the file, which the child reads too
        if let [model] = self.config.models.as_slice()
            && !self.plan.lists_models
        {
            give("--model", model.model.to_string());
            give("--served-model-name", model.name.clone());
        }
        give("--data-dir", self.config.data_dir.display().to_string());
        // each child's private listener has a port of its own, counted from the configured one
        give("--admin-port-offset", (number - 1).to_string());
        if let Some(path) = &self.plan.config_file {
            give("--config", path.display().to_string());
        }
        if !self.plan.own_threads {
            give("--threads", self.threads().to_string());
        }
        words
    }

    fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (cores / usize::from(self.plan.count)).max(1)
    }

    fn log(&self, number: u16) -> PathBuf {
        self.config.data_dir.join("logs").join(format!("node-{number}.log"))
    }
}

/// Where people are sent to, and what they are told.
impl Cluster {
    fn say_hello(&self) {
        let config = &self.config;
        println!("tidegate {}", env!("CARGO_PKG_VERSION"));
        let names: Vec<&str> = config.models.iter().map(|model| model.name.as_str()).collect();
        println!("model  {}", names.join(", "));
        println!(
            "nodes  {}, with their logs in {}",
            self.plan.count,
            self.log(1).with_file_name("node-*.log").display()
        );
        println!("loading the model ...");
    }

    /// Waits until the edge has a node to send requests to, and says how to send one; never returns.
    async fn say_ready(&self) -> Result<(), Failure> {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(1)).build();
        let client = client.map_err(|e| Failure::internal(e.to_string()))?;
        if let Some(admin) = self.admin {
            let ready = format!("http://{admin}/readyz");
            while !client.get(&ready).send().await.is_ok_and(|answer| answer.status().is_success()) {
                sleep(READY_POLL).await;
            }
            print!("{}", self.invitation(admin));
        }
        std::future::pending().await
    }

    fn invitation(&self, admin: SocketAddr) -> String {
        let scheme = if self.uses_tls { "https" } else { "http" };
        let base = self.address.map_or_else(String::new, |address| format!("{scheme}://{}", reachable(address)));
        let key = if self.asks_for_keys { " -H \"authorization: Bearer $TIDEGATE_API_KEY\"" } else { "" };
        let model = &self.config.default_model().name;
        format!(
            "ready: listening on {base} (OpenAI base URL {base}/v1)\n\nTry it:\n\n  \
             curl -N {base}/v1/chat/completions{key} -H 'content-type: application/json' \\\n    \
             -d '{{\"model\": \"{model}\", \"stream\": true, \"max_tokens\": 200, \"messages\": [{{\"role\": \"user\", \"content\": \"Why is the sky blue?\"}}]}}'\n\n\
             See the nodes:  tidegate status --admin {admin}\n\
             Stop:           Ctrl-C; twice to end at once\n"
        )
    }
}

/// Says on the terminal that a signal came.
fn tell(signal: &str) {
    eprintln!("{signal}: running answers may end now; once more to end at once");
}

/// An address that can be connected to from this machine.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from(([127, 0, 0, 1], v4.port())),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], v6.port())),
        other => other,
    }
}

/// The balancer blocks, so it has a thread of its own.
fn run_edge(
    balancer: Balancer,
    cluster: ClusterConfig,
    registry: Arc<dyn Registry>,
    stop: Shutdown,
) -> oneshot::Receiver<Result<(), RunError>> {
    let (ended, end) = oneshot::channel();
    std::thread::spawn(move || ended.send(balancer.run(&cluster, registry, stop)));
    end
}

/// Returns once the edge has drained and then every node has; a node that is given up ends all of it.
async fn edge_then_nodes(
    edge: oneshot::Receiver<Result<(), RunError>>,
    stop_nodes: Trigger,
    mut nodes: JoinSet<Result<(), Failure>>,
) -> Result<(), Failure> {
    let outcome = tokio::select! {
        outcome = edge => match outcome {
            Ok(outcome) => outcome.map_err(Failure::from),
            Err(_) => Err(Failure::internal("the balancer's thread panicked")),
        },
        Some(ended) = nodes.join_next() => match ended {
            Ok(outcome) => outcome,
            Err(e) => Err(Failure::internal(format!("a node's supervisor failed: {e}"))),
        },
    };
    stop_nodes.fire();
    while nodes.join_next().await.is_some() {}
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_for_everyone_is_shown_as_one_to_connect_to() {
        assert_eq!(reachable("0.0.0.0:80".parse().unwrap()).to_string(), "127.0.0.1:80");
        assert_eq!(reachable("[::]:80".parse().unwrap()).to_string(), "[::1]:80");
        assert_eq!(reachable("10.0.0.1:80".parse().unwrap()).to_string(), "10.0.0.1:80");
    }
}
