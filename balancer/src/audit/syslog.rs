//! Audit records as messages of syslog (RFC 5424), for a SIEM: over UDP (RFC 5426), TCP with counted lengths (RFC 6587), or a local socket.
//!
//! A thread of its own sends them from a bounded queue and connects again as long as it takes; what the queue cannot hold meanwhile is
//! counted. Syslog answers nothing, so what a broken connection swallowed is not known: the log's files are the record, this is a copy.

use std::{
    fmt::Write as _,
    io::{self, Write},
    net::{TcpStream, ToSocketAddrs, UdpSocket},
    os::unix::net::UnixDatagram,
    path::PathBuf,
    str::FromStr,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant},
};

use prometheus::IntCounter;
use serde_json::Value;
use tracing::{info, warn};

/// Messages that wait for the receiver.
const QUEUE_MAX: usize = 8192;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to connect.
const RECONNECT: Duration = Duration::from_millis(500);
/// How long the end waits for what is left.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest datagram; a longer record is cut, as RFC 5424 allows.
const DATAGRAM_MAX: usize = 8 << 10;
/// "Log audit", RFC 5424, section 6.2.1.
const FACILITY: u8 = 13;
/// The number for examples (RFC 5612): Tidegate has none of its own.
const ID: &str = "tidegate@32473";
/// Fields that a SIEM looks for, beside the whole record.
const FIELDS: [&str; 9] = ["seq", "request_id", "owner", "credential", "client", "path", "model", "node", "status"];

/// Where messages go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// `udp://host:port`
    Udp(String),
    /// `tcp://host:port`
    Tcp(String),
    /// `unix:///path`
    Unix(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_address = |rest: &str| {
            rest.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        };
        match text.split_once("://") {
            Some(("udp", rest)) if is_address(rest) => Ok(Self::Udp(rest.to_owned())),
            Some(("tcp", rest)) if is_address(rest) => Ok(Self::Tcp(rest.to_owned())),
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            _ => Err("is none of udp://HOST:PORT, tcp://HOST:PORT and unix:///PATH".to_owned()),
        }
    }
}

/// The way to a receiver.
pub(super) struct Syslog {
    lines: Option<SyncSender<Vec<u8>>>,
    ended: Receiver<()>,
    lost: IntCounter,
}

impl Syslog {
    pub(super) fn start(target: Target, lost: IntCounter) -> io::Result<Self> {
        let (lines, queue) = sync_channel(QUEUE_MAX);
        let (ends, ended) = sync_channel(1);
        thread::Builder::new().name("syslog".into()).spawn(move || {
            Sender { target, connection: None, host: host(), is_down: false }.run(&queue);
            let _ = ends.send(());
        })?;
        Ok(Self { lines: Some(lines), ended, lost })
    }

    /// Takes a record's line.
    pub(super) fn send(&self, line: &[u8]) {
        if self.lines.as_ref().is_some_and(|lines| lines.try_send(line.to_vec()).is_err()) {
            self.lost.inc();
        }
    }
}

impl Drop for Syslog {
    fn drop(&mut self) {
        self.lines = None;
        if self.ended.recv_timeout(CLOSE_TIMEOUT).is_err() {
            warn!("the last audit records did not go to syslog");
        }
    }
}

enum Connection {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Unix(UnixDatagram),
}

struct Sender {
    target: Target,
    connection: Option<Connection>,
    host: String,
    is_down: bool,
}

impl Sender {
    fn run(mut self, lines: &Receiver<Vec<u8>>) {
        while let Ok(line) = lines.recv() {
            let message = message(&line, &self.host, std::process::id());
            let began = Instant::now();
            while let Err(error) = self.attempt(&message) {
                self.connection = None;
                if !std::mem::replace(&mut self.is_down, true) {
                    warn!(%error, target = ?self.target, "syslog cannot be reached");
                }
                // a datagram that nobody takes is lost, as datagrams are
                if began.elapsed() > CLOSE_TIMEOUT && matches!(self.target, Target::Udp(_)) {
                    break;
                }
                thread::sleep(RECONNECT);
            }
            if self.connection.is_some() && std::mem::take(&mut self.is_down) {
                info!("syslog is reached again");
            }
        }
    }

