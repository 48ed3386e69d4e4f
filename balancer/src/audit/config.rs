//! `[balancer.audit]`, and the keys that a log is written and read with.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use bytesize::ByteSize;
use ring::hmac;
use tidegate_common::config::Reader;

use super::{frames::MasterKey, line::unhex, syslog::Target};
use crate::auth::check_mode;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The checked section. Deliberately without `Debug`: it holds keys.
#[derive(Clone)]
pub struct AuditConfig {
    /// The folder of the log.
    pub(crate) folder: PathBuf,
    /// Whether what clients ask is recorded too.
    pub(crate) bodies: bool,
    /// How much of it, in bytes.
    pub(crate) body_bytes_max: usize,
    pub(crate) sync: Sync,
    pub(crate) sync_interval: Duration,
    pub(crate) rotate_bytes: u64,
    pub(crate) rotate_age: Duration,
    pub(crate) compress: bool,
    pub(crate) retention: Duration,
    pub(crate) on_failure: OnFailure,
    /// Records that wait to be written.
    pub(crate) queue_max: usize,
    pub(crate) syslog: Option<Target>,
    pub(crate) mac: Option<hmac::Key>,
    pub(crate) cipher: Option<MasterKey>,
}

/// When what is written must be on the disk itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sync {
    /// When the system likes.
    Off,
    /// Every `sync_interval`.
    Interval,
    /// With each group of records.
    Each,
}

/// What becomes of requests that cannot be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFailure {
    /// They are served; the records that are lost are counted.
    Open,
    /// They are refused.
    Closed,
}

impl AuditConfig {
    /// Reads `[balancer.audit]`; `None` when it is not there.
    pub(crate) fn read(r: &Reader<'_>) -> Option<Self> {
        let folder = r.get::<PathBuf>("dir");
        if folder.is_none() && r.is_present() && !r.has("dir") {
            r.problem("dir", "is missing", "name a folder for the audit log, or remove the section to keep none");
        }
        let bodies = r.get_or("bodies", false);
        let sync =
            r.choice("sync", &[("off", Sync::Off), ("interval", Sync::Interval), ("each", Sync::Each)], Sync::Interval);
        let on_failure =
            r.choice("on_failure", &[("open", OnFailure::Open), ("closed", OnFailure::Closed)], OnFailure::Open);
        let mac = key_file(r, "hmac_key_file");
        let cipher = key_file(r, "encryption_key_file");
        let config = Self {
            folder: folder.clone().unwrap_or_default(),
            bodies,
            body_bytes_max: size(r, "max_body", ByteSize::kib(64), ByteSize::mib(4)),
            sync,
            sync_interval: r.duration_or("sync_interval", Duration::from_secs(1)),
            rotate_bytes: size(r, "rotate_size", ByteSize::mib(100), ByteSize::tib(1)) as u64,
            rotate_age: r.duration_or("rotate_age", DAY),
            compress: r.get_or("compress", true),
            retention: r.duration_or("retention", DAY * 180),
            on_failure,
            queue_max: r.in_range("queue", 16..=1_000_000, 8192),
            syslog: r.parse("syslog"),
            mac: mac.map(|key| hmac::Key::new(hmac::HMAC_SHA256, &key)),
            cipher: cipher.map(|key| MasterKey::new(&key)),
        };
        folder.map(|_| config)
    }

    /// The folder of the log.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The keys that it is written with.
    pub fn keys(&self) -> KeyRing {
        KeyRing { macs: self.mac.iter().cloned().collect(), ciphers: self.cipher.iter().cloned().collect() }
    }
}

fn size(r: &Reader<'_>, key: &str, default: ByteSize, most: ByteSize) -> usize {
    let size = r.get_or(key, default);
    if (1024..=most.as_u64()).contains(&size.as_u64()) {
        return size.as_u64() as usize;
    }
    r.problem(key, format!("{size} is outside 1 KiB to {most}"), "give a size such as \"64KiB\" or \"100MiB\"");
    default.as_u64() as usize
}

fn key_file(r: &Reader<'_>, key: &str) -> Option<[u8; 32]> {
    let path = r.get::<PathBuf>(key)?;
    check_mode(r, key, &path);
    read_key(&path)
        .map_err(|message| r.problem(key, message, "make one with: (umask 077; openssl rand -hex 32 > FILE)"))
        .ok()
}

fn read_key(path: &Path) -> Result<[u8; 32], String> {
    let text = fs::read_to_string(path).map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
    let digits = text.trim().to_ascii_lowercase();
    unhex(digits.as_bytes()).ok_or_else(|| format!("{} does not hold 64 hexadecimal digits", path.display()))
}

/// Keys that a log is read with; several where they were changed. Deliberately without `Debug`.
#[derive(Clone, Default)]
pub struct KeyRing {
    pub(crate) macs: Vec<hmac::Key>,
    pub(crate) ciphers: Vec<MasterKey>,
}

impl KeyRing {
    /// Adds a key by which records are authenticated.
    ///
    /// # Errors
    /// When the file holds no key.
    pub fn add_mac(&mut self, file: &Path) -> Result<(), String> {
        self.macs.push(hmac::Key::new(hmac::HMAC_SHA256, &read_key(file)?));
        Ok(())
    }

    /// Adds a key by which files are encrypted.
    ///
    /// # Errors
    /// When the file holds no key.
    pub fn add_cipher(&mut self, file: &Path) -> Result<(), String> {
        self.ciphers.push(MasterKey::new(&read_key(file)?));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;

    #[test]
    fn each_fault_is_told_with_its_key() {
        let text = "dirr = \"/x\"\nmax_body = \"1B\"\nsync = \"often\"\nhmac_key_file = \"/no/key\"\nqueue = 1";
        let problems = Raw::from_toml(text, "t").unwrap().check(AuditConfig::read).err().unwrap();
        let mut paths: Vec<&str> = problems.0.iter().map(|p| p.path.as_str()).collect();
        paths.sort_unstable();
        assert_eq!(paths, ["dir", "dirr", "hmac_key_file", "max_body", "queue", "sync"]);
    }

    #[test]
    fn without_the_section_there_is_no_log_and_with_it_half_a_year() {
        assert!(Raw::empty().check(|r| AuditConfig::read(&r.section("audit"))).unwrap().is_none());
        let config = Raw::from_toml("dir = \"/x\"", "t").unwrap().check(AuditConfig::read).unwrap().unwrap();
        assert_eq!(config.retention, DAY * 180);
        assert!(!config.bodies && config.compress && config.on_failure == OnFailure::Open);
    }
}
