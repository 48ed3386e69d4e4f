//! Reading the log: whether it is whole, and what stands in it. It never writes.

use std::{
    fmt,
    io::{self, BufRead, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    chain::{Break, Chain},
    config::KeyRing,
    files::{self, Name},
    head::Head,
    line::LINE_BYTES_MAX,
};

/// Faults that are told one by one.
const FAULTS_MAX: usize = 50;

/// What became of reading a log.
#[derive(Debug, Default)]
pub struct Report {
    /// Files read.
    pub files: usize,
    /// Records that are as they were written.
    pub records: u64,
    /// Number of the first and the last record.
    pub range: Option<(u64, u64)>,
    /// Where the chain breaks; at most 50.
    pub faults: Vec<Fault>,
    /// What is worth knowing and no fault.
    pub notes: Vec<String>,
}

/// A place where the log is not what was written.
#[derive(Debug)]
pub struct Fault {
    /// In which file.
    pub file: String,
    /// In which of its lines, from 1; none where the file as a whole is meant.
    pub line: Option<u64>,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}, line {line}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

/// What of a record the chain's own reading needs.
#[derive(Deserialize)]
struct Own {
    event: String,
    #[serde(default)]
    problem: Option<String>,
    #[serde(default)]
    file: Option<String>,
    #[serde(default)]
    through: Option<u64>,
    #[serde(default)]
    lost: Option<u64>,
    #[serde(default)]
    refused: Option<u64>,
}

/// Reads a log's folder, or one file of it, to its end and says whether it is the chain that was written.
///
/// # Errors
/// When it cannot be read at all.
pub fn verify(path: &Path, keys: &KeyRing) -> io::Result<Report> {
    let mut reading = Reading::new(keys);
    if path.is_dir() {
        reading.folder(path)?
    } else {
        reading.lone_file(path)?
    }
    Ok(reading.report())
}

struct Reading<'a> {
    keys: &'a KeyRing,
    chain: Chain<'a>,
    report: Report,
    /// What stands at a file's end and is none of the chain's: excused by the next file's first record.
    torn: Option<(String, Fault)>,
    /// Records up to here were removed because their time was over.
    pruned_through: Vec<u64>,
    line: Vec<u8>,
}

impl<'a> Reading<'a> {
    fn new(keys: &'a KeyRing) -> Self {
        Self {
            keys,
            chain: Chain::new(&keys.macs),
            report: Report::default(),
            torn: None,
            pruned_through: Vec::new(),
            line: Vec::new(),
        }
    }

    fn folder(&mut self, folder: &Path) -> io::Result<()> {
        // before the files are listed: what is written meanwhile comes after it
        let head = Head::peek(folder, &self.keys.macs);
        let names = files::list(folder)?;
        for name in &names {
            let path = files::path_of(folder, *name);
            let limit = match &head {
                Ok(Some(head)) if head.file == name.to_string() => Some(head.bytes),
                _ => None,
            };
            self.file(&path, limit)?;
            if let Some(limit) = limit
                && let Some(more) = path.metadata()?.len().checked_sub(limit).filter(|more| *more > 0)
            {
                self.report.notes.push(format!(
                    "{name}: {more} bytes after the last remembered record; they are being written, or the next start notes them"
                ));
            }
        }
        self.check_beginning();
        match head {
            Ok(Some(head)) => self.check_end(&head),
            Ok(None) if names.is_empty() => self.report.notes.push("there are no records".to_owned()),
            Ok(None) => self.fault(files::HEAD, None, "is missing, so whether the end was cut off is not known"),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => self.fault(files::HEAD, None, "was changed"),
            Err(e) => return Err(e),
        }
        Ok(())
    }

    fn lone_file(&mut self, path: &Path) -> io::Result<()> {
        self.file(path, None)?;
        self.report.notes.push(
            "only this file was read: whether records before or after it are missing shows in the folder".to_owned(),
        );
        Ok(())
    }

