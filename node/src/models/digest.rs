//! SHA-256 of a file, read in pieces.

use std::{fs::File, io::Read, path::Path};

use sha2::{Digest, Sha256};

use super::{ModelError, Progress};

const PIECE_BYTES: usize = 1 << 20;

/// SHA-256 of the file in hexadecimal, and its size.
pub(super) fn of_file(path: &Path, progress: &dyn Progress) -> Result<(String, u64), ModelError> {
    let mut file = File::open(path).map_err(ModelError::io(path, "open"))?;
    let total = file.metadata().map_err(ModelError::io(path, "read"))?.len();
    progress.begin("checking SHA-256", Some(total));
    let (mut hasher, mut done) = (Sha256::new(), 0);
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let count = file.read(&mut piece).map_err(ModelError::io(path, "read"))?;
        if count == 0 {
            return Ok((hex(&hasher.finalize()), done));
        }
        hasher.update(&piece[..count]);
        done += count as u64;
        progress.at(done);
    }
}

/// SHA-256 of a text in hexadecimal.
pub(super) fn of_text(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Silent;

    #[test]
    fn the_digest_is_the_published_one_for_abc() {
        // FIPS 180-2, appendix B.1
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        let (digest, bytes) = of_file(file.path(), &Silent).unwrap();
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(bytes, 3);
    }
}
