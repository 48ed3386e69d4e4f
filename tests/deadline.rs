//! Goal: a request that a node ends because its time is over ends for the client at the edge with the right status, or where it has begun
//! with an error event, and never as if it were whole. Method: a real node with a short deadline behind a real balancer.

use serde_json::Value;

use crate::support::{
    client::{Client, chat, chat_stream},
    cluster::{Cluster, NodePlan, Plan, Registry},
};

/// More than a second of it, on any machine.
fn endless(mut body: Value) -> Value {
    body["max_tokens"] = 6000.into();
    body["ignore_eos"] = true.into();
    body
}

#[tokio::test]
async fn the_time_of_a_request_ends_at_the_node_and_the_client_is_told() {
    let nodes = [NodePlan { lines: "threads = 1\nrequest_timeout = \"1s\"", ..NodePlan::named("n1") }];
    let cluster = Cluster::start(Plan::new(Registry::Static, &nodes)).await;
    let (client, chats) = (Client::new(), format!("{}/v1/chat/completions", cluster.edge()));

    let whole = client.post(&chats, &endless(chat("Count to a thousand.", 1))).await.unwrap();
    let (kind, code) = (&whole.body["error"]["type"], &whole.body["error"]["code"]);
    assert_eq!((whole.status, kind.as_str(), code.as_str()), (504, Some("timeout_error"), Some("timed_out")));
    assert_eq!(whole.node.as_deref(), Some("n1"));

    let text = client.raw(&chats, "s", &endless(chat_stream("Count to a thousand.", 1)), |_| {}).await;
    let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let last: Value = serde_json::from_str(data.last().unwrap()).unwrap();
    assert!(data.len() > 10, "{text}");
    assert_eq!(last["error"]["code"], "timed_out", "{last}");

    assert_eq!(client.metric(&cluster.admin(), "tidegate_retries_total").await, 0.0, "nobody else was asked");
    assert_eq!(client.post(&chats, &chat("Say one word.", 2)).await.unwrap().status, 200);
}