    fn file(&mut self, path: &Path, limit: Option<u64>) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.report.files += 1;
        let mut reader = match files::open(path, self.keys, limit) {
            Ok(reader) => reader,
            // cut before its first record
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                self.tear(&name, 1, "is not whole");
                return Ok(());
            }
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                self.fault(&name, None, e.to_string());
                return Ok(());
            }
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
        };
        self.lines(&name, &mut *reader);
        Ok(())
    }

    fn lines(&mut self, name: &str, mut reader: &mut dyn BufRead) {
        let mut number = 0;
        loop {
            number += 1;
            self.line.clear();
            let read = Read::take(&mut reader, LINE_BYTES_MAX as u64).read_until(b'\n', &mut self.line);
            match read {
                Ok(0) => return,
                Ok(_) if self.line.ends_with(b"\n") => {
                    self.line.pop();
                    self.take(name, number);
                }
                Ok(_) => self.tear(name, number, "the line has no end"),
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                    return self.tear(name, number, "the last frame is not whole");
                }
                Err(e) => return self.tear(name, number, &e.to_string()),
            }
        }
    }

    fn take(&mut self, file: &str, number: u64) {
        let line = std::mem::take(&mut self.line);
        match self.chain.step(&line) {
            Ok(()) => self.hear(&line, file, number),
            // at the end of a file it may be what a crash left
            Err(Break::Malformed) => self.tear(file, number, &Break::Malformed.to_string()),
            Err(wrong) => {
                self.settle_torn(None);
                self.fault(file, Some(number), wrong.to_string());
            }
        }
        self.line = line;
    }

    /// Records that say something of the log itself.
    fn hear(&mut self, line: &[u8], file: &str, number: u64) {
        let is_own = |word: &[u8]| memchr::memmem::find(line, word).is_some();
        let own = [&b"\"event\":\"recovered\""[..], b"\"event\":\"pruned\"", b"\"event\":\"gap\""];
        let own = own.iter().any(|word| is_own(word)).then(|| serde_json::from_slice::<Own>(line).ok()).flatten();
        let of = own.as_ref().filter(|own| own.event == "recovered").and_then(|own| own.file.clone());
        self.settle_torn(of.as_deref().filter(|_| number == 1));
        let Some(own) = own else { return };
        match own.event.as_str() {
            "recovered" => {
                let problem = own.problem.unwrap_or_default();
                let of = of.unwrap_or_default();
                self.report
                    .notes
                    .push(format!("{file}, line {number}: the writer found {of} not whole ({problem}) and went on"));
            }
            "pruned" => self.pruned_through.extend(own.through),
            "gap" => {
                let (lost, refused) = (own.lost.unwrap_or_default(), own.refused.unwrap_or_default());
                let what = format!(
                    "{lost} records were lost and {refused} requests refused before it, while it could not be written"
                );
                self.report.notes.push(format!("{file}, line {number}: {what}"));
            }
            _ => {}
        }
    }

    /// What was torn is a fault, unless the writer itself noted it as the first thing after it.
    fn settle_torn(&mut self, noted: Option<&str>) {
        if let Some((file, fault)) = self.torn.take()
            && noted.map(plain_name) != Some(plain_name(&file))
        {
            self.report_fault(fault);
        }
    }

    fn tear(&mut self, file: &str, number: u64, what: &str) {
        if self.torn.as_ref().is_some_and(|(torn, _)| torn == file) {
            return;
        }
        self.settle_torn(None);
        let fault = Fault { file: file.to_owned(), line: Some(number), what: what.to_owned() };
        self.torn = Some((file.to_owned(), fault));
    }

    fn check_beginning(&mut self) {
        let Some(first) = self.chain.first.filter(|first| *first > 1) else { return };
        if self.pruned_through.contains(&(first - 1)) {
            self.report
                .notes
                .push(format!("records 1 to {} were removed after their time, as a record says", first - 1));
        } else {
            let what = format!("records 1 to {} are missing, and no record says that their time was over", first - 1);
            self.fault("the log's beginning", None, what);
        }
    }

    fn check_end(&mut self, head: &Head) {
        let last = self.chain.last();
        let seq = last.map_or(0, |last| last.seq);
        if seq < head.link.seq {
            let what = format!(
                "records {} to {} are missing at the end: {} remembers them",
                seq + 1,
                head.link.seq,
                files::HEAD
            );
            self.fault("the log's end", None, what);
        } else if last.is_some_and(|last| last.seq == head.link.seq && last.hash != head.link.hash) {
            self.fault("the log's end", None, format!("record {seq} is not the one that {} remembers", files::HEAD));
        }
    }

    fn fault(&mut self, file: &str, line: Option<u64>, what: impl Into<String>) {
        self.report_fault(Fault { file: file.to_owned(), line, what: what.into() });
    }

    fn report_fault(&mut self, fault: Fault) {
        if self.report.faults.len() < FAULTS_MAX {
            self.report.faults.push(fault);
        }
    }

    fn report(mut self) -> Report {
        self.settle_torn(None);
        if !self.keys.macs.is_empty() && !self.chain.had_mac() && self.chain.lines > 0 {
            self.fault(
                "the log",
                None,
                "no record has a MAC, and a key was given: they were written without it, or by another",
            );
        }
        if self.keys.macs.is_empty() && self.chain.had_mac() {
            self.report.notes.push("the records have MACs, which were not checked: give --hmac-key-file".to_owned());
        }
        self.report.records = self.chain.lines;
        self.report.range = self.chain.first.zip(self.chain.last().map(|last| last.seq));
        self.report
    }
}

