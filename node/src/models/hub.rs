//! Models from the Hugging Face hub, by the `hf-hub` crate, which reads `HF_TOKEN` and `HF_ENDPOINT` itself.
//!
//! The hub publishes no checksum that this trusts: the SHA-256 recorded with the model is that of the first download.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use hf_hub::{
    HFClientBuilder, HFClientSync, HFError,
    progress::{DownloadEvent, ProgressEvent, ProgressHandler},
};

use super::{ModelError, ModelRef, Progress, Source, fetch::watched};

/// A file of a repository.
pub(super) struct RemoteFile<'a> {
    pub(super) owner: &'a str,
    pub(super) repo: &'a str,
    pub(super) file: &'a str,
}

/// A repository.
pub(super) struct Repository<'a> {
    pub(super) owner: &'a str,
    pub(super) repo: &'a str,
}

/// Files of a safetensors model beside its shards.
const FOLDER_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The reference with the file named: the repository's one GGUF file, when the reference names none. A repository without GGUF files
/// that holds a safetensors model stays as it is named, and means the folder.
pub(super) fn resolve(model: &ModelRef) -> Result<ModelRef, ModelError> {
    let Source::Hub { owner, repo, file: None } = model.source() else { return Ok(model.clone()) };
    if is_offline() {
        return Err(offline(model));
    }
    only_gguf(model, owner, repo, &client(model, HFClientBuilder::new())?)
}

/// Downloads one file to `target`.
pub(super) fn download(
    model: &ModelRef,
    remote: &RemoteFile<'_>,
    scratch: &Path,
    target: &Path,
    progress: &dyn Progress,
) -> Result<(), ModelError> {
    let client = client(model, HFClientBuilder::new())?;
    if is_offline() {
        return from_cache(model, remote, target, &client);
    }
    download_by(model, remote, scratch, target, progress, &client)
}

fn client(model: &ModelRef, builder: HFClientBuilder) -> Result<HFClientSync, ModelError> {
    builder.build_sync().map_err(|e| explain(model, &e))
}

/// The crate itself does not read this variable; its Python sibling does, and people set it.
fn is_offline() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
    matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

fn only_gguf(model: &ModelRef, owner: &str, repo: &str, client: &HFClientSync) -> Result<ModelRef, ModelError> {
    let names = names(model, &Repository { owner, repo }, client)?;
    let files: Vec<&String> = names.iter().filter(|name| name.ends_with(".gguf")).collect();
    match files.as_slice() {
        [] if is_folder(&names) => Ok(model.clone()),
        [] => {
            let cause = "the repository holds neither a GGUF file nor a safetensors model with its config.json";
            Err(ModelError::fetch(model, cause, "name a repository that does"))
        }
        [one] => {
            let full = format!("hf:{owner}/{repo}/{one}");
            full.parse().map_err(|e| ModelError::fetch(model, format!("{e}"), "name the file yourself"))
        }
        several => {
            let fix = format!("name one of them, such as hf:{owner}/{repo}/{}", several[0]);
            let listed = several.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
            Err(ModelError::fetch(model, format!("the repository holds {listed}"), fix))
        }
    }
}

/// All files of a repository, in the order of their names.
fn names(model: &ModelRef, of: &Repository<'_>, client: &HFClientSync) -> Result<Vec<String>, ModelError> {
    let info = client.model(of.owner, of.repo).info().send().map_err(|e| explain(model, &e))?;
    let mut names: Vec<String> = info.siblings.unwrap_or_default().into_iter().map(|file| file.rfilename).collect();
    names.sort();
    Ok(names)
}

fn is_folder(names: &[String]) -> bool {
    names.iter().any(|name| name == "config.json") && names.iter().any(|name| is_shard(name))
}

/// Whether a file of this name is part of a safetensors model.
pub(super) fn belongs(name: &str) -> bool {
    is_shard(name) || FOLDER_FILES.contains(&name)
}

/// A plain name, as it becomes part of a path.
fn is_shard(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    name.starts_with("model") && name.ends_with(".safetensors") && name.bytes().all(fits)
}

