//! The registry on a real etcd, and everything that can happen to it.
//!
//! Goal: what a node announces stays announced and what a balancer knows stays known, whatever becomes of etcd, and both mend by
//! themselves. Method: a real etcd process for each test, killed, wiped, frozen and compacted, with short leases; each wait is
//! bounded, and each bound is what the design promises at these settings.

#![allow(clippy::unwrap_used)] // clippy's leave for tests does not reach their helpers

#[path = "support/etcd.rs"]
mod support;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use etcd_client::{Certificate, Client, CompactionOptions, ConnectOptions, GetOptions, Identity, TlsOptions};
use support::{Etcd, free_port, is_installed};
use tempfile::TempDir;
use tidegate_common::{
    config::EtcdConfig,
    contract::NodeRecord,
    registry::{EtcdRegistry, Link, Registry, View},
    tls::install_provider,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    time::{sleep, timeout},
};

/// Of etcd's user `root`, where there is one.
const PASSWORD: &str = "secret";

fn config(endpoints: &[String]) -> EtcdConfig {
    EtcdConfig {
        endpoints: endpoints.to_vec(),
        lease_ttl: Duration::from_secs(2),
        timeout: Duration::from_secs(1),
        resync_interval: Duration::from_secs(1),
        ca: None,
        identity: None,
        credentials: None,
    }
}

fn open(config: &EtcdConfig) -> EtcdRegistry {
    EtcdRegistry::open(&"c".parse().unwrap(), config).unwrap()
}

fn registry(etcd: &Etcd) -> EtcdRegistry {
    open(&config(&[etcd.endpoint()]))
}

fn record(id: &str) -> NodeRecord {
    NodeRecord::new(id.parse().unwrap(), "127.0.0.1:1".into(), "m".into())
}

/// Waits until the view is as wanted; how long that took.
async fn until(views: &mut watch::Receiver<View>, limit_s: u64, wanted: impl Fn(&View) -> bool) -> Duration {
    let start = std::time::Instant::now();
    let waited = timeout(Duration::from_secs(limit_s), views.wait_for(|view| wanted(view))).await.map(drop);
    assert!(waited.is_ok(), "not within {limit_s} s; the view is {:?}", *views.borrow());
    start.elapsed()
}

fn shows(view: &View, link: Link, ids: &[&str]) -> bool {
    view.link == link && view.nodes.keys().map(|id| id.as_str()).eq(ids.iter().copied())
}

#[tokio::test]
async fn balancers_count_each_other_while_they_live() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::start();
    let (one, other) = (registry(&etcd), registry(&etcd));
    let (mut alive, _other_sees) = (one.join("b1").await, other.join("b2").await);
    let mut until = async |count: usize| {
        let waited = timeout(Duration::from_secs(10), alive.wait_for(|alive| *alive == count)).await.map(drop);
        assert!(waited.is_ok(), "{} are counted", *alive.borrow());
    };
    until(2).await;
    assert_eq!(*one.watch().borrow(), View::default(), "balancers are no nodes");
    other.leave("b2").await;
    until(1).await;
    // one that died leaves with its lease
    let died = registry(&etcd);
    let _sees = died.join("b3").await;
    until(2).await;
    drop((died, _sees));
    until(1).await;
}

#[tokio::test]
async fn a_node_is_seen_changed_and_gone_at_once_when_withdrawn() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::start();
    let (node, edge) = (registry(&etcd), registry(&etcd));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    node.announce(record("n2")).await;
    until(&mut views, 3, |v| shows(v, Link::Live, &["n1", "n2"])).await;

    let heavier = NodeRecord { weight: 7, ..record("n1") };
    node.announce(heavier.clone()).await;
    until(&mut views, 2, |v| v.nodes.get(&heavier.id) == Some(&heavier)).await;

    node.withdraw(&heavier.id).await;
    let took = until(&mut views, 2, |v| shows(v, Link::Live, &["n2"])).await;
    assert!(took < Duration::from_millis(500), "gone only after {took:?}");
    // one that was never announced is no reason to wait
    timeout(Duration::from_millis(200), node.withdraw(&"n9".parse().unwrap())).await.unwrap();
    // and one that was withdrawn may come again
    node.announce(record("n1")).await;
    until(&mut views, 2, |v| shows(v, Link::Live, &["n1", "n2"])).await;
}

