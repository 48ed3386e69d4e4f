//! Files in memory without reading them.
// a memory map is unsafe because another process could cut the file while we read
#![allow(unsafe_code)]

use std::{fs::File, path::Path};

use bytes::Bytes;
use memmap2::Mmap;

use super::LoadError;

/// The bytes of a file, read as they are used.
pub(super) fn file(path: &Path) -> Result<Bytes, LoadError> {
    let io = |source| LoadError::Io { path: path.to_owned(), source };
    // opening a pipe would wait for its other end
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(LoadError::Broken { path: path.to_owned(), reason: "it is no plain file".to_owned() });
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is read only; a file that is cut while it is mapped can end the process, which the store rules out by
    // replacing files whole and never writing into them
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(map))
}
