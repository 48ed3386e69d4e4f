//! Files of one folder. A name from a file of the folder is not trusted: it must be a plain name, and what it leads to must lie in the
//! folder, also through links.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use bytes::Bytes;
use serde_json::Value as Json;

use crate::weights::{LoadError, map};

/// Largest text that is read whole; the largest tokenizers known have a third of it.
const TEXT_BYTES_MAX: u64 = 128 << 20;

/// A folder that exists.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    /// Without links.
    real: PathBuf,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let real = fs::canonicalize(path).map_err(|source| LoadError::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), real })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file of that name, when it is there.
    pub(super) fn find(&self, name: &str) -> Result<Option<PathBuf>, LoadError> {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) || name.contains('\0') {
            return Err(self.broken(format!("'{name}' is no plain file name; a model's files lie in one folder")));
        }
        let path = self.path.join(name);
        let io = |source| LoadError::Io { path: path.clone(), source };
        let real = match fs::canonicalize(&path) {
            Ok(real) => real,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
        };
        if !real.starts_with(&self.real) {
            let text = format!(
                "'{name}' is a link that leads out of the folder, to {}; put the file itself there",
                real.display()
            );
            return Err(self.broken(text));
        }
        if !fs::metadata(&real).map_err(io)?.is_file() {
            return Err(self.broken(format!("'{name}' is no plain file")));
        }
        Ok(Some(real))
    }

    /// A text, when it is there.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>, LoadError> {
        let Some(path) = self.find(name)? else { return Ok(None) };
        let io = |source| LoadError::Io { path: path.clone(), source };
        let size = fs::metadata(&path).map_err(io)?.len();
        if size > TEXT_BYTES_MAX {
            return Err(self.broken(format!("'{name}' has {size} bytes, more than {TEXT_BYTES_MAX}")));
        }
        fs::read_to_string(&path).map(Some).map_err(io)
    }

    /// A JSON file, when it is there.
    pub(super) fn json(&self, name: &str) -> Result<Option<Json>, LoadError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|e| self.broken(format!("'{name}' is no JSON: {e}")))
    }

    /// The bytes of a file that must be there.
    pub(super) fn map(&self, name: &str) -> Result<Bytes, LoadError> {
        let path = self.find(name)?.ok_or_else(|| self.broken(format!("'{name}' is missing")))?;
        map::file(&path)
    }

    /// An error about this folder.
    pub(super) fn broken(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Broken { path: self.path.clone(), reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn no_name_and_no_link_leads_out_of_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("model");
        fs::create_dir_all(inner.join("sub")).unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        fs::write(inner.join("a"), "x").unwrap();
        symlink("../secret", inner.join("out")).unwrap();
        symlink("a", inner.join("in")).unwrap();
        symlink("loop", inner.join("loop")).unwrap();
        let folder = Folder::open(&inner).unwrap();
        for name in ["../secret", "/etc/passwd", "", ".", "..", "sub/../../secret", "a/b", "a\0", "out", "sub", "loop"]
        {
            let error = folder.find(name).unwrap_err().to_string();
            assert!(error.contains("model"), "{error}");
        }
        assert!(folder.find("out").unwrap_err().to_string().contains("leads out of the folder"));
        assert!(folder.find("a").unwrap().is_some() && folder.find("in").unwrap().is_some());
        assert!(folder.find("none").unwrap().is_none());
    }
}
