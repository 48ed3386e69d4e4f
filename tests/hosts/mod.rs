//! Goal: three hosts, each with an etcd, a balancer and a node, are one service: when one is lost as a whole, the clients of the other
//! balancers see nothing, and those of the lost one are back at the virtual address within 3 s. Method: three network namespaces on one
//! bridge, each a host with an address of its own; TLS from everyone to everyone; `vrrp.py` in keepalived's place. The host that holds the
//! virtual address loses its link and its processes at one blow, while clients ask at each of the others and at the virtual address. Every
//! answer is compared to the byte, as in `faults`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    runtime::Runtime,
    task::{JoinHandle, spawn_blocking},
    time::sleep,
};

use crate::{
    faults::{
        report::Report,
        requests::{self, Request},
        work::{Edge, Expected, Taken, Work, ask, verdict},
    },
    support::{
        LOADING, MODEL,
        certs::Authority,
        client::Client,
        etcd::{Etcd, Seat, is_installed},
        isolated::{ip, is_inside, within},
        process::{Process, ensure_model, run, tidegate},
        until,
    },
};

/// Where clients find whichever host holds it.
const VIRTUAL: &str = "10.77.0.100";

const EDGE_PORT: u16 = 8443;

/// From the loss of a host to being served at the virtual address.
const BACK: Duration = Duration::from_secs(3);

/// Between two attempts of a client that nobody answers.
const AGAIN: Duration = Duration::from_millis(50);

/// One host. What it runs is on its own address.
struct Host {
    name: &'static str,
    ip: String,
    etcd: Etcd,
    processes: Vec<Process>,
}

/// The hosts, and what all of them know.
struct Site {
    hosts: Vec<Host>,
    folder: TempDir,
    client: Client,
}

#[test]
fn a_lost_host_costs_no_answer_and_its_clients_are_back_in_three_seconds() {
    if is_installed() && is_inside("hosts::a_lost_host_costs_no_answer_and_its_clients_are_back_in_three_seconds") {
        Runtime::new().unwrap().block_on(lose_a_host());
    }
}

async fn lose_a_host() {
    let mut site = Site::start().await;
    let mut report = Report::default();
    let requests = requests::all(64);
    let (expected, quiet) = Expected::ask(&site.edge(&site.hosts[0].ip), requests, 6).await;
    report.note("nothing: the answers to compare with", quiet);

    let others = [0, 1].map(|host| Work::start(&site.edge(&site.hosts[host].ip), &expected, 2));
    let visitors = [0, 1].map(|i| Visitor::start(site.edge(VIRTUAL), &expected, i));
    sleep(Duration::from_secs(4)).await;
    let lost = site.lose(2);
    sleep(Duration::from_secs(10)).await;

    for (work, host) in others.into_iter().zip(["h1", "h2"]) {
        report.note(format!("a host lost: clients of {host}"), work.stop().await);
    }
    let (mut back, mut answered) = (Duration::ZERO, Duration::ZERO);
    for (i, visitor) in visitors.into_iter().enumerate() {
        let visits = visitor.stop().await;
        let interrupted: Vec<Instant> = visits.iter().filter_map(|visit| visit.back).collect();
        assert_eq!(interrupted.len(), 1, "client {i} lost its connection so often");
        back = back.max(interrupted[0] - lost);
        let first = visits.iter().filter_map(|visit| visit.begun).find(|begun| *begun > interrupted[0]);
        answered = answered.max(first.expect("the client of the lost host is never answered again") - lost);
        let whole = visits.into_iter().filter(|visit| visit.back.is_none()).map(|visit| visit.taken).collect();
        report.note(format!("a host lost: client {i} of the virtual address"), whole);
    }
    println!("clients of the lost host were back {back:?} after its loss, and had a first token after {answered:?}");
    report.judge();
    assert!(back <= BACK, "a client came back only after {back:?}");
    until("etcd's other members are followed", Duration::from_secs(10), || async {
        site.members(0).await["registry"] == "live"
    })
    .await;
}

impl Site {
    async fn start() -> Self {
        ensure_model();
        let folder = tempfile::tempdir().unwrap();
        let (client, seats) = (secure(folder.path()), lay_cables(folder.path()));
        let etcd = spawn_blocking(|| Etcd::start_members(seats, "https", "https")).await.unwrap();
        let endpoints: Vec<String> = etcd.iter().map(Etcd::endpoint).collect();
        let hosts = etcd.into_iter().zip(HOSTS).map(|(etcd, (name, priority))| {
            let ip = address(name);
            let file = folder.path().join(format!("{name}.toml"));
            fs::write(&file, configuration(name, &ip, &endpoints, folder.path())).unwrap();
            let start = |what: &str, command: &Command| {
                Process::start(&format!("{what}-{name}"), folder.path(), &mut within(name, command))
            };
            let role = |role: &str| start(role, tidegate().args([role, "--config"]).arg(&file));
            let mut vrrp = Command::new("python3");
            vrrp.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hosts/vrrp.py"));
            vrrp.args([&ip, VIRTUAL, "eth0", priority]);
            let processes = vec![role("balancer"), role("node"), start("vrrp", &vrrp)];
            Host { name, ip, etcd, processes }
        });
        let site = Self { hosts: hosts.collect(), folder, client };
        for host in 0..3 {
            until("each balancer knows three nodes", LOADING, || async {
                let members = site.members(host).await;
                let ready = |m: &&Value| m["state"] == "ready";
                members["members"].as_array().is_some_and(|all| all.iter().filter(ready).count() == 3)
            })
            .await;
        }
        site
    }

