//! Files that others read while they change: written beside and moved into place, so that a reader finds the old one or the new one whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Permissions of a secret: its owner alone reads it.
pub const SECRET: u32 = 0o600;

/// Holds the file at `path` against others who change it by this function too, until what it returns is dropped: who reads, changes and writes
/// a file would undo what somebody else has written meanwhile. The lock is a file beside it, `path.lock`, which stays.
///
/// # Errors
/// When that file cannot be made.
pub fn lock(path: &Path) -> io::Result<File> {
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path.with_added_extension("lock"))?;
    lock.lock()?;
    Ok(lock)
}

/// Puts a file with this content and these permissions in the place of the one at `path`, on disk before this returns.
///
/// # Errors
/// When the file beside it, `path.new`, cannot be written or moved; the one at `path` is as it was then.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let beside = path.with_added_extension("new");
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_new_one_has_its_own_permissions_and_nothing_stays_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.key");
        fs::write(&path, "old").unwrap();
        fs::write(dir.path().join("a.key.new"), "left by a crash").unwrap();
        replace(&path, b"new", SECRET).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, SECRET);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
