//! Goal: a user meets the limit that the configuration grants, counted by the node's own tokens, and two balancers of one cluster grant no
//! more than one would. Method: real processes and a real etcd; a second balancer comes and dies, and the headers of answers tell.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{
    client::chat,
    cluster::{Cluster, NodePlan, Plan, Registry},
    etcd::{Etcd, free_port, is_installed},
    process::{Process, tidegate},
    until,
};

/// The lease of these tests, two counts, and a busy machine.
const COUNTED: Duration = Duration::from_secs(20);

/// Tokens of the limit, tokens left of it, and the answer's body.
async fn ask(edge: &str) -> (i64, i64, Value) {
    let request =
        reqwest::Client::new().post(format!("{edge}/v1/chat/completions")).body(chat("Say one.", 8).to_string());
    let response = request.send().await.unwrap();
    let number = |name: &str| -> i64 { response.headers()[name].to_str().unwrap().parse().unwrap() };
    let (limit, left) = (number("x-ratelimit-limit-tokens"), number("x-ratelimit-remaining-tokens"));
    (limit, left, serde_json::from_str(&response.text().await.unwrap()).unwrap())
}

#[tokio::test]
async fn two_balancers_grant_one_limit() {
    if !is_installed() {
        return;
    }
    let nodes = [NodePlan { lines: "threads = 1", ..NodePlan::named("n1") }];
    let mut plan = Plan::new(Registry::Etcd(Etcd::start()), &nodes);
    plan.balancer = "[balancer.limits.per_address]\ntokens_per_minute = 6000";
    let cluster = Cluster::start(plan).await;
    let edge = cluster.edge();
    let began = Instant::now();
    let (limit, first, body) = ask(&edge).await;
    let used = body["usage"]["total_tokens"].as_i64().unwrap();
    let (_, second, _) = ask(&edge).await;
    println!("{used} tokens used; {first} left, then {second}");
    // both reserved the same, so what lies between them is the first's use, less what has drained meanwhile
    let drained = (began.elapsed().as_secs_f64() * 100.0) as i64;
    assert_eq!(limit, 6_000);
    assert!(
        (used - drained - 2..=used + 1).contains(&(first - second)),
        "{first} - {second}, {used} used, {drained} drained"
    );

    let folder = cluster.folder();
    let (port, admin_port) = (free_port(), free_port());
    let text = fs::read_to_string(folder.join("balancer.toml")).unwrap();
    let port_of = |url: &str| url.rsplit_once(':').unwrap().1.to_owned();
    let text = text
        .replace(&port_of(&edge), &port.to_string())
        .replace(&port_of(&cluster.admin()), &admin_port.to_string())
        .replace("members.json", "members-2.json");
    fs::write(folder.join("second.toml"), text).unwrap();
    let command = &mut tidegate();
    let mut other =
        Process::start("second", folder, command.args(["balancer", "--config"]).arg(folder.join("second.toml")));
    until("half the limit is left to each", COUNTED, || async { ask(&edge).await.0 == 3_000 }).await;
    other.kill();
    until("the whole limit is the one's again", COUNTED, || async { ask(&edge).await.0 == 6_000 }).await;
}
