//! Why a model cannot be had, in words that name the cause and what to do about it.

use std::{io, path::PathBuf};

/// A model that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Not on this machine.
    #[error("model '{model}' is not on this machine; looked at:\n{}\n  fix: {fix}", listed(.looked))]
    NotFound {
        /// The reference as given.
        model: String,
        /// Every place that was looked at.
        looked: Vec<PathBuf>,
        /// What to do.
        fix: String,
    },
    /// A file or folder of the store cannot be used.
    #[error("{path}: cannot {action}: {reason}{}", io_fix(.reason))]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        reason: io::Error,
    },
    /// Fetching failed.
    #[error("model '{model}' cannot be fetched: {cause}\n  fix: {fix}")]
    Fetch {
        /// The reference as given.
        model: String,
        /// What went wrong.
        cause: String,
        /// What to do.
        fix: String,
    },
    /// The file is not the one that was expected.
    #[error(
        "model '{model}' has SHA-256 {found}, but {expected} was expected; the file was thrown away\n  \
         fix: try again; if it stays so, the source does not serve the file that it should"
    )]
    Checksum {
        /// The reference as given.
        model: String,
        /// What the catalogue says.
        expected: String,
        /// What came.
        found: String,
    },
    /// No place to keep models.
    #[error("no folder to keep models in: {0}\n  fix: set TIDEGATE_DATA_DIR or give --data-dir")]
    NoHome(String),
}

impl ModelError {
    /// For `map_err` on an I/O result.
    pub(super) fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |reason| Self::Io { path, action, reason }
    }

    /// A fetch that failed.
    pub(super) fn fetch(model: impl ToString, cause: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Fetch { model: model.to_string(), cause: cause.into(), fix: fix.into() }
    }
}

fn listed(paths: &[PathBuf]) -> String {
    let lines: Vec<String> = paths.iter().map(|path| format!("    {}", path.display())).collect();
    lines.join("\n")
}

fn io_fix(reason: &io::Error) -> &'static str {
    match reason.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "\n  fix: free some disk space, or name another disk with --data-dir"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "\n  fix: give this user write access there, or name another folder with --data-dir"
        }
        _ => "",
    }
}
