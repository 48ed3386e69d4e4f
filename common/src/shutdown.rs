//! One word for "stop": a flag that anyone can wait for, set by a signal or by the owner.

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Sets the flag; dropping it sets it too.
#[derive(Debug)]
pub struct Trigger(watch::Sender<bool>);

/// Waits for the flag.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<bool>);

/// A new flag, not set.
pub fn channel() -> (Trigger, Shutdown) {
    let (tx, rx) = watch::channel(false);
    (Trigger(tx), Shutdown(rx))
}

impl Trigger {
    /// Sets the flag.
    pub fn fire(&self) {
        self.0.send_replace(true);
    }
}

impl Shutdown {
    /// Whether the flag is set.
    pub fn is_set(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }

    /// Returns once the flag is set.
    ///
    /// # Cancel safety
    /// Safe: waiting again goes on as if never stopped.
    pub async fn wait(&mut self) {
        // an error means that the trigger is gone, which is the same as set
        let _ = self.0.wait_for(|set| *set).await;
    }
}

/// Returns on the first SIGINT or SIGTERM, with its name.
///
/// # Errors
/// When the process may not listen for signals.
pub async fn signalled() -> std::io::Result<&'static str> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_waiters_wake_on_fire_and_on_drop() {
        let (trigger, mut a) = channel();
        let b = a.clone();
        assert!(!b.is_set());
        trigger.fire();
        a.wait().await;
        assert!(b.is_set());
        let (trigger, mut c) = channel();
        drop(trigger);
        c.wait().await;
        assert!(c.is_set());
    }
}