#[tokio::test]
async fn a_withdrawal_spares_the_successor_of_the_same_name() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::start();
    let (old, new, edge) = (registry(&etcd), registry(&etcd), registry(&etcd));
    let mut views = edge.watch();
    old.announce(record("n1")).await;
    until(&mut views, 3, |v| shows(v, Link::Live, &["n1"])).await;
    let successor = NodeRecord { address: "127.0.0.1:2".into(), ..record("n1") };
    new.announce(successor.clone()).await;
    until(&mut views, 3, |v| v.nodes.values().any(|n| *n == successor)).await;
    old.withdraw(&successor.id).await;
    sleep(Duration::from_millis(500)).await;
    assert!(views.borrow().nodes.values().any(|n| *n == successor), "{:?}", *views.borrow());
}

#[tokio::test]
async fn a_dead_etcd_leaves_the_view_and_both_sides_mend_when_it_is_back() {
    if !is_installed() {
        return;
    }
    let mut etcd = Etcd::start();
    let (node, edge) = (registry(&etcd), registry(&etcd));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    until(&mut views, 3, |v| shows(v, Link::Live, &["n1"])).await;

    etcd.kill();
    until(&mut views, 3, |v| shows(v, Link::Lost, &["n1"])).await;
    // longer than the lease, so that only an announcement made again can be there afterwards
    sleep(Duration::from_secs(3)).await;
    assert!(shows(&views.borrow(), Link::Lost, &["n1"]));
    etcd.run();
    let took = until(&mut views, 5, |v| shows(v, Link::Live, &["n1"])).await;
    println!("live again {took:?} after etcd answered");
    // past the old lease, it is still there
    sleep(Duration::from_secs(4)).await;
    assert!(shows(&views.borrow(), Link::Live, &["n1"]));
}

#[tokio::test]
async fn an_etcd_that_lost_its_data_is_told_again() {
    if !is_installed() {
        return;
    }
    let mut etcd = Etcd::start();
    let (node, edge) = (registry(&etcd), registry(&etcd));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    node.announce(record("n2")).await;
    until(&mut views, 3, |v| shows(v, Link::Live, &["n1", "n2"])).await;
    etcd.kill();
    etcd.wipe();
    etcd.run();
    let mut client = Client::connect([etcd.endpoint()], None).await.unwrap();
    let announced = async {
        let options = || Some(GetOptions::new().with_prefix().with_count_only());
        while client.get("/tidegate/v1/c/nodes/", options()).await.unwrap().count() < 2 {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(5), announced).await.expect("both nodes announce again by themselves");
    until(&mut views, 5, |v| shows(v, Link::Live, &["n1", "n2"])).await;
}

#[tokio::test]
async fn a_node_that_vanished_is_gone_with_its_lease() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::start();
    let (node, edge) = (registry(&etcd), registry(&etcd));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    until(&mut views, 3, |v| shows(v, Link::Live, &["n1"])).await;
    // well past the lease: the key is being kept
    sleep(Duration::from_secs(4)).await;
    assert!(shows(&views.borrow(), Link::Live, &["n1"]));
    drop(node);
    let took = until(&mut views, 6, |v| shows(v, Link::Live, &[])).await;
    println!("gone {took:?} after its last word");
}

#[tokio::test]
async fn a_deleted_key_is_put_again() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::start();
    let (node, edge) = (registry(&etcd), registry(&etcd));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    until(&mut views, 3, |v| shows(v, Link::Live, &["n1"])).await;
    let mut client = Client::connect([etcd.endpoint()], None).await.unwrap();
    client.delete("/tidegate/v1/c/nodes/n1", None).await.unwrap();
    until(&mut views, 1, |v| shows(v, Link::Live, &[])).await;
    until(&mut views, 2, |v| shows(v, Link::Live, &["n1"])).await;
}

