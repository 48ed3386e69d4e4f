//! The log's end: where lines are added, under the lock, a group at a time.
//!
//! Nothing that a crash, a full disk or another hand left behind is passed over: what goes on in the chain is adopted, and what does not is
//! left as it lies, with a record `recovered` of it as the first of a new file.

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::PathBuf,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use ring::hmac;
use serde_json::json;

use super::{
    config::{AuditConfig, Sync},
    content,
    files::{self, Name},
    frames::{Frames, HEADER_LEN, Sealer},
    head::{Head, HeadFile, News, identity},
    line::{self, LINE_BYTES_MAX},
};

/// The log as one of its writers has it.
pub(crate) struct Trail {
    config: Arc<AuditConfig>,
    keys: Vec<hmac::Key>,
    head_file: HeadFile,
    head: Head,
    current: Option<Current>,
    /// Records of this file's own, that the next group begins with.
    notes: VecDeque<Vec<u8>>,
    /// The newest group's lines.
    plain: Vec<u8>,
    synced: Instant,
    is_dirty: bool,
    has_rotated: bool,
}

/// The file that lines are added to.
struct Current {
    name: String,
    file: File,
    identity: (u64, u64),
    sealer: Option<Sealer>,
}

impl Trail {
    /// Opens the log, and mends what the last writer left.
    ///
    /// # Errors
    /// When the folder cannot be made or written.
    pub(crate) fn open(config: Arc<AuditConfig>) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&config.folder)?;
        let mut trail = Self {
            keys: config.mac.iter().cloned().collect(),
            head_file: HeadFile::open(&config.folder)?,
            config,
            head: Head::NONE,
            current: None,
            notes: VecDeque::new(),
            plain: Vec::new(),
            synced: Instant::now(),
            is_dirty: false,
            has_rotated: true,
        };
        trail.append(&[])?;
        Ok(trail)
    }

    /// Adds these records to the log; all of them or, with an error, none.
    ///
    /// # Errors
    /// When they cannot be written. What was written of them is taken back, or will be noted.
    pub(crate) fn append(&mut self, records: &[Vec<u8>]) -> io::Result<()> {
        if !self.config.folder.join(files::HEAD).exists() {
            self.begin_anew()?;
        }
        let _lock = self.head_file.lock()?;
        self.refresh()?;
        self.settle()?;
        self.write(records)?;
        self.sync(false)
    }

    /// The lines of the newest group, each with its end.
    pub(crate) fn newest(&self) -> &[u8] {
        &self.plain
    }

    /// Number of the newest line.
    pub(crate) fn seq(&self) -> u64 {
        self.head.link.seq
    }

    /// The file that lines are added to; files before it are closed.
    pub(crate) fn current(&self) -> &str {
        &self.head.file
    }

    /// Whether a file has been closed since it was asked last.
    pub(crate) fn take_rotated(&mut self) -> bool {
        std::mem::take(&mut self.has_rotated)
    }

    /// Puts what is written on the disk itself, where the configuration says so and it is time, or `now`.
    pub(crate) fn sync(&mut self, now: bool) -> io::Result<()> {
        let is_due = match self.config.sync {
            Sync::Off => false,
            Sync::Interval => now || self.synced.elapsed() >= self.config.sync_interval,
            Sync::Each => true,
        };
        let Some(current) = self.current.as_ref().filter(|_| is_due && self.is_dirty) else { return Ok(()) };
        current.file.sync_data()?;
        self.head_file.sync()?;
        (self.is_dirty, self.synced) = (false, Instant::now());
        Ok(())
    }

    /// The folder or its state has gone: what is remembered here is all there is, and the chain goes on from it.
    fn begin_anew(&mut self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.config.folder)?;
        self.head_file = HeadFile::open(&self.config.folder)?;
        self.current = None;
        if self.head != Head::NONE {
            self.note("head_lost", &self.head.file.clone(), None);
        }
        Ok(())
    }

    /// Learns what other processes have written.
    fn refresh(&mut self) -> io::Result<()> {
        match self.head_file.read(&self.keys)? {
            News::Same => {}
            News::Moved(head) => self.head = head,
            // the state has gone and not the process: what it knows goes on
            News::Empty | News::Damaged if self.head != Head::NONE => {}
            news => {
                if let Some(newest) = files::list(&self.config.folder)?.pop() {
                    self.head = self.last_of(newest)?;
                    let problem = if news == News::Empty { "head_lost" } else { "head_changed" };
                    self.note(problem, &newest.to_string(), None);
                }
            }
        }
        Ok(())
    }

    /// The end of a log of which nothing is remembered.
    fn last_of(&self, newest: Name) -> io::Result<Head> {
        let mut head = Head { file: newest.to_string(), ..Head::NONE };
        head.link.seq = newest.seq.saturating_sub(1);
        let path = files::path_of(&self.config.folder, newest);
        let mut reader = files::open(&path, &self.config.keys(), None)?;
        let mut text = Vec::new();
        while reader.by_ref().take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut text).unwrap_or(0) > 0 {
            // whichever key it was written with: what matters is where it ends
            if let Some(Ok(line)) = text.strip_suffix(b"\n").map(|line| line::read(line, &[])) {
                head.link = line.link;
            }
            text.clear();
        }
        // never written again: what else is in it is not known
        head.bytes = u64::MAX;
        Ok(head)
    }

    /// Sees to it that there is a file to add to.
    fn settle(&mut self) -> io::Result<()> {
        if self.head.file.is_empty() {
            return self.begin_file();
        }
        let path = self.path();
        let found = match fs::metadata(&path) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if self.head.bytes != u64::MAX {
                    self.note("file_lost", &self.head.file.clone(), None);
                }
                return self.begin_file();
            }
            Err(e) => return Err(e),
        };
        if found.len() > self.head.bytes {
            self.adopt(&path)?;
        }
        if found.len() != self.head.bytes {
            if self.head.bytes != u64::MAX {
                let name = self.head.file.clone();
                self.note("torn", &name, Some((self.head.bytes, found.len())));
            }
            return self.begin_file();
        }
        let is_old = unix_seconds().saturating_sub(self.head.began) >= self.config.rotate_age.as_secs();
        let is_empty = self.head.bytes <= HEADER_LEN as u64;
        if !is_empty && (is_old || self.head.bytes >= self.config.rotate_bytes) {
            return self.begin_file();
        }
        let is_open = self.current.as_ref().is_some_and(|c| c.name == self.head.file && c.identity == identity(&found));
        if is_open { Ok(()) } else { self.reopen(&path) }
    }

    /// Takes lines that go on in the chain for written: who wrote them could not remember them any more.
    fn adopt(&mut self, path: &std::path::Path) -> io::Result<()> {
        let mut lines = Lines::open(path, self.head.bytes, &self.config)?;
        let mut text = Vec::new();
        while let Ok(Some(length)) = lines.next(&mut text) {
            match text.strip_suffix(b"\n").map(|line| line::read(line, &self.keys)) {
                Some(Ok(line)) if line.prev == self.head.link.hash && line.link.seq == self.head.link.seq + 1 => {
                    self.head.link = line.link;
                    self.head.bytes += length;
                }
                _ => break,
            }
        }
        Ok(())
    }

    fn reopen(&mut self, path: &std::path::Path) -> io::Result<()> {
        let file = OpenOptions::new().read(true).append(true).open(path)?;
        let is_encrypted = self.head.file.ends_with(".enc");
        let sealer = match (&self.config.cipher, is_encrypted) {
            (Some(master), true) => Some(Sealer::go_on(master, &file)?),
            (None, false) => None,
            // the configuration says otherwise now
            _ => return self.begin_file(),
        };
        let identity = identity(&file.metadata()?);
        self.current = Some(Current { name: self.head.file.clone(), file, identity, sealer });
        Ok(())
    }

    /// Closes the current file and begins the next, of which the state knows before its first line is written.
    fn begin_file(&mut self) -> io::Result<()> {
        self.sync(true)?;
        let (name, mut file) = self.create()?;
        let path = self.config.folder.join(name.to_string());
        let begun = self.begin_in(&mut file);
        match begun.and_then(|(sealer, bytes)| {
            let head = Head { link: self.head.link, file: name.to_string(), bytes, began: unix_seconds() };
            self.head_file.write(&head, self.config.mac.as_ref())?;
            Ok((sealer, head, identity(&file.metadata()?)))
        }) {
            Ok((sealer, head, identity)) => {
                self.head = head;
                self.current = Some(Current { name: name.to_string(), file, identity, sealer });
                self.has_rotated = true;
                if self.config.sync != Sync::Off {
                    File::open(&self.config.folder)?.sync_all()?;
                }
                Ok(())
            }
            Err(e) => {
                let _ = fs::remove_file(path);
                Err(e)
            }
        }
    }

    fn begin_in(&self, file: &mut File) -> io::Result<(Option<Sealer>, u64)> {
        let Some(master) = &self.config.cipher else { return Ok((None, 0)) };
        let (sealer, header) = Sealer::begin(master);
        file.write_all(&header)?;
        Ok((Some(sealer), HEADER_LEN as u64))
    }

    fn create(&self) -> io::Result<(Name, File)> {
        let mut name = Name {
            seq: self.head.link.seq + 1,
            turn: 0,
            is_compressed: false,
            is_encrypted: self.config.cipher.is_some(),
        };
        let all = files::list(&self.config.folder)?;
        while all.iter().any(|known| (known.seq, known.turn) == (name.seq, name.turn)) {
            name.turn += 1;
        }
        let path = self.config.folder.join(name.to_string());
        let file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(path)?;
        Ok((name, file))
    }

    fn write(&mut self, records: &[Vec<u8>]) -> io::Result<()> {
        let Some(current) = &mut self.current else { return Err(io::Error::other("no file was begun")) };
        let (mut link, mut sealed) = (self.head.link, Vec::new());
        self.plain.clear();
        for record in self.notes.iter().chain(records) {
            let start = self.plain.len();
            link = line::seal(&mut self.plain, link, record, self.config.mac.as_ref());
            if let Some(sealer) = &current.sealer {
                sealer.seal(&mut sealed, &self.plain[start..]);
            }
        }
        if self.plain.is_empty() {
            return Ok(());
        }
        let bytes = if current.sealer.is_some() { &sealed } else { &self.plain };
        let head = Head { link, bytes: self.head.bytes + bytes.len() as u64, ..self.head.clone() };
        let written =
            current.file.write_all(bytes).and_then(|()| self.head_file.write(&head, self.config.mac.as_ref()));
        if let Err(e) = written {
            self.plain.clear();
            // where this fails too, the rest is found and noted by who writes next
            let _ = current.file.set_len(self.head.bytes);
            return Err(e);
        }
        self.head = head;
        self.notes.clear();
        self.is_dirty = true;
        Ok(())
    }

    /// Notes what was found: in which file, and from which byte to which it is no part of the log.
    fn note(&mut self, problem: &str, file: &str, torn: Option<(u64, u64)>) {
        let fields = json!({"problem": problem, "file": file, "kept_bytes": torn.map(|t| t.0), "found_bytes": torn.map(|t| t.1)});
        tracing::warn!(problem, file, "the audit log was not left whole; it is noted in it, and goes on");
        self.notes.push_back(content("recovered", &fields));
    }

    fn path(&self) -> PathBuf {
        self.config.folder.join(&self.head.file)
    }
}

/// Lines of a file that is written, from one of them on.
enum Lines {
    Plain(BufReader<File>),
    Framed(Frames<BufReader<File>>),
}

impl Lines {
    fn open(path: &std::path::Path, from: u64, config: &AuditConfig) -> io::Result<Self> {
        let mut file = BufReader::new(File::open(path)?);
        if !path.to_string_lossy().ends_with(".enc") {
            file.seek(SeekFrom::Start(from))?;
            return Ok(Self::Plain(file));
        }
        let mut frames = Frames::new(file, &config.keys().ciphers)?;
        frames.inner_mut().seek(SeekFrom::Start(from.max(HEADER_LEN as u64)))?;
        Ok(Self::Framed(frames))
    }

    /// The next line with its end, and how many bytes of the file it takes.
    fn next(&mut self, text: &mut Vec<u8>) -> io::Result<Option<u64>> {
        text.clear();
        match self {
            Self::Plain(file) => {
                let length = file.take(LINE_BYTES_MAX as u64).read_until(b'\n', text)?;
                Ok((length > 0).then_some(length as u64))
            }
            Self::Framed(frames) => Ok(frames.next()?.map(|(line, length)| {
                text.extend_from_slice(line);
                length
            })),
        }
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
