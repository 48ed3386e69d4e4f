//! One node as a child process, kept running until told to stop.
//!
//! The parent holds the write end of the child's standard input and never writes: when the parent is gone, however it went, the child
//! reads the end of it and drains. A child has a process group of its own, so a Ctrl-C on the terminal reaches the parent alone, and
//! the parent decides in which order things stop.

use std::{
    fs::{File, OpenOptions},
    io,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use tidegate_common::{contract::NodeRecord, registry::Registry, shutdown::Shutdown};
use tokio::{
    process::{Child, ChildStdin, Command},
    time::{sleep, timeout},
};

use super::backoff::Backoff;
use crate::exit::Failure;

/// How long past its own drain a child may take to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// A child that gives up so often before any of its lives was long is given up.
const FAILURES_MAX: u32 = 4;
/// A life at least this long was no failure to start.
const LONG_LIFE: Duration = Duration::from_secs(30);
/// How much of a log stands in an error message.
const TAIL_LINES: usize = 6;

/// What every child of this run has in common, and what tells this one from the others.
pub(super) struct Node {
    /// What the registry says of it, less the address, which changes with each start.
    pub(super) record: NodeRecord,
    /// Arguments after `tidegate node`, less the address.
    pub(super) arguments: Vec<String>,
    /// Its standard output and error.
    pub(super) log: PathBuf,
    /// How long it drains.
    pub(super) drain_grace: Duration,
    pub(super) registry: Arc<dyn Registry>,
}

impl Node {
    /// Keeps the node running; returns when it has drained, or when starting it again is in vain.
    pub(super) async fn supervise(mut self, mut stop: Shutdown) -> Result<(), Failure> {
        let mut backoff = Backoff::default();
        let mut failures = Failures::default();
        loop {
            let (mut child, started) = (self.start().await?, Instant::now());
            // held here, because waiting for a child closes its standard input
            let lifeline = child.stdin.take();
            let status = tokio::select! {
                status = child.wait() => status,
                () = stop.wait() => return self.drain(child, lifeline).await,
            };
            self.registry.withdraw(&self.record.id).await;
            let lifetime = started.elapsed();
            failures.count(lifetime, &status);
            let how = status.map_or_else(|e| e.to_string(), describe);
            if failures.are_too_many() {
                return Err(self.in_vain(&how));
            }
            let wait = backoff.after(lifetime);
            println!("{} ended ({how}); it is started again in {} ms", self.record.id, wait.as_millis());
            tokio::select! {
                () = sleep(wait) => {}
                () = stop.wait() => return Ok(()),
            }
        }
    }

    async fn start(&mut self) -> Result<Child, Failure> {
        let fail = |e: io::Error| Failure::internal(format!("{} cannot be started: {e}", self.record.id));
        let log = open_log(&self.log)?;
        let address = free_address().map_err(fail)?;
        let child = Command::new(std::env::current_exe().map_err(fail)?)
            .arg("node")
            .args(&self.arguments)
            .args(["--listen", &address, "--stop-on-stdin-eof"])
            .stdin(Stdio::piped())
            .stdout(log.try_clone().map_err(fail)?)
            .stderr(log)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(fail)?;
        self.record.address = address;
        self.registry.announce(self.record.clone()).await;
        Ok(child)
    }

    async fn drain(&self, mut child: Child, lifeline: Option<ChildStdin>) -> Result<(), Failure> {
        self.registry.withdraw(&self.record.id).await;
        drop(lifeline);
        if timeout(self.drain_grace + PATIENCE, child.wait()).await.is_err() {
            println!("{} does not end; it is killed", self.record.id);
            // an error means that it has just ended
            let _ = child.kill().await;
        }
        Ok(())
    }

    fn in_vain(&self, how: &str) -> Failure {
        Failure::unavailable(format!(
            "{} ended {FAILURES_MAX} times ({how}) and never ran for long; the end of {}:\n{}",
            self.record.id,
            self.log.display(),
            tail(&self.log)
        ))
    }
}

/// How often the child ended by itself before it had ever lived long. One that was killed, or that once ran, is worth another try.
#[derive(Debug, Default)]
struct Failures {
    count: u32,
    has_lived: bool,
}

impl Failures {
    fn count(&mut self, lifetime: Duration, status: &io::Result<ExitStatus>) {
        self.has_lived |= lifetime >= LONG_LIFE;
        let by_itself = status.as_ref().is_ok_and(|status| status.code().is_some());
        self.count += u32::from(by_itself);
    }

    fn are_too_many(&self) -> bool {
        !self.has_lived && self.count >= FAILURES_MAX
    }
}

/// Another process may take the port before the child does; the child then ends and is started with the next one.
fn free_address() -> io::Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

fn open_log(path: &Path) -> Result<File, Failure> {
    let folder = path.parent().unwrap_or(path);
    let opened = std::fs::create_dir_all(folder).and_then(|()| OpenOptions::new().create(true).append(true).open(path));
    opened.map_err(|e| {
        Failure::unavailable(format!("{}: cannot be written: {e}\n  fix: name another --data-dir", path.display()))
    })
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no status".to_owned(),
    }
}

fn tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].iter().map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn ended(failures: &mut Failures, lifetime_s: u64, raw_status: i32) -> bool {
        failures.count(Duration::from_secs(lifetime_s), &Ok(ExitStatus::from_raw(raw_status)));
        failures.are_too_many()
    }

    #[test]
    fn a_child_that_never_ran_is_given_up_and_a_killed_or_once_good_one_is_not() {
        const CODE_69: i32 = 69 << 8;
        const KILLED: i32 = 9;
        let mut broken = Failures::default();
        assert_eq!([0, 0, 0, 0].map(|s| ended(&mut broken, s, CODE_69)), [false, false, false, true]);
        let mut killed = Failures::default();
        assert!(!(0..20).any(|_| ended(&mut killed, 1, KILLED)));
        let mut good = Failures::default();
        ended(&mut good, 60, KILLED);
        assert!(!(0..20).any(|_| ended(&mut good, 1, CODE_69)));
    }
}
