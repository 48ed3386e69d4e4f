//! A balancer and nodes as separate processes, set up by one configuration file each.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use super::{
    LOADING, MODEL,
    cable::Cable,
    client::Client,
    etcd::{Etcd, free_port},
    process::{Process, ensure_model, tidegate},
    until,
};

/// Where the members of a cluster find each other.
pub(crate) enum Registry {
    /// A real etcd.
    Etcd(Etcd),
    /// A real etcd of several members.
    Members(Vec<Etcd>),
    /// A list in the balancer's configuration.
    Static,
}

impl Registry {
    /// The members of etcd.
    fn members(&self) -> &[Etcd] {
        match self {
            Self::Etcd(member) => std::slice::from_ref(member),
            Self::Members(members) => members,
            Self::Static => &[],
        }
    }
}

/// Who asks etcd.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Balancer,
    Nodes,
}

/// Cables to the members of etcd, for each side its own; none where they are asked directly.
#[derive(Default)]
struct EtcdCables {
    balancer: Vec<Cable>,
    nodes: Vec<Cable>,
}

impl EtcdCables {
    fn to(registry: &Registry) -> Self {
        let all = || registry.members().iter().map(|member| Cable::to(member.port())).collect();
        Self { balancer: all(), nodes: all() }
    }
}

/// What a node is to be, beyond the defaults of these tests.
#[derive(Clone, Copy, Default)]
pub(crate) struct NodePlan {
    /// Its id.
    pub(crate) id: &'static str,
    /// More lines of its `[node]` section.
    pub(crate) lines: &'static str,
    /// Its model's name in the API, when it is not the model's own.
    pub(crate) serves: Option<&'static str>,
    /// Whether it is reached by a cable that can be cut.
    pub(crate) by_cable: bool,
}

impl NodePlan {
    /// A node with nothing special.
    pub(crate) fn named(id: &'static str) -> Self {
        Self { id, ..Self::default() }
    }
}

/// One node's address and, while it runs, its process.
pub(crate) struct Node {
    plan: NodePlan,
    port: u16,
    admin_port: u16,
    cable: Option<Cable>,
    process: Option<Process>,
}

/// Everything one test runs.
pub(crate) struct Cluster {
    balancer: Process,
    nodes: BTreeMap<&'static str, Node>,
    pub(crate) registry: Registry,
    etcd_cables: EtcdCables,
    edge_port: u16,
    admin_port: u16,
    scheme: &'static str,
    client: Client,
    folder: TempDir,
}

/// What to set up.
pub(crate) struct Plan<'a> {
    pub(crate) registry: Registry,
    /// Whether etcd is reached by cables that can be cut.
    pub(crate) etcd_by_cable: bool,
    pub(crate) nodes: &'a [NodePlan],
    /// More lines after the balancer's `listen`, sections included.
    pub(crate) balancer: &'a str,
    /// Nodes that the static list names and nobody runs: id and model.
    pub(crate) ghosts: &'a [(&'static str, &'static str)],
    pub(crate) folder: TempDir,
    pub(crate) tls: bool,
}

impl Plan<'_> {
    /// A plain cluster of these nodes.
    pub(crate) fn new(registry: Registry, nodes: &[NodePlan]) -> Plan<'_> {
        let folder = tempfile::tempdir().unwrap();
        Plan { registry, etcd_by_cable: false, nodes, balancer: "", ghosts: &[], folder, tls: false }
    }
}

impl Cluster {
    /// Starts everything and waits until every node is ready.
    pub(crate) async fn start(plan: Plan<'_>) -> Self {
        ensure_model();
        let (edge_port, admin_port) = (free_port(), free_port());
        let nodes: BTreeMap<_, _> = plan.nodes.iter().map(|p| (p.id, Node::planned(*p))).collect();
        let file = balancer_file(plan.folder.path());
        let etcd_cables = if plan.etcd_by_cable { EtcdCables::to(&plan.registry) } else { EtcdCables::default() };
        let registry = registry_lines(&plan.registry, &etcd_cables.balancer, &nodes, plan.ghosts);
        let more = plan.balancer;
        // never the file of who runs the tests
        let members = plan.folder.path().join("members.json");
        let text = format!(
            "{registry}\n[balancer]\nlisten = [\"127.0.0.1:{edge_port}\"]\nmembers_file = {members:?}\n{more}\n\
             [balancer.admin]\nlisten = \"127.0.0.1:{admin_port}\"\n"
        );
        fs::write(file, text).unwrap();
        let balancer = start_balancer(plan.folder.path());
        let scheme = if plan.tls { "https" } else { "http" };
        let mut cluster = Self {
            balancer,
            nodes,
            registry: plan.registry,
            etcd_cables,
            edge_port,
            admin_port,
            scheme,
            client: Client::new(),
            folder: plan.folder,
        };
        let ids: Vec<&str> = cluster.nodes.keys().copied().collect();
        ids.iter().for_each(|id| cluster.start_node(id));
        cluster.until_ready(&ids, LOADING).await;
        cluster
    }