    /// Where clients ask: one host, or whichever holds the virtual address.
    fn edge(&self, ip: &str) -> Edge {
        let log = |host: &Host| self.folder.path().join(format!("balancer-{}.log", host.name));
        let logs: Vec<PathBuf> = self.hosts.iter().map(log).collect();
        Edge { url: format!("https://{ip}:{EDGE_PORT}"), client: self.client.clone(), logs }
    }

    /// What a host's balancer says of its members, asked on that host.
    async fn members(&self, host: usize) -> Value {
        let mut command = Command::new("curl");
        command.args(["--silent", "--max-time", "2", "http://127.0.0.1:18790/members"]);
        let mut command = within(self.hosts[host].name, &command);
        let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// As a power cut would: the link first, so that nothing says farewell.
    fn lose(&mut self, host: usize) -> Instant {
        let host = &mut self.hosts[host];
        let lost = Instant::now();
        ip(&format!("-n {} link set eth0 down", host.name));
        host.etcd.kill();
        host.processes.iter_mut().for_each(Process::kill);
        lost
    }
}

/// Names, and priorities for the virtual address.
const HOSTS: [(&str, &str); 3] = [("h1", "170"), ("h2", "90"), ("h3", "250")];

fn address(name: &str) -> String {
    format!("10.77.0.1{}", &name[1..])
}

/// A key for clients, a certificate for each host; a client that has the one and trusts the other.
fn secure(folder: &Path) -> Client {
    let authority = Authority::write(folder);
    for (name, _) in HOSTS {
        authority.issue(folder, name, &[&address(name), VIRTUAL, "127.0.0.1"]);
    }
    let keys = folder.join("keys.toml").display().to_string();
    let (code, key, err) = run(&["key", "create", "--file", &keys, "--owner", "tester"]);
    assert_eq!(code, 0, "{err}");
    Client::trusting(&fs::read(folder.join("ca.pem")).unwrap(), key.trim())
}

/// The hosts' namespaces on one bridge; what etcd must know of each.
fn lay_cables(folder: &Path) -> Vec<Seat> {
    ip("link add br0 type bridge");
    ip("addr add 10.77.0.1/24 dev br0");
    ip("link set br0 up");
    let seat = |(name, _): (&str, &str)| {
        ip(&format!("netns add {name}"));
        ip(&format!("link add v-{name} type veth peer name eth0 netns {name}"));
        ip(&format!("link set v-{name} master br0 up"));
        ip(&format!("-n {name} addr add {}/24 dev eth0", address(name)));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} link set lo up"));
        let file = |end: &str| folder.join(end).display().to_string();
        let (cert, key, ca) = (file(&format!("{name}.pem")), file(&format!("{name}.key")), file("ca.pem"));
        let tls = |peer: &str| {
            let flag = |flag: &str, value: &str| format!("--{peer}{flag}={value}");
            [
                flag("cert-file", &cert),
                flag("key-file", &key),
                flag("trusted-ca-file", &ca),
                format!("--{peer}client-cert-auth"),
            ]
        };
        Seat {
            name: name.to_owned(),
            ip: address(name),
            flags: tls("").into_iter().chain(tls("peer-")).collect(),
            within: ["ip", "netns", "exec", name].map(str::to_owned).into(),
        }
    };
    HOSTS.map(seat).into()
}

/// One file for both roles of a host.
fn configuration(name: &str, ip: &str, endpoints: &[String], folder: &Path) -> String {
    let at = folder.display();
    let pair = format!("cert = \"{at}/{name}.pem\", key = \"{at}/{name}.key\"");
    format!(
        r#"
[cluster]
name = "three-hosts"
[cluster.registry]
kind = "etcd"
endpoints = {endpoints:?}
lease_ttl = "4s"
ca = "{at}/ca.pem"
cert = "{at}/{name}.pem"
key = "{at}/{name}.key"
[balancer]
listen = "0.0.0.0:{EDGE_PORT}"
tls = {{ {pair} }}
auth.keys_file = "{at}/keys.toml"
upstream_tls = {{ ca = "{at}/ca.pem", {pair} }}
relay.stall_timeout = "2s"
members_file = "{at}/{name}-members.json"
[node]
id = "{name}"
listen = "{ip}:18800"
model = "{MODEL}"
threads = 1
kv_cache_memory = "256MiB"
tls = {{ {pair}, client_ca = "{at}/ca.pem" }}
"#
    )
}

/// One request of a client of the virtual address.
struct Visit {
    /// When the head of its answer was there.
    begun: Option<Instant>,
    /// When it broke off: when the address answered again.
    back: Option<Instant>,
    taken: Taken,
}

/// A client of the virtual address, which asks again at once when its connection is lost.
struct Visitor {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<Visit>>,
}

impl Visitor {
    fn start(edge: Edge, expected: &Expected, number: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let streams = expected.streams().skip(number).step_by(2).cloned().collect();
        let task = tokio::spawn(visit(edge, streams, stop.clone()));
        Self { stop, task }
    }

    async fn stop(self) -> Vec<Visit> {
        self.stop.store(true, Relaxed);
        self.task.await.unwrap()
    }
}

async fn visit(edge: Edge, streams: Vec<(Request, String)>, stop: Arc<AtomicBool>) -> Vec<Visit> {
    let mut visits = Vec::new();
    for (request, expected) in streams.iter().cycle() {
        if stop.load(Relaxed) {
            break;
        }
        let heard = ask(&edge, request).await;
        let taken = Taken { verdict: verdict(expected, &heard), pause: heard.pause, moved: false };
        let back = if heard.fault.is_some() { Some(until_back(&edge).await) } else { None };
        visits.push(Visit { begun: heard.begun, back, taken });
    }
    visits
}

async fn until_back(edge: &Edge) -> Instant {
    while edge.client.get(&format!("{}/v1/models", edge.url)).await.is_err() {
        sleep(AGAIN).await;
    }
    Instant::now()
}
