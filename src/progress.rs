//! Progress of long jobs: a bar on a terminal, plain lines elsewhere.

use std::{
    io::{IsTerminal, stderr},
    sync::Mutex,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use tidegate_node::models::Progress;

/// Shows progress on standard error.
pub(crate) struct Shown {
    bar: Mutex<Option<ProgressBar>>,
    on_terminal: bool,
}

impl Shown {
    pub(crate) fn new() -> Self {
        Self { bar: Mutex::new(None), on_terminal: stderr().is_terminal() }
    }

    fn replace(&self, next: Option<ProgressBar>) {
        let mut bar = self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(last) = std::mem::replace(&mut *bar, next) {
            last.finish_and_clear();
        }
    }
}

impl Progress for Shown {
    fn begin(&self, job: &str, total: Option<u64>) {
        if !self.on_terminal {
            match total {
                Some(bytes) => eprintln!("{job} ({} MB)", bytes / 1_000_000),
                None => eprintln!("{job}"),
            }
            return;
        }
        self.replace(Some(bar(job, total)));
    }

    fn at(&self, done: u64) {
        let bar = self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(bar) = &*bar {
            // pip keeps two copies for a moment
            bar.set_position(bar.length().map_or(done, |total| done.min(total)));
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.replace(None);
    }
}

fn bar(job: &str, total: Option<u64>) -> ProgressBar {
    const KNOWN: &str = "{msg} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}, {eta} left";
    const UNKNOWN: &str = "{spinner} {msg} {decimal_bytes}";
    let (bar, template) = match total {
        Some(bytes) => (ProgressBar::new(bytes), KNOWN),
        None => (ProgressBar::new_spinner(), UNKNOWN),
    };
    bar.set_style(ProgressStyle::with_template(template).expect("the templates are constant and well formed"));
    bar.set_message(job.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