    /// Where clients are served.
    pub(crate) fn edge(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.edge_port)
    }

    /// Where one node is served directly.
    pub(crate) fn node(&self, id: &str) -> String {
        format!("http://127.0.0.1:{}", self.nodes[id].port)
    }

    /// One node's private listener.
    pub(crate) fn node_admin(&self, id: &str) -> String {
        format!("127.0.0.1:{}", self.nodes[id].admin_port)
    }

    /// The folder of this cluster's files.
    pub(crate) fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// The balancer's private listener.
    pub(crate) fn admin(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin_port)
    }

    /// The members of etcd.
    pub(crate) fn etcd_members(&mut self) -> &mut [Etcd] {
        match &mut self.registry {
            Registry::Etcd(etcd) => std::slice::from_mut(etcd),
            Registry::Members(members) => members,
            Registry::Static => panic!("this cluster has no etcd"),
        }
    }

    /// The etcd, or its first member.
    pub(crate) fn etcd(&mut self) -> &mut Etcd {
        &mut self.etcd_members()[0]
    }

    /// Starts a node that does not run.
    pub(crate) fn start_node(&mut self, id: &str) {
        let node = self.nodes.get_mut(id).unwrap();
        assert!(node.process.is_none(), "{id} runs already");
        let file = self.folder.path().join(format!("{id}.toml"));
        let file = node_file(file, node, &self.registry, &self.etcd_cables.nodes);
        let command = &mut tidegate();
        node.process = Some(Process::start(id, self.folder.path(), command.args(["node", "--config"]).arg(file)));
    }

    /// Starts a node that does not run, and waits until requests go to it; from when it can answer, how long that took.
    pub(crate) async fn revive_node(&mut self, id: &'static str, limit: Duration) -> Duration {
        self.start_node(id);
        let (client, health) = (Client::new(), format!("{}/health", self.node(id)));
        until(&format!("{id} says that it is healthy"), LOADING, || async {
            client.get(&health).await.is_ok_and(|answer| answer.status == 200)
        })
        .await;
        until(&format!("{id} is ready"), limit, || async { self.ready().await.iter().any(|ready| ready == id) }).await
    }

    /// Cuts the cable to a node, or mends it.
    pub(crate) fn cut(&self, id: &str, is_cut: bool) {
        self.nodes[id].cable.as_ref().expect("the node is reached by a cable").cut(is_cut);
    }

    /// Cuts all cables between one side and etcd, or mends them.
    pub(crate) fn cut_etcd(&self, side: Side, is_cut: bool) {
        let cables = match side {
            Side::Balancer => &self.etcd_cables.balancer,
            Side::Nodes => &self.etcd_cables.nodes,
        };
        assert!(!cables.is_empty(), "etcd is reached by cables");
        cables.iter().for_each(|cable| cable.cut(is_cut));
    }

    /// Tells a node to end; whether it did within `limit`.
    pub(crate) fn drain_node(&mut self, id: &str, limit: Duration) -> bool {
        let mut process = self.nodes.get_mut(id).unwrap().process.take().unwrap();
        process.signal("TERM");
        process.ended_within(limit).is_some_and(|status| status.success())
    }

    /// Ends a node as a power cut would.
    pub(crate) fn kill_node(&mut self, id: &str) {
        self.nodes.get_mut(id).unwrap().process.take().unwrap().kill();
    }

    /// A node's process.
    pub(crate) fn process(&mut self, id: &str) -> &mut Process {
        self.nodes.get_mut(id).unwrap().process.as_mut().unwrap()
    }

    /// Ends the balancer as a power cut would, and starts it again.
    pub(crate) fn restart_balancer(&mut self) {
        self.balancer.kill();
        self.balancer = start_balancer(self.folder.path());
    }

    /// The balancer's process.
    pub(crate) fn balancer(&mut self) -> &mut Process {
        &mut self.balancer
    }

    /// Ids of the nodes that the balancer sends requests to.
    pub(crate) async fn ready(&self) -> Vec<String> {
        let Ok(answer) = self.client.get(&format!("{}/members", self.admin())).await else { return Vec::new() };
        let members = answer.body["members"].as_array().cloned().unwrap_or_default();
        let ready = members.iter().filter(|member| member["state"] == "ready");
        ready.filter_map(|member| member["node"].as_str().map(str::to_owned)).collect()
    }

    /// What the balancer says of its registry.
    pub(crate) async fn link(&self) -> Value {
        let answer = self.client.get(&format!("{}/members", self.admin())).await;
        answer.map_or(Value::Null, |answer| answer.body["registry"].clone())
    }

    /// Waits until exactly these nodes are ready; how long that took.
    pub(crate) async fn until_ready(&self, ids: &[&str], limit: Duration) -> Duration {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        until(&format!("{ids:?} ready"), limit, || async {
            let mut ready = self.ready().await;
            ready.sort_unstable();
            ready == ids
        })
        .await
    }
}