/// Downloads what a safetensors model needs of a repository to the folder `target`.
pub(super) fn download_folder(
    model: &ModelRef,
    of: &Repository<'_>,
    scratch: &Path,
    target: &Path,
    progress: &dyn Progress,
) -> Result<(), ModelError> {
    folder_by(model, of, scratch, target, progress, &client(model, HFClientBuilder::new())?)
}

fn folder_by(
    model: &ModelRef,
    of: &Repository<'_>,
    scratch: &Path,
    target: &Path,
    progress: &dyn Progress,
    client: &HFClientSync,
) -> Result<(), ModelError> {
    fs::create_dir_all(target).map_err(ModelError::io(target, "create"))?;
    let names = names(model, of, client)?;
    for file in names.iter().filter(|name| belongs(name)) {
        let remote = RemoteFile { owner: of.owner, repo: of.repo, file };
        download_by(model, &remote, scratch, &target.join(file), progress, client)?;
    }
    Ok(())
}

fn download_by(
    model: &ModelRef,
    remote: &RemoteFile<'_>,
    scratch: &Path,
    target: &Path,
    progress: &dyn Progress,
    client: &HFClientSync,
) -> Result<(), ModelError> {
    progress.begin(&format!("downloading {}", remote.file), None);
    let counter = Arc::new(Counter::default());
    let seen = || counter.report(remote.file, progress);
    let repo = client.model(remote.owner, remote.repo);
    let job = repo.download_file().filename(remote.file).local_dir(scratch).progress(Arc::clone(&counter));
    let file = watched(progress, seen, || job.send()).map_err(|e| explain(model, &e))?;
    fs::rename(&file, target).map_err(ModelError::io(target, "create"))
}

fn from_cache(
    model: &ModelRef,
    remote: &RemoteFile<'_>,
    target: &Path,
    client: &HFClientSync,
) -> Result<(), ModelError> {
    let repo = client.model(remote.owner, remote.repo);
    let cached: PathBuf =
        repo.download_file().filename(remote.file).local_files_only(true).send().map_err(|_| offline(model))?;
    fs::copy(&cached, target).map(|_| ()).map_err(ModelError::io(target, "write"))
}

fn offline(model: &ModelRef) -> ModelError {
    let fix = "unset HF_HUB_OFFLINE to allow the download, or give the path of a file";
    ModelError::fetch(model, "HF_HUB_OFFLINE is set and the hub's cache does not hold it", fix)
}

fn explain(model: &ModelRef, error: &HFError) -> ModelError {
    let fix = match error {
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
            "accept the model's terms on the hub, and set HF_TOKEN to a token that may read it"
        }
        HFError::RepoNotFound { .. } | HFError::EntryNotFound { .. } | HFError::RevisionNotFound { .. } => {
            "correct owner, repository and file; a private one needs HF_TOKEN"
        }
        HFError::Request { .. } => "see to the network; HF_ENDPOINT names another hub",
        HFError::Io(e) if e.kind() == std::io::ErrorKind::StorageFull => "free some disk space",
        _ => "try again later",
    };
    ModelError::fetch(model, with_sources(error), fix)
}

/// The whole chain: an HTTP error's own text leaves out why.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}

/// What the crate's callbacks say, kept for the thread that shows it.
#[derive(Default)]
struct Counter {
    total: AtomicU64,
    told_total: AtomicU64,
    done: AtomicU64,
}

impl Counter {
    fn report(&self, file: &str, progress: &dyn Progress) -> u64 {
        let total = self.total.load(Ordering::Relaxed);
        if total != self.told_total.swap(total, Ordering::Relaxed) {
            progress.begin(&format!("downloading {file}"), Some(total));
        }
        self.done.load(Ordering::Relaxed)
    }
}

impl ProgressHandler for Counter {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Start { total_bytes, .. } => self.total.store(*total_bytes, Ordering::Relaxed),
            DownloadEvent::Progress { files } => {
                let done = files.iter().map(|file| file.bytes_completed).max().unwrap_or(0);
                self.done.fetch_max(done, Ordering::Relaxed);
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => {
                self.done.fetch_max(*bytes_completed, Ordering::Relaxed);
            }
            DownloadEvent::Complete => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        net::TcpListener,
        thread,
    };

