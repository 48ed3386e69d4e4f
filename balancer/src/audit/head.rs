//! What is remembered of the newest line, in a file of its own: a log whose end was cut off is a sound chain otherwise.
//!
//! The file is also the lock: who holds it writes. So two processes, as in an upgrade, write one chain.

use std::{
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use ring::hmac;
use serde::{Deserialize, Serialize};

use super::{
    files::HEAD,
    line::{self, Link},
};

/// The state is written in place as one block of a disk.
const BLOCK: usize = 512;

/// Where the log ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    /// The newest line.
    pub(crate) link: Link,
    /// The file that lines are added to; empty before the first.
    pub(crate) file: String,
    /// Its length in bytes.
    pub(crate) bytes: u64,
    /// When it was begun, in Unix seconds.
    pub(crate) began: u64,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    seq: u64,
    line: String,
    file: String,
    bytes: u64,
    began: u64,
}

impl Head {
    pub(crate) const NONE: Self = Self { link: Link::START, file: String::new(), bytes: 0, began: 0 };

    fn to_block(&self, key: Option<&hmac::Key>) -> Vec<u8> {
        let stored = Stored {
            seq: self.link.seq,
            line: line::hex(&self.link.hash),
            file: self.file.clone(),
            bytes: self.bytes,
            began: self.began,
        };
        let mut block = serde_json::to_vec(&stored).unwrap_or_default(); // numbers and texts always serialize
        block.pop();
        line::close(&mut block, 0, key);
        block.resize(BLOCK - 1, b' ');
        block.push(b'\n');
        block
    }

    /// Reads what [`to_block`](Self::to_block) wrote.
    pub(crate) fn from_block(block: &[u8], keys: &[hmac::Key]) -> Option<Self> {
        let (content, _, has_mac) = line::open(block.trim_ascii_end(), keys).ok()?;
        if !keys.is_empty() && !has_mac {
            return None;
        }
        let object = [content, b"}"].concat();
        let stored: Stored = serde_json::from_slice(&object).ok()?;
        let link = Link { seq: stored.seq, hash: line::unhex(stored.line.as_bytes())? };
        Some(Self { link, file: stored.file, bytes: stored.bytes, began: stored.began })
    }

    /// What a folder's log remembers, for a reader.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub(crate) fn peek(folder: &Path, keys: &[hmac::Key]) -> io::Result<Option<Self>> {
        let file = match File::open(folder.join(HEAD)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        file.lock_shared()?;
        let mut block = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&file, BLOCK as u64), &mut block)?;
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, format!("{HEAD} was changed"));
        Self::from_block(&block, keys).map(Some).ok_or_else(damaged)
    }
}

/// The state's file.
pub(crate) struct HeadFile {
    path: PathBuf,
    file: Arc<File>,
    identity: (u64, u64),
    /// As it was read or written last.
    block: Vec<u8>,
}

/// While it is held, nobody else writes the log.
pub(crate) struct Lock(Arc<File>);

impl Drop for Lock {
    fn drop(&mut self) {
        // the system lets go of it at the file's end too
        let _ = self.0.unlock();
    }
}

/// What another process may have done since.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// Nothing.
    Same,
    /// It has written.
    Moved(Head),
    /// Nothing has been written ever.
    Empty,
    /// It is not as it was written.
    Damaged,
}

impl HeadFile {
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join(HEAD);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        let identity = identity(&file.metadata()?);
        Ok(Self { path, file: Arc::new(file), identity, block: Vec::new() })
    }

    /// Waits for its turn.
    ///
    /// # Errors
    /// When the file is not in its place any more.
    pub(crate) fn lock(&self) -> io::Result<Lock> {
        self.file.lock()?;
        let lock = Lock(Arc::clone(&self.file));
        if identity(&std::fs::metadata(&self.path)?) != self.identity {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{} was replaced", self.path.display())));
        }
        Ok(lock)
    }

    pub(crate) fn read(&mut self, keys: &[hmac::Key]) -> io::Result<News> {
        let mut block = [0; BLOCK];
        let length = self.file.read_at(&mut block, 0)?;
        if block[..length] == self.block[..] && length > 0 {
            return Ok(News::Same);
        }
        self.block = block[..length].to_vec();
        Ok(match Head::from_block(&self.block, keys) {
            Some(head) => News::Moved(head),
            None if length == 0 => News::Empty,
            None => News::Damaged,
        })
    }

    pub(crate) fn write(&mut self, head: &Head, key: Option<&hmac::Key>) -> io::Result<()> {
        let block = head.to_block(key);
        self.file.write_all_at(&block, 0)?;
        self.block = block;
        Ok(())
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// What tells a file from another in its place.
pub(crate) fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_reads_back_and_a_change_of_it_does_not() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &[1; 32]);
        let head = Head { link: Link { seq: 9, hash: [3; 32] }, file: "audit-1.jsonl".into(), bytes: 12, began: 34 };
        let block = head.to_block(Some(&key));
        assert_eq!(block.len(), BLOCK);
        let keys = [key];
        assert_eq!(Head::from_block(&block, &keys), Some(head.clone()));
        let changed = String::from_utf8(block).unwrap().replace("\"seq\":9", "\"seq\":8");
        assert_eq!(Head::from_block(changed.as_bytes(), &keys), None);
        assert_eq!(Head::from_block(&head.to_block(None), &keys), None, "made without the key");
    }
}
