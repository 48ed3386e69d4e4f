//! Copies of what was written, for those who watch elsewhere. They never hold up the log.

use std::{io, sync::Arc, time::SystemTime};

use serde_json::Value;
use tidegate_common::logs::{Logs, Record};

use super::syslog::{Syslog, Target};
use crate::metrics::Metrics;

/// Fields that records are found by, beside the text of the whole.
const FIELDS: [&str; 11] =
    ["seq", "event", "request_id", "owner", "credential", "client", "path", "model", "node", "status", "reason"];

/// Who gets copies.
pub(super) struct Copies {
    syslog: Option<Syslog>,
    logs: Option<Logs>,
}

impl Copies {
    pub(super) fn start(syslog: Option<&Target>, logs: Option<Logs>, metrics: &Arc<Metrics>) -> io::Result<Self> {
        let lost = metrics.audit_export_lost.with_label_values(&["syslog"]);
        let syslog = syslog.map(|target| Syslog::start(target.clone(), lost)).transpose()?;
        Ok(Self { syslog, logs })
    }

    /// Copies these lines, each of which has its end.
    pub(super) fn send(&self, lines: &[u8]) {
        if self.syslog.is_none() && self.logs.is_none() {
            return;
        }
        for line in lines.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            if let Some(syslog) = &self.syslog {
                syslog.send(line);
            }
            if let Some(logs) = &self.logs {
                logs.export(record(line));
            }
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        if let Some(logs) = &self.logs {
            logs.close();
        }
    }
}

fn record(line: &[u8]) -> Record {
    let fields: Value = serde_json::from_slice(line).unwrap_or_default();
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let named = FIELDS.iter().filter(|key| !fields[**key].is_null());
    let is_lossy = matches!(fields["event"].as_str(), Some("gap" | "recovered"));
    let time = fields["time"].as_str().and_then(|time| humantime::parse_rfc3339(time).ok());
    Record {
        time: time.unwrap_or_else(SystemTime::now),
        is_warning: is_lossy || fields["status"].as_u64().is_some_and(|status| status >= 400),
        body: String::from_utf8_lossy(line).into_owned(),
        attributes: named.map(|key| (format!("tidegate.{key}"), text(&fields[*key]))).collect(),
        trace: fields["trace"].as_str().and_then(|trace| u128::from_str_radix(trace, 16).ok()),
    }
}
