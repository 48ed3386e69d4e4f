//! Goal: a node serves several models and switches them while it runs, and no request pays for it. Method: real processes; each model is
//! the same file under another name, so that a second one costs seconds and not a download.

use std::time::Duration;

use futures::{future::join_all, join};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::support::{
    LOADING, MODEL,
    client::{Answer, Client, End, Load, chat, chat_stream},
    cluster::{Cluster, NodePlan, Plan, Registry},
    etcd::free_port,
    process::{Process, finish, tidegate},
    until,
};

/// About 110 MiB each, so that two fit.
const THREE_MODELS: &str = r#"
threads = 1
models_memory = "260MiB"
max_context = 512
kv_cache_memory = "16MiB"
[[node.models]]
model = "smollm2-135m"
[[node.models]]
model = "smollm2-135m"
name = "second"
load = "first_use"
[[node.models]]
model = "smollm2-135m"
name = "third"
load = "first_use"
"#;

/// One of them fits.
const ONE_AT_A_TIME: &str = r#"
threads = 1
models_memory = "200MiB"
max_context = 2048
kv_cache_memory = "64MiB"
[[node.models]]
model = "smollm2-135m"
[[node.models]]
model = "smollm2-135m"
name = "second"
load = "first_use"
"#;

async fn cluster(ids: &[&'static str]) -> Cluster {
    let nodes: Vec<NodePlan> = ids.iter().map(|id| NodePlan { lines: THREE_MODELS, ..NodePlan::named(id) }).collect();
    Cluster::start(Plan::new(Registry::Static, &nodes)).await
}

/// A greedy request for this model.
fn of(model: &str, mut body: Value) -> Value {
    body["model"] = model.into();
    body
}

/// Name and state of each model, as a node's `/health` says.
async fn states(client: &Client, node: &str) -> Vec<(String, String)> {
    let health = client.get(&format!("{node}/health")).await.unwrap().body;
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let models = health["models"].as_array().unwrap();
    models.iter().map(|model| (text(&model["name"]), text(&model["state"]))).collect()
}

async fn state(client: &Client, node: &str, model: &str) -> Option<String> {
    states(client, node).await.into_iter().find(|(name, _)| name == model).map(|(_, state)| state)
}

async fn admin(client: &Client, address: &str, what: &str, body: Value) -> Answer {
    client.post(&format!("http://{address}/admin/models/{what}"), &body).await.unwrap()
}

/// Waits until the balancer would send a request for `model` to this many nodes.
async fn until_served_by(client: &Client, cluster: &Cluster, model: &str, count: usize) {
    let members = format!("{}/members", cluster.admin());
    until(&format!("{count} nodes serve {model}"), LOADING, || async {
        let members = client.get(&members).await.unwrap().body["members"].as_array().cloned().unwrap_or_default();
        let is_served = |m: &&Value| {
            m["models"].as_array().unwrap().iter().any(|s| s["name"] == model && s["state"] != "unloading")
        };
        members.iter().filter(is_served).count() == count
    })
    .await;
}

#[tokio::test]
async fn models_load_with_their_first_request_and_switch_under_load_without_a_failure() {
    let cluster = cluster(&["n1", "n2"]).await;
    let (client, edge) = (Client::new(), cluster.edge());
    let chats = format!("{edge}/v1/chat/completions");

    let listed = client.get(&format!("{edge}/v1/models")).await.unwrap().body;
    let ids: Vec<&str> = listed["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["second", MODEL, "third"]);
    assert_eq!(state(&client, &cluster.node("n1"), "second").await.as_deref(), Some("unloaded"));

    // several at once for a model that nobody has loaded: streams and whole answers all come, from either node
    let bodies: Vec<Value> = (0..4).map(|i| of("second", chat("Say one word.", 2 + i))).collect();
    let whole = join_all(bodies.iter().map(|body| client.post(&chats, body)));
    let (body, mut ignore) = (of("second", chat_stream("Say one word.", 4)), |_: &Value| {});
    let (whole, stream) = join!(whole, client.stream(&chats, &body, &mut ignore));
    for answer in whole.into_iter().map(Result::unwrap) {
        assert_eq!((answer.status, answer.body["model"].as_str()), (200, Some("second")), "{:?}", answer.body);
    }
    assert_eq!(stream.end(), End::Whole, "{:?}", stream.fault);
    let unnamed = json!({"query": "Say one word.", "max_tokens": 2});
    let unnamed = client.post(&format!("{edge}/api/v1/chat"), &unnamed).await.unwrap();
    assert_eq!((unnamed.status, unnamed.body["model"].as_str()), (200, Some(MODEL)), "{:?}", unnamed.body);

    let load = Load::start(&edge, 4);
    for id in ["n1", "n2"] {
        let address = cluster.node_admin(id);
        sleep(Duration::from_secs(1)).await;
        let out = admin(&client, &address, "unload", json!({"name": MODEL})).await;
        assert_eq!(out.status, 200, "{:?}", out.body);
        assert_eq!(state(&client, &cluster.node(id), MODEL).await, None, "it is not offered any more");
        until_served_by(&client, &cluster, MODEL, 1).await;
        let back = admin(&client, &address, "load", json!({"model": MODEL})).await;
        assert_eq!(back.status, 200, "{:?}", back.body);
        until_served_by(&client, &cluster, MODEL, 2).await;
    }
    let tally = load.stop().await;
    println!("{:?}, the slowest took {:?}", tally.ends, tally.slowest);
    assert_eq!(tally.count(End::Failed) + tally.count(End::Broken), 0, "{:?}", tally.faults);
    assert!(tally.count(End::Whole) > 10, "too few requests to say anything: {:?}", tally.ends);

    let metrics = client.text(&format!("{}/metrics", cluster.node("n1"))).await;
    for line in
        ["vllm:num_requests_running{model_name=\"smollm2-135m\"}", "tidegate_node_steps_total{model_name=\"second\"}"]
    {
        assert!(metrics.contains(line), "{line} is missing in {metrics}");
    }
}

#[tokio::test]
async fn a_node_that_takes_long_to_load_a_model_is_not_taken_for_lost() {
    const STALL: Duration = Duration::from_millis(1500);
    let nodes = [NodePlan { lines: ONE_AT_A_TIME, ..NodePlan::named("n1") }];
    let balancer = "[balancer.relay]\nstall_timeout = \"1500ms\"";
    let cluster = Cluster::start(Plan { balancer, ..Plan::new(Registry::Static, &nodes) }).await;
    let (client, node, address) = (Client::new(), cluster.node("n1"), cluster.node_admin("n1"));

    // the first model goes when its answer has ended, and only then is there room for the second
    let mut long = chat_stream("Count to a thousand.", 1500);
    long["ignore_eos"] = true.into();
    let chats = format!("{node}/v1/chat/completions");
    let holds = client.stream(&chats, &long, |_| {});
    let waits = async {
        until("it answers", LOADING, || async {
            client.get(&format!("{node}/health")).await.unwrap().body["running"] == 1
        })
        .await;
        let unload = admin(&client, &address, "unload", json!({"name": MODEL}));
        let asked = async {
            until("it is on its way out", LOADING, || async {
                state(&client, &node, MODEL).await.as_deref() == Some("unloading")
            })
            .await;
            let edge = format!("{}/v1/chat/completions", cluster.edge());
            let (began, body) = (Instant::now(), of("second", chat("Say one word.", 2)));
            let stream = of("second", chat_stream("Say one word.", 2));
            let (whole, streamed) = join!(client.post(&edge, &body), client.raw(&edge, "s", &stream, |_| {}));
            (whole.unwrap(), streamed, began.elapsed())
        };
        join!(asked, unload).0
    };
    let (held, (whole, streamed, took)) = join!(holds, waits);
    println!("loaded after {took:?}");
    assert_eq!(held.end(), End::Whole, "{:?}", held.fault);
    assert!(took > STALL, "{took:?} is no long time");
    assert_eq!((whole.status, whole.body["model"].as_str()), (200, Some("second")), "{:?}", whole.body);
    assert!(streamed.starts_with(": wait\n\n") && streamed.ends_with("data: [DONE]\n\n"), "{streamed}");
    for metric in ["tidegate_retries_total", "tidegate_resumes_total"] {
        assert_eq!(client.metric(&cluster.admin(), metric).await, 0.0, "{metric}");
    }
}

#[tokio::test]
async fn the_least_recently_used_model_makes_room_and_one_with_running_answers_stays() {
    let cluster = cluster(&["n1"]).await;
    let (client, node, address) = (Client::new(), cluster.node("n1"), cluster.node_admin("n1"));
    let chats = format!("{node}/v1/chat/completions");
    let ask = |model: &'static str| {
        let (client, chats) = (&client, &chats);
        async move { client.post(chats, &of(model, chat("Say one word.", 2))).await.unwrap() }
    };
    for model in ["second", "third"] {
        let answer = ask(model).await;
        assert_eq!(answer.status, 200, "{model}: {:?}", answer.body);
    }
    let now: Vec<_> = states(&client, &node).await.into_iter().map(|(_, state)| state).collect();
    assert_eq!(now, ["unloaded", "ready", "ready"], "the one unused longest went");

    // both that stand are at work: there is no room for the first, and the refusal says when to try again
    let bodies = ["second", "third"].map(|model| of(model, chat_stream("Count to a thousand.", 400)));
    let streams = join_all(bodies.iter().map(|body| client.stream(&chats, body, |_| {})));
    let refused = async {
        until("both answer", LOADING, || async {
            let running = client.get(&format!("{node}/health")).await.unwrap().body["running"].as_u64();
            running == Some(2)
        })
        .await;
        ask(MODEL).await
    };
    let (streams, refused) = join!(streams, refused);
    assert_eq!((refused.status, refused.body["error"]["code"].as_str()), (503, Some("no_room")), "{:?}", refused.body);
    for stream in streams {
        assert_eq!(stream.end(), End::Whole, "{:?}", stream.fault);
    }
    until("the first comes back once there is room", LOADING, || async { ask(MODEL).await.status == 200 }).await;

    // a file that is no model fails, and nothing else does
    let broken = cluster.folder().join("broken.gguf");
    std::fs::write(&broken, b"GGUF, or so it says").unwrap();
    let reference = broken.display().to_string();
    let failed = admin(&client, &address, "load", json!({"model": reference, "name": "broken"})).await;
    assert_eq!(failed.status, 503, "{:?}", failed.body);
    assert!(failed.body["error"]["message"].as_str().unwrap().contains("broken.gguf"), "{:?}", failed.body);
    let refused = ask("broken").await;
    assert_eq!((refused.status, refused.body["error"]["code"].as_str()), (503, Some("model_failed")));
    assert!(!refused.body.to_string().contains("broken.gguf"), "clients are not told of this machine's files");
    assert_eq!(state(&client, &node, "broken").await.as_deref(), Some("failed"));
    assert_eq!(ask(MODEL).await.status, 200);

    for (body, status) in [
        (json!({"model": "./nowhere.gguf"}), 404),
        (json!({"model": "no such thing"}), 400),
        (json!({"name": "x"}), 400),
    ] {
        let answer = admin(&client, &address, "load", body.clone()).await;
        assert_eq!(answer.status, status, "{body}: {:?}", answer.body);
    }
    assert_eq!(client.post(&format!("{node}/admin/models/unload"), &json!({"name": MODEL})).await.unwrap().status, 404);

    let shown = tidegate().args(["model", "ps", "--admin", &address]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("NAME") && shown.contains("third") && shown.contains("not a sound model file"), "{shown}");
}

#[tokio::test]
async fn random_weights_are_made_here_and_served() {
    let folder = tempfile::tempdir().unwrap();
    let pull = |model: &str| finish(tidegate().args(["model", "pull", model]).env("TIDEGATE_DATA_DIR", folder.path()));
    let (code, out, err) = pull("random:tiny");
    assert!(code == 0 && out.contains("tiny.gguf"), "{code} {out}{err}");
    let (code, _, err) = pull("random:gpt-5");
    assert!(code == 64 && err.contains("llama-3.1-8b"), "{code} {err}");

    let address = format!("127.0.0.1:{}", free_port());
    let mut node = tidegate();
    node.arg("node").env("TIDEGATE_DATA_DIR", folder.path()).env("TIDEGATE__NODE__MODEL", "random:tiny");
    node.env("TIDEGATE__NODE__LISTEN", &address).env("TIDEGATE__NODE__ADMIN__LISTEN", "off");
    let _node = Process::start("node", folder.path(), &mut node);
    let client = Client::new();
    let health = format!("http://{address}/health");
    until("the node serves", LOADING, || async {
        client.get(&health).await.is_ok_and(|answer| answer.body["status"] == "healthy")
    })
    .await;
    let body = json!({"model": "random-tiny", "prompt": "abc", "max_tokens": 3, "ignore_eos": true});
    let answer = client.post(&format!("http://{address}/v1/completions"), &body).await.unwrap();
    assert!(answer.status == 200 && answer.body["usage"]["completion_tokens"] == 3, "{}", answer.body);
}
