//! Models that share the machine's cores take turns, step by step.
//!
//! Each model has kernel threads for all cores, and within a step they hand work over by spinning. Two models that computed at once
//! would have twice as many spinning threads as cores, each waiting for one that is not running. So one step runs at a time, on all
//! threads, and whoever waits gets the next turn in the order of asking: a model at work never keeps another from its next step. The
//! threads of models that have nothing to do are parked and cost nothing.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::{
    batch::Batch,
    model::{Model, Output},
};

/// Hands out turns in the order they are asked for; clones are handles of the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Turns(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    tickets: Mutex<Tickets>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Tickets {
    /// The next to be drawn.
    next: u64,
    /// Whose turn it is.
    now: u64,
}

/// A turn; it ends when this is dropped.
struct Turn<'a>(&'a Shared);

impl Turns {
    /// Waits for a turn.
    fn take(&self) -> Turn<'_> {
        let shared = &*self.0;
        let mut tickets = shared.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = tickets.next;
        tickets.next += 1;
        drop(shared.ended.wait_while(tickets, |tickets| tickets.now != mine).unwrap_or_else(PoisonError::into_inner));
        Turn(shared)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.tickets.lock().unwrap_or_else(PoisonError::into_inner).now += 1;
        self.0.ended.notify_all();
    }
}

/// A model whose steps wait for their turn. Every method of [`Model`] is passed on, those with a default too.
pub(super) struct InTurn {
    pub(super) model: Box<dyn Model>,
    pub(super) turns: Turns,
}

impl Model for InTurn {
    fn forward(&mut self, batch: &Batch, beat: &dyn Fn()) -> Output<'_> {
        let _turn = self.turns.take();
        self.model.forward(batch, beat)
    }

    fn picks(&self) -> bool {
        self.model.picks()
    }

    fn width(&self) -> usize {
        self.model.width()
    }

    fn vocab(&self) -> usize {
        self.model.vocab()
    }

    fn device_class(&self) -> String {
        self.model.device_class()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use super::*;

    #[test]
    fn turns_never_overlap() {
        const EACH: usize = 200;
        let (turns, taken, order) = (Turns::default(), AtomicBool::new(false), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for who in 0..2 {
                let (turns, taken, order) = (turns.clone(), &taken, &order);
                scope.spawn(move || {
                    for _ in 0..EACH {
                        let turn = turns.take();
                        assert!(!taken.swap(true, Ordering::SeqCst), "two turns at once");
                        thread::yield_now();
                        order.lock().unwrap().push(who);
                        taken.store(false, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert_eq!(order.into_inner().unwrap().len(), 2 * EACH);
    }

    #[test]
    fn whoever_asked_first_is_next() {
        let turns = Turns::default();
        let (first, order) = (turns.take(), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for who in 0..3 {
                let (others, order) = (turns.clone(), &order);
                scope.spawn(move || {
                    let _turn = others.take();
                    order.lock().unwrap().push(who);
                });
                // its ticket is drawn before the next one asks
                while turns.0.tickets.lock().unwrap().next != who + 2 {
                    thread::yield_now();
                }
            }
            drop(first);
        });
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2]);
    }

    #[test]
    fn a_step_that_panics_ends_its_turn() {
        let turns = Turns::default();
        let other = turns.clone();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _turn = other.take();
            panic!("a kernel failed");
        }));
        assert!(panicked.is_err());
        drop(turns.take());
    }
}
