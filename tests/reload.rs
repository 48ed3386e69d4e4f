//! Goal: configuration and certificates change while a balancer and a node run, by SIGHUP and by the files alone; what is bad is refused
//! with its reason, and what was good stays. Method: real processes with TLS, certificates of two authorities behind a symbolic link that
//! is swapped as Kubernetes swaps it, clients that trust one of the two, and the counters.

use std::{fs, net::Ipv4Addr, os::unix::fs::symlink, path::Path, time::Duration};

use tokio::{io::AsyncReadExt, net::TcpSocket, time::timeout};

use crate::support::{
    LOADING, MODEL, certs,
    client::Client,
    cluster::{Cluster, Plan, Registry},
    etcd::free_port,
    process::{Process, ensure_model, tidegate},
    until,
};

/// Two looks of a second each, and a busy machine.
const SEEN: Duration = Duration::from_secs(8);

/// Two authorities, `v1` and `v2`, and `live` that points to the first.
fn two_authorities(folder: &Path) {
    for version in ["v1", "v2"] {
        fs::create_dir(folder.join(version)).unwrap();
        certs::write(&folder.join(version));
    }
    symlink("v1", folder.join("live")).unwrap();
}

fn swap(folder: &Path) {
    symlink("v2", folder.join("next")).unwrap();
    fs::rename(folder.join("next"), folder.join("live")).unwrap();
}

/// Whether a new connection is made by somebody who trusts this authority alone.
async fn is_trusted(folder: &Path, version: &str, url: &str) -> bool {
    let root = reqwest::Certificate::from_pem(&fs::read(folder.join(version).join("ca.pem")).unwrap()).unwrap();
    let client = reqwest::Client::builder().tls_certs_only([root]).timeout(Duration::from_secs(5)).build().unwrap();
    client.get(format!("{url}/health")).send().await.is_ok()
}

/// Whether a connection from there is closed at once.
async fn is_refused(from: Ipv4Addr, port: u16) -> bool {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    let Ok(mut stream) = socket.connect((Ipv4Addr::LOCALHOST, port).into()).await else { return true };
    timeout(Duration::from_millis(500), stream.read_u8()).await.is_ok()
}

#[tokio::test]
async fn a_balancer_takes_new_certificates_and_rules_and_keeps_the_old_when_they_are_bad() {
    let mut plan = Plan::new(Registry::Static, &[]);
    let folder = plan.folder.path().to_owned();
    two_authorities(&folder);
    let at = folder.join("live").display().to_string();
    let lines = format!("allow = [\"127.0.0.0/8\"]\n[balancer.tls]\ncert = \"{at}/edge.pem\"\nkey = \"{at}/edge.key\"");
    plan.balancer = &lines;
    plan.ghosts = &[("ghost", "ghost")];
    plan.tls = true;
    let mut cluster = Cluster::start(plan).await;
    let (edge, client) = (cluster.edge(), Client::new());
    let admin = cluster.admin();
    let reloads = async |outcome: &str| {
        let text = client.text(&format!("{admin}/metrics")).await;
        let line = format!("tidegate_reloads_total{{outcome=\"{outcome}\"}} ");
        text.lines().find_map(|l| l.strip_prefix(&line)?.parse::<u32>().ok()).unwrap_or(0)
    };
    until("the balancer listens", LOADING, || is_trusted(&folder, "v1", &edge)).await;
    assert!(!is_trusted(&folder, "v2", &edge).await);

    swap(&folder);
    until("the new certificate is served", SEEN, || is_trusted(&folder, "v2", &edge)).await;
    assert!(!is_trusted(&folder, "v1", &edge).await);
    assert_eq!(reloads("applied").await, 1);

    let (good, bad) = (folder.join("v2/edge.pem"), "no certificate");
    let pem = fs::read(&good).unwrap();
    fs::write(&good, bad).unwrap();
    until("the bad one is refused", SEEN, || async { reloads("refused").await == 1 }).await;
    assert!(is_trusted(&folder, "v2", &edge).await, "what was good did not stay");
    fs::write(&good, pem).unwrap();
    until("the good one is back", SEEN, || async { reloads("applied").await == 2 }).await;

    let file = folder.join("balancer.toml");
    let text = fs::read_to_string(&file).unwrap();
    let other = Ipv4Addr::new(127, 0, 0, 2);
    let port = edge.rsplit_once(':').unwrap().1.parse().unwrap();
    assert!(!is_refused(other, port).await);
    let denied = text.replace("allow =", "deny = [\"127.0.0.2\"]\nthreads = 1\nallow =");
    fs::write(&file, denied).unwrap();
    cluster.balancer().signal("HUP");
    until("the address is denied", SEEN, || is_refused(other, port)).await;
    assert!(is_trusted(&folder, "v2", &edge).await);
    fs::write(&file, text.replace("allow =", "allowed =")).unwrap();
    cluster.balancer().signal("HUP");
    until("a wrong key is refused", SEEN, || async { reloads("refused").await == 2 }).await;
    assert!(is_refused(other, port).await, "the rules before did not stay");
    let log = cluster.balancer().output();
    for words in ["no usable certificate", "balancer.allowed", "\"balancer.threads\"", "next start"] {
        assert!(log.contains(words), "the log does not say: {words}");
    }
}

#[tokio::test]
async fn a_node_takes_new_certificates_and_keeps_the_old_when_they_are_bad() {
    ensure_model();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    two_authorities(folder);
    let (at, port) = (folder.join("live").display().to_string(), free_port());
    let text = format!(
        "[node]\nid = \"n1\"\nmodel = \"{MODEL}\"\nthreads = 1\nlisten = \"127.0.0.1:{port}\"\nadmin.listen = \"off\"\n\
         tls = {{ cert = \"{at}/edge.pem\", key = \"{at}/edge.key\" }}\n"
    );
    fs::write(folder.join("node.toml"), text).unwrap();
    let mut node = Process::start("n1", folder, tidegate().args(["node", "--config"]).arg(folder.join("node.toml")));
    let url = format!("https://127.0.0.1:{port}");
    until("the node listens", LOADING, || is_trusted(folder, "v1", &url)).await;
    until("the model is there", LOADING, || async { node.output().contains("ready") }).await;
    swap(folder);
    until("the new certificate is served", SEEN, || is_trusted(folder, "v2", &url)).await;
    assert!(!is_trusted(folder, "v1", &url).await);
    fs::write(folder.join("v2/edge.pem"), "no certificate").unwrap();
    node.signal("HUP");
    until("the bad one is refused", SEEN, || async { node.output().contains("are refused") }).await;
    assert!(is_trusted(folder, "v2", &url).await, "what was good did not stay");
    assert!(node.ended_within(Duration::from_millis(100)).is_none());
}
