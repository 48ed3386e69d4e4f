//! What a node does with requests: serve them, finish what it has, or let go of that too; and who may want it drained.

use tokio::sync::watch;

/// What the node does now. A drain goes from the first to the last, and back when it is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duty {
    /// It takes requests.
    Serving,
    /// It finishes what it has and takes nothing new.
    Draining,
    /// What still runs is handed over.
    LettingGo,
}

/// The present duty. One task sets it, and everybody reads it.
#[derive(Debug)]
pub struct Duties(watch::Sender<Duty>);

impl Default for Duties {
    fn default() -> Self {
        Self(watch::Sender::new(Duty::Serving))
    }
}

impl Duties {
    /// The present one.
    pub fn now(&self) -> Duty {
        *self.0.borrow()
    }

    pub(crate) fn set(&self, duty: Duty) {
        self.0.send_replace(duty);
    }

    /// Ends when the duty is this.
    pub fn reached(&self, duty: Duty) -> impl Future<Output = ()> + Send + use<> {
        let mut present = self.0.subscribe();
        async move {
            // an error means that the node is gone, and with it everything that ran
            let _ = present.wait_for(|present| *present == duty).await;
        }
    }
}

/// Who wants the node drained: an operator through the registry, or one at the private listener.
#[derive(Debug)]
pub struct Wishes {
    registry: watch::Receiver<bool>,
    private: watch::Sender<bool>,
}

impl Wishes {
    /// What the registry says, and nobody at the private listener yet.
    pub(crate) fn new(registry: watch::Receiver<bool>) -> Self {
        Self { registry, private: watch::Sender::new(false) }
    }

    /// Whether the registry says so.
    pub fn in_registry(&self) -> bool {
        *self.registry.borrow()
    }

    /// Somebody at the private listener wants this.
    pub(crate) fn set_private(&self, drained: bool) {
        self.private.send_replace(drained);
    }

    /// Ends when anybody wants the node drained, or else when nobody does any more.
    pub(crate) async fn until(&self, drained: bool) {
        let (mut registry, mut private) = (self.registry.clone(), self.private.subscribe());
        while (*registry.borrow_and_update() || *private.borrow_and_update()) != drained {
            tokio::select! {
                () = changed(&mut registry) => {}
                () = changed(&mut private) => {}
            }
        }
    }
}

/// Whoever is gone changes nothing any more.
async fn changed(wish: &mut watch::Receiver<bool>) {
    if wish.changed().await.is_err() {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn one_wish_drains_and_all_must_be_taken_back() {
        let (registry, says) = watch::channel(false);
        let wishes = Wishes::new(says);
        assert!(wishes.until(false).now_or_never().is_some());
        registry.send_replace(true);
        wishes.set_private(true);
        wishes.until(true).await;
        registry.send_replace(false);
        assert!(wishes.until(false).now_or_never().is_none(), "the private listener still wants it");
        wishes.set_private(false);
        wishes.until(false).await;
    }

    #[tokio::test]
    async fn a_registry_that_is_gone_leaves_the_private_listener_its_say() {
        let wishes = Wishes::new(watch::channel(false).1);
        let drained = wishes.until(true);
        tokio::pin!(drained);
        assert!(drained.as_mut().now_or_never().is_none());
        wishes.set_private(true);
        drained.await;
    }

    #[tokio::test]
    async fn a_duty_wakes_who_waits_for_it() {
        let duties = Duties::default();
        let let_go = duties.reached(Duty::LettingGo);
        duties.set(Duty::Draining);
        duties.set(Duty::LettingGo);
        let_go.await;
        duties.set(Duty::Serving);
        assert_eq!(duties.now(), Duty::Serving);
        assert!(duties.reached(Duty::LettingGo).now_or_never().is_none());
    }
}
