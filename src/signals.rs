//! The first SIGINT or SIGTERM asks for a drain, the second ends the process at once.

use std::io::Read;

use tidegate_common::shutdown::{Trigger, signalled};
use tokio::sync::mpsc;

use crate::exit::Failure;

/// Listens until the process ends: fires `drain` at the first signal, or when `otherwise` is over, and returns at the next signal.
pub(crate) async fn drain_then_cut(drain: Trigger, otherwise: impl Future<Output = ()>, say: fn(&str)) -> Failure {
    let first = tokio::select! {
        signal = signalled() => signal.map(Some),
        () = otherwise => Ok(None),
    };
    match first {
        Ok(Some(name)) => say(name),
        Ok(None) => {}
        Err(e) => return Failure::internal(format!("cannot listen for signals: {e}")),
    }
    drain.fire();
    match signalled().await {
        Ok(_) => Failure::cut(),
        Err(e) => Failure::internal(format!("cannot listen for signals: {e}")),
    }
}

/// Says in the log that a signal came, as servers do.
pub(crate) fn logged(signal: &str) {
    tracing::info!(signal, "draining; a second signal ends at once");
}

/// Returns once standard input ends, as it does when the process that holds its other end is gone.
pub(crate) async fn end_of_stdin() {
    let (ended, mut end) = mpsc::channel::<()>(1);
    std::thread::spawn(move || {
        let mut piece = [0; 256];
        while std::io::stdin().read(&mut piece).is_ok_and(|count| count > 0) {}
        drop(ended);
    });
    end.recv().await;
}
