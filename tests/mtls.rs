//! Goal: between balancer and node there is mutual TLS: a request goes through, and nobody without a certificate of the CA is served.
//! Method: one node with `node.tls.client_ca`, one balancer with `balancer.upstream_tls`, one file of configuration for both; then the
//! node is asked directly, in plain words and over TLS without a certificate.

use std::{fs, time::Duration};

use serde_json::json;

use crate::support::{
    LOADING, MODEL, certs,
    client::Client,
    etcd::free_port,
    process::{Process, ensure_model, tidegate},
    until,
};

#[tokio::test]
async fn a_node_serves_only_who_shows_a_certificate() {
    ensure_model();
    let folder = tempfile::tempdir().unwrap();
    certs::write(folder.path());
    let at = folder.path().display();
    let (edge, admin, node) = (free_port(), free_port(), free_port());
    let text = format!(
        r#"
[cluster.registry]
kind = "static"
nodes = [{{ id = "n1", address = "127.0.0.1:{node}", model = "{MODEL}", tls = true }}]
[balancer]
listen = "127.0.0.1:{edge}"
admin.listen = "127.0.0.1:{admin}"
upstream_tls = {{ ca = "{at}/ca.pem", cert = "{at}/edge.pem", key = "{at}/edge.key" }}
[node]
id = "n1"
listen = "127.0.0.1:{node}"
tls = {{ cert = "{at}/edge.pem", key = "{at}/edge.key", client_ca = "{at}/ca.pem" }}
"#
    );
    let file = folder.path().join("both.toml");
    fs::write(&file, text).unwrap();
    let start = |role: &str| Process::start(role, folder.path(), tidegate().args([role, "--config"]).arg(&file));
    let (_balancer, _node) = (start("balancer"), start("node"));

    let (client, ready) = (Client::new(), format!("http://127.0.0.1:{admin}/readyz"));
    until("the node is ready", LOADING, || async { client.get(&ready).await.is_ok_and(|a| a.status == 200) }).await;
    let body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4});
    let answer = client.post(&format!("http://127.0.0.1:{edge}/v1/chat/completions"), &body).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);

    assert!(client.get(&format!("http://127.0.0.1:{node}/health")).await.is_err(), "the node answered plain HTTP");
    let root = reqwest::Certificate::from_pem(&fs::read(folder.path().join("ca.pem")).unwrap()).unwrap();
    let trusting = reqwest::Client::builder().tls_certs_only([root]).timeout(Duration::from_secs(5)).build().unwrap();
    let without = trusting.get(format!("https://127.0.0.1:{node}/health")).send().await;
    assert!(without.is_err(), "the node answered a client without a certificate");
}