fn balancer_file(folder: &Path) -> PathBuf {
    folder.join("balancer.toml")
}

fn start_balancer(folder: &Path) -> Process {
    Process::start("balancer", folder, tidegate().args(["balancer", "--config"]).arg(balancer_file(folder)))
}

impl Node {
    fn planned(plan: NodePlan) -> Self {
        let port = free_port();
        let cable = plan.by_cable.then(|| Cable::to(port));
        Self { plan, port, admin_port: free_port(), cable, process: None }
    }
}

/// A node alone, asked directly.
pub(crate) async fn lone_node(plan: NodePlan) -> (Process, String, TempDir) {
    ensure_model();
    let folder = tempfile::tempdir().unwrap();
    let node = Node::planned(plan);
    let file = node_file(folder.path().join("node.toml"), &node, &Registry::Static, &[]);
    let process = Process::start(plan.id, folder.path(), tidegate().args(["node", "--config"]).arg(file));
    let (client, base) = (Client::new(), format!("http://127.0.0.1:{}", node.port));
    let health = format!("{base}/health");
    until("the node is healthy", LOADING, || async {
        client.get(&health).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    (process, base, folder)
}

fn node_file(file: PathBuf, node: &Node, registry: &Registry, etcd_cables: &[Cable]) -> PathBuf {
    let Node { plan, port, admin_port, cable, .. } = node;
    // announcing into a list does nothing: the balancer has the whole of it
    let registry = registry_lines(registry, etcd_cables, &BTreeMap::new(), &[("none", "none")]);
    let serves = plan.serves.map(|name| format!("served_model_name = \"{name}\"\n")).unwrap_or_default();
    let model = match plan.lines.contains("[[node.models]]") {
        true => String::new(),
        false => format!("model = \"{MODEL}\"\n"),
    };
    let advertise =
        cable.as_ref().map(|cable| format!("advertise = \"127.0.0.1:{}\"\n", cable.port())).unwrap_or_default();
    let text = format!(
        "{registry}\n[node]\nid = \"{}\"\nlisten = \"127.0.0.1:{port}\"\nadmin.listen = \"127.0.0.1:{admin_port}\"\n\
         {model}{serves}{advertise}{}\n",
        plan.id, plan.lines
    );
    fs::write(&file, text).unwrap();
    file
}

fn registry_lines(
    registry: &Registry,
    etcd_cables: &[Cable],
    nodes: &BTreeMap<&str, Node>,
    ghosts: &[(&str, &str)],
) -> String {
    let head = "[cluster]\nname = \"t\"\n[cluster.registry]\n";
    match registry {
        Registry::Etcd(_) | Registry::Members(_) => {
            let by_cable = etcd_cables.iter().map(|cable| format!("http://127.0.0.1:{}", cable.port()));
            let endpoints: Vec<String> = match etcd_cables.is_empty() {
                true => registry.members().iter().map(Etcd::endpoint).collect(),
                false => by_cable.collect(),
            };
            format!("{head}kind = \"etcd\"\nendpoints = {endpoints:?}\nlease_ttl = \"4s\"\n")
        }
        Registry::Static => {
            let entry = |id: &str, port: u16, model: &str| {
                format!(
                    "[[cluster.registry.nodes]]\nid = \"{id}\"\naddress = \"127.0.0.1:{port}\"\nmodel = \"{model}\"\n"
                )
            };
            let real = nodes.values().map(|n| entry(n.plan.id, n.port, n.plan.serves.unwrap_or(MODEL)));
            let ghosts = ghosts.iter().map(|(id, model)| entry(id, free_port(), model));
            format!("{head}kind = \"static\"\n{}", real.chain(ghosts).collect::<String>())
        }
    }
}
