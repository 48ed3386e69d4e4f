//! Goal: certificates of `tidegate ca` make mutual TLS between balancer, node and etcd, and the README's way to them works as pasted; keys
//! are their owner's alone, and nothing is lost by mistake. Method: the README's own words, run by bash in an empty folder with other ports;
//! clients without a certificate; modes of files.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use crate::support::{
    client::{Client, chat},
    etcd::{free_port, is_installed},
    process::{Process, ensure_model, finish, tidegate},
    until,
};

/// The commands below the README's heading about certificates.
fn recipe() -> String {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let section = readme.split("\n## Certificates\n").nth(1).expect("the README tells of certificates");
    section.split("```\n").nth(1).expect("with commands").to_owned()
}

#[tokio::test]
async fn the_readmes_way_to_mutual_tls_works_as_pasted() {
    if !is_installed() {
        return;
    }
    ensure_model();
    let folder = tempfile::tempdir().unwrap();
    let [edge, admin, node, client_port, peer] = std::array::from_fn(|_| free_port());
    let words = recipe().replace("2479", &client_port.to_string()).replace("2480", &peer.to_string());
    let words = words.replace("18811", &node.to_string()).replace("sleep 5;", "sleep 1;");
    // whoever pastes it has a shell that stays; this one takes what it started along, however it ends
    let words = format!("trap 'kill $(jobs -p); wait' EXIT\ntrap exit TERM\n{words}\nwait\n");
    fs::write(folder.path().join("recipe.sh"), &words).unwrap();
    let bin = Path::new(env!("CARGO_BIN_EXE_tidegate")).parent().unwrap().display().to_string();
    let mut bash = std::process::Command::new("bash");
    bash.args(["-e", "recipe.sh"]).current_dir(folder.path());
    bash.env("PATH", format!("{bin}:{}", std::env::var("PATH").unwrap()));
    bash.env("TIDEGATE__BALANCER__LISTEN", format!("127.0.0.1:{edge}"));
    bash.env("TIDEGATE__BALANCER__ADMIN__LISTEN", format!("127.0.0.1:{admin}"));
    bash.env("TIDEGATE__BALANCER__MEMBERS_FILE", "off").env("TIDEGATE__NODE__ADMIN__LISTEN", "off");
    let mut shell = Process::start("bash", folder.path(), &mut bash);

    let (client, ready) = (Client::new(), format!("http://127.0.0.1:{admin}/readyz"));
    until("a node is ready", Duration::from_secs(60), || async {
        client.get(&ready).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    let answer =
        client.post(&format!("http://127.0.0.1:{edge}/v1/chat/completions"), &chat("Hello.", 4)).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);

    let root = fs::read(folder.path().join("certs/ca.pem")).unwrap();
    let mut identity = fs::read(folder.path().join("certs/host-1.pem")).unwrap();
    identity.extend(fs::read(folder.path().join("certs/host-1.key")).unwrap());
    let trusting = || {
        let root = reqwest::Certificate::from_pem(&root).unwrap();
        reqwest::Client::builder().tls_certs_only([root]).timeout(Duration::from_secs(5))
    };
    let with = trusting().identity(reqwest::Identity::from_pem(&identity).unwrap()).build().unwrap();
    let without = trusting().build().unwrap();
    for url in [format!("https://127.0.0.1:{node}/health"), format!("https://127.0.0.1:{client_port}/version")] {
        assert!(with.get(&url).send().await.is_ok(), "{url} refuses a certificate of the cluster");
        assert!(without.get(&url).send().await.is_err(), "{url} answers without a certificate");
    }
    shell.signal("TERM");
    assert!(shell.ended_within(Duration::from_secs(30)).is_some());
}

#[test]
fn keys_are_private_and_nothing_is_overwritten_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let ca = |words: &[&str]| finish(tidegate().arg("ca").args(words).current_dir(folder.path()));
    let at = |name: &str| folder.path().join("certs").join(name);
    let (code, _, err) = ca(&["issue", "certs", "host-1"]);
    assert!(code == 64 && err.contains("tidegate ca init certs"), "{code} {err}");
    assert_eq!(ca(&["init", "certs"]).0, 0);
    let (code, out, err) = ca(&["issue", "certs", "host-1", "--host", "10.0.0.1", "--host", "h.example.net"]);
    assert!(code == 0 && out.contains("certs/host-1.key"), "{code} {out}{err}");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(["ca.key", "host-1.key", "host-1.pem"].map(|name| mode(&at(name))), [0o600, 0o600, 0o644]);
    assert_eq!(mode(&folder.path().join("certs")), 0o700);
    let kept = fs::read(at("host-1.key")).unwrap();
    for words in [&["init", "certs"][..], &["issue", "certs", "host-1"]] {
        let (code, _, err) = ca(words);
        assert!(code == 64 && err.contains("is there already") && err.contains("--force"), "{code} {err}");
    }
    assert_eq!(fs::read(at("host-1.key")).unwrap(), kept);
    assert_eq!(ca(&["issue", "certs", "host-1", "--force"]).0, 0);
    assert_ne!(fs::read(at("host-1.key")).unwrap(), kept);
    for (words, reason) in [(["ca", "--days", "1"], "authority itself"), (["a/b", "--days", "1"], "not a valid name")] {
        let (code, _, err) = ca(&[&["issue", "certs"], &words[..]].concat());
        assert!(code == 64 && err.contains(reason), "{code} {err}");
    }
}
