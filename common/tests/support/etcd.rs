//! A real etcd process of the test's own, on free loopback ports, with its data in a temporary directory.

// each test file includes this as a module of its own and uses its own part of it
#![allow(dead_code, unreachable_pub, clippy::print_stdout)]

use std::{
    fs::File,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// One etcd member that is killed when dropped.
pub struct Etcd {
    child: Option<Child>,
    client_port: u16,
    peer_port: u16,
    dir: TempDir,
    flags: Vec<String>,
    scheme: &'static str,
}

/// Whether etcd can be started here; says so when not, since a test that skips must tell why.
pub fn is_installed() -> bool {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("skipped: the program `etcd` is not installed here (Debian and Ubuntu: apt-get install etcd-server)");
    }
    found
}

/// A port that nobody listened on a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Etcd {
    /// Starts one that speaks plain HTTP.
    pub fn start() -> Self {
        Self::start_with(&[], "http")
    }

    /// Starts one with more flags, reached by `scheme`.
    pub fn start_with(flags: &[&str], scheme: &'static str) -> Self {
        let mut etcd = Self {
            child: None,
            client_port: free_port(),
            peer_port: free_port(),
            dir: tempfile::tempdir().unwrap(),
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            scheme,
        };
        etcd.run();
        etcd
    }

    /// Where clients reach it.
    pub fn endpoint(&self) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.client_port)
    }

    /// The client port.
    pub fn port(&self) -> u16 {
        self.client_port
    }

    /// Starts it, or starts it again on the same ports and data, and waits until it answers.
    pub fn run(&mut self) {
        assert!(self.child.is_none(), "etcd runs already");
        let log = File::create(self.dir.path().join("log")).unwrap();
        let (client, peer) = (self.endpoint(), format!("http://127.0.0.1:{}", self.peer_port));
        let child = Command::new("etcd")
            .args(["--name", "t", "--data-dir"])
            .arg(self.data())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("t={peer}")])
            // quick elections, and so a quick start; a lease is never shorter than one and a half of them
            .args(["--heartbeat-interval", "50", "--election-timeout", "500", "--unsafe-no-fsync"])
            .args(&self.flags)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        self.wait_until_it_answers();
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Loses all its data; only while it does not run.
    pub fn wipe(&mut self) {
        assert!(self.child.is_none(), "etcd runs");
        std::fs::remove_dir_all(self.data()).unwrap();
    }

    /// Stops its clock: connections stay open, and nothing answers.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn wait_until_it_answers(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            // with TLS the log is the only witness that needs no client certificate
            let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            if log.contains("ready to serve client requests") {
                return;
            }
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("etcd ended with {status}:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("etcd does not answer after 20 s");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
