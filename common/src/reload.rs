//! When to read files again: at SIGHUP, and when one of them is another than before.
//!
//! Files are looked at once a second, through symbolic links: Kubernetes swaps a link above the files, which a watch on the files or their
//! folder may not see. A change counts once it has stood still for two looks, since a certificate and its key come one after the other.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::sleep,
};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Looks at files.
#[derive(Debug)]
pub struct Watcher {
    files: Vec<PathBuf>,
    looks: Looks,
    hangups: Signal,
}

impl Watcher {
    /// Looks at `files` from now on, and takes SIGHUP, which ends a process that nobody takes it for.
    ///
    /// # Errors
    /// When the process may not listen for signals.
    pub fn new(files: Vec<PathBuf>) -> io::Result<Self> {
        Ok(Self { looks: Looks::new(stamps(&files)), files, hangups: signal(SignalKind::hangup())? })
    }

    /// Looks at these files from now on.
    pub fn watch(&mut self, files: Vec<PathBuf>) {
        if self.files != files {
            self.looks = Looks::new(stamps(&files));
            self.files = files;
        }
    }

    /// Returns when it is time to read the files again, with the reason.
    ///
    /// # Cancel safety
    /// Safe: what was not told yet is told next time.
    pub async fn changed(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.hangups.recv() => {
                    self.looks = Looks::new(stamps(&self.files));
                    return "SIGHUP";
                }
                () = sleep(INTERVAL) => {}
            }
            if self.looks.tell(stamps(&self.files)) {
                return "a file changed";
            }
        }
    }
}

/// What tells a file from the one before it: device, inode, time of change in seconds and nanoseconds, length. None when there is none.
type Stamp = Option<(u64, u64, i64, i64, u64)>;

fn stamp(file: &Path) -> Stamp {
    let found = fs::metadata(file).ok()?;
    Some((found.dev(), found.ino(), found.mtime(), found.mtime_nsec(), found.size()))
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    files.iter().map(|file| stamp(file)).collect()
}

/// What was told of, and the last look.
#[derive(Debug)]
struct Looks {
    told: Vec<Stamp>,
    last: Vec<Stamp>,
}

impl Looks {
    fn new(now: Vec<Stamp>) -> Self {
        Self { told: now.clone(), last: now }
    }

    /// Whether the files are others than those told of last, and have stood still since the last look.
    fn tell(&mut self, now: Vec<Stamp>) -> bool {
        let stands_still = now == self.last;
        self.last = now;
        let is_news = stands_still && self.last != self.told;
        if is_news {
            self.told.clone_from(&self.last);
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_changed_a_swapped_and_a_missing_file_are_told_once_each() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for (version, text) in [("v1", "one"), ("v2", "two")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("cert"), text).unwrap();
        }
        symlink("v1", at("data")).unwrap();
        symlink("data/cert", at("cert")).unwrap();
        let files = [at("cert")];
        let mut looks = Looks::new(stamps(&files));
        let mut told = || [(); 4].map(|()| looks.tell(stamps(&files)));
        const AFTER_ONE_LOOK: [bool; 4] = [false, true, false, false];
        assert_eq!(told(), [false; 4]);
        // as Kubernetes does it: a new link beside the old one, moved over it
        symlink("v2", at("data_new")).unwrap();
        fs::rename(at("data_new"), at("data")).unwrap();
        assert_eq!(told(), AFTER_ONE_LOOK, "a link above the file was swapped");
        fs::write(at("v2").join("cert"), "longer").unwrap();
        assert_eq!(told(), AFTER_ONE_LOOK);
        fs::remove_file(at("v2").join("cert")).unwrap();
        assert_eq!(told(), AFTER_ONE_LOOK);
    }

    #[test]
    fn what_is_still_changing_is_not_told() {
        let look = |n: u64| vec![Some((0, n, 0, 0, 0))];
        let mut looks = Looks::new(look(0));
        let told = [1, 2, 3, 3, 3, 0, 0].map(|n| looks.tell(look(n)));
        assert_eq!(told, [false, false, false, true, false, false, true]);
    }
}
