//! Closed files: compressed, and removed when their time is over.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, SystemTime},
};

use flate2::{Compression, write::GzEncoder};
use tracing::{info, warn};

use super::{
    config::AuditConfig,
    files::{self, Name},
    frames,
};

/// Held by the one process that compresses.
const LOCK: &str = "keep.lock";

/// Compresses all files before the current one; at a time, one process of all does.
pub(crate) fn compress(config: &AuditConfig, current: &str) {
    let outcome = locked(config, || {
        for name in files::list(&config.folder)?.into_iter().filter(|name| is_closed(*name, current)) {
            if let Err(error) = compress_one(config, name) {
                warn!(file = %name, %error, "a file of the audit log stays uncompressed");
            }
        }
        Ok(())
    });
    if let Err(error) = outcome {
        warn!(%error, "the audit log's closed files stay uncompressed");
    }
}

fn locked(config: &AuditConfig, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let lock =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(config.folder.join(LOCK))?;
    // somebody else does it
    if lock.try_lock().is_err() { Ok(()) } else { work() }
}

fn is_closed(name: Name, current: &str) -> bool {
    !name.is_compressed
        && Name::parse(current).is_some_and(|current| (name.seq, name.turn) < (current.seq, current.turn))
}

/// Beside the file first, and in its place once it is whole.
fn compress_one(config: &AuditConfig, name: Name) -> io::Result<()> {
    let path = config.folder.join(name.to_string());
    let target = config.folder.join(name.compressed().to_string());
    let part = config.folder.join(format!("{}.part", name.compressed()));
    let written = fs::metadata(&path)?.modified()?;
    let mut reader = files::open(&path, &config.keys(), None)?;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    let mut chunk = vec![0; 64 << 10];
    loop {
        match reader.read(&mut chunk)? {
            0 => break,
            length => encoder.write_all(&chunk[..length])?,
        }
    }
    let mut content = encoder.finish()?;
    if let Some(master) = config.cipher.as_ref().filter(|_| name.is_encrypted) {
        content = frames::seal_all(master, &content);
    }
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
    file.write_all(&content)?;
    // as old as what is in it: its time ends by that
    file.set_modified(written)?;
    file.sync_all()?;
    fs::rename(&part, target)?;
    fs::remove_file(path)
}

/// The oldest files whose time is over, each with the number of its last record.
pub(crate) fn outdated(folder: &Path, current: &str, retention: Duration) -> io::Result<Vec<(Name, u64)>> {
    let names = files::list(folder)?;
    let mut outdated = Vec::new();
    for (name, next) in names.iter().zip(names.iter().skip(1)) {
        let written = fs::metadata(files::path_of(folder, *name))?.modified()?;
        let is_over = SystemTime::now().duration_since(written).is_ok_and(|age| age > retention);
        if !is_over || name.to_string() == current {
            break;
        }
        outdated.push((*name, next.seq.saturating_sub(1)));
    }
    Ok(outdated)
}

/// Removes a file whose end has been recorded.
pub(crate) fn remove(folder: &Path, name: Name) {
    match fs::remove_file(files::path_of(folder, name)) {
        Ok(()) => info!(file = %name, "a file of the audit log is removed, its time is over"),
        Err(error) => warn!(file = %name, %error, "a file of the audit log whose time is over stays"),
    }
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}
