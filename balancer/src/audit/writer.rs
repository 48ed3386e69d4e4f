//! The one thread that writes: records come from the queue in groups, and what cannot be written stays until it can.

use std::{
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use tracing::{error, info, warn};

use super::{
    Message, Place, State,
    config::{AuditConfig, Sync},
    content,
    copies::Copies,
    keep,
    trail::Trail,
};
use crate::metrics::Metrics;

/// Records of one group.
const GROUP_MAX: usize = 1024;
/// How long a group waits for more of its kind: a writer that sleeps need not be woken for each record.
const LINGER: Duration = Duration::from_millis(10);
/// Between two attempts at what could not be written.
const RETRY: Duration = Duration::from_millis(250);
/// How long the end goes on trying.
const END_ATTEMPTS: u32 = 4;
/// How often files whose time is over are looked for.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

pub(super) struct Writer {
    trail: Trail,
    config: Arc<AuditConfig>,
    state: Arc<State>,
    metrics: Arc<Metrics>,
    copies: Copies,
    group: Vec<Vec<u8>>,
    /// Given back once the group is written.
    places: Vec<Place>,
    has_ended: bool,
    failures: u32,
    pruned: Option<Instant>,
}

impl Writer {
    pub(super) fn new(
        trail: Trail,
        config: Arc<AuditConfig>,
        state: Arc<State>,
        metrics: Arc<Metrics>,
        copies: Copies,
    ) -> Self {
        Self {
            trail,
            config,
            state,
            metrics,
            copies,
            group: Vec::new(),
            places: Vec::new(),
            has_ended: false,
            failures: 0,
            pruned: None,
        }
    }

    pub(super) fn run(mut self, messages: &Receiver<Message>) {
        self.tidy();
        while !self.has_ended || !self.group.is_empty() {
            self.gather(messages);
            self.write();
            if self.failures > 0 {
                if self.has_ended && self.failures >= END_ATTEMPTS {
                    return error!(records = self.group.len(), "audit records are lost at the end");
                }
                thread::sleep(RETRY);
            } else {
                self.tidy();
            }
        }
        if let Err(error) = self.trail.sync(true) {
            warn!(%error, "the audit log's end may not be on the disk");
        }
    }

    fn gather(&mut self, messages: &Receiver<Message>) {
        if self.group.is_empty() && !self.has_ended {
            match messages.recv_timeout(self.config.sync_interval.min(Duration::from_secs(1))) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => self.has_ended = true,
            }
            if self.config.sync != Sync::Each && !self.has_ended {
                thread::sleep(LINGER);
            }
        }
        while self.group.len() < GROUP_MAX
            && let Ok(message) = messages.try_recv()
        {
            self.take(message);
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Record(record, place) => {
                self.group.push(record);
                self.places.push(place);
            }
            Message::End => self.has_ended = true,
        }
    }

    fn write(&mut self) {
        let (lost, refused) = (self.state.lost.swap(0, Relaxed), self.state.refused.swap(0, Relaxed));
        let has_gap = lost + refused > 0;
        if has_gap {
            self.group.push(content("gap", &json!({"lost": lost, "refused": refused})));
        }
        if self.group.is_empty() {
            return drop(self.trail.sync(false));
        }
        match self.trail.append(&self.group) {
            Ok(()) => {
                self.group.clear();
                self.places.clear();
                self.copies.send(self.trail.newest());
                self.succeeded();
            }
            Err(error) => {
                if has_gap {
                    self.group.pop();
                    self.state.lost.fetch_add(lost, Relaxed);
                    self.state.refused.fetch_add(refused, Relaxed);
                }
                self.failed(&error);
            }
        }
    }

    fn succeeded(&mut self) {
        self.metrics.audit_sequence.set(i64::try_from(self.trail.seq()).unwrap_or(i64::MAX));
        if std::mem::take(&mut self.failures) > 0 {
            self.metrics.audit_failing.set(0);
            self.state.is_failing.store(false, Relaxed);
            info!("the audit log is written again");
        }
    }

    fn failed(&mut self, error: &std::io::Error) {
        self.failures = self.failures.saturating_add(1);
        self.metrics.audit_failures.inc();
        if self.failures == 1 {
            self.metrics.audit_failing.set(1);
            self.state.is_failing.store(true, Relaxed);
            error!(%error, folder = %self.config.folder.display(), "the audit log cannot be written");
        }
    }

    /// Sees to closed files: a thread of its own compresses them, so that nothing waits for it.
    fn tidy(&mut self) {
        if self.trail.take_rotated() && self.config.compress {
            let (config, current) = (Arc::clone(&self.config), self.trail.current().to_owned());
            let spawned =
                thread::Builder::new().name("audit-gzip".into()).spawn(move || keep::compress(&config, &current));
            if let Err(error) = spawned {
                warn!(%error, "the audit log's closed files stay uncompressed");
            }
        }
        if self.pruned.is_none_or(|at| at.elapsed() >= PRUNE_EVERY) {
            self.pruned = Some(Instant::now());
            if let Err(error) = self.prune() {
                warn!(%error, "files of the audit log whose time is over stay");
            }
        }
    }

    /// A record first, then the end of the file: so the beginning of the log is never missing without a word.
    fn prune(&mut self) -> std::io::Result<()> {
        let outdated = keep::outdated(&self.config.folder, self.trail.current(), self.config.retention)?;
        for (name, through) in outdated {
            self.trail.append(&[content("pruned", &json!({"file": name.to_string(), "through": through}))])?;
            self.copies.send(self.trail.newest());
            keep::remove(&self.config.folder, name);
        }
        Ok(())
    }
}
