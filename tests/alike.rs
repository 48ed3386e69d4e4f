//! Goal: a stream whose node is lost goes on at one that would have answered the same, and never at another. Method: three real nodes, one
//! of which is configured otherwise; each that a stream is on is killed, until both ends have been seen.

use std::{collections::BTreeSet, time::Duration};

use serde_json::Value;
use tokio::sync::watch;

use crate::support::{
    client::{Client, End, chat_stream},
    cluster::{Cluster, NodePlan, Plan, Registry},
};

const WARNING: &str = "nodes would not answer alike";

fn story() -> Value {
    let mut body = chat_stream("Tell a long story of a lighthouse.", 500);
    body["ignore_eos"] = true.into();
    body
}

/// The node that has work.
async fn at_work(cluster: &Cluster) -> &'static str {
    for id in ["n1", "n2", "n3"] {
        let health = Client::new().get(&format!("{}/health", cluster.node(id))).await.unwrap().body;
        if health["running"] == 1 {
            return id;
        }
    }
    panic!("no node has work")
}

#[tokio::test]
async fn a_stream_goes_on_only_at_a_node_that_would_have_answered_the_same() {
    let nodes =
        [("n1", "threads = 1"), ("n2", "threads = 1\ndefaults.top_p = 0.5"), ("n3", "threads = 1\nmax_queue = 9")];
    let nodes = nodes.map(|(id, lines)| NodePlan { lines, ..NodePlan::named(id) });
    let balancer = "[balancer.relay]\nqueue_wait = \"1s\"";
    let mut cluster = Cluster::start(Plan { balancer, ..Plan::new(Registry::Static, &nodes) }).await;
    let (client, chats) = (Client::new(), format!("{}/v1/chat/completions", cluster.edge()));
    let quiet = client.stream(&chats, &story(), |_| {}).await;
    assert_eq!(quiet.end(), End::Whole, "{:?}", quiet.fault);

    let mut seen = BTreeSet::new();
    for _ in 0..6 {
        let (count, mut events) = watch::channel(0);
        let (client, chats) = (client.clone(), chats.clone());
        let note = move |_: &Value| count.send_modify(|events| *events += 1);
        let stream = tokio::spawn(async move { client.stream(&chats, &story(), note).await });
        events.wait_for(|events| *events >= 8).await.expect("the stream goes on for longer");
        let lost = at_work(&cluster).await;
        cluster.kill_node(lost);
        let stream = stream.await.unwrap();
        if lost == "n2" {
            let fault = stream.fault.as_deref().unwrap_or_default();
            assert!(stream.end() == End::Broken && fault.contains("nodes_differ"), "{fault}");
            assert!(quiet.text.starts_with(&stream.text), "{}", stream.text);
        } else {
            assert_eq!((stream.end(), &stream.text), (End::Whole, &quiet.text), "{:?}", stream.fault);
        }
        seen.insert(lost == "n2");
        if seen.len() == 2 {
            break;
        }
        cluster.revive_node(lost, Duration::from_secs(10)).await;
    }
    assert_eq!(seen.len(), 2, "the streams were all on nodes of one kind");
    let said = cluster.balancer().output();
    assert_eq!(said.matches(WARNING).count(), 1, "{said}");
}
