//! Goal: a wrong configuration is told whole, at once, with the path and the fix of each fault, and a process that cannot start says
//! what is in its way. Method: the command itself on files that are wrong in known ways; its exit code and its words.
//!
//! Exit codes: 0, 64 for configuration and arguments, 69 for a needed service that is out of reach.

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use tempfile::TempDir;

use crate::support::{
    etcd::free_port,
    process::{finish, run, tidegate},
};

/// A registry that needs nothing else to run.
const LISTED: &str = "[cluster.registry]\nkind = \"static\"\n\
                      [[cluster.registry.nodes]]\nid = \"n\"\naddress = \"127.0.0.1:9\"\nmodel = \"m\"\n";

/// A file of this text, in a folder that is there as long as the test.
fn file(text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tidegate.toml");
    fs::write(&path, text).unwrap();
    (folder, path)
}

fn with_file(role: &str, path: &std::path::Path) -> Command {
    let mut command = tidegate();
    command.args([role, "--config"]).arg(path);
    command
}

/// Runs a role on a file that must not start: exit code and all it said.
fn refused(role: &str, text: &str) -> (i32, String) {
    let (_folder, path) = file(text);
    let (code, out, err) = finish(&mut with_file(role, &path));
    (code, out + &err)
}

fn demand(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "'{word}' is not in:\n{said}");
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let (code, said) = refused(
        "check",
        "[cluster]\nname = \"no spaces please\"\n[cluster.registry]\nkind = \"zookeeper\"\n\
         [balancer]\nlisten = [\"127.0.0.1:99999\"]\nallow = [\"moon\"]\n[balancer.relay]\nstall_timeout = \"soon\"\n\
         [balancer.limits]\nmax_bdoy = \"8MiB\"\n[node]\nmax_batch_size = 0\nmodle = \"x\"\n[tiemout]\n",
    );
    assert_eq!(code, 64, "{said}");
    let paths = [
        "cluster.name",
        "cluster.registry.kind",
        "balancer.listen[0]",
        "balancer.allow[0]",
        "balancer.relay.stall_timeout",
        "balancer.limits.max_bdoy",
        "node.max_batch_size",
        "node.modle",
        "tiemout",
    ];
    demand(&said, &paths);
    demand(&said, &["did you mean 'max_body'?", "did you mean 'model'?"]);
    assert!(said.matches("fix:").count() >= paths.len(), "not every problem has its fix:\n{said}");
}

#[test]
fn a_good_file_is_good_and_a_missing_or_broken_one_is_named() {
    let (_folder, path) = file("[balancer]\nlisten = [\"127.0.0.1:18999\"]\n");
    let (code, out, err) = finish(&mut with_file("check", &path));
    assert_eq!(code, 0, "{out}{err}");

    let (code, out, err) = run(&["check", "--config", "/nonexistent/tidegate.toml"]);
    assert_eq!(code, 64);
    demand(&(out + &err), &["/nonexistent/tidegate.toml"]);

    let (code, said) = refused("check", "[balancer\nlisten = 1");
    assert_eq!(code, 64);
    demand(&said, &["tidegate.toml", "line 1"]);
}

#[test]
fn unknown_arguments_are_bad_arguments() {
    for args in [&["frobnicate"][..], &["up", "--nodes", "many"], &["node", "--no-such-flag"], &[]] {
        let (code, out, err) = run(args);
        assert_eq!(code, 64, "{args:?}: {out}{err}");
    }
    let (code, out, _) = run(&["--help"]);
    assert_eq!(code, 0);
    demand(&out, &["up", "balancer", "node", "check", "model", "status"]);
}

