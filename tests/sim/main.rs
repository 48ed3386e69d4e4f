//! Seeded simulation of scheduler and KV pool: thousands of small worlds of random sizes, each with its own requests.
//!
//! `laws` shows that the accounting holds after every step, that everybody comes to an end, and that no answer depends on who shared the
//! pool. `fair` shows what a tenant gets beside others that want more than there is.
//! Each world prints its seed when it fails; `TIDEGATE_SIM_SEED=n` runs that world alone, `TIDEGATE_SIM_WORLDS` sets how many there are.

#![allow(clippy::print_stdout)] // the figures of a run are read by people

mod fair;
mod laws;

/// Runs the worlds of all seeds, or of the one that is asked for; gives what each came to.
fn in_every_world<T>(worlds: u64, run: impl Fn(u64) -> T + std::panic::RefUnwindSafe) -> Vec<T> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("TIDEGATE_SIM_SEED") {
        return vec![run(seed)];
    }
    let seeds = 0..number("TIDEGATE_SIM_WORLDS").unwrap_or(worlds);
    let tried = |seed| {
        std::panic::catch_unwind(|| run(seed)).unwrap_or_else(|_| {
            panic!("the world of seed {seed} broke a law; run it alone with TIDEGATE_SIM_SEED={seed}")
        })
    };
    seeds.map(tried).collect()
}
