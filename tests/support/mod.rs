//! What every whole-cluster test stands on: processes that never outlive their test, a cluster of them, clients, certificates.

#[path = "../../common/tests/support/etcd.rs"]
pub(crate) mod etcd;

#[path = "../../common/tests/support/collector.rs"]
pub(crate) mod collector;

pub(crate) mod process;
pub(crate) mod cable;
pub(crate) mod cluster;
pub(crate) mod client;
pub(crate) mod certs;
pub(crate) mod clock;
pub(crate) mod isolated;

use std::{
    future::Future,
    time::{Duration, Instant},
};

use tokio::time::sleep;

/// The model of these tests, as the catalogue names it.
pub(crate) const MODEL: &str = "smollm2-135m";

/// How long loading the model may take on a busy machine.
pub(crate) const LOADING: Duration = Duration::from_secs(60);

/// Asks again and again until the answer is yes; how long that took.
///
/// # Panics
/// When the answer is not yes within `limit`; `what` says what was waited for.
pub(crate) async fn until<F: Future<Output = bool>>(
    what: &str,
    limit: Duration,
    mut question: impl FnMut() -> F,
) -> Duration {
    let start = Instant::now();
    while start.elapsed() < limit {
        if question().await {
            return start.elapsed();
        }
        sleep(Duration::from_millis(25)).await;
    }
    panic!("not within {limit:?}: {what}");
}
