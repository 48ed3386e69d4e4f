//! What tells the files of one model from those of another without reading all of them: the beginning of each, where a GGUF file has all
//! but its weights, and samples of the rest. No proof as a checksum is, but a model of other weights differs in all of them.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use sha2::{Digest, Sha256};

use super::{ModelError, hub};

/// Bytes that are read of each file from its beginning.
const HEAD_BYTES: u64 = 16 << 20;
/// Samples of the rest.
const SAMPLES: u64 = 256;
/// Bytes of one.
const SAMPLE_BYTES: u64 = 4096;

/// SHA-256 of a model's file, or of a folder's files that belong to it, as far as they are read. Where the model lies makes no difference.
///
/// # Errors
/// When a file cannot be read.
pub fn sample(path: &Path) -> Result<[u8; 32], ModelError> {
    let mut hasher = Sha256::new();
    if !path.is_dir() {
        add(path, &mut hasher).map_err(ModelError::io(path, "read"))?;
        return Ok(hasher.finalize().into());
    }
    for name in names(path).map_err(ModelError::io(path, "list"))? {
        let file = path.join(&name);
        hasher.update(name);
        add(&file, &mut hasher).map_err(ModelError::io(file, "read"))?;
    }
    Ok(hasher.finalize().into())
}

fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    let mut names: Vec<String> = entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| hub::belongs(name));
    names.sort_unstable();
    Ok(names)
}

fn add(path: &Path, hasher: &mut Sha256) -> io::Result<()> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    hasher.update(bytes.to_le_bytes());
    let head = bytes.min(HEAD_BYTES);
    let mut buffer = vec![0; head as usize];
    file.read_exact_at(&mut buffer, 0)?;
    hasher.update(&buffer);
    // the first follows the beginning, the last ends the file
    let room = (bytes - head).saturating_sub(SAMPLE_BYTES);
    buffer.resize((bytes - head).min(SAMPLE_BYTES) as usize, 0);
    for i in 0..SAMPLES {
        file.read_exact_at(&mut buffer, head + room * i / (SAMPLES - 1))?;
        hasher.update(&buffer);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_the_end_and_the_length_all_tell() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of = |bytes: &[u8]| {
            fs::write(file.path(), bytes).unwrap();
            sample(file.path()).unwrap()
        };
        let large = HEAD_BYTES as usize + 3 * SAMPLE_BYTES as usize;
        for len in [0, 1, 5000, large] {
            let mut bytes = vec![7; len];
            let known = of(&bytes);
            assert_eq!(of(&bytes), known);
            for at in [0, len / 2, len.saturating_sub(1)].into_iter().filter(|at| *at < len) {
                bytes[at] = 8;
                assert_ne!(of(&bytes), known, "byte {at} of {len}");
                bytes[at] = 7;
            }
            bytes.push(7);
            assert_ne!(of(&bytes), known);
        }
    }

    #[test]
    fn of_a_folder_what_belongs_to_the_model_tells_and_nothing_else() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [a, b] = [folders[0].path(), folders[1].path()];
        for folder in [a, b] {
            fs::write(folder.join("model.safetensors"), "w").unwrap();
            fs::write(folder.join("config.json"), "{}").unwrap();
        }
        fs::write(b.join("README.md"), "told by nobody").unwrap();
        assert_eq!(sample(a).unwrap(), sample(b).unwrap());
        fs::write(b.join("tokenizer.json"), "{}").unwrap();
        assert_ne!(sample(a).unwrap(), sample(b).unwrap());
    }
}
