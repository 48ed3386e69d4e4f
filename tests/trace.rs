//! Goal: one request is one trace from the client over the edge to the node. Method: a real balancer and a real node export to a collector;
//! a request comes with a place in a trace.

use std::time::Duration;

use crate::support::{
    LOADING,
    client::chat,
    cluster::{Cluster, NodePlan, Plan, Registry},
    collector::{Collector, Span},
    until,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edge_and_node_show_one_request_as_one_trace() {
    let collector = Collector::start().await;
    // lives as long as the test program
    let lines: &'static str = Box::leak(format!("threads = 1\n{}", collector.section("")).into_boxed_str());
    let nodes = [NodePlan { lines, ..NodePlan::named("n1") }];
    let section = collector.section("");
    let mut plan = Plan::new(Registry::Static, &nodes);
    plan.balancer = &section;
    let mut cluster = Cluster::start(plan).await;
    let url = format!("{}/v1/chat/completions", cluster.edge());
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let request = client.post(&url).body(chat("Say something.", 12).to_string());
    let request = request.header("traceparent", format!("00-{TRACE}-{CALLER}-01"));
    let answer = request.header("content-type", "application/json").send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["x-request-id"].to_str().unwrap()), (200, TRACE));
    assert!(cluster.drain_node("n1", Duration::from_secs(10)), "the node exports at its end");
    cluster.balancer().signal("TERM");
    assert!(cluster.balancer().ended_within(Duration::from_secs(10)).is_some());
    until("the spans have come", LOADING, || async { collector.spans().iter().any(|span| span.name == "decode") })
        .await;
    let spans: Vec<Span> = collector.spans().into_iter().filter(|span| span.trace == TRACE).collect();
    let named =
        |name: &str| spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name} in {spans:#?}"));
    let edge = named("POST /v1/chat/completions");
    let leg = named("ask n1");
    let node = named(&format!("chat {}", crate::support::MODEL));
    assert_eq!((edge.parent.as_str(), edge.role.as_str()), (CALLER, "balancer"));
    assert_eq!(leg.parent, edge.id);
    assert_eq!((&node.parent, node.role.as_str()), (&leg.id, "node"));
    assert_eq!(node.attributes["gen_ai.usage.output_tokens"], edge.attributes["gen_ai.usage.output_tokens"]);
    assert_eq!(node.attributes["gen_ai.usage.input_tokens"], edge.attributes["gen_ai.usage.input_tokens"]);
    assert_eq!(node.attributes["gen_ai.operation.name"], "chat");
    let mut end = node.time.0;
    for part in ["queue", "prefill", "decode"] {
        let part = named(part);
        assert_eq!(part.parent, node.id);
        // two clocks of this process are read one after the other
        assert!(part.time.0.abs_diff(end) < 5_000_000, "{part:?} does not begin where the one before it ends");
        end = part.time.1;
    }
    assert!(node.time.1.abs_diff(end) < 5_000_000);
    assert!(leg.time.0 <= node.time.0 && node.time.0 < leg.time.1);
}
