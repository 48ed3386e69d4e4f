//! Threads that stay awake through a step: work is handed over by a counter in memory, not by waking a thread per operation.

use std::{
    cell::UnsafeCell,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::*},
    },
    thread::{JoinHandle, Thread},
};

/// Looks at the counter before a worker goes to sleep; about a hundred microseconds, longer than the gaps within a step.
const SPINS: u32 = 30_000;

/// What each thread runs, told its number.
type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Valid while `unfinished` is above zero.
    job: UnsafeCell<Option<Job>>,
    /// Grows by one with each job.
    epoch: AtomicUsize,
    unfinished: AtomicUsize,
    /// The next item of each thread's own share; the caller's first.
    next: Box<[Counter]>,
    stop: AtomicBool,
    panicked: AtomicBool,
}

/// On a cache line of its own, as each is written all the time by one thread.
#[derive(Default)]
#[repr(align(128))]
struct Counter(AtomicUsize);

// SAFETY: `job` is written by the owner only while no worker runs, and read by workers only after they saw the epoch grow
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in it is only followed while the owner waits in `run`
unsafe impl Send for Shared {}

/// A fixed set of threads, the caller's among them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

impl Pool {
    /// A pool of `threads`, of which the caller is one.
    pub(crate) fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            epoch: AtomicUsize::new(0),
            unfinished: AtomicUsize::new(0),
            next: (0..threads.max(1)).map(|_| Counter::default()).collect(),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let spawn = |i: usize| {
            let shared = shared.clone();
            let builder = std::thread::Builder::new().name(format!("kernel-{i}"));
            builder.spawn(move || work(&shared, i)).expect("a thread can be started")
        };
        let workers: Vec<JoinHandle<()>> = (1..threads.max(1)).map(spawn).collect();
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Self { shared, workers, handles }
    }

    /// Threads, the caller's among them.
    pub(crate) fn threads(&self) -> usize {
        1 + self.workers.len()
    }

    /// Runs `job` over `0..items` in chunks, on all threads; returns when all is done. Each thread has a share of neighbours, which it goes
    /// through in order, since memory is read fastest in order; who is done with his own takes from the others'.
    pub(crate) fn for_each(&mut self, items: usize, chunk: usize, job: impl Fn(Range<usize>) + Sync) {
        if self.workers.is_empty() || items <= chunk {
            return job(0..items);
        }
        let shared = self.shared.clone();
        let threads = shared.next.len();
        let share = items.div_ceil(threads).next_multiple_of(chunk);
        shared.next.iter().enumerate().for_each(|(i, next)| next.0.store(i * share, Relaxed));
        self.run(&|me| {
            for i in 0..threads {
                let owner = (me + i) % threads;
                let end = items.min((owner + 1) * share);
                let take = || shared.next[owner].0.fetch_add(chunk, Relaxed);
                let mut start = take();
                while start < end {
                    job(start..end.min(start + chunk));
                    start = take();
                }
            }
        });
    }

    fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime is forgotten; this function does not return, or unwind, before every worker is done with `job`
        let forever: Job = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
        // SAFETY: no worker runs: `unfinished` was zero when the last `run` returned, and `&mut self` excludes a second caller
        unsafe { *self.shared.job.get() = Some(forever) };
        self.shared.unfinished.store(self.workers.len(), Relaxed);
        self.shared.epoch.fetch_add(1, Release);
        self.handles.iter().for_each(Thread::unpark);
        let waiter = Waiter(&self.shared);
        job(0);
        drop(waiter);
        assert!(!self.shared.panicked.swap(false, Relaxed), "a kernel panicked on another thread");
    }
}

/// Waits for the workers when dropped, also when the caller's own share panicked.
struct Waiter<'a>(&'a Shared);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut spins = 0;
        while self.0.unfinished.load(Acquire) > 0 {
            spins += 1;
            if spins % 2_000 == 0 {
                // another process may hold the worker's core
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }
}

fn work(shared: &Shared, me: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Acquire) == seen {
            if shared.stop.load(Relaxed) {
                return;
            }
            spins += 1;
            if spins % 2_000 == 0 {
                // on a busy machine somebody else may need this core
                std::thread::yield_now();
            }
            if spins > SPINS {
                std::thread::park();
                spins = 0;
            }
            std::hint::spin_loop();
        }
        seen += 1;
        // SAFETY: the epoch grew, so the owner has written a job and waits in `run` until `unfinished` is zero again
        let job = unsafe { (*shared.job.get()).expect("a job was handed over") };
        // SAFETY: as above, the closure lives until `unfinished` is zero
        let job = unsafe { &*job };
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(me))).is_err() {
            // the owner panics in its turn: half a result is no result
            shared.panicked.store(true, Relaxed);
        }
        shared.unfinished.fetch_sub(1, Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.handles.iter().for_each(Thread::unpark);
        self.workers.drain(..).for_each(|w| {
            let _ = w.join();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_on_any_thread_reaches_the_owner_and_the_pool_lives() {
        let mut pool = Pool::new(2);
        for _ in 0..20 {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.for_each(64, 1, |range| assert!(!range.contains(&40), "the fortieth item"));
            }));
            assert!(result.is_err());
            let done = AtomicUsize::new(0);
            pool.for_each(64, 1, |range| {
                done.fetch_add(range.len(), Relaxed);
            });
            assert_eq!(done.load(Relaxed), 64);
        }
    }

    #[test]
    fn every_item_is_done_once_also_after_sleep() {
        let mut pool = Pool::new(3);
        for round in 0..200 {
            let counts: Vec<AtomicUsize> = (0..97).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each(97, 8, |range| {
                for i in range {
                    counts[i].fetch_add(1, Relaxed);
                }
            });
            assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
            if round % 100 == 0 {
                // long enough for the workers to park
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    }
}
