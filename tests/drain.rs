//! Goal: a node stops taking requests, by command or by SIGTERM, and no stream breaks; by command it comes back. Method: two nodes behind
//! a balancer and long greedy streams whose text is known from a quiet run; `tidegate drain` and `undrain` through a real etcd and at the
//! private listener; a short drain_grace, the clock, and a restart of the drained node.

use std::time::Duration;

use futures::join;
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::support::{
    LOADING,
    client::{Client, End, Streamed, chat_stream},
    cluster::{Cluster, NodePlan, Plan, Registry},
    etcd::{Etcd, is_installed},
    process::run,
    until,
};

const IDS: [&str; 2] = ["n1", "n2"];

/// Several times the grace below, on a busy machine.
const LONG: u32 = 300;

const GRACE: Duration = Duration::from_millis(400);

async fn two_nodes(registry: Registry) -> Cluster {
    let nodes = IDS.map(|id| NodePlan { lines: "threads = 1\ndrain_grace = \"400ms\"", ..NodePlan::named(id) });
    Cluster::start(Plan::new(registry, &nodes)).await
}

fn story() -> Value {
    let mut body = chat_stream("Tell a long story of a lighthouse.", LONG);
    body["ignore_eos"] = true.into();
    body
}

/// A stream that somebody watches.
struct Watched {
    events: watch::Receiver<usize>,
    reader: tokio::task::JoinHandle<Streamed>,
}

impl Watched {
    fn start(cluster: &Cluster) -> Self {
        let (client, url) = (Client::new(), format!("{}/v1/chat/completions", cluster.edge()));
        let (count, events) = watch::channel(0);
        let note = move |_: &Value| count.send_modify(|events| *events += 1);
        let reader = tokio::spawn(async move { client.stream(&url, &story(), note).await });
        Self { events, reader }
    }

    async fn under_way(&mut self) {
        self.events.wait_for(|events| *events >= 8).await.expect("the stream goes on for longer");
    }

    async fn end_like(self, quiet: &Streamed) {
        let streamed = self.reader.await.unwrap();
        assert_eq!(streamed.end(), End::Whole, "{:?}", streamed.fault);
        assert_eq!(streamed.text, quiet.text);
        assert_eq!(streamed.tokens, quiet.tokens);
    }
}

/// Two at once, so that one is on each node.
async fn one_on_each(cluster: &Cluster) -> [Watched; 2] {
    let mut both = [Watched::start(cluster), Watched::start(cluster)];
    let [a, b] = &mut both;
    join!(a.under_way(), b.under_way());
    both
}

async fn quiet(cluster: &Cluster) -> Streamed {
    let url = format!("{}/v1/chat/completions", cluster.edge());
    let quiet = Client::new().stream(&url, &story(), |_| {}).await;
    assert_eq!((quiet.end(), quiet.tokens), (End::Whole, u64::from(LONG)), "{:?}", quiet.fault);
    quiet
}

async fn status(cluster: &Cluster, id: &str) -> Value {
    let answer = Client::new().get(&format!("{}/health", cluster.node(id))).await;
    answer.map_or(Value::Null, |answer| answer.body["status"].clone())
}

async fn resumes(cluster: &Cluster) -> f64 {
    Client::new().metric(&cluster.admin(), "tidegate_resumes_total").await
}

