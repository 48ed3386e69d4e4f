//! `tidegate audit`: whether an audit log is whole, and what stands in it. It only reads, so it may run beside the balancer.

use std::{
    collections::VecDeque,
    io::{self, Write},
    path::PathBuf,
    thread,
    time::{Duration, SystemTime},
};

use serde_json::Value;
use tidegate_balancer::{
    BalancerConfig,
    audit::{self, KeyRing, Records, Report},
};
use tidegate_common::config::{ClusterConfig, LogConfig};

use crate::{
    exit::Failure,
    settings::{self, ConfigFile},
};

/// How often a followed log is looked at.
const POLL: Duration = Duration::from_millis(200);

/// Check and read the balancer's audit log
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Say whether the log is whole: no record changed, removed, swapped or cut off
    #[command(after_help = VERIFY_HELP)]
    Verify {
        #[command(flatten)]
        log: Log,
    },
    /// Print the records that are asked for, the oldest first, as JSON lines
    #[command(after_help = "Examples:\n  tidegate audit show --config cluster.toml --owner alice --since 1h\n  \
        tidegate audit show /var/lib/tidegate/audit --event reload\n  \
        tidegate audit show ./audit --status 5xx | jq .reason")]
    Show {
        #[command(flatten)]
        log: Log,
        #[command(flatten)]
        filter: Box<Filter>,
    },
    /// Print the newest records, and with --follow those that come
    #[command(after_help = "Example:\n  tidegate audit tail --config cluster.toml --follow --owner alice")]
    Tail {
        #[command(flatten)]
        log: Log,
        #[command(flatten)]
        filter: Box<Filter>,
        /// How many
        #[arg(long, short = 'n', value_name = "N", default_value_t = 10)]
        lines: usize,
        /// Go on with what is written from now on, until Ctrl-C
        #[arg(long, short)]
        follow: bool,
    },
}

const VERIFY_HELP: &str = "\
Each record names the SHA-256 of the one before it, and head.json in the log's folder remembers the newest. Whoever can write the log can make
all of that anew, unless it is written with a key (balancer.audit.hmac_key_file). A head.json that was put back to an older one together with
the log shows by comparison with what else has seen the log: tidegate_audit_sequence in the metrics, or the syslog.

It ends with 0 when the log is whole, and with 69 when it is not or cannot be read.

Examples:
  tidegate audit verify --config cluster.toml
  tidegate audit verify /var/lib/tidegate/audit --hmac-key-file audit.key";

/// Which log, and by which keys.
#[derive(Debug, clap::Args)]
pub(crate) struct Log {
    /// The log's folder, or one of its files [default: balancer.audit.dir of --config]
    #[arg(value_name = "DIR|FILE", required_unless_present = "config")]
    path: Option<PathBuf>,
    #[command(flatten)]
    file: ConfigFile,
    /// Key file that records are authenticated by; several where it was changed [default: that of --config]
    #[arg(long, value_name = "FILE")]
    hmac_key_file: Vec<PathBuf>,
    /// Key file that the log is encrypted by; several where it was changed [default: that of --config]
    #[arg(long, value_name = "FILE")]
    encryption_key_file: Vec<PathBuf>,
}

/// Which records.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Filter {
    /// Of this key's or token's owner
    #[arg(long, value_name = "NAME")]
    owner: Option<String>,
    /// Of this credential, such as key:k-1f2e3d4c
    #[arg(long, value_name = "KIND:ID")]
    credential: Option<String>,
    /// Of this event: request, reload, member, start, ...
    #[arg(long, value_name = "WORD")]
    event: Option<String>,
    /// With this status, such as 503 or 4xx
    #[arg(long, value_name = "STATUS")]
    status: Option<String>,
    /// Of this request
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Of this model
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Not before this time, or so long ago: 2026-01-31T00:00:00Z or 1h
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<SystemTime>,
    /// Not after this time, or so long ago
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<SystemTime>,
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Verify { log } => verify(&log),
        Command::Show { log, filter } => show(&log, &filter),
        Command::Tail { log, filter, lines, follow } => tail(&log, &filter, lines, follow),
    }
}

impl Log {
    fn open(&self) -> Result<(PathBuf, KeyRing), Failure> {
        let mut keys = KeyRing::default();
        let mut path = self.path.clone();
        if self.file.config.is_some() {
            let raw = self.file.read()?;
            let config = raw.check(|r| {
                settings::leave_to_others(r, "node");
                (ClusterConfig::read(r), LogConfig::read(r), BalancerConfig::read(r)).2
            })?;
            match (config.audit(), &path) {
                (Some(audit), _) => {
                    keys = audit.keys();
                    path.get_or_insert_with(|| audit.folder().to_owned());
                }
                (None, Some(_)) => {}
                (None, None) => return Err(Failure::usage("balancer.audit.dir: is not set, so there is no audit log")),
            }
        }
        let path = path.ok_or_else(|| Failure::usage("give the log's folder, or --config"))?;
        self.hmac_key_file.iter().try_for_each(|file| keys.add_mac(file)).map_err(Failure::usage)?;
        self.encryption_key_file.iter().try_for_each(|file| keys.add_cipher(file)).map_err(Failure::usage)?;
        Ok((path, keys))
    }
}

