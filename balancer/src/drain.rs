//! How many requests are open, so that the end waits for exactly them: it comes at once when there is none.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

/// Counts open requests.
#[derive(Debug, Default)]
pub(crate) struct OpenRequests {
    count: AtomicUsize,
    draining: AtomicBool,
    idle: Notify,
}

impl OpenRequests {
    /// One more open request, until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> OpenRequest {
        self.count.fetch_add(1, Ordering::SeqCst);
        OpenRequest(Arc::clone(self))
    }

    /// How many are open now.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Whether the end has begun.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Says that the end has begun.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Returns once no request is open.
    pub(crate) async fn idle(&self) {
        loop {
            let notified = self.idle.notified();
            tokio::pin!(notified);
            // registered before the count is read, so that the last guard's notice cannot fall between
            notified.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// One open request.
#[derive(Debug)]
pub(crate) struct OpenRequest(Arc<OpenRequests>);

impl Drop for OpenRequest {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn idle_waits_for_the_last_guard() {
        let open = Arc::new(OpenRequests::default());
        assert!(open.idle().now_or_never().is_some());
        let (a, b) = (open.enter(), open.enter());
        let mut idle = Box::pin(open.idle());
        assert!(idle.as_mut().now_or_never().is_none());
        drop(a);
        assert!(idle.as_mut().now_or_never().is_none());
        drop(b);
        idle.await;
    }
}
