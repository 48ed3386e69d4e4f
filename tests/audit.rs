//! Goal: whatever is done to an audit log shows, and a balancer that is killed leaves one that goes on whole. Method: the real balancer writes
//! a log, is killed and started again; then the log is changed, cut, reordered and shortened by hand, and `tidegate audit verify` asked.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    LOADING,
    client::Client,
    etcd::free_port,
    process::{Process, finish, run, tidegate},
    until,
};

/// What somebody does to a file's lines.
type Edit = fn(&mut Vec<String>);

/// A balancer that writes a log, without any node.
struct Edge {
    folder: tempfile::TempDir,
    process: Process,
    port: u16,
    client: Client,
}

fn start(folder: &Path) -> Process {
    Process::start("balancer", folder, tidegate().args(["balancer", "--config"]).arg(folder.join("balancer.toml")))
}

impl Edge {
    async fn start(more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (port, admin) = (free_port(), free_port());
        let text = format!(
            "[cluster.registry]\nkind = \"static\"\n[balancer]\nlisten = \"127.0.0.1:{port}\"\nadmin.listen = \"127.0.0.1:{admin}\"\n\
             members_file = {:?}\nupgrade_socket = \"off\"\n[balancer.audit]\ndir = {:?}\n{more}\n",
            folder.path().join("members.json"),
            folder.path().join("audit"),
        );
        fs::write(folder.path().join("balancer.toml"), text).unwrap();
        let process = start(folder.path());
        let edge = Self { process, folder, port, client: Client::new() };
        edge.listens().await;
        edge
    }

    async fn listens(&self) {
        let url = format!("http://127.0.0.1:{}/health", self.port);
        until("the balancer answers", LOADING, || async { self.client.get(&url).await.is_ok() }).await;
    }

    /// Requests that are answered with 404, and the time for their records.
    async fn ask(&self, count: usize) {
        let before = self.count();
        for i in 0..count {
            let url = format!("http://127.0.0.1:{}/nowhere/{i}", self.port);
            assert_eq!(self.client.get(&url).await.unwrap().status, 404);
        }
        until("the records are written", LOADING, || async { self.count() >= before + count }).await;
    }

    fn count(&self) -> usize {
        self.show(&["--event", "request"]).len()
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("audit")
    }

    fn config(&self) -> String {
        self.folder.path().join("balancer.toml").display().to_string()
    }