#[tokio::test]
async fn a_frozen_etcd_is_noticed_and_followed_again() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::start();
    let (node, edge) = (registry(&etcd), registry(&etcd));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    until(&mut views, 3, |v| shows(v, Link::Live, &["n1"])).await;
    etcd.freeze();
    // nothing closes and nothing answers: only the resync finds out, within its interval and one time limit
    let took = until(&mut views, 4, |v| shows(v, Link::Lost, &["n1"])).await;
    println!("lost {took:?} after the freeze");
    // a withdrawal does not wait for it longer than its bound
    node.announce(record("n2")).await;
    timeout(Duration::from_millis(1500), node.withdraw(&"n2".parse().unwrap())).await.unwrap();
    sleep(Duration::from_secs(2)).await;
    etcd.thaw();
    let took = until(&mut views, 5, |v| shows(v, Link::Live, &["n1"])).await;
    println!("live again {took:?} after the thaw");
}

/// With the usual long resync it is the ping of the open watch that finds out.
#[tokio::test]
async fn a_frozen_etcd_is_noticed_between_listings_too() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::start();
    let (node, edge) =
        (registry(&etcd), open(&EtcdConfig { resync_interval: Duration::from_secs(60), ..config(&[etcd.endpoint()]) }));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    until(&mut views, 3, |v| shows(v, Link::Live, &["n1"])).await;
    etcd.freeze();
    let took = until(&mut views, 9, |v| shows(v, Link::Lost, &["n1"])).await;
    println!("lost {took:?} after the freeze");
    etcd.thaw();
    until(&mut views, 5, |v| shows(v, Link::Live, &["n1"])).await;
}

#[tokio::test]
async fn an_etcd_that_comes_later_and_a_dead_member_are_no_hindrance() {
    if !is_installed() {
        return;
    }
    let mut etcd = Etcd::start();
    etcd.kill();
    let dead = format!("http://127.0.0.1:{}", free_port());
    let both = config(&[dead, etcd.endpoint()]);
    let (node, edge) = (open(&both), open(&both));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    until(&mut views, 3, |v| shows(v, Link::Lost, &[])).await;
    etcd.run();
    until(&mut views, 8, |v| shows(v, Link::Live, &["n1"])).await;
}

/// Every word to etcd comes late, so that between a listing and its watch the history is compacted away, again and again.
#[tokio::test]
async fn compaction_leads_to_a_new_listing() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::start();
    let slow = slow_way(etcd.port(), Duration::from_millis(150)).await;
    let patient = EtcdConfig { resync_interval: Duration::from_secs(60), ..config(&[slow]) };
    let (node, edge) = (registry(&etcd), open(&patient));
    node.announce(record("n1")).await;
    let mut views = edge.watch();
    let mut client = Client::connect([etcd.endpoint()], None).await.unwrap();
    let churn = async {
        for i in 0..60 {
            let put = client.put("/other", i.to_string(), None).await.unwrap();
            let revision = put.header().unwrap().revision();
            client.compact(revision, Some(CompactionOptions::new())).await.unwrap();
            sleep(Duration::from_millis(25)).await;
        }
    };
    let mut seen = views.clone();
    let (_, listed) = tokio::join!(churn, until(&mut seen, 5, |v| shows(v, Link::Live, &["n1"])));
    println!("listed after {listed:?} under compaction");
    node.announce(record("n2")).await;
    until(&mut views, 4, |v| shows(v, Link::Live, &["n1", "n2"])).await;
}

/// A way to `port` on which everything towards it is late.
async fn slow_way(port: u16, late: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            tokio::spawn(carry(near_in, far_out, late));
            tokio::spawn(carry(far_in, near_out, Duration::ZERO));
        }
    });
    endpoint
}