    fn attempt(&mut self, message: &[u8]) -> io::Result<()> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(Connection::open(&self.target)?),
        };
        connection.send(message)
    }
}

impl Connection {
    fn open(target: &Target) -> io::Result<Self> {
        match target {
            Target::Udp(address) => {
                let to = resolve(address)?;
                let socket = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
                socket.connect(to)?;
                Ok(Self::Udp(socket))
            }
            Target::Tcp(address) => {
                let stream = TcpStream::connect_timeout(&resolve(address)?, CONNECT_TIMEOUT)?;
                stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
                Ok(Self::Tcp(stream))
            }
            Target::Unix(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
                socket.connect(path)?;
                Ok(Self::Unix(socket))
            }
        }
    }

    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let datagram = &message[..message.len().min(DATAGRAM_MAX)];
        match self {
            Self::Udp(socket) => socket.send(datagram).map(drop),
            Self::Unix(socket) => socket.send(datagram).map(drop),
            Self::Tcp(stream) => {
                let mut framed = format!("{} ", message.len()).into_bytes();
                framed.extend_from_slice(message);
                stream.write_all(&framed)
            }
        }
    }
}

fn resolve(address: &str) -> io::Result<std::net::SocketAddr> {
    address.to_socket_addrs()?.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(char::is_ascii_graphic).take(255).collect();
    if name.is_empty() { "-".to_owned() } else { name }
}

/// A record as a message: what a SIEM looks for as structured data, and the whole line behind it.
fn message(line: &[u8], host: &str, pid: u32) -> Vec<u8> {
    let record: Value = serde_json::from_slice(line).unwrap_or_default();
    let text =
        |key: &str| record[key].as_str().filter(|text| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()));
    let event = text("event").unwrap_or("-");
    let priority = FACILITY * 8 + severity(&record, event);
    let mut out = format!("<{priority}>1 {} {host} tidegate {pid} {event} [{ID}", text("time").unwrap_or("-"));
    for key in FIELDS {
        let value = match &record[key] {
            Value::Null => continue,
            Value::String(text) => escape(text),
            other => other.to_string(),
        };
        let _ = write!(out, " {key}=\"{value}\""); // writing to memory does not fail
    }
    out.push_str("] ");
    let mut out = out.into_bytes();
    out.extend_from_slice(line);
    out
}

/// Warning for what went wrong, notice for what was done to the edge, information for the rest.
fn severity(record: &Value, event: &str) -> u8 {
    match (event, record["status"].as_u64()) {
        ("gap" | "recovered", _) | ("request", Some(400..)) => 4,
        ("request", _) => 6,
        _ => 5,
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace(']', "\\]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_a_message_of_rfc_5424() {
        let line = br#"{"seq":7,"time":"2026-01-31T12:00:00.000Z","event":"request","owner":"a]\"b","status":503}"#;
        let message = String::from_utf8(message(line, "edge-1", 42)).unwrap();
        let head = r#"<108>1 2026-01-31T12:00:00.000Z edge-1 tidegate 42 request [tidegate@32473 seq="7" owner="a\]\"b" status="503"] {"#;
        assert!(message.starts_with(head), "{message}");
        assert!(message.ends_with(r#""status":503}"#));
    }

    #[test]
    fn what_is_no_target_is_told() {
        assert_eq!("udp://h:514".parse(), Ok(Target::Udp("h:514".into())));
        assert_eq!("unix:///dev/log".parse(), Ok(Target::Unix("/dev/log".into())));
        for bad in ["h:514", "tcp://h", "tls://h:1", "unix://dev/log", "udp://:514"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }
}
