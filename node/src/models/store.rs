//! The folder that models are kept in: `<data dir>/models/`.
//!
//! A model is a file, or a folder of files, with a record beside it (`<file>.json`), written last: what has no record is not there.
//! Everything on the way in lies in `.partial/`, under one lock, so a crash leaves nothing that could be taken for a model.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tidegate_common::data_dir;

use super::{ModelError, ModelRef, Progress, Source, Wheels, digest, fetch, hub};

/// Version of the record's form.
const RECORD_VERSION: u32 = 1;

/// Models kept on this machine.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

/// What was known of a file when it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this form.
    pub v: u32,
    /// The reference that it was fetched by.
    pub model: String,
    /// SHA-256 in hexadecimal: of the file, or of the list of a folder's files as `sha256sum` writes it.
    pub sha256: String,
    /// Size of the file, or of all files.
    pub bytes: u64,
    /// The files of a folder, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileRecord>,
    /// SPDX name of the licence, where the catalogue knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
}

/// What was known of a folder's file when it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name.
    pub name: String,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
}

/// One model of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The file or folder.
    pub path: PathBuf,
    /// What is known of it.
    pub record: Record,
}

/// What [`Store::verify`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// The file is what it was.
    Good,
    /// The file has another SHA-256 now.
    Changed {
        /// Which.
        found: String,
    },
    /// The record is there and the file is not.
    Missing,
}

impl Store {
    /// The store below a data folder. Nothing is created before something is pulled.
    pub fn open(data_dir: &Path) -> Self {
        Self { folder: data_dir.join("models") }
    }

    /// The data folder when none is named: `$TIDEGATE_DATA_DIR`, else `tidegate` in the user's XDG data folder.
    ///
    /// # Errors
    /// When the variable is not set and the user has no home.
    pub fn default_data_dir() -> Result<PathBuf, ModelError> {
        data_dir::default().map_err(ModelError::NoHome)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the model lies on this machine. Never touches the network.
    ///
    /// # Errors
    /// [`ModelError::NotFound`], with every place that was looked at.
    pub fn locate(&self, model: &ModelRef) -> Result<PathBuf, ModelError> {
        let looked = match model.source() {
            Source::Path(path) => {
                let path = std::path::absolute(path).map_err(ModelError::io(path, "find"))?;
                if path.exists() {
                    return Ok(path);
                }
                path
            }
            Source::Hub { file: None, .. } if is_present(&self.folder.join(place(model))) => {
                return Ok(self.folder.join(place(model)));
            }
            Source::Hub { owner, repo, file: None } => {
                let folder = self.folder.join("hf").join(owner).join(repo);
                if let [kept] = self.below(&folder)?.as_slice() {
                    return Ok(kept.path.clone());
                }
                folder
            }
            _ => {
                let path = self.folder.join(place(model));
                if is_present(&path) {
                    return Ok(path);
                }
                path
            }
        };
        Err(not_found(model, looked))
    }

    /// Where the model lies, after fetching it when it is not there yet.
    ///
    /// # Errors
    /// When it cannot be fetched, kept, or is not what it should be; nothing is left behind then.
    pub fn pull(&self, model: &ModelRef, progress: &dyn Progress) -> Result<PathBuf, ModelError> {
        match self.locate(model) {
            Err(ModelError::NotFound { .. }) if !matches!(model.source(), Source::Path(_)) => {}
            settled => return settled,
        }
        fs::create_dir_all(&self.folder).map_err(ModelError::io(&self.folder, "create"))?;
        let _lock = self.lock(progress)?;
        // another process may have pulled it while this one waited
        match self.locate(model) {
            Err(ModelError::NotFound { .. }) => self.pull_locked(model, progress),
            settled => settled,
        }
    }

    /// All models, in the order of their paths.
    ///
    /// # Errors
    /// When a folder cannot be listed or a record cannot be read.
    pub fn list(&self) -> Result<Vec<Kept>, ModelError> {
        let mut kept = self.below(&self.folder)?;
        kept.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(kept)
    }

    /// Reads a model's file again and compares it with its record.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn verify(&self, kept: &Kept, progress: &dyn Progress) -> Result<State, ModelError> {
        if !kept.path.exists() {
            return Ok(State::Missing);
        }
        let found = measure(&kept.path, progress)?.sha256;
        Ok(if found == kept.record.sha256 { State::Good } else { State::Changed { found } })
    }

