//! A test that may do as it likes with networks, mounts and processes: it runs again, by itself, in namespaces of its own. When it ends,
//! however it ends, the kernel takes away every process, interface and mount that it made; so any number of them may run at once.

use std::{
    os::unix::fs::MetadataExt,
    process::{Command, Output},
};

/// Set where the test runs by itself.
const INSIDE: &str = "TIDEGATE_TEST_ISOLATED";

/// What makes `ip netns` work there: names of its own.
const PREPARE: &str = "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip link set lo up";

/// What must be possible.
const TRY: &str = "ip netns add t && ip netns exec t true && ip link add name br-t type bridge";

/// Whether this is the inner run of the test of this name. In the outer one, which is then over, the inner one has passed, or the reason
/// was told why this machine cannot have it.
///
/// # Panics
/// When the inner run fails.
pub(crate) fn is_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if let Some(reason) = refusal() {
        println!("skipped: namespaces cannot be had here: {reason}");
        return false;
    }
    let this = std::env::current_exe().unwrap();
    let mut inner = isolated(&format!("{PREPARE} && exec \"$@\""));
    let status = inner.arg(this).args(["--exact", test, "--nocapture"]).env(INSIDE, "1").status().unwrap();
    assert!(status.success(), "the test by itself ended with {status}");
    false
}

fn refusal() -> Option<String> {
    match isolated(&format!("{PREPARE} && {TRY}")).output() {
        Ok(Output { status, .. }) if status.success() => None,
        Ok(Output { stderr, .. }) => Some(String::from_utf8_lossy(&stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

fn isolated(script: &str) -> Command {
    let mut command = Command::new("unshare");
    // who is not root may be root there, where the system allows it
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|this| this.uid() == 0);
    command.args(if is_root { &[][..] } else { &["--map-root-user"] });
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["sh", "-c", script, "sh"]);
    command
}

/// `command` in the network namespace of this name.
pub(crate) fn within(name: &str, command: &Command) -> Command {
    let mut inside = Command::new("ip");
    inside.args(["netns", "exec", name]).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => inside.env(key, value),
            None => inside.env_remove(key),
        };
    }
    inside.stdin(std::process::Stdio::null());
    inside
}

/// `ip` with these words.
///
/// # Panics
/// When it fails.
pub(crate) fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}