#[test]
fn plaintext_beyond_loopback_is_refused_unless_asked_for() {
    for (role, section) in [("balancer", "balancer"), ("node", "node")] {
        let listen = if role == "balancer" { "[\"0.0.0.0:18998\"]" } else { "\"0.0.0.0:18998\"" };
        let text = format!("[{section}]\nlisten = {listen}\n");
        let (code, said) = refused("check", &text);
        assert_eq!(code, 64, "{role}: {said}");
        demand(&said, &[&format!("{section}.listen"), "0.0.0.0:18998", "insecure"]);
        let (code, said) = refused("check", &format!("{text}insecure = true\n"));
        assert_eq!(code, 0, "{role}: {said}");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let admin = free_port();
    let (code, said) = refused(
        "balancer",
        &format!(
            "{LISTED}[balancer]\nlisten = [\"127.0.0.1:{port}\"]\n[balancer.admin]\nlisten = \"127.0.0.1:{admin}\"\n"
        ),
    );
    assert_eq!(code, 69, "{said}");
    demand(&said, &[&format!("127.0.0.1:{port}"), "in use"]);
}

#[test]
fn a_model_that_is_not_there_says_where_it_was_looked_for() {
    let port = free_port();
    let node = |model: &str| format!("{LISTED}[node]\nlisten = \"127.0.0.1:{port}\"\nmodel = \"{model}\"\n");
    let (code, said) = refused("node", &node("/nonexistent/model.gguf"));
    assert!([64, 69].contains(&code), "{code}: {said}");
    demand(&said, &["/nonexistent/model.gguf"]);

    let empty = tempfile::tempdir().unwrap();
    let (_folder, path) = file(&node("smollm2-135m"));
    let (code, out, err) = finish(with_file("node", &path).env("TIDEGATE_DATA_DIR", empty.path()));
    assert!([64, 69].contains(&code), "{code}: {out}{err}");
    demand(&(out + &err), &["smollm2-135m", &empty.path().display().to_string(), "tidegate model pull"]);

    let (code, said) = refused("node", &node("no-such-model"));
    assert_eq!(code, 64, "{said}");
    demand(&said, &["no-such-model"]);
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_build_without_cuda_says_how_to_get_one_with_it() {
    let (code, said) = refused("node", &format!("{LISTED}[node]\ndevice = \"cuda\"\n"));
    assert_eq!(code, 64, "{said}");
    demand(&said, &["node.device", "no CUDA support", "make cuda-build"]);
}

#[test]
fn secrets_that_others_can_read_are_refused() {
    let (folder, _) = file("");
    let keys = folder.path().join("keys.toml");
    fs::write(&keys, "[[keys]]\nid = \"k\"\nsha256 = \"00\"\nowner = \"o\"\n").unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o644)).unwrap();
    let (code, said) = refused("check", &format!("[balancer.auth]\nkeys_file = \"{}\"\n", keys.display()));
    assert_eq!(code, 64, "{said}");
    demand(&said, &["balancer.auth.keys_file", "600", "sha256"]);
}

#[test]
fn environment_goes_over_file_and_a_flag_over_both() {
    let (_folder, path) = file("[balancer]\nlisten = [\"nonsense of the file\"]\n");
    let check = |env: Option<&str>| {
        let mut command = with_file("check", &path);
        if let Some(value) = env {
            command.env("TIDEGATE__BALANCER__LISTEN", value);
        }
        finish(&mut command)
    };
    assert_eq!(check(None).0, 64);
    let (code, out, err) = check(Some("127.0.0.1:18997"));
    assert_eq!(code, 0, "{out}{err}");
    let (code, out, err) = check(Some("nonsense of the environment"));
    assert_eq!(code, 64);
    demand(&(out + &err), &["nonsense of the environment", "TIDEGATE__BALANCER__LISTEN"]);

    // the flag's address is good but taken, so that its being told shows that neither of the others was looked at
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (_folder, path) = file(&format!("{LISTED}[balancer]\nlisten = [\"nonsense of the file\"]\n"));
    let mut both = with_file("balancer", &path);
    both.args(["--listen", &address]).env("TIDEGATE__BALANCER__LISTEN", "nonsense of the environment");
    let (code, out, err) = finish(&mut both);
    assert_eq!(code, 69, "{out}{err}");
    demand(&(out + &err), &[&address, "in use"]);
}
