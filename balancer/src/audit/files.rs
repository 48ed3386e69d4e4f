//! The folder of an audit log: which files are in it and how each is read.
//!
//! `audit-<number of its first line>.jsonl`, `-<turn>` behind the number where a file of that number was there already; `.gz` once it is
//! closed and compressed, `.enc` when it is encrypted, and then it was compressed first.

use std::{
    cmp::Ordering,
    fmt,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use flate2::bufread::MultiGzDecoder;

use super::{config::KeyRing, frames::Frames};

/// The file that remembers the newest line.
pub(crate) const HEAD: &str = "head.json";

/// A file's name, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    /// Number of its first line.
    pub(crate) seq: u64,
    pub(crate) turn: u32,
    pub(crate) is_compressed: bool,
    pub(crate) is_encrypted: bool,
}

impl Name {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("audit-")?;
        let (rest, is_encrypted) = rest.strip_suffix(".enc").map_or((rest, false), |rest| (rest, true));
        let (rest, is_compressed) = rest.strip_suffix(".gz").map_or((rest, false), |rest| (rest, true));
        let rest = rest.strip_suffix(".jsonl")?;
        let (seq, turn) = rest.split_once('-').unwrap_or((rest, "0"));
        let name_of = Self { seq: seq.parse().ok()?, turn: turn.parse().ok()?, is_compressed, is_encrypted };
        (name_of.to_string() == name).then_some(name_of)
    }

    /// The same part of the log, compressed.
    pub(crate) fn compressed(self) -> Self {
        Self { is_compressed: true, ..self }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "audit-{:020}", self.seq)?;
        if self.turn > 0 {
            write!(f, "-{}", self.turn)?;
        }
        f.write_str(".jsonl")?;
        f.write_str(if self.is_compressed { ".gz" } else { "" })?;
        f.write_str(if self.is_encrypted { ".enc" } else { "" })
    }
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |name: &Self| (name.seq, name.turn, name.is_compressed, name.is_encrypted);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The log's files in their order; of one that is there twice, because its compression was cut short, the first.
pub(crate) fn list(folder: &Path) -> io::Result<Vec<Name>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.extend(entry?.file_name().to_str().and_then(Name::parse));
    }
    names.sort_unstable();
    names.dedup_by_key(|name| (name.seq, name.turn));
    Ok(names)
}

/// Opens a file for reading its lines. Of a file that is still written, `limit` says how many bytes count.
///
/// # Errors
/// When it cannot be opened, or is encrypted and there is no key.
pub(crate) fn open(path: &Path, keys: &KeyRing, limit: Option<u64>) -> io::Result<Box<dyn BufRead>> {
    let name = path.to_string_lossy();
    let file = BufReader::new(File::open(path)?.take(limit.unwrap_or(u64::MAX)));
    let (inner, is_encrypted) = name.strip_suffix(".enc").map_or((&*name, false), |inner| (inner, true));
    if is_encrypted && keys.ciphers.is_empty() {
        let message = "is encrypted: give the key file that balancer.audit.encryption_key_file names";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    Ok(match (is_encrypted, inner.ends_with(".gz")) {
        (false, false) => Box::new(file),
        (false, true) => Box::new(BufReader::new(MultiGzDecoder::new(file))),
        (true, false) => Box::new(Frames::new(file, &keys.ciphers)?),
        (true, true) => Box::new(BufReader::new(MultiGzDecoder::new(Frames::new(file, &keys.ciphers)?))),
    })
}

/// Where a part of the log is now: it may have been compressed since it was listed.
pub(crate) fn path_of(folder: &Path, name: Name) -> PathBuf {
    let path = folder.join(name.to_string());
    let later = folder.join(name.compressed().to_string());
    if !path.exists() && later.exists() { later } else { path }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_name_reads_back(seq: u64, turn in 0u32..100, is_compressed: bool, is_encrypted: bool) {
            let name = Name { seq, turn, is_compressed, is_encrypted };
            prop_assert_eq!(Name::parse(&name.to_string()), Some(name));
        }
    }

    #[test]
    fn what_is_not_ours_is_no_part_of_the_log() {
        for other in ["head.json", "audit-1.jsonl", "audit-x.jsonl", "audit-00000000000000000001.jsonl.part", "audit-"]
        {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }
}
