//! `tidegate key`: API keys. A key itself is shown once and never kept; the file holds its hash.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rand::RngExt;
use tidegate_balancer::auth::{
    Grant, HashSecret, KeyEntry, KeyHash, KeyLimits, KeyState, KeysFile, Pattern, Scope, UnixSeconds, is_owner,
};
use tidegate_common::{
    ids::SiteName,
    replace::{SECRET, lock, replace},
};

use crate::exit::Failure;

/// Make, list, rotate and revoke API keys for clients
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "The balancer reads the file when it starts and whenever it changes: set balancer.auth.keys_file to it.\n\n\
Examples:\n  tidegate key create --file keys.toml --owner alice --expire-in 90d\n  \
tidegate key create --file keys.toml --owner grafana --scope metrics --expire-in never\n  \
tidegate key create --file keys.toml --owner bob --model 'smollm2*' --requests-per-second 5 --tokens-per-minute 60000\n  \
tidegate key list --file keys.toml\n  tidegate key rotate k-1f2e3d4c --file keys.toml --overlap 7d\n  \
tidegate key revoke k-1f2e3d4c --file keys.toml"
)]
pub(crate) enum Command {
    /// Make a key, print it once, and add its hash to a file of keys
    Create {
        #[command(flatten)]
        at: Place,
        /// Who the key is for; stands in logs and metrics
        #[arg(long, value_name = "NAME", value_parser = owner)]
        owner: String,
        /// How long it is good for, such as 12h or 90d, or never
        #[arg(long, value_name = "TIME", default_value = "90d", value_parser = lifetime)]
        expire_in: Lifetime,
        #[command(flatten)]
        grant: GrantArgs,
    },
    /// Show the keys of a file: what each may do, and until when
    List {
        /// File of keys
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
    /// Make a key that may do the same, and let the old one end a little later
    Rotate {
        /// Which key, by the id that `tidegate key list` shows
        id: String,
        #[command(flatten)]
        at: Place,
        /// How long both are good
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = humantime::parse_duration)]
        overlap: Duration,
        /// How long the new one is good for, such as 12h or 90d, or never
        #[arg(long, value_name = "TIME", default_value = "90d", value_parser = lifetime)]
        expire_in: Lifetime,
    },
    /// Take a key back at once, and with it every token that was made of it
    Revoke {
        /// Which key, by the id that `tidegate key list` shows
        id: String,
        /// File of keys
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
    },
}

/// Where keys are written.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Place {
    /// File of keys; made with mode 600 when it is not there
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// Key the hash with the secret of this file (balancer.auth.hash_secret_file); made with mode 600 when it is not there
    #[arg(long, value_name = "FILE")]
    hash_secret: Option<PathBuf>,
}

/// What a key may do.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct GrantArgs {
    /// What it is good for: inference, metrics, logs, admin; inference when none is said
    #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    scopes: Vec<Scope>,
    /// A model that it may ask for, with * for any characters; all of them when none is said
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<Pattern>,
    /// A site that its requests may not leave; any when none is said
    #[arg(long = "site", value_name = "SITE")]
    sites: Vec<SiteName>,
    /// Steady rate of its requests, in the place of balancer.limits.per_key
    #[arg(long, value_name = "N")]
    requests_per_second: Option<f64>,
    /// Requests that may come at once after a pause
    #[arg(long, value_name = "N")]
    burst: Option<u32>,
    /// Steady rate of tokens, of prompts and answers together
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<u64>,
    /// Generations at the same time
    #[arg(long, value_name = "N")]
    concurrent_streams: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lifetime(Option<Duration>);

impl From<GrantArgs> for Grant {
    fn from(args: GrantArgs) -> Self {
        let limits = KeyLimits {
            requests_per_second: args.requests_per_second,
            burst: args.burst,
            tokens_per_minute: args.tokens_per_minute,
            concurrent_streams: args.concurrent_streams,
        };
        let scopes = if args.scopes.is_empty() { Default::default() } else { args.scopes.into_iter().collect() };
        let models = Some(args.models).filter(|models| !models.is_empty());
        let sites = Some(args.sites).filter(|sites| !sites.is_empty());
        Self { scopes, models, sites, limits }
    }
}

