//! Goal: one command gives a cluster on one machine that answers, heals, shows itself and leaves nothing behind. Method: the command as
//! a user calls it, `kill -9` of a node below it, and SIGINT, with the process table as the witness.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    LOADING, MODEL,
    client::{Client, End, chat, chat_stream},
    etcd::free_port,
    process::{Process, ensure_model, is_alive, run, signal, tidegate},
    until,
};

/// A data folder of the test's own, with the user's models in it.
fn data_folder(within: &Path) -> PathBuf {
    ensure_model();
    let data = within.join("data");
    std::fs::create_dir(&data).unwrap();
    std::os::unix::fs::symlink(user_data().join("models"), data.join("models")).unwrap();
    data
}

fn user_data() -> PathBuf {
    let named = |name: &str| std::env::var_os(name).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    named("TIDEGATE_DATA_DIR")
        .or_else(|| Some(named("XDG_DATA_HOME")?.join("tidegate")))
        .unwrap_or_else(|| named("HOME").unwrap().join(".local/share/tidegate"))
}

#[tokio::test]
async fn one_command_gives_a_cluster_that_heals_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("127.0.0.1:{}", free_port());
    let admin = format!("127.0.0.1:{}", free_port());
    let mut command = tidegate();
    command.args(["up", "--nodes", "2", "--listen", &address, "--admin-listen", &admin, "--data-dir"]);
    command.arg(data_folder(folder.path()));
    let mut up = Process::start("up", folder.path(), &mut command);

    until("it says how to ask", LOADING, || async { up.output().contains("curl ") }).await;
    assert!(up.output().contains(&address), "it does not say where it listens");
    let (client, url) = (Client::new(), format!("http://{address}/v1/chat/completions"));
    let answer = client.post(&url, &chat("Say hello.", 8)).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(answer.body["choices"][0]["message"]["content"].as_str().is_some_and(|text| !text.is_empty()));
    ask_as_it_says(&up.output()).await;

    heal(&up, &client, &url).await;
    let (code, table, err) = run(&["status", "--admin", &admin]);
    assert_eq!(code, 0, "{err}");
    println!("{table}");
    assert!(table.starts_with("NODE"), "{table}");
    assert_eq!(table.lines().filter(|line| line.contains("ready") && line.contains(MODEL)).count(), 2, "{table}");

    let children = up.children();
    assert!(children.len() >= 2, "{children:?}");
    up.signal("INT");
    let ended = up.ended_within(Duration::from_secs(20)).expect("it ends within 20 s of SIGINT");
    assert_eq!(ended.code(), Some(0), "{}", up.output());
    assert!(!up.output().contains("ERROR"), "{}", up.output());
    let (code, _, err) = run(&["status", "--admin", &admin]);
    assert_eq!(code, 69, "{err}");
    let left: Vec<&u32> = children.iter().filter(|pid| is_alive(**pid)).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Runs the line that it offers for pasting.
async fn ask_as_it_says(output: &str) {
    let start = output.find("curl ").unwrap();
    let mut line = String::new();
    for part in output[start..].lines() {
        line += part.trim_end_matches('\\');
        if !part.ends_with('\\') {
            break;
        }
    }
    if tokio::process::Command::new("curl").arg("--version").output().await.is_err() {
        println!("not tried, because curl is not installed here: {line}");
        return;
    }
    let shell = tokio::process::Command::new("sh").args(["-c", &line]).output().await.unwrap();
    let said = String::from_utf8_lossy(&shell.stdout).into_owned();
    assert!(shell.status.success() && said.contains("choices"), "{line}\n{said}");
}

async fn heal(up: &Process, client: &Client, url: &str) {
    let before = up.children();
    let ready = || async { health(client, url).await["ready"].as_u64() };
    until("both nodes are ready", LOADING, || async { ready().await == Some(2) }).await;
    signal(before[0], "KILL");
    until("the loss is noticed", Duration::from_secs(8), || async { ready().await == Some(1) }).await;
    // the other one serves meanwhile
    let streamed = client.stream(url, &chat_stream("Say hello.", 8), |_| {}).await;
    assert_eq!(streamed.end(), End::Whole, "{:?}", streamed.fault);
    until("both nodes are ready again", LOADING, || async { ready().await == Some(2) }).await;
    let after = up.children();
    assert_eq!(after.len(), before.len(), "{before:?} {after:?}");
    assert!(!after.contains(&before[0]));
}

/// The edge's own health.
async fn health(client: &Client, url: &str) -> Value {
    let health = url.replace("/v1/chat/completions", "/health");
    client.get(&health).await.map_or(Value::Null, |answer| answer.body)
}