fn verify(log: &Log) -> Result<(), Failure> {
    let (path, keys) = log.open()?;
    let report = audit::verify(&path, &keys).map_err(|e| unreadable(&e))?;
    for note in &report.notes {
        println!("note   {note}");
    }
    for fault in &report.faults {
        println!("break  {fault}");
    }
    println!("{}", summary(&report));
    match report.faults.len() {
        0 => Ok(()),
        1 => Err(Failure::unavailable("the audit log is not whole: 1 break")),
        count => Err(Failure::unavailable(format!("the audit log is not whole: {count} breaks"))),
    }
}

fn summary(report: &Report) -> String {
    let range = report.range.map(|(first, last)| format!(", {first} to {last}")).unwrap_or_default();
    let word = if report.faults.is_empty() { "whole" } else { "not whole" };
    format!("{word}: {} records{range} in {} files", report.records, report.files)
}

fn unreadable(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Failure::usage(error.to_string()),
        _ => Failure::unavailable(format!("the audit log cannot be read: {error}")),
    }
}

fn show(log: &Log, filter: &Filter) -> Result<(), Failure> {
    let (path, keys) = log.open()?;
    let mut records = Records::open(&path, keys).map_err(|e| unreadable(&e))?;
    let mut out = io::stdout().lock();
    while let Some(line) = records.next_line().map_err(|e| unreadable(&e))? {
        if filter.wants(line) && !print(&mut out, line) {
            return Ok(());
        }
    }
    Ok(())
}

fn tail(log: &Log, filter: &Filter, lines: usize, follow: bool) -> Result<(), Failure> {
    let (path, keys) = log.open()?;
    let mut records = Records::open(&path, keys).map_err(|e| unreadable(&e))?;
    let mut newest = VecDeque::with_capacity(lines.min(1024));
    while let Some(line) = records.next_line().map_err(|e| unreadable(&e))? {
        if filter.wants(line) {
            newest.push_back(line.to_vec());
            if newest.len() > lines {
                newest.pop_front();
            }
        }
    }
    let mut out = io::stdout().lock();
    let mut is_read = newest.iter().all(|line| print(&mut out, line));
    while follow && is_read {
        match records.next_line().map_err(|e| unreadable(&e))? {
            Some(line) if filter.wants(line) => is_read = print(&mut out, line),
            Some(_) => {}
            None => thread::sleep(POLL),
        }
    }
    Ok(())
}

/// Whether anybody reads on.
fn print(out: &mut impl Write, line: &[u8]) -> bool {
    out.write_all(line).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()).is_ok()
}

impl Filter {
    fn wants(&self, line: &[u8]) -> bool {
        let Ok(record) = serde_json::from_slice::<Value>(line) else { return false };
        let text = |key: &str| record[key].as_str();
        let fields = [
            ("owner", &self.owner),
            ("credential", &self.credential),
            ("event", &self.event),
            ("request_id", &self.request_id),
            ("model", &self.model),
        ];
        let time = text("time").and_then(|time| humantime::parse_rfc3339(time).ok());
        fields.iter().all(|(key, wanted)| wanted.is_none() || text(key) == wanted.as_deref())
            && self.status.as_ref().is_none_or(|wanted| has_status(&record["status"], wanted))
            && self.since.is_none_or(|since| time.is_some_and(|time| time >= since))
            && self.until.is_none_or(|until| time.is_some_and(|time| time <= until))
    }
}

/// `4xx` is any of that hundred.
fn has_status(status: &Value, wanted: &str) -> bool {
    let Some(status) = status.as_u64().map(|status| format!("{status:03}")) else { return false };
    status.len() == wanted.len() && status.chars().zip(wanted.chars()).all(|(is, asked)| asked == 'x' || is == asked)
}

fn moment(text: &str) -> Result<SystemTime, String> {
    if let Ok(time) = humantime::parse_rfc3339(text) {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text).ok().and_then(|ago| SystemTime::now().checked_sub(ago));
    ago.ok_or_else(|| "use a time such as 2026-01-31T00:00:00Z, or how long ago, such as 1h or 7d".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_chosen_by_what_stands_in_them() {
        let line = br#"{"seq":1,"time":"2026-01-31T12:00:00.000Z","event":"request","owner":"alice","status":503}"#;
        let at = |text: &str| Some(moment(text).unwrap());
        let right = Filter {
            owner: Some("alice".into()),
            status: Some("5xx".into()),
            since: at("2026-01-31T11:59:59Z"),
            until: at("2026-01-31T12:00:01Z"),
            ..Filter::default()
        };
        assert!(right.wants(line) && Filter::default().wants(line));
        for wrong in [
            Filter { owner: Some("bob".into()), ..Filter::default() },
            Filter { model: Some("m".into()), ..Filter::default() },
            Filter { status: Some("50".into()), ..Filter::default() },
            Filter { since: at("2026-01-31T12:00:01Z"), ..Filter::default() },
            Filter { since: at("1h"), until: at("2h"), ..Filter::default() },
        ] {
            assert!(!wrong.wants(line), "{wrong:?}");
        }
        assert!(moment("soon").is_err());
    }
}
