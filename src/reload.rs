//! A balancer's configuration while it runs: read again at SIGHUP, and when the file or one that it names changes.

use std::path::PathBuf;

use tidegate_balancer::{BalancerConfig, Reloads};
use tidegate_common::{
    config::{Problems, Raw},
    reload::Watcher,
};
use tracing::{info, warn};

use crate::exit::Failure;

/// The configuration, as it is read at the start and again.
pub(crate) trait Source {
    /// Where the file is, if there is one.
    fn file(&self) -> Option<PathBuf>;

    /// File, environment and flags, one over the other.
    fn raw(&self) -> Result<Raw, Problems>;

    /// What the balancer is told.
    fn checked(&self, raw: &Raw) -> Result<BalancerConfig, Problems>;
}

/// Hands new readings to the balancer. It ends only when it cannot begin. `started` is what the process was started with.
pub(crate) async fn follow(source: impl Source, started: (Raw, Vec<PathBuf>), reloads: Reloads) -> Failure {
    let (first, files) = started;
    let mut last = first.clone();
    let with_file = |files: &[PathBuf]| source.file().into_iter().chain(files.iter().cloned()).collect::<Vec<_>>();
    let mut watcher = match Watcher::new(with_file(&files)) {
        Ok(watcher) => watcher,
        Err(e) => return Failure::internal(format!("cannot listen for signals: {e}")),
    };
    loop {
        let why = watcher.changed().await;
        info!(why, "reading the configuration again");
        let reading = source.raw().and_then(|raw| Ok((source.checked(&raw)?, raw)));
        let mut changed = Vec::new();
        let reading = reading.map(|(config, raw)| {
            tell_fixed(&first, &raw);
            watcher.watch(with_file(config.files()));
            changed = raw.differences(&last);
            last = raw;
            config
        });
        reloads.give(reading, changed).await;
    }
}

fn tell_fixed(first: &Raw, now: &Raw) {
    for path in now.differences(first).into_iter().filter(|path| is_fixed(path)) {
        warn!(path, "this changes with the next start; `tidegate balancer --upgrade` makes one that nobody notices");
    }
}

fn is_fixed(path: &str) -> bool {
    let is_within =
        |fixed: &&str| path.strip_prefix(fixed).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    BalancerConfig::FIXED.iter().any(is_within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_to_the_end_is_told_by_its_path_and_all_below_it() {
        for path in ["balancer.listen", "balancer.admin.listen", "cluster.registry.endpoints", "log.level"] {
            assert!(is_fixed(path), "{path}");
        }
        for path in ["balancer.listened", "balancer.tls.cert", "balancer.limits.max_body", "node.id"] {
            assert!(!is_fixed(path), "{path}");
        }
    }
}