    fn pull_locked(&self, model: &ModelRef, progress: &dyn Progress) -> Result<PathBuf, ModelError> {
        let model = &hub::resolve(model)?;
        let scratch = self.folder.join(".partial");
        remove_all(&scratch)?;
        let result = self.pull_through(model, &scratch, progress);
        let cleaned = remove_all(&scratch);
        let path = result?;
        cleaned.map(|()| path)
    }

    fn pull_through(&self, model: &ModelRef, scratch: &Path, progress: &dyn Progress) -> Result<PathBuf, ModelError> {
        let download = scratch.join("download");
        fs::create_dir_all(&download).map_err(ModelError::io(&download, "create"))?;
        let file = scratch.join("model");
        fetch::fetch(model, &download, &file, progress)?;
        let record = examine(model, &file, progress)?;
        let path = self.folder.join(place(model));
        keep(&record, &file, &path)?;
        Ok(path)
    }

    fn lock(&self, progress: &dyn Progress) -> Result<File, ModelError> {
        let path = self.folder.join(".lock");
        let lock = File::create(&path).map_err(ModelError::io(&path, "create"))?;
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => progress.begin("waiting for another process that pulls a model", None),
            Err(TryLockError::Error(e)) => return Err(ModelError::io(path, "lock")(e)),
        }
        lock.lock().map_err(ModelError::io(path, "lock"))?;
        Ok(lock)
    }

    fn below(&self, folder: &Path) -> Result<Vec<Kept>, ModelError> {
        let mut found = Vec::new();
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(found),
            Err(e) => return Err(ModelError::io(folder, "list")(e)),
        };
        for entry in entries {
            let path = entry.map_err(ModelError::io(folder, "list"))?.path();
            let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if path.is_dir() {
                // a folder with a record beside it is a model, and what lies in it is its own
                if !hidden && !record_path(&path).exists() {
                    found.extend(self.below(&path)?);
                }
            } else if let Some(file) = described_by(&path) {
                found.push(Kept { record: read_record(&file)?, path: file });
            }
        }
        Ok(found)
    }
}

/// Where a model lies below the store's folder. References are narrow enough to be paths, see `reference`.
fn place(model: &ModelRef) -> PathBuf {
    match model.source() {
        Source::Pip(wheels) => Path::new("pip").join(folder_of(wheels)).join(wheels.whole()),
        Source::Hub { owner, repo, file: Some(file) } => Path::new("hf").join(owner).join(repo).join(file),
        Source::Hub { owner, repo, file: None } => Path::new("hf-folder").join(owner).join(repo),
        Source::Random(shape) => Path::new("random").join(format!("{}.gguf", shape.name)),
        Source::Path(path) => path.clone(),
    }
}

/// The package's name and version; of parts the first one's, and what tells these parts from others.
fn folder_of(wheels: &Wheels) -> String {
    let names: Vec<String> = wheels.parts.iter().map(|part| format!("{}/{}", part.requirement(), part.file)).collect();
    let first = wheels.parts.first().map(|part| format!("{}-{}", part.package, part.version)).unwrap_or_default();
    match names.as_slice() {
        [_] => first,
        parts => format!("{first}-{}", &digest::of_text(&parts.join(","))[..12]),
    }
}

fn not_found(model: &ModelRef, looked: PathBuf) -> ModelError {
    let fix = match model.source() {
        Source::Path(_) => "correct the path, or name a model of the catalogue".to_owned(),
        _ => format!("run `tidegate model pull {model}`"),
    };
    ModelError::NotFound { model: model.to_string(), looked: vec![looked], fix }
}

fn examine(model: &ModelRef, file: &Path, progress: &dyn Progress) -> Result<Record, ModelError> {
    let Measured { sha256, bytes, files } = measure(file, progress)?;
    if let Some(expected) = model.sha256().filter(|expected| *expected != sha256) {
        return Err(ModelError::Checksum { model: model.to_string(), expected: expected.to_owned(), found: sha256 });
    }
    let licence = model.entry().map(|entry| entry.licence.to_owned());
    Ok(Record { v: RECORD_VERSION, model: model.to_string(), sha256, bytes, files, licence })
}

/// What is told of a file or folder by reading it.
struct Measured {
    sha256: String,
    bytes: u64,
    files: Vec<FileRecord>,
}

