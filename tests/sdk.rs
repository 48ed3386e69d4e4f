//! Goal: the official `openai` Python client works against the edge over TLS 1.3, its typed errors included. Method: a cluster with keys
//! and certificates of an own CA; `sdk/check.py` does what a user's program does and says what it saw.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::{
    MODEL, certs,
    cluster::{Cluster, NodePlan, Plan, Registry},
    process::{finish, run},
};

#[tokio::test]
async fn the_official_client_is_served_over_tls() {
    let python = virtual_environment();
    let nodes = [
        NodePlan { lines: "threads = 1", ..NodePlan::named("n1") },
        // one at a time and one more in its queue: the third is one too many
        NodePlan {
            id: "n2",
            lines: "threads = 1\nmax_batch_size = 1\nmax_queue = 1",
            serves: Some("narrow"),
            ..NodePlan::default()
        },
    ];
    let mut plan = Plan::new(Registry::Static, &nodes);
    let folder = plan.folder.path().to_owned();
    let (key, lines) = secure(&folder);
    plan.balancer = &lines;
    plan.ghosts = &[("n3", "ghost")];
    plan.tls = true;
    let cluster = Cluster::start(plan).await;

    let mut command = Command::new(python);
    command.arg("tests/sdk/check.py").current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(["--base-url", &format!("{}/v1", cluster.edge()), "--model", MODEL, "--key", &key]);
    command.args(["--narrow", "narrow", "--ghost", "ghost", "--ca"]).arg(folder.join("ca.pem"));
    let (code, out, err) = tokio::task::spawn_blocking(move || finish(&mut command)).await.unwrap();
    println!("{out}{err}");
    assert_eq!(code, 0, "the client is not content");
}

/// A key, and the lines of the balancer that ask for it and for TLS.
fn secure(folder: &Path) -> (String, String) {
    certs::write(folder);
    let keys = folder.join("keys.toml").display().to_string();
    let (code, key, err) = run(&["key", "create", "--file", &keys, "--owner", "tester"]);
    assert_eq!(code, 0, "{err}");
    let folder = folder.display();
    let lines = format!(
        "[balancer.tls]\ncert = \"{folder}/edge.pem\"\nkey = \"{folder}/edge.key\"\n\
         [balancer.auth]\nkeys_file = \"{keys}\""
    );
    (key.trim().to_owned(), lines)
}

/// Python with the client in it, made once below `target/`.
fn virtual_environment() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sdk-venv");
    let (python, made) = (folder.join("bin/python"), folder.join("made"));
    let wanted = fs::read_to_string("tests/sdk/requirements.txt").unwrap();
    if fs::read_to_string(&made).is_ok_and(|has| has == wanted) {
        return python;
    }
    demand(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder));
    demand(Command::new(&python).args(["-m", "pip", "install", "-q", "-r", "tests/sdk/requirements.txt"]));
    fs::write(made, wanted).unwrap();
    python
}

fn demand(command: &mut Command) {
    let (code, out, err) = finish(command);
    assert_eq!(code, 0, "{command:?} failed:\n{out}{err}");
}