#[tokio::test]
async fn a_drain_in_etcd_breaks_no_stream_and_holds_over_a_restart() {
    if !is_installed() {
        return;
    }
    let mut cluster = two_nodes(Registry::Etcd(Etcd::start())).await;
    let file = cluster.folder().join("n1.toml").display().to_string();
    let order = |word: &str, node: &str| {
        let (word, node, file) = (word.to_owned(), node.to_owned(), file.clone());
        tokio::task::spawn_blocking(move || run(&[&word, &node, "--config", &file]))
    };
    let quiet = quiet(&cluster).await;
    let streams = one_on_each(&cluster).await;
    let (code, out, err) = order("drain", "n1").await.unwrap();
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("n1 takes no new requests"), "{out}");
    for stream in streams {
        stream.end_like(&quiet).await;
    }
    assert!(resumes(&cluster).await >= 1.0, "no stream was on n1, so nothing was shown");
    assert_eq!(status(&cluster, "n1").await, "draining");
    cluster.until_ready(&["n2"], Duration::from_secs(4)).await;

    let (code, out, _) = order("drain", "n1").await.unwrap();
    assert!(code == 0 && out.contains("already"), "{code} {out}");
    let (code, _, err) = order("drain", "n7").await.unwrap();
    assert!(code == 64 && err.contains("n7") && err.contains("n1, n2"), "{code} {err}");

    cluster.kill_node("n1");
    cluster.start_node("n1");
    until("n1 is drained after its restart too", LOADING, || async { status(&cluster, "n1").await == "draining" })
        .await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(cluster.ready().await, ["n2"]);

    let (code, out, err) = order("undrain", "n1").await.unwrap();
    assert!(code == 0 && out.contains("n1 takes requests"), "{code} {out}{err}");
    cluster.until_ready(&IDS, Duration::from_secs(4)).await;
    let (code, out, _) = order("undrain", "n1").await.unwrap();
    assert!(code == 0 && out.contains("not drained"), "{code} {out}");

    cluster.etcd().kill();
    let (code, _, err) = order("drain", "n1").await.unwrap();
    assert!(code == 69 && err.contains("out of reach") && err.contains("--admin"), "{code} {err}");
    assert_eq!(cluster.ready().await.len(), 2);
}

#[tokio::test]
async fn a_drain_at_the_private_listener_needs_no_store() {
    let cluster = two_nodes(Registry::Static).await;
    let admin = cluster.node_admin("n1");
    let order = |word: &str, node: &str| {
        let (word, node, admin) = (word.to_owned(), node.to_owned(), admin.clone());
        tokio::task::spawn_blocking(move || run(&[&word, &node, "--admin", &admin]))
    };
    let quiet = quiet(&cluster).await;
    let streams = one_on_each(&cluster).await;
    let (code, out, err) = order("drain", "n1").await.unwrap();
    assert!(code == 0 && out.contains("n1 is drained"), "{code} {out}{err}");
    for stream in streams {
        stream.end_like(&quiet).await;
    }
    assert!(resumes(&cluster).await >= 1.0, "no stream was on n1, so nothing was shown");
    cluster.until_ready(&["n2"], Duration::from_secs(4)).await;
    let (code, _, err) = order("drain", "n2").await.unwrap();
    assert!(code == 64 && err.contains("node 'n1'"), "{code} {err}");
    let (code, out, err) = order("undrain", "n1").await.unwrap();
    assert!(code == 0 && out.contains("n1 takes requests"), "{code} {out}{err}");
    cluster.until_ready(&IDS, Duration::from_secs(4)).await;

    let file = cluster.folder().join("n1.toml");
    let (code, _, err) = run(&["drain", "n1", "--config", &file.display().to_string()]);
    assert!(code == 64 && err.contains("etcd") && err.contains("--admin"), "{code} {err}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_a_node_in_its_grace_and_a_second_whatever_runs_there() {
    if !is_installed() {
        return;
    }
    let mut cluster = two_nodes(Registry::Etcd(Etcd::start())).await;
    let quiet = quiet(&cluster).await;
    for is_etcd_there in [true, false] {
        if !is_etcd_there {
            cluster.etcd().freeze();
        }
        let before = resumes(&cluster).await;
        let streams = one_on_each(&cluster).await;
        let start = Instant::now();
        cluster.process("n1").signal("TERM");
        let status = tokio::task::block_in_place(|| cluster.process("n1").ended_within(Duration::from_secs(10)));
        let took = start.elapsed();
        println!("gone after {took:?}, with etcd {}", if is_etcd_there { "there" } else { "frozen" });
        assert_eq!(status.and_then(|status| status.code()), Some(0));
        for stream in streams {
            stream.end_like(&quiet).await;
        }
        assert!(resumes(&cluster).await > before, "no stream was on n1, so nothing was shown");
        assert!(took < GRACE + Duration::from_secs(1), "it took {took:?}");
        if is_etcd_there {
            cluster.kill_node("n1");
            cluster.start_node("n1");
            cluster.until_ready(&IDS, LOADING).await;
        }
    }
}