fn measure(path: &Path, progress: &dyn Progress) -> Result<Measured, ModelError> {
    if !path.is_dir() {
        let (sha256, bytes) = digest::of_file(path, progress)?;
        return Ok(Measured { sha256, bytes, files: Vec::new() });
    }
    let mut files = Vec::new();
    for path in files_in(path)? {
        let (sha256, bytes) = digest::of_file(&path, progress)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push(FileRecord { name, sha256, bytes });
    }
    let list: String = files.iter().map(|file| format!("{}  {}\n", file.sha256, file.name)).collect();
    let bytes = files.iter().map(|file| file.bytes).sum();
    Ok(Measured { sha256: digest::of_text(&list), bytes, files })
}

/// Paths of a folder's files, in the order of their names.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let list = || -> std::io::Result<Vec<PathBuf>> { fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect() };
    let mut paths = list().map_err(ModelError::io(folder, "list"))?;
    paths.sort();
    Ok(paths)
}

fn keep(record: &Record, file: &Path, path: &Path) -> Result<(), ModelError> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(ModelError::io(folder, "create"))?;
    let written = if file.is_dir() { files_in(file)? } else { vec![file.to_owned()] };
    for file in &written {
        File::open(file).and_then(|f| f.sync_all()).map_err(ModelError::io(file, "write"))?;
    }
    if file.is_dir() {
        // what an earlier crash left there has no record, so it is nobody's
        remove_all(path)?;
    }
    fs::rename(file, path).map_err(ModelError::io(path, "create"))?;
    let text = serde_json::to_vec_pretty(record).expect("a record is plain data");
    let draft = file.with_extension("json");
    fs::write(&draft, text).map_err(ModelError::io(&draft, "write"))?;
    let beside = record_path(path);
    fs::rename(&draft, &beside).map_err(ModelError::io(beside, "create"))
}

fn is_present(path: &Path) -> bool {
    let has = |path: &Path, bytes: u64| fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == bytes);
    read_record(path).is_ok_and(|record| match record.files.as_slice() {
        [] => has(path, record.bytes),
        files => files.iter().all(|file| has(&path.join(&file.name), file.bytes)),
    })
}

fn record_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    PathBuf::from(name)
}

/// The model that `path` is the record of.
fn described_by(path: &Path) -> Option<PathBuf> {
    let text = path.to_str()?;
    text.strip_suffix(".json").map(PathBuf::from)
}

fn read_record(path: &Path) -> Result<Record, ModelError> {
    let beside = record_path(path);
    let text = fs::read(&beside).map_err(ModelError::io(&beside, "read"))?;
    serde_json::from_slice(&text).map_err(|e| ModelError::io(beside, "understand")(e.into()))
}

