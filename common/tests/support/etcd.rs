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
    seat: Seat,
    child: Option<Child>,
    client_port: u16,
    /// `name=address` of each member, as etcd wants it.
    members: String,
    dir: TempDir,
    scheme: &'static str,
}

/// Where a member is to be.
#[derive(Debug, Clone)]
pub struct Seat {
    /// Its name, unlike any other member's.
    pub name: String,
    /// Its address.
    pub ip: String,
    /// More flags.
    pub flags: Vec<String>,
    /// The command that it is run by, such as `ip netns exec NAME`; mostly none.
    pub within: Vec<String>,
}

impl Seat {
    /// On loopback.
    pub fn here(name: &str) -> Self {
        Self { name: name.to_owned(), ip: "127.0.0.1".to_owned(), flags: Vec::new(), within: Vec::new() }
    }
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
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        // its one peer is itself
        Self::start_members(vec![Seat { flags, ..Seat::here("t") }], scheme, "http").remove(0)
    }

    /// Starts the members of one cluster, which answer clients by `scheme` and each other by `peer_scheme`.
    pub fn start_members(seats: Vec<Seat>, scheme: &'static str, peer_scheme: &str) -> Vec<Self> {
        let member = |seat: &Seat| format!("{}={peer_scheme}://{}:{}", seat.name, seat.ip, free_port());
        let members = seats.iter().map(member).collect::<Vec<_>>().join(",");
        let etcd = |seat| Self {
            seat,
            child: None,
            client_port: free_port(),
            members: members.clone(),
            dir: tempfile::tempdir().unwrap(),
            scheme,
        };
        let mut all: Vec<Self> = seats.into_iter().map(etcd).collect();
        Self::run_all(&mut all);
        all
    }

    /// Starts all members, none of which answers before most of them run.
    pub fn run_all(members: &mut [Self]) {
        members.iter_mut().for_each(Self::spawn);
        members.iter_mut().for_each(Self::wait_until_it_answers);
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.seat.name
    }

    /// Where clients reach it.
    pub fn endpoint(&self) -> String {
        format!("{}://{}:{}", self.scheme, self.seat.ip, self.client_port)
    }

    fn peer_url(&self) -> &str {
        let own = |member: &&str| member.starts_with(&format!("{}=", self.seat.name));
        let member = self.members.split(',').find(own).unwrap();
        &member[self.seat.name.len() + 1..]
    }

    /// The client port.
    pub fn port(&self) -> u16 {
        self.client_port
    }

    /// Starts it, or starts it again on the same ports and data, and waits until it answers.
    pub fn run(&mut self) {
        self.spawn();
        self.wait_until_it_answers();
    }

    fn spawn(&mut self) {
        assert!(self.child.is_none(), "etcd runs already");
        let log = File::create(self.dir.path().join("log")).unwrap();
        let (client, peer) = (self.endpoint(), self.peer_url().to_owned());
        let mut words = self.seat.within.iter().map(String::as_str).chain(["etcd"]);
        let child = Command::new(words.next().unwrap())
            .args(words)
            .args(["--name", &self.seat.name, "--data-dir"])
            .arg(self.data())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.members])
            // quick elections, and so a quick start; a lease is never shorter than one and a half of them
            .args(["--heartbeat-interval", "50", "--election-timeout", "500", "--unsafe-no-fsync"])
            .args(&self.seat.flags)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
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