    use super::*;
    use crate::models::Silent;

    const INFO: &str =
        r#"{"_id":"1","id":"acme/tiny","siblings":[{"rfilename":"README.md"},{"rfilename":"tiny.gguf"}]}"#;

    const DENSE: &str = r#"{"_id":"2","id":"acme/dense","siblings":[{"rfilename":"README.md"},{"rfilename":"config.json"},
        {"rfilename":"model.safetensors"},{"rfilename":"sub/model.safetensors"},{"rfilename":"pytorch_model.bin"}]}"#;

    /// A hub of two repositories on loopback; answers until the test's process ends.
    fn fake_hub() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let request = lines.next().unwrap_or_default();
                lines.take_while(|line| !line.is_empty()).for_each(drop);
                let (status, body) = match request.split(' ').nth(1).unwrap_or_default() {
                    "/api/models/acme/tiny" => ("200 OK", INFO),
                    "/api/models/acme/dense" => ("200 OK", DENSE),
                    "/acme/tiny/resolve/main/tiny.gguf" => ("200 OK", "weights"),
                    "/acme/dense/resolve/main/config.json" => ("200 OK", "{}"),
                    "/acme/dense/resolve/main/model.safetensors" => ("200 OK", "dense"),
                    _ => ("404 Not Found", "{}"),
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-type: application/json\r\netag: \"e\"\r\n\
                     x-repo-commit: 0123\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                let body = if request.starts_with("HEAD") { "" } else { body };
                let _ = stream.write_all(format!("{head}{body}").as_bytes());
            }
        });
        address
    }

    fn hub(endpoint: &str) -> HFClientSync {
        tidegate_common::tls::install_provider();
        let model = "hf:acme/tiny".parse().unwrap();
        client(&model, HFClientBuilder::new().endpoint(endpoint).retry_max_attempts(0)).unwrap()
    }

    #[test]
    fn the_one_gguf_file_of_a_repository_is_found_and_downloaded() {
        let hub = hub(&fake_hub());
        let model = only_gguf(&"hf:acme/tiny".parse().unwrap(), "acme", "tiny", &hub).unwrap();
        assert_eq!(model.to_string(), "hf:acme/tiny/tiny.gguf");
        let dir = tempfile::tempdir().unwrap();
        let (scratch, target) = (dir.path().join("s"), dir.path().join("t"));
        let remote = RemoteFile { owner: "acme", repo: "tiny", file: "tiny.gguf" };
        download_by(&model, &remote, &scratch, &target, &Silent, &hub).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"weights");
    }

    #[test]
    fn a_safetensors_repository_becomes_a_folder_of_what_the_model_needs() {
        let hub = hub(&fake_hub());
        let model: ModelRef = "hf:acme/dense".parse().unwrap();
        assert_eq!(only_gguf(&model, "acme", "dense", &hub).unwrap(), model);
        let dir = tempfile::tempdir().unwrap();
        let (scratch, target) = (dir.path().join("s"), dir.path().join("t"));
        folder_by(&model, &Repository { owner: "acme", repo: "dense" }, &scratch, &target, &Silent, &hub).unwrap();
        let mut files: Vec<_> =
            fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        assert_eq!(files, ["config.json", "model.safetensors"]);
        assert_eq!(fs::read(target.join("model.safetensors")).unwrap(), b"dense");
    }

    #[test]
    fn a_missing_repository_and_a_hub_out_of_reach_say_what_to_do() {
        let model: ModelRef = "hf:acme/none/x.gguf".parse().unwrap();
        let text = only_gguf(&model, "acme", "none", &hub(&fake_hub())).unwrap_err().to_string();
        assert!(text.contains("correct owner"), "{text}");
        let closed = {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            format!("http://{}", listener.local_addr().unwrap())
        };
        let text = only_gguf(&model, "acme", "none", &hub(&closed)).unwrap_err().to_string();
        assert!(text.contains("see to the network") && text.contains("refused"), "{text}");
    }
}