async fn carry(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, late: Duration) {
    let mut chunk = vec![0; 16 * 1024];
    while let Ok(n @ 1..) = from.read(&mut chunk).await {
        sleep(late).await;
        if to.write_all(&chunk[..n]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn tls_both_ways_and_a_password() {
    if !is_installed() {
        return;
    }
    install_provider();
    let files = Files::make();
    let (cert, key, ca) = (files.text("server.pem"), files.text("server.key"), files.text("ca.pem"));
    let flags = ["--cert-file", &cert, "--key-file", &key, "--client-cert-auth", "--trusted-ca-file", &ca];
    let etcd = Etcd::start_with(&flags, "https");
    let secure = EtcdConfig {
        ca: Some(files.path("ca.pem")),
        identity: Some((files.path("client.pem"), files.path("client.key"))),
        ..config(&[etcd.endpoint()])
    };
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(files.text_of("ca.pem")))
        .identity(Identity::from_pem(files.text_of("client.pem"), files.text_of("client.key")));
    let mut client = Client::connect([etcd.endpoint()], Some(ConnectOptions::new().with_tls(tls))).await.unwrap();
    demand_password(&mut client).await;

    let with_password = EtcdConfig { credentials: Some(("root".into(), files.path("password"))), ..secure.clone() };
    let (node, edge) = (open(&with_password), open(&with_password));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    until(&mut views, 4, |v| shows(v, Link::Live, &["n1"])).await;

    // without the certificate, or without the password, nothing is seen
    for refused in [EtcdConfig { identity: None, ..with_password }, secure] {
        let edge = open(&refused);
        let mut views = edge.watch();
        until(&mut views, 4, |v| shows(v, Link::Lost, &[])).await;
    }
}

/// From then on nobody is served without it.
async fn demand_password(client: &mut Client) {
    client.user_add("root", PASSWORD, None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.auth_enable().await.unwrap();
}

/// etcd forgets a token that nobody has used for a second, and everybody here asks less often than that.
#[tokio::test]
async fn an_expired_token_is_renewed_and_nobody_notices() {
    if !is_installed() {
        return;
    }
    let (files, etcd) = (Files::make(), Etcd::start_with(&["--auth-token-ttl", "1"], "http"));
    demand_password(&mut Client::connect([etcd.endpoint()], None).await.unwrap()).await;
    let config = EtcdConfig {
        lease_ttl: Duration::from_secs(15),
        resync_interval: Duration::from_secs(3),
        credentials: Some(("root".into(), files.path("password"))),
        ..config(&[etcd.endpoint()])
    };
    let (node, edge) = (open(&config), open(&config));
    let mut views = edge.watch();
    node.announce(record("n1")).await;
    until(&mut views, 4, |v| shows(v, Link::Live, &["n1"])).await;
    let lease = lease_of_n1(&etcd).await;

    let options = ConnectOptions::new().with_user("root", PASSWORD);
    let mut idle = Client::connect([etcd.endpoint()], Some(options)).await.unwrap();
    let other = timeout(Duration::from_secs(11), views.wait_for(|v| !shows(v, Link::Live, &["n1"])))
        .await
        .map(|v| v.unwrap().clone());
    assert!(other.is_err(), "the view became {other:?}");
    let refused = idle.get("k", None).await.expect_err("the token of this one has expired").to_string();
    assert!(refused.contains("invalid auth token"), "{refused}");
    assert_eq!(lease_of_n1(&etcd).await, lease, "announced again, as if etcd had been away");

    node.announce(record("n2")).await;
    until(&mut views, 2, |v| shows(v, Link::Live, &["n1", "n2"])).await;
    node.withdraw(&"n2".parse().unwrap()).await;
    until(&mut views, 2, |v| shows(v, Link::Live, &["n1"])).await;
}

async fn lease_of_n1(etcd: &Etcd) -> i64 {
    let options = ConnectOptions::new().with_user("root", PASSWORD);
    let mut client = Client::connect([etcd.endpoint()], Some(options)).await.unwrap();
    client.get("/tidegate/v1/c/nodes/n1", None).await.unwrap().kvs()[0].lease()
}

/// Certificates of an own CA, and a password, as files.
struct Files(TempDir);

impl Files {
    fn make() -> Self {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
        let files = Self(tempfile::tempdir().unwrap());
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        files.write("ca.pem", &ca.self_signed(&ca_key).unwrap().pem());
        let issuer = Issuer::new(ca, ca_key);
        for name in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
            files.write(&format!("{name}.pem"), &params.signed_by(&key, &issuer).unwrap().pem());
            files.write(&format!("{name}.key"), &key.serialize_pem());
        }
        files.write("password", &format!("{PASSWORD}\n"));
        files
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.0.path()).join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn text_of(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
}

#[test]
fn it_opens_outside_a_runtime_and_ends_with_its_owner() {
    let registry = open(&config(&["http://127.0.0.1:1".to_owned()]));
    let mut views = registry.watch();
    assert_eq!(views.borrow().link, Link::Connecting);
    drop(registry);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let ended = async {
        // the last sender of the view lives on the registry's thread
        while views.changed().await.is_ok() {}
    };
    runtime.block_on(async { timeout(Duration::from_secs(2), ended).await }).expect("the thread ends");
}
