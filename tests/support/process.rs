//! A `tidegate` process that a test started: its output in a file, signals by its number, and never alive after its test.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::Once,
    time::{Duration, Instant},
};

use super::MODEL;

/// Lines of its output that a failed test shows.
const LINES_SHOWN: usize = 40;

/// One running process and, when it ends, its children.
pub(crate) struct Process {
    child: Child,
    name: String,
    output: PathBuf,
}

/// The command, free of the configuration of whoever runs the tests.
pub(crate) fn tidegate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TIDEGATE__") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

/// Runs the command to its end; exit code, standard output and standard error.
pub(crate) fn run(args: &[&str]) -> (i32, String, String) {
    finish(tidegate().args(args))
}

/// Runs a prepared command to its end.
pub(crate) fn finish(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

/// Fetches the model once, into the same cache that the user has.
pub(crate) fn ensure_model() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let (code, out, err) = run(&["model", "pull", MODEL]);
        assert_eq!(code, 0, "cannot fetch the model:\n{out}{err}");
    });
}

impl Process {
    /// Starts `command`, with its output in `folder`.
    pub(crate) fn start(name: &str, folder: &Path, command: &mut Command) -> Self {
        let output = folder.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&output).unwrap();
        let child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
        Self { child, name: name.to_owned(), output }
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it has written.
    pub(crate) fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal, such as `INT`.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for its end.
    pub(crate) fn ended_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    /// The numbers of its children.
    pub(crate) fn children(&self) -> Vec<u32> {
        children(self.pid())
    }

    fn show(&self) {
        let output = self.output();
        let lines: Vec<&str> = output.lines().collect();
        println!("--- the last lines of {}:", self.name);
        lines[lines.len().saturating_sub(LINES_SHOWN)..].iter().for_each(|line| println!("{line}"));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show();
        }
        let orphans = if self.child.try_wait().is_ok_and(|ended| ended.is_none()) { self.children() } else { vec![] };
        self.kill();
        orphans.into_iter().filter(|pid| is_alive(*pid)).for_each(|pid| signal(pid, "KILL"));
    }
}

/// Sends a signal to one process.
pub(crate) fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args(["-s", name, &pid.to_string()]).status();
}

/// Whether a process is there and not only a corpse.
pub(crate) fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z')
}

fn children(pid: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    all.filter(|child| stat(*child).is_some_and(|(state, parent)| parent == pid && state != 'Z')).collect()
}

/// State and parent, from `/proc/<pid>/stat`; see proc(5).
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // the name before them is in brackets and may hold anything
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