/// A file's name as it was while it was written.
fn plain_name(name: &str) -> String {
    name.replace(".gz", "")
}

/// Reads a log record by record, the oldest first, and follows it.
pub struct Records {
    folder: Option<PathBuf>,
    keys: KeyRing,
    names: std::collections::VecDeque<PathBuf>,
    last: Option<Name>,
    reader: Option<Box<dyn BufRead>>,
    line: Vec<u8>,
}

impl Records {
    /// Of a folder, or of one file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(path: &Path, keys: KeyRing) -> io::Result<Self> {
        let mut records = Self {
            folder: path.is_dir().then(|| path.to_owned()),
            keys,
            names: [path.to_owned()].into(),
            last: None,
            reader: None,
            line: Vec::new(),
        };
        if records.folder.is_some() {
            records.names.clear();
            records.look()?;
        }
        Ok(records)
    }

    /// Looks for files that came later.
    fn look(&mut self) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        for name in files::list(folder)? {
            if self.last.is_none_or(|last| (name.seq, name.turn) > (last.seq, last.turn)) {
                self.last = Some(name);
                self.names.push_back(files::path_of(folder, name));
            }
        }
        Ok(())
    }

    /// The next record's line without its end; `None` when there is none yet. Asked again later, it goes on from there.
    ///
    /// # Errors
    /// When a file cannot be read, or the key is missing.
    pub fn next_line(&mut self) -> io::Result<Option<&[u8]>> {
        if self.line.ends_with(b"\n") {
            self.line.clear();
        }
        loop {
            if self.reader.is_none() {
                let Some(path) = self.names.pop_front() else { return Ok(None) };
                let opened = files::open(&path, &self.keys, None);
                self.reader = Some(opened.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?);
            }
            let Some(reader) = &mut self.reader else { return Ok(None) };
            let limit = (LINE_BYTES_MAX - self.line.len().min(LINE_BYTES_MAX)) as u64;
            match reader.by_ref().take(limit).read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {
                    return Ok(Some(&self.line[..self.line.len() - 1]));
                }
                Ok(_) => {}
                // the end of what was cut while it was written
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
                Err(e) => return Err(e),
            }
            self.look()?;
            if self.names.is_empty() {
                return Ok(None);
            }
            self.reader = None;
            self.line.clear();
        }
    }
}

/// The faults in a file of a log that is these bytes, and in one that is these bytes encrypted.
#[cfg(fuzzing)]
pub(crate) fn faults_of(bytes: &[u8]) -> (usize, usize) {
    use super::frames::{Frames, MasterKey};
    let master = MasterKey::new(&[7; 32]);
    let keys = KeyRing { macs: vec![ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &[7; 32])], ciphers: vec![master] };
    let faults = |reader: &mut dyn BufRead| {
        let mut reading = Reading::new(&keys);
        reading.lines("f", reader);
        reading.report().faults.len()
    };
    let framed = Frames::new(bytes, &keys.ciphers).map_or(0, |mut frames| faults(&mut frames));
    (faults(&mut &bytes[..]), framed)
}