fn remove_all(folder: &Path) -> Result<(), ModelError> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(ModelError::io(folder, "remove")(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Silent;

    fn model(text: &str) -> ModelRef {
        text.parse().unwrap()
    }

    /// A store with one file in it, as a pull would have left it.
    fn with_model(dir: &Path, text: &str, weights: &[u8]) -> (Store, PathBuf) {
        let store = Store::open(dir);
        let path = store.folder.join(place(&model(text)));
        let draft = dir.join("draft");
        fs::write(&draft, weights).unwrap();
        let record = examine(&model(text), &draft, &Silent).unwrap();
        keep(&record, &draft, &path).unwrap();
        (store, path)
    }

    #[test]
    fn what_is_kept_is_located_listed_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let (store, path) = with_model(dir.path(), "hf:acme/tiny/sub/t.gguf", b"weights");
        assert_eq!(store.locate(&model("hf:acme/tiny/sub/t.gguf")).unwrap(), path);
        assert_eq!(store.locate(&model("hf:acme/tiny")).unwrap(), path);
        // pulling again does nothing: there is no network in a unit test
        assert_eq!(store.pull(&model("hf:acme/tiny/sub/t.gguf"), &Silent).unwrap(), path);
        let kept = store.list().unwrap();
        assert_eq!(kept.len(), 1);
        assert_eq!((kept[0].record.model.as_str(), kept[0].record.bytes), ("hf:acme/tiny/sub/t.gguf", 7));
        assert_eq!(store.verify(&kept[0], &Silent).unwrap(), State::Good);
    }

    #[test]
    fn a_folder_is_one_model_with_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let (store, model) = (Store::open(dir.path()), model("hf:acme/dense"));
        let (path, draft) = (store.folder.join(place(&model)), dir.path().join("draft"));
        let write = |config: &str| {
            fs::create_dir_all(&draft).unwrap();
            fs::write(draft.join("config.json"), config).unwrap();
            fs::write(draft.join("model.safetensors"), "weights").unwrap();
        };
        write("{}");
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("left-by-a-crash"), "x").unwrap();
        assert!(store.locate(&model).is_err());
        keep(&examine(&model, &draft, &Silent).unwrap(), &draft, &path).unwrap();
        assert_eq!(store.locate(&model).unwrap(), path);
        let kept = store.list().unwrap();
        assert_eq!((kept.len(), kept[0].record.bytes, kept[0].record.files.len()), (1, 9, 2));
        assert_eq!(store.verify(&kept[0], &Silent).unwrap(), State::Good);
        fs::write(path.join("config.json"), "[]").unwrap();
        assert!(matches!(store.verify(&kept[0], &Silent).unwrap(), State::Changed { .. }));
        fs::remove_file(path.join("model.safetensors")).unwrap();
        assert!(store.locate(&model).is_err());
    }

    /// Other parts with the same first one are another model.
    #[test]
    fn parts_have_a_place_of_their_own() {
        let at = |text: &str| place(&model(text));
        let one = at("pip:a==1/m.gguf.part0,b==1/m.gguf.part1");
        assert!(one.ends_with("m.gguf") && one.starts_with("pip"));
        assert_ne!(one, at("pip:a==1/m.gguf.part0,c==1/m.gguf.part1"));
        assert_eq!(one, at("pip:a==1/m.gguf.part0,b==1/m.gguf.part1#s==1/SUMS"));
        assert_eq!(at("pip:a==1/x/m.gguf"), Path::new("pip/a-1/x/m.gguf"));
    }

    #[test]
    fn a_flipped_bit_and_a_lost_file_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (store, path) = with_model(dir.path(), "pip:acme==1/t.gguf", b"weights");
        let kept = store.list().unwrap().remove(0);
        fs::write(&path, b"weightz").unwrap();
        assert!(matches!(store.verify(&kept, &Silent).unwrap(), State::Changed { .. }));
        fs::remove_file(&path).unwrap();
        assert_eq!(store.verify(&kept, &Silent).unwrap(), State::Missing);
    }

    #[test]
    fn a_file_cut_short_or_without_record_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let (store, path) = with_model(dir.path(), "pip:acme==1/t.gguf", b"weights");
        fs::write(&path, b"wei").unwrap();
        assert!(store.locate(&model("pip:acme==1/t.gguf")).is_err());
        fs::write(&path, b"weights").unwrap();
        fs::remove_file(record_path(&path)).unwrap();
        assert!(store.locate(&model("pip:acme==1/t.gguf")).is_err());
    }

    #[test]
    fn a_model_that_is_not_there_says_where_it_was_looked_for_and_how_to_get_it() {
        let dir = tempfile::tempdir().unwrap();
        let text = Store::open(dir.path()).locate(&ModelRef::default()).unwrap_err().to_string();
        assert!(
            text.contains("tidegate model pull smollm2-135m") && text.contains(dir.path().to_str().unwrap()),
            "{text}"
        );
        let text = Store::open(dir.path()).pull(&model("/no/such.gguf"), &Silent).unwrap_err().to_string();
        assert!(text.contains("/no/such.gguf") && text.contains("correct the path"), "{text}");
    }

    #[test]
    fn the_wrong_file_is_refused_with_both_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        fs::write(&file, "not the model").unwrap();
        let error = examine(&ModelRef::default(), &file, &Silent).unwrap_err();
        let ModelError::Checksum { expected, found, .. } = error else { panic!("{error}") };
        assert!(expected.starts_with("b179c952") && found.len() == 64);
    }

    #[test]
    fn several_files_of_one_repository_make_its_bare_name_ambiguous() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = with_model(dir.path(), "hf:acme/tiny/a.gguf", b"a");
        with_model(dir.path(), "hf:acme/tiny/b.gguf", b"b");
        assert!(store.locate(&model("hf:acme/tiny")).is_err());
    }

    #[test]
    fn a_second_process_waits_for_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = with_model(dir.path(), "hf:acme/tiny/a.gguf", b"a");
        let held = store.lock(&Silent).unwrap();
        let second = File::open(store.folder.join(".lock")).unwrap();
        assert!(matches!(second.try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        second.try_lock().unwrap();
    }
}
