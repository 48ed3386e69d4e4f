//! The audit log: who asked what and what became of it, and what was done to the edge itself, as JSON lines that are chained by their
//! hashes, so that a cut, a changed, a removed or a swapped line shows.
//!
//! A request only formats its record into a buffer and puts it into a bounded queue. One thread writes, a group at a time: `trail` adds
//! `line`s to the newest of the `files` under the lock of `head`, which remembers where the log ends; `frames` encrypt, `keep`
//! compresses and removes, `copies` go to syslog and to OpenTelemetry. `read` never writes: it follows the `chain` through all of them.
//!
//! When writing fails the writer keeps what it has and tries again. `on_failure = "open"` serves on and counts what the queue cannot hold;
//! `"closed"` refuses requests, and holds a place in the queue for each that it lets in.

pub(crate) mod config;
mod line;
mod frames;
mod files;
mod head;
mod trail;
mod keep;
mod writer;
mod syslog;
mod copies;
mod chain;
pub(crate) mod read;

use std::{
    io::{self, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tidegate_common::{
    contract::{ApiError, ErrorKind},
    logs::Logs,
};
use tracing::warn;

pub use chain::Break;
pub use config::{AuditConfig, KeyRing};
pub use read::{Fault, Records, Report, verify};

use crate::metrics::Metrics;
use config::OnFailure;
use copies::Copies;
use trail::Trail;
use writer::Writer;

/// The code of requests that are refused because they could not be recorded. They are counted and have no records of their own: those
/// would be in the way of what is to be written first.
pub(crate) const UNAVAILABLE: &str = "audit_unavailable";
/// How long the end waits for the last records to be written.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The log, as those who have something to record see it.
pub(crate) struct Audit {
    config: Arc<AuditConfig>,
    sender: SyncSender<Message>,
    state: Arc<State>,
    metrics: Arc<Metrics>,
    ended: Mutex<Option<Receiver<()>>>,
}

/// What callers and the writer share.
#[derive(Default)]
pub(crate) struct State {
    /// Places taken in the queue.
    places: Arc<AtomicUsize>,
    /// Records lost since the last gap was recorded.
    lost: AtomicU64,
    /// Requests refused since then because they could not have been recorded.
    refused: AtomicU64,
    is_failing: AtomicBool,
}

/// A place in the queue, until the record that came with it is written.
#[derive(Debug)]
pub(crate) struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

pub(crate) enum Message {
    Record(Vec<u8>, Place),
    End,
}

impl Audit {
    /// Opens the log and starts its writer.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub(crate) fn open(config: &AuditConfig, metrics: &Arc<Metrics>, logs: Option<Logs>) -> io::Result<Self> {
        let config = Arc::new(config.clone());
        let trail = Trail::open(Arc::clone(&config))?;
        // places bound what is in it; one more for the end
        let (sender, messages) = sync_channel(config.queue_max + 1);
        let state = Arc::<State>::default();
        let (ends, ended) = sync_channel(1);
        let copies = Copies::start(config.syslog.as_ref(), logs, metrics)?;
        let writer = Writer::new(trail, Arc::clone(&config), Arc::clone(&state), Arc::clone(metrics), copies);
        std::thread::Builder::new().name("audit".into()).spawn(move || {
            writer.run(&messages);
            // an error means that nobody waits any more
            let _ = ends.send(());
        })?;
        Ok(Self { config, sender, state, metrics: Arc::clone(metrics), ended: Mutex::new(Some(ended)) })
    }

    /// What is asked for beside the frame of a request.
    pub(crate) fn body_bytes_max(&self) -> Option<usize> {
        self.config.bodies.then_some(self.config.body_bytes_max)
    }

    /// Lets a request in: with a place for its record, where no request may go without one.
    ///
    /// # Errors
    /// When it could not be recorded and must be.
    pub(crate) fn admit(&self) -> Result<Option<Place>, ApiError> {
        if self.config.on_failure == OnFailure::Open {
            return Ok(None);
        }
        let place = if self.state.is_failing.load(Relaxed) { None } else { self.place() };
        place.map(Some).ok_or_else(|| {
            self.state.refused.fetch_add(1, Relaxed);
            let message = "requests are recorded here, and the record cannot be written now";
            ApiError::new(ErrorKind::Unavailable, UNAVAILABLE, message).with_retry_after(Duration::from_secs(1))
        })
    }

    fn place(&self) -> Option<Place> {
        let places = &self.state.places;
        let taken = places.fetch_update(Relaxed, Relaxed, |n| (n < self.config.queue_max).then_some(n + 1));
        taken.ok().map(|_| Place(Arc::clone(places)))
    }

    /// Records that something happened, with these fields, which make a JSON object.
    pub(crate) fn record(&self, event: &'static str, fields: &impl Serialize, place: Option<Place>) {
        let sent = place
            .or_else(|| self.place())
            .is_some_and(|place| self.sender.try_send(Message::Record(content(event, fields), place)).is_ok());
        if sent {
            self.metrics.audit_records.with_label_values(&[event]).inc();
        } else {
            self.state.lost.fetch_add(1, Relaxed);
            self.metrics.audit_lost.inc();
        }
    }

    /// Writes what is left.
    pub(crate) fn close(&self) {
        let ended = self.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        // a full queue takes the end once the writer has made room; where it cannot, nothing more can be done
        let told = (0..100).any(|_| {
            self.sender.try_send(Message::End).is_ok() || {
                std::thread::sleep(CLOSE_TIMEOUT / 100);
                false
            }
        });
        if !told || ended.is_some_and(|ended| ended.recv_timeout(CLOSE_TIMEOUT).is_err()) {
            warn!("the last audit records could not be written");
        }
    }
}

/// A record's own fields, without braces: when, what, and `fields`.
pub(crate) fn content(event: &str, fields: &impl Serialize) -> Vec<u8> {
    let mut out = Vec::with_capacity(640);
    // writing to memory does not fail
    let _ = write!(out, "\"time\":\"{}\",\"event\":\"{event}\"", humantime::format_rfc3339_millis(SystemTime::now()));
    let start = out.len();
    let written = serde_json::to_writer(&mut out, fields);
    match (written, out.len() - start) {
        // braces of an object with nothing in it, or nothing at all
        (Err(_), _) | (_, ..=2) => out.truncate(start),
        _ => {
            out[start] = b',';
            out.pop();
        }
    }
    out
}
