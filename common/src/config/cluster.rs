//! The sections both servers read: `[cluster]` with `[telemetry]`, and `[log]`.

use std::{path::PathBuf, time::Duration};

use crate::{
    contract::NodeRecord,
    ids::{ClusterName, Color, NodeId, SiteName},
};

use super::{Reader, TelemetryConfig};

/// `[cluster]`: which cluster this process belongs to, and how its members find each other.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// The cluster's name; part of every key in etcd.
    pub name: ClusterName,
    /// Where members are found.
    pub registry: RegistryConfig,
    /// `[telemetry]`, beside it: both servers export to one place.
    pub telemetry: TelemetryConfig,
}

/// `[cluster.registry]`.
#[derive(Debug, Clone)]
pub enum RegistryConfig {
    /// Within one process; what `tidegate up` uses.
    Memory,
    /// A fixed list of nodes.
    Static {
        /// The nodes, as `[[cluster.registry.nodes]]` lists them.
        nodes: Vec<NodeRecord>,
    },
    /// An etcd cluster.
    Etcd(EtcdConfig),
}

/// How to reach etcd, and how long a silent node stays listed there.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// Client addresses of the members, such as `http://127.0.0.1:2379`.
    pub endpoints: Vec<String>,
    /// Lease of a node's key; kept alive at a third of it.
    pub lease_ttl: Duration,
    /// Bound of each single call.
    pub timeout: Duration,
    /// How often a watcher lists everything again, since a watch can lie silent.
    pub resync_interval: Duration,
    /// Root certificates (PEM) to check the members by.
    pub ca: Option<PathBuf>,
    /// Certificate and key (PEM) to show to the members.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// User name and a file that holds the password.
    pub credentials: Option<(String, PathBuf)>,
}

impl ClusterConfig {
    /// Reads `[cluster]` and `[telemetry]`.
    pub fn read(root: &Reader<'_>) -> Self {
        let cluster = root.section("cluster");
        let name = cluster.parse("name").unwrap_or_else(|| "default".parse().expect("'default' is a valid name"));
        let registry = RegistryConfig::read(&cluster.section("registry"));
        Self { name, registry, telemetry: TelemetryConfig::read(&root.section("telemetry")) }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Memory,
    Static,
    Etcd,
}

impl RegistryConfig {
    fn read(r: &Reader<'_>) -> Self {
        let kind =
            r.choice("kind", &[("memory", Kind::Memory), ("static", Kind::Static), ("etcd", Kind::Etcd)], Kind::Memory);
        match kind {
            Kind::Memory => Self::Memory,
            Kind::Static => Self::Static { nodes: r.sections("nodes").iter().filter_map(read_node).collect() },
            Kind::Etcd => Self::Etcd(EtcdConfig::read(r)),
        }
    }
}

impl EtcdConfig {
    fn read(r: &Reader<'_>) -> Self {
        let endpoints = r.get_or::<Vec<String>>("endpoints", Vec::new());
        if endpoints.is_empty() {
            r.problem(
                "endpoints",
                "no etcd member is named",
                "list client addresses, such as [\"http://127.0.0.1:2379\"]",
            );
        }
        for (i, endpoint) in endpoints.iter().enumerate() {
            if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
                r.problem(
                    &format!("endpoints[{i}]"),
                    format!("'{endpoint}' has no scheme"),
                    "write http:// or https:// before it",
                );
            }
        }
        Self {
            endpoints,
            lease_ttl: r.duration_or("lease_ttl", Duration::from_secs(10)),
            timeout: r.duration_or("timeout", Duration::from_secs(3)),
            resync_interval: r.duration_or("resync_interval", Duration::from_secs(30)),
            ca: r.get("ca"),
            identity: read_pair(r, "cert", "key"),
            credentials: read_credentials(r),
        }
    }
}

/// Two paths that only make sense together.
pub fn read_pair(r: &Reader<'_>, first: &str, second: &str) -> Option<(PathBuf, PathBuf)> {
    match (r.get::<PathBuf>(first), r.get::<PathBuf>(second)) {
        (Some(a), Some(b)) => Some((a, b)),
        (None, None) => None,
        (Some(_), None) => {
            r.problem(second, format!("'{first}' stands here without it"), "set both or neither");
            None
        }
        (None, Some(_)) => {
            r.problem(first, format!("'{second}' stands here without it"), "set both or neither");
            None
        }
    }
}

fn read_credentials(r: &Reader<'_>) -> Option<(String, PathBuf)> {
    let user = r.get::<String>("user");
    let file = r.get::<PathBuf>("password_file");
    match (user, file) {
        (Some(user), Some(file)) => Some((user, file)),
        (None, None) => None,
        _ => {
            r.problem("user", "user and password_file belong together", "set both or neither");
            None
        }
    }
}

fn read_node(r: &Reader<'_>) -> Option<NodeRecord> {
    let id: Option<NodeId> = r.parse("id");
    let address: Option<String> = r.get("address");
    let model: Option<String> = r.get("model");
    let color: Option<Color> = r.parse("color");
    let site: Option<SiteName> = r.parse("site");
    let weight = r.in_range("weight", 1..=1000u32, 1);
    let tls = r.get_or("tls", false);
    let version = r.get_or("version", String::new());
    for (key, missing) in [("id", !r.has("id")), ("address", !r.has("address")), ("model", !r.has("model"))] {
        if missing {
            r.problem(key, "is missing", "every listed node needs id, address and model");
        }
    }
    let mut record = NodeRecord::new(id?, address?, model?);
    record.weight = weight;
    record.tls = tls;
    record.version = version;
    record.color = color.unwrap_or(record.color);
    record.site = site.unwrap_or(record.site);
    Some(record)
}

/// `[log]`.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// A filter as `tracing-subscriber` writes them: `info`, or `info,tidegate_node=debug`.
    pub filter: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line, for machines.
    Json,
}

impl LogConfig {
    /// Reads `[log]`.
    pub fn read(root: &Reader<'_>) -> Self {
        let r = root.section("log");
        let filter = r.get_or("level", "info".to_owned());
        if tracing_subscriber::EnvFilter::try_new(&filter).is_err() {
            r.problem("level", format!("'{filter}' is not a log filter"), "use error, warn, info, debug or trace");
        }
        Self {
            filter,
            format: r.choice("format", &[("text", LogFormat::Text), ("json", LogFormat::Json)], LogFormat::Text),
        }
    }
}