impl Lifetime {
    fn end(self) -> Result<Option<UnixSeconds>, Failure> {
        let Some(time) = self.0 else { return Ok(None) };
        let end = UnixSeconds::now().after(time);
        end.map(Some).ok_or_else(|| Failure::usage("--expire-in: the time is too long; use never"))
    }
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Create { at, owner, expire_in, grant } => {
            let expires = expire_in.end()?;
            let made = change(&at.file, |keys| at.add(keys, owner, grant.into(), expires))?;
            made.show();
            Ok(())
        }
        Command::Rotate { id, at, overlap, expire_in } => {
            let (expires, now) = (expire_in.end()?, UnixSeconds::now());
            let until = now.after(overlap).ok_or_else(|| Failure::usage("--overlap: the time is too long"))?;
            let made = change(&at.file, |keys| {
                let old = find(keys, &id)?;
                if old.state(now) != KeyState::Good {
                    let fix = "make another with `tidegate key create`";
                    return Err(Failure::usage(format!(
                        "the key {id} is good no more, so nothing takes its place\n  fix: {fix}"
                    )));
                }
                old.expires = Some(old.expires.map_or(until, |end| end.min(until)));
                let (owner, grant) = (old.owner.clone(), old.grant.clone());
                at.add(keys, owner, grant, expires)
            })?;
            made.show();
            Ok(())
        }
        Command::Revoke { id, file } => {
            change(&file, |keys| {
                find(keys, &id)?.revoked = Some(UnixSeconds::now());
                Ok(())
            })?;
            eprintln!("{id} is good no more, once the balancer has read the file");
            Ok(())
        }
        Command::List { file } => {
            list(&KeysFile::read(&file)?, UnixSeconds::now());
            Ok(())
        }
    }
}

impl Place {
    fn add(
        &self,
        keys: &mut KeysFile,
        owner: String,
        grant: Grant,
        expires: Option<UnixSeconds>,
    ) -> Result<Made, Failure> {
        let secret = self.hash_secret.as_deref().map(secret).transpose()?;
        let key = format!("tg-{:032x}{:032x}", rand::rng().random::<u128>(), rand::rng().random::<u128>());
        let hash = KeyHash::of(key.as_bytes(), secret.as_ref());
        let until = expires.map_or_else(|| "it is revoked".to_owned(), |at| at.to_string());
        let about = format!("key {} for {owner}, good until {until}; it is shown only now:", hash.id());
        keys.keys.push(KeyEntry { id: hash.id(), hash, owner, grant, expires, revoked: None });
        Ok(Made { about, key })
    }
}

/// A new key, to be shown once the file has it.
struct Made {
    about: String,
    key: String,
}

impl Made {
    fn show(&self) {
        eprintln!("{}", self.about);
        println!("{}", self.key);
    }
}

/// Reads the file, changes it and writes it, while nobody else does. What the balancer would refuse is not written.
fn change<T>(path: &Path, apply: impl FnOnce(&mut KeysFile) -> Result<T, Failure>) -> Result<T, Failure> {
    let fail = |e: io::Error| Failure::unavailable(format!("{}: cannot be written: {e}", path.display()));
    let _lock = lock(path).map_err(fail)?;
    let mut keys = KeysFile::read(path)?;
    let done = apply(&mut keys)?;
    keys.check()?;
    keys.write(path).map_err(fail)?;
    Ok(done)
}

fn find<'a>(keys: &'a mut KeysFile, id: &str) -> Result<&'a mut KeyEntry, Failure> {
    let found = keys.keys.iter_mut().find(|key| key.id == id);
    found.ok_or_else(|| Failure::usage(format!("no key has the id '{id}'\n  fix: see `tidegate key list`")))
}

