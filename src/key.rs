//! `tidegate key`: API keys. The key itself is shown once and never kept; the file holds its SHA-256.

use std::{
    fs::{self, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rand::RngExt;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::exit::Failure;

/// Only its owner reads a file of keys, and the balancer insists on it.
const MODE: u32 = 0o600;

/// Make API keys for clients
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a key, print it once, and add its SHA-256 to a file of keys
    #[command(
        after_help = "The balancer reads the file when it starts and when it changes: set balancer.auth.keys_file to it.\n\n\
    Example:\n  tidegate key create --file keys.toml --owner alice --expire-in 90d"
    )]
    Create {
        /// File of keys; made with mode 600 when it is not there
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// Who the key is for; stands in logs and metrics
        #[arg(long, value_name = "NAME", value_parser = owner)]
        owner: String,
        /// How long it is good for, such as 12h or 90d, or never
        #[arg(long, value_name = "TIME", default_value = "90d", value_parser = lifetime)]
        expire_in: Lifetime,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lifetime(Option<Duration>);

/// The file as a whole: `[[keys]]`.
#[derive(Debug, Default, Serialize, Deserialize)]
struct File {
    #[serde(default)]
    keys: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    id: String,
    sha256: String,
    owner: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<toml::Value>,
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    let Command::Create { file, owner, expire_in } = command;
    let mut keys = read(&file)?;
    let key = format!("tg-{:032x}{:032x}", rand::rng().random::<u128>(), rand::rng().random::<u128>());
    let entry = describe(&key, owner, expire_in, SystemTime::now())?;
    let until = entry.expires.as_ref().and_then(toml::Value::as_str).unwrap_or("it is removed").to_owned();
    eprintln!("key {} for {}, good until {until}; it is shown only now:", entry.id, entry.owner);
    keys.keys.push(entry);
    write(&file, &keys)?;
    println!("{key}");
    Ok(())
}

fn owner(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 63 || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("use 1 to 63 printable ASCII characters without spaces".to_owned());
    }
    Ok(text.to_owned())
}

fn lifetime(text: &str) -> Result<Lifetime, String> {
    if text == "never" {
        return Ok(Lifetime(None));
    }
    match humantime::parse_duration(text) {
        Ok(time) if !time.is_zero() => Ok(Lifetime(Some(time))),
        _ => Err("use a time such as 12h or 90d, or never".to_owned()),
    }
}

fn describe(key: &str, owner: String, lifetime: Lifetime, now: SystemTime) -> Result<Entry, Failure> {
    let digest = Sha256::digest(key.as_bytes());
    let sha256: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let expires = match lifetime.0 {
        None => None,
        Some(time) => {
            let at = now.checked_add(time).filter(|at| *at < SystemTime::UNIX_EPOCH + MOST_DISTANT);
            let at = at.ok_or_else(|| Failure::usage("--expire-in: the time is too long; use never"))?;
            Some(toml::Value::String(humantime::format_rfc3339_seconds(at).to_string()))
        }
    };
    Ok(Entry { id: format!("k-{}", &sha256[..8]), sha256, owner, expires })
}

/// The end of the year 9999, after which RFC 3339 has no form.
const MOST_DISTANT: Duration = Duration::from_secs(253_402_300_799);

fn read(path: &Path) -> Result<File, Failure> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(File::default()),
        Err(e) => return Err(Failure::usage(format!("{}: cannot be read: {e}", path.display()))),
    };
    let mode = fs::metadata(path).map_or(MODE, |meta| meta.permissions().mode() & 0o777);
    if mode & 0o077 != 0 {
        let path = path.display();
        return Err(Failure::usage(format!(
            "{path}: has mode {mode:o}, so others can reach it\n  fix: chmod 600 {path}"
        )));
    }
    toml::from_str(&text).map_err(|e| Failure::usage(format!("{}: is not a file of keys: {e}", path.display())))
}

/// Written beside and moved into place, so that a balancer that reads it never sees half a file.
fn write(path: &Path, keys: &File) -> Result<(), Failure> {
    let fail = |e: std::io::Error| Failure::unavailable(format!("{}: cannot be written: {e}", path.display()));
    let text = toml::to_string(keys).map_err(|e| Failure::internal(e.to_string()))?;
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(MODE).open(&draft).map_err(fail)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
    fs::rename(&draft, path).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(file: &Path, owner: &str) -> Result<(), Failure> {
        run(Command::Create { file: file.to_owned(), owner: owner.to_owned(), expire_in: lifetime("90d").unwrap() })
    }

    #[test]
    fn keys_are_added_hashed_and_the_balancer_takes_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.toml");
        create(&path, "alice").unwrap();
        create(&path, "bob").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        assert_eq!(read(&path).unwrap().keys.len(), 2);
        let config = format!("[balancer.auth]\nkeys_file = {path:?}");
        let raw = tidegate_common::config::Raw::from_toml(&config, "t").unwrap();
        raw.check(tidegate_balancer::BalancerConfig::read).unwrap();
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.toml");
        create(&path, "alice").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(create(&path, "bob").is_err());
    }

    #[test]
    fn the_digest_and_the_expiry_are_what_they_say() {
        // SHA-256 of "one", as `printf one | sha256sum` gives it
        let entry = describe("one", "a".into(), lifetime("1d").unwrap(), SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(entry.sha256, "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed");
        assert_eq!(entry.expires.unwrap().as_str(), Some("1970-01-02T00:00:00Z"));
        assert!(describe("one", "a".into(), lifetime("9000000y").unwrap(), SystemTime::now()).is_err());
        assert_eq!(lifetime("never"), Ok(Lifetime(None)));
        assert!(lifetime("0s").is_err() && lifetime("soon").is_err() && owner("a b").is_err());
    }
}
