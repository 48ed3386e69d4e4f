//! Goal: requests spread evenly, and a balancer that starts while etcd is away knows whom to ask. Method: one balancer, its nodes and a
//! real etcd as separate processes. What losses do to answers is shown in `faults`.

use std::{collections::BTreeMap, time::Duration};

use futures::{StreamExt, stream};
use tokio::time::sleep;

use crate::support::{
    LOADING,
    client::{Client, End, Load, Tally, chat},
    cluster::{Cluster, NodePlan, Plan, Registry},
    etcd::{Etcd, is_installed},
    until,
};

const IDS: [&str; 3] = ["n1", "n2", "n3"];

/// What the issue allows from a death to being out, and from being able to answer to being in.
const NOTICED: Duration = Duration::from_secs(4);

fn demand_no_failure(tally: &Tally) {
    println!("{:?}, the slowest took {:?}", tally.ends, tally.slowest);
    assert_eq!(tally.count(End::Failed), 0, "failed before they had anything: {:?}", tally.faults);
    assert_eq!(tally.count(End::Broken), 0, "broken: {:?}", tally.faults);
    assert!(tally.count(End::Whole) > 10, "too few requests to say anything: {:?}", tally.ends);
}

#[tokio::test]
async fn three_hundred_requests_spread_evenly() {
    if !is_installed() {
        return;
    }
    // one thread each: three nodes share the machine with their clients
    let nodes = IDS.map(|id| NodePlan { lines: "threads = 1", ..NodePlan::named(id) });
    let cluster = Cluster::start(Plan::new(Registry::Etcd(Etcd::start()), &nodes)).await;
    let (client, url) = (Client::new(), format!("{}/v1/chat/completions", cluster.edge()));
    let ask = |i: usize| {
        let (client, url) = (client.clone(), url.clone());
        async move { client.post(&url, &chat(&format!("Say {i}."), 1)).await.unwrap() }
    };
    let answers: Vec<_> = stream::iter(0..300).map(ask).buffer_unordered(6).collect().await;
    let mut shares: BTreeMap<String, usize> = BTreeMap::new();
    for answer in answers {
        assert_eq!(answer.status, 200, "{}", answer.body);
        *shares.entry(answer.node.expect("an answer names its node")).or_default() += 1;
    }
    println!("{shares:?}");
    assert_eq!(shares.keys().map(String::as_str).collect::<Vec<_>>(), IDS);
    assert!(shares.values().all(|share| (95..=105).contains(share)), "not within 5 % of a third: {shares:?}");
}

#[tokio::test]
async fn a_balancer_that_starts_while_etcd_is_away_begins_with_the_members_last_known() {
    if !is_installed() {
        return;
    }
    let nodes = ["n1", "n2"].map(|id| NodePlan { lines: "threads = 1", ..NodePlan::named(id) });
    let mut cluster = Cluster::start(Plan::new(Registry::Etcd(Etcd::start()), &nodes)).await;
    let members = cluster.folder().join("members.json");
    until("the members are written", NOTICED, || async {
        std::fs::read_to_string(&members).is_ok_and(|text| text.contains("\"n1\"") && text.contains("\"n2\""))
    })
    .await;
    cluster.etcd().kill();
    cluster.kill_node("n2");
    cluster.restart_balancer();

    // n2 stands in the file and passes no probe
    let ready = cluster.until_ready(&["n1"], NOTICED).await;
    assert_eq!(cluster.link().await, "lost");
    println!("n1 is ready {ready:?} after the balancer's start");
    let load = Load::start(&cluster.edge(), 2);
    cluster.start_node("n2");
    cluster.until_ready(&["n1", "n2"], LOADING).await;
    cluster.etcd().run();
    until("the balancer follows etcd again", LOADING, || async { cluster.link().await == "live" }).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(cluster.ready().await.len(), 2);
    demand_no_failure(&load.stop().await);

    cluster.etcd().kill();
    std::fs::write(&members, "{\"v\": 1, \"clus").unwrap();
    cluster.restart_balancer();
    until("the balancer warns of its file", NOTICED, || async { cluster.link().await == "lost" }).await;
    assert!(cluster.balancer().output().contains("the file of last known members cannot be used"));
    cluster.etcd().run();
    cluster.until_ready(&["n1", "n2"], LOADING).await;
}