/// The secret in this file, which is made when it is not there.
fn secret(path: &Path) -> Result<HashSecret, Failure> {
    if !path.exists() {
        let secret = format!("{:032x}{:032x}\n", rand::rng().random::<u128>(), rand::rng().random::<u128>());
        let made = replace(path, secret.as_bytes(), SECRET);
        made.map_err(|e| Failure::unavailable(format!("{}: cannot be written: {e}", path.display())))?;
    }
    HashSecret::read(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

fn list(keys: &KeysFile, now: UnixSeconds) {
    println!("{:<12} {:<16} {:<9} {:<21} {:<24} MODELS", "ID", "OWNER", "STATE", "UNTIL", "SCOPES");
    for key in &keys.keys {
        let state = match key.state(now) {
            KeyState::Good => "good",
            KeyState::Expired => "expired",
            KeyState::Revoked => "revoked",
        };
        let until = key.revoked.or(key.expires).map_or_else(|| "-".to_owned(), |at| at.to_string());
        let scopes: Vec<&str> = key.grant.scopes.iter().map(Scope::as_str).collect();
        let models = key.grant.models.as_ref().map_or_else(
            || "*".to_owned(),
            |models| models.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        );
        println!("{:<12} {:<16} {state:<9} {until:<21} {:<24} {models}", key.id, key.owner, scopes.join(","));
    }
}

fn owner(text: &str) -> Result<String, String> {
    if is_owner(text) {
        return Ok(text.to_owned());
    }
    Err("use 1 to 63 printable ASCII characters without spaces".to_owned())
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

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn at(file: &Path) -> Place {
        Place { file: file.to_owned(), hash_secret: None }
    }

    fn create(file: &Path, owner: &str) -> Result<(), Failure> {
        let (owner, expire_in) = (owner.to_owned(), lifetime("90d").unwrap());
        run(Command::Create { at: at(file), owner, expire_in, grant: GrantArgs::default() })
    }

    #[test]
    fn keys_are_added_hashed_and_the_balancer_takes_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.toml");
        create(&path, "alice").unwrap();
        create(&path, "bob").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, SECRET);
        assert_eq!(KeysFile::read(&path).unwrap().keys.len(), 2);
        let config = format!("[balancer.auth]\nkeys_file = {path:?}");
        let raw = tidegate_common::config::Raw::from_toml(&config, "t").unwrap();
        raw.check(tidegate_balancer::BalancerConfig::read).unwrap();
    }

    #[test]
    fn a_rotated_key_ends_after_the_overlap_and_a_revoked_one_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.toml");
        create(&path, "alice").unwrap();
        let id = KeysFile::read(&path).unwrap().keys[0].id.clone();
        let (overlap, expire_in) = (Duration::from_secs(3600), lifetime("never").unwrap());
        run(Command::Rotate { id: id.clone(), at: at(&path), overlap, expire_in }).unwrap();
        let keys = KeysFile::read(&path).unwrap().keys;
        let (now, later) = (UnixSeconds::now(), UnixSeconds::now().after(2 * overlap).unwrap());
        assert_eq!([keys[0].state(now), keys[0].state(later)], [KeyState::Good, KeyState::Expired]);
        assert_eq!((keys[1].owner.as_str(), keys[1].state(later)), ("alice", KeyState::Good));
        run(Command::Revoke { id: keys[1].id.clone(), file: path.clone() }).unwrap();
        assert_eq!(KeysFile::read(&path).unwrap().keys[1].state(UnixSeconds::now()), KeyState::Revoked);
        assert!(run(Command::Revoke { id: "k-none".into(), file: path.clone() }).is_err());
        let again = Command::Rotate { id: keys[1].id.clone(), at: at(&path), overlap, expire_in };
        assert!(run(again).is_err(), "what was taken back does not come back");
        let for_ever = Command::Rotate { id, at: at(&path), overlap: Duration::MAX, expire_in };
        assert!(run(for_ever).is_err());
        assert_eq!(KeysFile::read(&path).unwrap().keys.len(), 2);
    }

    #[test]
    fn what_the_balancer_would_refuse_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.toml");
        create(&path, "alice").unwrap();
        let grant = GrantArgs { requests_per_second: Some(0.0), ..GrantArgs::default() };
        let expire_in = lifetime("1d").unwrap();
        assert!(run(Command::Create { at: at(&path), owner: "bob".into(), expire_in, grant }).is_err());
        assert_eq!(KeysFile::read(&path).unwrap().keys.len(), 1);
    }

    #[test]
    fn a_keyed_hash_needs_its_secret() {
        let dir = tempfile::tempdir().unwrap();
        let (file, secret) = (dir.path().join("keys.toml"), dir.path().join("keys.secret"));
        let at = Place { file: file.clone(), hash_secret: Some(secret.clone()) };
        let expire_in = lifetime("1d").unwrap();
        run(Command::Create { at, owner: "a".into(), expire_in, grant: GrantArgs::default() }).unwrap();
        assert_eq!(fs::metadata(&secret).unwrap().permissions().mode() & 0o777, SECRET);
        assert!(matches!(KeysFile::read(&file).unwrap().keys[0].hash, KeyHash::HmacSha256(_)));
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
    fn times_and_owners_are_checked() {
        assert_eq!(lifetime("never"), Ok(Lifetime(None)));
        assert!(lifetime("0s").is_err() && lifetime("soon").is_err() && owner("a b").is_err());
        assert!(lifetime("9000000y").unwrap().end().is_err());
    }
}
