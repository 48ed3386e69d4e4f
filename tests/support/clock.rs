//! Clocks that are off: a process started so lives in a time of day of its own.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The library that bends the time of day.
pub(crate) struct Clock(PathBuf);

impl Clock {
    /// Compiles it, with the compiler that the build needs anyway.
    pub(crate) fn make(folder: &Path) -> Self {
        let library = folder.join("clock.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/clock.c");
        let status = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status().unwrap();
        assert!(status.success(), "cc: {status}");
        Self(library)
    }

    /// Has `command` run so many seconds ahead of the time.
    pub(crate) fn off_by<'c>(&self, seconds: i64, command: &'c mut Command) -> &'c mut Command {
        command.env("LD_PRELOAD", &self.0).env("CLOCK_OFF_S", seconds.to_string())
    }
}
