//! Who may come in, and to what.

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::{
    requests::error,
    support::{CHAT, House, chat},
};

/// SHA-256 of "one" to "four".
const HASHES: [&str; 4] = [
    "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
    "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3",
    "8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f",
    "04efaf080f5a3e74e1c29d1ca6a48569382cbbcd324e8d59d2b83ef21c039f00",
];

/// A file that its owner alone can read.
pub(crate) fn secret(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o600)).unwrap();
    file
}

/// Keys "one", "two", ... with these lines each.
pub(crate) fn keys(entries: &[&str]) -> NamedTempFile {
    let entry = |(i, more): (usize, &&str)| format!("[[keys]]\nid = \"k{i}\"\nsha256 = \"{}\"\n{more}\n", HASHES[i]);
    secret(&entries.iter().enumerate().map(entry).collect::<String>())
}

/// Status and body of a GET with this key.
async fn get(house: &House, path: &str, key: &str) -> (u16, String) {
    let response = house.client.get(house.url(path)).bearer_auth(key).send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

/// Status and body of a generation with this key.
async fn ask(house: &House, body: &Value, key: &str) -> (u16, String) {
    let response = house.client.post(house.url(CHAT)).bearer_auth(key).body(body.to_string()).send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

#[tokio::test]
async fn keys_are_asked_for_except_for_health() {
    let file = keys(&["owner = \"alice\""]);
    let mut house = House::with(1, &format!("[balancer.auth]\nkeys_file = {:?}", file.path())).await;
    assert_eq!(house.client.get(house.url("/health")).send().await.unwrap().status(), 200);
    for path in ["/v1/models", "/nowhere"] {
        let response = house.client.get(house.url(path)).send().await.unwrap();
        assert_eq!(response.status(), 401);
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        assert_eq!(error(&response.text().await.unwrap()).0, "missing_api_key");
    }
    let request = |key: &str| house.client.post(house.url(CHAT)).bearer_auth(key).body(chat(false).to_string()).send();
    assert_eq!(request("two").await.unwrap().status(), 401);
    assert_eq!(request("one").await.unwrap().status(), 200);
    assert_eq!(house.asked().await.header("x-tidegate-tenant"), Some("alice"));
    assert!(house.metrics().await.contains("reason=\"invalid_api_key\",status=\"401\"} 1"));
}

#[tokio::test]
async fn a_key_is_good_for_its_scopes_and_models_alone() {
    let file = keys(&[
        "owner = \"alice\"\nmodels = [\"ti*\"]",
        "owner = \"prometheus\"\nscopes = [\"metrics\"]",
        "owner = \"bob\"\nscopes = [\"inference\", \"admin\"]\nmodels = [\"other\"]",
        "owner = \"carol\"\nrevoked = 2020-01-01T00:00:00Z",
    ]);
    let house = House::with(1, &format!("[balancer.auth]\nkeys_file = {:?}", file.path())).await;
    let codes = |(status, body): (u16, String)| (status, error(&body).0);

    assert_eq!(ask(&house, &chat(false), "one").await.0, 200);
    for path in ["/metrics", "/members"] {
        assert_eq!(codes(get(&house, path, "one").await), (403, "insufficient_scope".into()));
    }
    let (status, figures) = get(&house, "/metrics", "two").await;
    assert!(status == 200 && figures.contains("tidegate_open_requests"), "{figures}");
    assert_eq!(codes(ask(&house, &chat(false), "two").await), (403, "insufficient_scope".into()));

    let (status, members) = get(&house, "/members", "three").await;
    assert!(status == 200 && members.contains("\"n0\""), "{members}");
    assert_eq!(codes(ask(&house, &chat(false), "three").await), (403, "model_not_allowed".into()));
    let unnamed = json!({"messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(codes(ask(&house, &unnamed, "three").await), (403, "model_not_allowed".into()), "the default model too");
    let (_, models) = get(&house, "/v1/models", "three").await;
    assert!(models.contains("\"data\":[]"), "{models}");
    assert_eq!(codes(ask(&house, &chat(false), "four").await), (401, "revoked_api_key".into()));
    assert!(house.metrics().await.contains("reason=\"model_not_allowed\",status=\"403\"} 2"));
}

#[tokio::test]
async fn figures_are_nobodys_where_no_credential_is_asked_for() {
    let house = House::with_nodes(1).await;
    for path in ["/metrics", "/members"] {
        let response = house.client.get(house.url(path)).send().await.unwrap();
        assert_eq!(response.status(), 404);
    }
}

#[tokio::test]
async fn policies_say_who_may_do_what_and_a_denial_wins() {
    let file = keys(&["owner = \"alice\"", "owner = \"bob\"\nscopes = [\"inference\", \"metrics\"]"]);
    let rules = "[[balancer.policies]]\nname = \"chat\"\neffect = \"allow\"\nactions = [\"inference:*\"]\nresources = [\"model:ti*\"]\n\
        principals = [\"owner:alice\", \"key:k1\"]\n\
        [[balancer.policies]]\nname = \"figures\"\neffect = \"allow\"\nactions = [\"metrics:read\"]\nprincipals = [\"address:127.0.0.0/8\"]\n\
        [[balancer.policies]]\nname = \"no vectors\"\neffect = \"deny\"\nactions = [\"inference:embeddings\"]\nprincipals = [\"*\"]\n";
    let house = House::with(1, &format!("[balancer.auth]\nkeys_file = {:?}\n{rules}", file.path())).await;
    let denied = |(status, body): (u16, String)| (status, error(&body).0) == (403, "policy_denied".into());
    assert_eq!(ask(&house, &chat(false), "one").await.0, 200);
    assert_eq!(get(&house, "/metrics", "two").await.0, 200);
    assert!(denied(get(&house, "/v1/models", "one").await), "nothing allows it");
    let vectors = house.client.post(house.url("/v1/embeddings")).bearer_auth("one").body(chat(false).to_string());
    let response = vectors.send().await.unwrap();
    assert!(
        denied((response.status().as_u16(), response.text().await.unwrap())),
        "one rule allows it, and one denies it"
    );
}

#[tokio::test]
async fn requests_do_not_leave_the_sites_of_their_key() {
    let file = keys(&["owner = \"alice\"\nsites = [\"local\"]", "owner = \"bob\"\nsites = [\"elsewhere\"]"]);
    let mut house = House::with(
        1,
        &format!("[balancer.auth]\nkeys_file = {:?}\n[balancer.relay]\nqueue_wait = \"100ms\"", file.path()),
    )
    .await;
    assert_eq!(ask(&house, &chat(false), "one").await.0, 200);
    assert_eq!(house.asked().await.node, "n0");
    let (status, body) = ask(&house, &chat(false), "two").await;
    assert!(status == 503 && body.contains("sites"), "{body}");
}