    fn show(&self, more: &[&str]) -> Vec<Value> {
        let config = self.config();
        let (code, out, err) = run(&[&["audit", "show", "--config", &config], more].concat());
        assert_eq!(code, 0, "{err}");
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn verify(&self) -> (i32, String) {
        let (code, out, err) = run(&["audit", "verify", "--config", &self.config()]);
        (code, out + &err)
    }

    /// The lines of the only file.
    fn lines(&self) -> (PathBuf, Vec<String>) {
        let names = fs::read_dir(self.log()).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<PathBuf> = names.filter(|path| path.extension().is_some_and(|e| e == "jsonl")).collect();
        assert_eq!(files.len(), 1);
        let text = fs::read_to_string(&files[0]).unwrap();
        (files.remove(0), text.lines().map(str::to_owned).collect())
    }

    /// What verify says when the log is this.
    fn verify_as(&self, edit: impl FnOnce(&mut Vec<String>)) -> (i32, String) {
        let (file, whole) = self.lines();
        let mut lines = whole.clone();
        edit(&mut lines);
        let write = |lines: &[String]| fs::write(&file, lines.iter().map(|l| format!("{l}\n")).collect::<String>());
        write(&lines).unwrap();
        let said = self.verify();
        write(&whole).unwrap();
        said
    }

    fn stop(&mut self) {
        self.process.signal("TERM");
        let ended = self.process.ended_within(Duration::from_secs(10));
        assert!(ended.is_some_and(|status| status.success()), "{}", self.process.output());
    }
}

#[tokio::test]
async fn each_change_of_a_log_is_found() {
    let mut edge = Edge::start("").await;
    edge.ask(20).await;
    edge.stop();
    let (code, said) = edge.verify();
    assert!(code == 0 && said.contains("whole: "), "{said}");
    let cases: [(&str, &str, Edit); 6] = [
        ("a flipped byte", "was changed", |l| l[5] = l[5].replacen("\"status\":404", "\"status\":405", 1)),
        ("a removed line", "record 6 is missing", |l| drop(l.remove(5))),
        ("a swapped pair", "stands where", |l| l.swap(5, 6)),
        ("a cut tail", "missing at the end", |l| l.truncate(l.len() - 2)),
        ("a cut beginning", "no record says that their time was over", |l| drop(l.drain(..3))),
        ("a line of somebody's", "no record of an audit log", |l| l.insert(5, "{\"event\":\"request\"}".into())),
    ];
    for (case, expected, edit) in cases {
        let (code, said) = edge.verify_as(edit);
        assert!(code == 69 && said.contains(expected), "{case}: {code} {said}");
    }
    assert_eq!(edge.verify().0, 0, "it was put back");
    fs::remove_file(edge.log().join("head.json")).unwrap();
    let (code, said) = edge.verify();
    assert!(code == 69 && said.contains("head.json"), "{said}");
}

#[tokio::test]
async fn a_log_goes_on_whole_after_its_balancer_was_killed() {
    let mut edge = Edge::start("").await;
    edge.ask(10).await;
    edge.process.kill();
    let (file, _) = edge.lines();
    // what a power cut leaves: a line without its end
    let mut bytes = fs::read(&file).unwrap();
    bytes.extend_from_slice(b"{\"seq\":999,\"prev\":\"12");
    fs::write(&file, bytes).unwrap();
    let (code, said) = edge.verify();
    assert!(code == 0 && said.contains("the next start notes them"), "{said}");
    edge.process = start(edge.folder.path());
    edge.listens().await;
    edge.ask(5).await;
    let (code, said) = edge.verify();
    assert!(code == 0 && said.contains("not whole (torn)"), "{said}");
    let events: Vec<Value> = edge.show(&[]).into_iter().map(|record| record["event"].clone()).collect();
    assert_eq!(events.iter().filter(|event| *event == "start").count(), 2);
    assert_eq!(events.iter().filter(|event| *event == "request").count(), 15);
    assert!(events.contains(&"recovered".into()));
    let seqs: Vec<u64> = edge.show(&[]).iter().filter_map(|record| record["seq"].as_u64()).collect();
    assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_log_with_keys_is_written_read_and_held_against_them() {
    let folder = tempfile::tempdir().unwrap();
    let key = |name: &str, digit: &str| {
        let path = folder.path().join(name);
        fs::write(&path, digit.repeat(64)).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        path.display().to_string()
    };
    let (mac, cipher, other) = (key("mac", "a"), key("cipher", "b"), key("other", "c"));
    let keys = format!("hmac_key_file = \"{mac}\"\nencryption_key_file = \"{cipher}\"\nrotate_size = \"4KiB\"");
    let mut edge = Edge::start(&keys).await;
    edge.ask(30).await;
    edge.stop();
    let (code, said) = edge.verify();
    assert!(code == 0, "{said}");
    assert_eq!(edge.count(), 30);
    let log = edge.log().display().to_string();
    let plain = fs::read_dir(edge.log()).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap());
    assert!(plain.into_iter().all(|bytes| !String::from_utf8_lossy(&bytes).contains("nowhere")), "it is not encrypted");
    let asked = |keys: &[&str]| finish(tidegate().args(["audit", "verify", &log]).args(keys));
    let (code, out, err) = asked(&[]);
    assert!(code == 64 && err.contains("encryption_key_file"), "{code} {out} {err}");
    let (code, out, _) = asked(&["--encryption-key-file", &cipher]);
    assert!(code == 0 && out.contains("MACs, which were not checked"), "{code} {out}");
    let (code, out, _) = asked(&["--encryption-key-file", &cipher, "--hmac-key-file", &other]);
    assert!(code == 69 && out.contains("not written with the key"), "{code} {out}");
    let (code, out, _) = asked(&["--encryption-key-file", &other]);
    assert!(code == 69 && out.contains("another key"), "{code} {out}");
    let (code, out, _) =
        asked(&["--encryption-key-file", &other, "--encryption-key-file", &cipher, "--hmac-key-file", &mac]);
    assert_eq!(code, 0, "{out}");
}

#[tokio::test]
async fn a_reload_is_recorded_with_what_it_changed() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.toml").display().to_string();
    let make = |owner: &str| {
        let (code, key, said) = run(&["key", "create", "--file", &keys, "--owner", owner]);
        assert_eq!(code, 0, "{said}");
        let id = said.split_whitespace().find(|word| word.starts_with("k-")).unwrap().trim_end_matches([',', ';', ':']);
        (key.trim().to_owned(), id.to_owned())
    };
    let (key, id) = make("alice");
    let edge = Edge::start(&format!("[balancer.auth]\nkeys_file = \"{keys}\"")).await;
    let url = format!("http://127.0.0.1:{}/v1/models", edge.port);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    assert_eq!(client.get(&url).bearer_auth(&key).send().await.unwrap().status(), 200);
    let (_, new) = make("bob");
    let (code, _, err) = run(&["key", "revoke", "--file", &keys, &id]);
    assert_eq!(code, 0, "{err}");
    edge.process.signal("HUP");
    until("the reload is recorded", LOADING, || async { !edge.show(&["--event", "reload"]).is_empty() }).await;
    let reload = edge.show(&["--event", "reload"]).remove(0);
    assert_eq!(reload["outcome"], "applied");
    let said: Vec<&str> = reload["keys"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(said.contains(&&*format!("{id} revoked")) && said.contains(&&*format!("{new} added")), "{said:?}");
    assert_eq!(reload["files"][0], keys);
    assert_eq!(client.get(&url).bearer_auth(&key).send().await.unwrap().status(), 401);
    until("both requests are recorded", LOADING, || async { edge.count() == 2 }).await;
    let asked = edge.show(&["--owner", "alice"]);
    assert_eq!((asked.len(), asked[0]["credential"].as_str()), (1, Some(&*format!("key:{id}"))));
    assert!(!serde_json::to_string(&edge.show(&[])).unwrap().contains(&key));
}
