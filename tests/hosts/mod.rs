//! Goal: three hosts, each with an etcd, a balancer and a node, are one service. Each balancer gives its place to a new one, a host is cut
//! off, and at last one is lost as a whole: the clients of the other balancers see nothing of all this, and those of the lost host are back
//! at the virtual address within 3 s. Method: three network namespaces on one bridge, each a host with an address of its own, and no two
//! with the same time of day; TLS from everyone to everyone; `vrrp.py` in keepalived's place. The host that holds the virtual address first
//! loses its port of the bridge for a while, and then its link and its processes at one blow, while clients ask at the others and at the
//! virtual address. Every answer is compared to the byte, as in `faults`.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
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
        is_full,
        report::Report,
        requests::{self, Request},
        work::{Edge, Expected, Taken, Work, ask, verdict},
    },
    support::{
        LOADING, MODEL,
        client::{Client, chat},
        clock::Clock,
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

/// How long a host is cut off: longer than the leases of nodes.
const CUT: Duration = Duration::from_secs(10);

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
    clock: Clock,
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
    site.check_clocks().await;
    let mut report = Report::default();
    let (long, rounds) = if is_full() { (200, 3) } else { (64, 1) };
    let requests = requests::all(long);
    let (expected, quiet) = Expected::ask(&site.edge(&site.hosts[0].ip), requests, 6).await;
    report.note("nothing: the answers to compare with", quiet);

    let all = site.clients_of([0, 1, 2], &expected);
    for host in (0..rounds).flat_map(|_| 0..3) {
        sleep(Duration::from_secs(1)).await;
        site.upgrade(host).await;
    }
    for (work, host) in all.into_iter().zip(["h1", "h2", "h3"]) {
        report.note(format!("balancers upgraded in turn, {rounds} x: clients of {host}"), work.stop().await);
    }

    let others = site.clients_of([0, 1], &expected);
    sleep(Duration::from_secs(2)).await;
    site.cut_off(2, true);
    sleep(CUT).await;
    assert_eq!(site.ready(2).await, ["h3"], "the host that is cut off serves with its own node");
    site.cut_off(2, false);
    site.until_whole(Duration::from_secs(20)).await;
    for (work, host) in others.into_iter().zip(["h1", "h2"]) {
        report.note(format!("a host cut off for {} s: clients of {host}", CUT.as_secs()), work.stop().await);
    }

    let others = site.clients_of([0, 1], &expected);
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
        let clock = Clock::make(folder.path());
        let hosts = etcd.into_iter().zip(HOSTS).map(|(etcd, (name, priority, off_s))| {
            let ip = address(name);
            let file = folder.path().join(format!("{name}.toml"));
            fs::write(&file, configuration(name, &ip, &endpoints, folder.path())).unwrap();
            let start = |what: &str, command: &Command| {
                Process::start(&format!("{what}-{name}"), folder.path(), &mut within(name, command))
            };
            let role = |role: &str| start(role, clock.off_by(off_s, tidegate().args([role, "--config"]).arg(&file)));
            let mut vrrp = Command::new("python3");
            vrrp.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hosts/vrrp.py"));
            vrrp.args([&ip, VIRTUAL, "eth0", priority]);
            let processes = vec![role("balancer"), role("node"), start("vrrp", &vrrp)];
            Host { name, ip, etcd, processes }
        });
        let site = Self { hosts: hosts.collect(), clock, folder, client };
        site.until_whole(LOADING).await;
        site
    }

    /// Waits until each balancer asks all nodes.
    async fn until_whole(&self, limit: Duration) {
        for host in 0..3 {
            until("each balancer knows three nodes", limit, || async { self.ready(host).await.len() == 3 }).await;
        }
    }

    /// That each host lives in its own time, as its balancer's answers show.
    async fn check_clocks(&self) {
        for (host, (name, _, off_s)) in self.hosts.iter().zip(HOSTS) {
            let url = format!("{}/v1/chat/completions", self.edge(&host.ip).url);
            let answer = self.client.post(&url, &chat("What time is it?", 2)).await.unwrap();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
            let off = answer.body["created"].as_u64().unwrap().cast_signed() - now.cast_signed();
            assert!((off - off_s).abs() < 60, "the clock of {name} is {off} s ahead");
        }
    }

    fn clients_of<const N: usize>(&self, hosts: [usize; N], expected: &Expected) -> [Work; N] {
        hosts.map(|host| Work::start(&self.edge(&self.hosts[host].ip), expected, 2))
    }

    /// Where clients ask: one host, or whichever holds the virtual address.
    fn edge(&self, ip: &str) -> Edge {
        let host = self.hosts.iter().filter(|host| host.ip == ip);
        let logs = host.map(|host| self.folder.path().join(format!("balancer-{}.log", host.name))).collect();
        Edge { url: format!("https://{ip}:{EDGE_PORT}"), client: self.client.clone(), logs }
    }

    /// A new balancer takes the place of a host's old one, which ends once its answers have.
    async fn upgrade(&mut self, host: usize) {
        let (host, off_s) = (&mut self.hosts[host], HOSTS[host].2);
        let mut command = tidegate();
        command.args(["balancer", "--upgrade", "--config"]).arg(self.folder.path().join(format!("{}.toml", host.name)));
        self.clock.off_by(off_s, &mut command);
        let name = format!("balancer-{}", host.name);
        let new = Process::start(&name, self.folder.path(), &mut within(host.name, &command));
        let mut old = std::mem::replace(&mut host.processes[0], new);
        let ended = spawn_blocking(move || old.ended_within(LOADING)).await.unwrap();
        assert!(ended.is_some_and(|status| status.success()), "the old {name} ended with {ended:?}");
    }

    /// What a host's balancer says of its members, asked on that host.
    async fn members(&self, host: usize) -> Value {
        let mut command = Command::new("curl");
        command.args(["--silent", "--max-time", "2", "http://127.0.0.1:18790/members"]);
        let mut command = within(self.hosts[host].name, &command);
        let output = spawn_blocking(move || command.output().unwrap()).await.unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Nodes that a host's balancer sends requests to.
    async fn ready(&self, host: usize) -> Vec<String> {
        let members = self.members(host).await["members"].as_array().cloned().unwrap_or_default();
        let ready = members.iter().filter(|member| member["state"] == "ready");
        ready.filter_map(|member| member["node"].as_str().map(str::to_owned)).collect()
    }

    /// The host's port of the bridge: what it sends and what is sent to it goes nowhere, and all of it runs on.
    fn cut_off(&self, host: usize, is_cut: bool) {
        let port = format!("link set v-{}", self.hosts[host].name);
        ip(&if is_cut { format!("{port} nomaster") } else { format!("{port} master br0") });
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

/// Names, priorities for the virtual address, and how many seconds their clocks are ahead.
const HOSTS: [(&str, &str, i64); 3] = [("h1", "170", 0), ("h2", "90", 1500), ("h3", "250", -1500)];

fn address(name: &str) -> String {
    format!("10.77.0.1{}", &name[1..])
}

/// A key for clients, a certificate for each host; a client that has the one and trusts the other.
fn secure(folder: &Path) -> Client {
    let (certs, keys) = (folder.join("certs"), folder.join("keys.toml").display().to_string());
    let dir = certs.display().to_string();
    made(&["ca", "init", &dir]);
    for (name, _, _) in HOSTS {
        made(&["ca", "issue", &dir, name, "--host", &address(name), "--host", VIRTUAL, "--host", "127.0.0.1"]);
    }
    let key = made(&["key", "create", "--file", &keys, "--owner", "tester"]);
    Client::trusting(&fs::read(certs.join("ca.pem")).unwrap(), key.trim())
}

/// What the command says when it has done its work.
fn made(words: &[&str]) -> String {
    let (code, out, err) = run(words);
    assert_eq!(code, 0, "{words:?}: {err}");
    out
}

/// The hosts' namespaces on one bridge; what etcd must know of each.
fn lay_cables(folder: &Path) -> Vec<Seat> {
    ip("link add br0 type bridge");
    ip("addr add 10.77.0.1/24 dev br0");
    ip("link set br0 up");
    let seat = |(name, _, _): (&str, &str, i64)| {
        ip(&format!("netns add {name}"));
        ip(&format!("link add v-{name} type veth peer name eth0 netns {name}"));
        ip(&format!("link set v-{name} master br0 up"));
        ip(&format!("-n {name} addr add {}/24 dev eth0", address(name)));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} link set lo up"));
        let file = |end: &str| folder.join("certs").join(end).display().to_string();
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
    let pair = format!("cert = \"{at}/certs/{name}.pem\", key = \"{at}/certs/{name}.key\"");
    format!(
        r#"
[cluster]
name = "three-hosts"
[cluster.registry]
kind = "etcd"
endpoints = {endpoints:?}
lease_ttl = "4s"
ca = "{at}/certs/ca.pem"
cert = "{at}/certs/{name}.pem"
key = "{at}/certs/{name}.key"
[balancer]
listen = "0.0.0.0:{EDGE_PORT}"
tls = {{ {pair} }}
auth.keys_file = "{at}/keys.toml"
upstream_tls = {{ ca = "{at}/certs/ca.pem", {pair} }}
relay.stall_timeout = "2s"
members_file = "{at}/{name}-members.json"
upgrade_socket = "{at}/{name}-run/upgrade.sock"
[node]
id = "{name}"
listen = "{ip}:18800"
model = "{MODEL}"
threads = 1
kv_cache_memory = "256MiB"
tls = {{ {pair}, client_ca = "{at}/certs/ca.pem" }}
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
