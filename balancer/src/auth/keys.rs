//! The file of API keys: what `tidegate key` writes and the balancer reads. A key itself is in neither, only its hash.
//!
//! Keys made here have 256 random bits, which no search finds. Where keys come from elsewhere and may be weaker, the hash is keyed with a secret
//! that is not in the file, so that the file alone does not help a search.

use std::{collections::BTreeSet, fs, io, path::Path, sync::Arc};

use ring::hmac;
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use tidegate_common::{
    config::{FromValue, Problems, Raw, Reader},
    contract::ApiError,
    replace::{SECRET, replace},
};
use toml::{Table, Value};

use super::{Credential, CredentialKind, Grant, KeyLimits, Principal, UnixSeconds, check_mode, refusal};

/// A file of keys.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeysFile {
    /// The keys, in the file's order.
    pub keys: Vec<KeyEntry>,
}

/// What is known of one key.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyEntry {
    /// Its name, shown in logs and taken by `tidegate key revoke`.
    pub id: String,
    /// The hash that it is known by.
    pub hash: KeyHash,
    /// Whose it is.
    pub owner: String,
    /// What it allows.
    pub grant: Grant,
    /// When it ends.
    pub expires: Option<UnixSeconds>,
    /// When it was taken back.
    pub revoked: Option<UnixSeconds>,
}

/// A hash of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyHash {
    /// Of the key alone.
    Sha256([u8; 32]),
    /// Keyed with the secret of `hash_secret_file` (HMAC, RFC 2104).
    HmacSha256([u8; 32]),
}

impl KeyHash {
    /// Of `key`, keyed where there is a secret.
    pub fn of(key: &[u8], secret: Option<&HashSecret>) -> Self {
        match secret {
            None => Self::Sha256(Sha256::digest(key).into()),
            Some(secret) => Self::HmacSha256(secret.hash(key)),
        }
    }

    /// Its name and digits in the file.
    fn shown(self) -> (&'static str, String) {
        let (name, bytes) = match self {
            Self::Sha256(bytes) => (SHA256, bytes),
            Self::HmacSha256(bytes) => (HMAC_SHA256, bytes),
        };
        (name, bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The name that a key gets from it.
    pub fn id(self) -> String {
        format!("k-{}", &self.shown().1[..8])
    }
}

const SHA256: &str = "sha256";
const HMAC_SHA256: &str = "hmac_sha256";

/// What keyed hashes are keyed with. Deliberately without `Debug`.
pub struct HashSecret(hmac::Key);

/// Least bytes of such a secret.
const SECRET_BYTES_MIN: usize = 32;

impl HashSecret {
    /// Reads a file of at least 32 bytes, as they are.
    ///
    /// # Errors
    /// When it cannot be read or is too short.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = fs::read(path)?;
        let bytes = bytes.trim_ascii();
        if bytes.len() < SECRET_BYTES_MIN {
            return Err(io::Error::other(format!("has {} bytes, and needs {SECRET_BYTES_MIN}", bytes.len())));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, bytes)))
    }

    fn hash(&self, key: &[u8]) -> [u8; 32] {
        let tag = hmac::sign(&self.0, key);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(tag.as_ref());
        bytes
    }
}

impl KeysFile {
    /// Reads a file of keys; one that is not there has none.
    ///
    /// # Errors
    /// Everything that is wrong with it, others being able to read it included.
    pub fn read(path: &Path) -> Result<Self, Problems> {
        if matches!(fs::exists(path), Ok(false)) {
            return Ok(Self::default());
        }
        let mode = Raw::empty().check(|r| check_mode(r, "keys", path));
        let read = Raw::from_file(path).and_then(|raw| raw.check(Self::read_sections));
        match (mode, read) {
            (Ok(()), read) => read,
            (Err(problems), Ok(_)) => Err(problems),
            (Err(first), Err(then)) => Err(Problems(first.0.into_iter().chain(then.0).collect())),
        }
    }

    /// Writes it in the place of the one at `path`, for its owner alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        replace(path, self.to_text().as_bytes(), SECRET)
    }

    /// Whether it can be read again.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn check(&self) -> Result<(), Problems> {
        Raw::from_toml(&self.to_text(), "the file of keys")?.check(Self::read_sections).map(drop)
    }

    pub(crate) fn to_text(&self) -> String {
        let keys = self.keys.iter().map(|key| Value::Table(key.to_table())).collect();
        Table::from_iter([("keys".to_owned(), Value::Array(keys))]).to_string()
    }

    pub(crate) fn read_sections(root: &Reader<'_>) -> Self {
        let mut ids = BTreeSet::new();
        let sections = root.sections("keys");
        let keys: Vec<_> = sections.iter().filter_map(KeyEntry::read).collect();
        for key in keys.iter().filter(|key| !ids.insert(key.id.as_str())) {
            root.problem("keys", format!("two keys have the id '{}'", key.id), "give each an id of its own");
        }
        Self { keys }
    }
}

impl KeyEntry {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let (id, owner) = (r.get::<String>("id"), r.get::<String>("owner"));
        let hashes = [(SHA256, r.get::<String>(SHA256)), (HMAC_SHA256, r.get::<String>(HMAC_SHA256))];
        let (expires, revoked, grant) = (r.get("expires"), r.get("revoked"), Grant::read(r));
        for key in ["id", "owner"].into_iter().filter(|key| !r.has(key)) {
            r.problem(key, "is missing", "every key needs id, owner, and sha256 or hmac_sha256");
        }
        if owner.as_ref().is_some_and(|owner| !is_owner(owner)) {
            r.problem("owner", "is not a name of printable ASCII without spaces", "choose a short name");
            return None;
        }
        let hash = read_hash(r, hashes)?;
        Some(Self { id: id?, hash, owner: owner?, grant, expires, revoked })
    }

    fn to_table(&self) -> Table {
        let text = |text: String| Value::String(text);
        let list = |items: Vec<String>| Value::Array(items.into_iter().map(Value::String).collect());
        let (hash, digits) = self.hash.shown();
        let time = |at: UnixSeconds| text(at.to_string());
        let grant = &self.grant;
        let fields = [
            ("id", Some(text(self.id.clone()))),
            ("owner", Some(text(self.owner.clone()))),
            (hash, Some(text(digits))),
            ("expires", self.expires.map(time)),
            ("revoked", self.revoked.map(time)),
            ("scopes", Some(list(grant.scopes.iter().map(|scope| scope.to_string()).collect()))),
            ("models", grant.models.as_ref().map(|m| list(m.iter().map(ToString::to_string).collect()))),
            ("sites", grant.sites.as_ref().map(|s| list(s.iter().map(ToString::to_string).collect()))),
            ("limits", grant.limits.to_table().map(Value::Table)),
        ];
        fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// Whether it is good at this time.
    pub fn state(&self, now: UnixSeconds) -> KeyState {
        match (self.revoked, self.expires) {
            (Some(at), _) if at <= now => KeyState::Revoked,
            (_, Some(at)) if at <= now => KeyState::Expired,
            _ => KeyState::Good,
        }
    }
}

/// Whether a key may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// Yes.
    Good,
    /// Its time is over.
    Expired,
    /// It was taken back.
    Revoked,
}

/// A name that logs, metrics and headers can carry.
pub fn is_owner(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic())
}

fn read_hash(r: &Reader<'_>, hashes: [(&'static str, Option<String>); 2]) -> Option<KeyHash> {
    let mut found = hashes.into_iter().filter_map(|(name, digits)| Some((name, digits?)));
    let (Some((name, digits)), None) = (found.next(), found.next()) else {
        r.problem(SHA256, "exactly one of sha256 and hmac_sha256 is needed", "keep the one that the key was made with");
        return None;
    };
    let Some(bytes) = decode_hex(&digits) else {
        r.problem(name, "is not 64 hexadecimal digits", "write the output of: printf %s KEY | sha256sum");
        return None;
    };
    Some(if name == SHA256 { KeyHash::Sha256(bytes) } else { KeyHash::HmacSha256(bytes) })
}

fn decode_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Keys as requests meet them. Deliberately without `Debug`.
pub(crate) struct Keys {
    keys: Vec<Key>,
    secret: Option<HashSecret>,
}

struct Key {
    entry: KeyEntry,
    principal: Arc<Principal>,
}

impl Keys {
    /// Reads `keys_file` and `hash_secret_file`; none when there is no file of keys.
    pub(crate) fn read(r: &Reader<'_>) -> Option<Self> {
        let secret = read_secret(r);
        let path = r.get::<std::path::PathBuf>("keys_file")?;
        let keys = match fs::metadata(&path).map_err(|e| e.to_string()) {
            Ok(_) => KeysFile::read(&path),
            Err(e) => {
                let message = format!("{}: cannot be read: {e}", path.display());
                r.problem("keys_file", message, "make keys with: tidegate key create --file FILE --owner NAME");
                return None;
            }
        };
        match keys {
            Ok(file) if file.keys.is_empty() => {
                r.problem(
                    "keys_file",
                    "no key is listed",
                    "make one with: tidegate key create --file FILE --owner NAME",
                );
                None
            }
            Ok(file) => Some(Self::new(file, secret, r)),
            Err(problems) => {
                for problem in problems.0 {
                    r.problem("keys_file", format!("{}: {}", problem.path, problem.message), problem.fix);
                }
                None
            }
        }
    }

    fn new(file: KeysFile, secret: Option<HashSecret>, r: &Reader<'_>) -> Self {
        let is_keyed = |key: &&KeyEntry| matches!(key.hash, KeyHash::HmacSha256(_));
        if let Some(key) = file.keys.iter().find(is_keyed).filter(|_| secret.is_none() && !r.has("hash_secret_file")) {
            let message = format!("the hash of {} is keyed, and the secret is not named", key.id);
            r.problem("hash_secret_file", message, "name the file that `tidegate key create --hash-secret` made");
        }
        let keys = file.keys.into_iter().map(|entry| Key { principal: Arc::new(Principal::of_key(&entry)), entry });
        Self { keys: keys.collect(), secret }
    }

    /// What is known of each key.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &KeyEntry> {
        self.keys.iter().map(|key| &key.entry)
    }

    /// Who shows this key.
    pub(crate) fn principal(&self, given: &[u8], now: UnixSeconds) -> Result<Arc<Principal>, ApiError> {
        let plain = KeyHash::of(given, None);
        let keyed = self.secret.as_ref().map(|secret| KeyHash::of(given, Some(secret)));
        let key =
            self.find(plain, keyed).ok_or_else(|| refusal("invalid_api_key", "this API key is not known here"))?;
        key.good(now)
    }

    /// Who has the key of this id, when it is good.
    pub(super) fn by_id(&self, id: &str, now: UnixSeconds) -> Result<Arc<Principal>, ApiError> {
        let key = self.keys.iter().find(|key| key.entry.id == id);
        key.ok_or_else(|| refusal("invalid_token", "the API key that it goes by is not known here"))?.good(now)
    }

    /// Compares with every key, so that the time taken says nothing about which one matched.
    fn find(&self, plain: KeyHash, keyed: Option<KeyHash>) -> Option<&Key> {
        let (mut found, mut at) = (Choice::from(0), 0u64);
        for (i, key) in self.keys.iter().enumerate() {
            let equal = match (key.entry.hash, plain, keyed) {
                (KeyHash::Sha256(known), KeyHash::Sha256(given), _) => known.ct_eq(&given),
                (KeyHash::HmacSha256(known), _, Some(KeyHash::HmacSha256(given))) => known.ct_eq(&given),
                _ => Choice::from(0),
            };
            at.conditional_assign(&(i as u64), equal);
            found |= equal;
        }
        if bool::from(found) { self.keys.get(at as usize) } else { None }
    }
}

impl Key {
    fn good(&self, now: UnixSeconds) -> Result<Arc<Principal>, ApiError> {
        match self.entry.state(now) {
            KeyState::Good => Ok(Arc::clone(&self.principal)),
            KeyState::Expired => Err(refusal("expired_api_key", "this API key has expired")),
            KeyState::Revoked => Err(refusal("revoked_api_key", "this API key has been revoked")),
        }
    }
}

impl Principal {
    fn of_key(key: &KeyEntry) -> Self {
        Self {
            credential: Credential { kind: CredentialKind::Key, id: key.id.as_str().into() },
            owner: key.owner.as_str().into(),
            grant: Arc::new(key.grant.clone()),
            bound: None,
            roles: Vec::new(),
        }
    }
}

fn read_secret(r: &Reader<'_>) -> Option<HashSecret> {
    let path = r.get::<std::path::PathBuf>("hash_secret_file")?;
    check_mode(r, "hash_secret_file", &path);
    let fail = |e: io::Error| {
        r.problem("hash_secret_file", format!("{}: {e}", path.display()), "name the file that the keys were made with");
    };
    HashSecret::read(&path).map_err(fail).ok()
}

impl KeyLimits {
    fn to_table(&self) -> Option<Table> {
        let whole = |n: u64| Value::Integer(i64::try_from(n).unwrap_or(i64::MAX));
        let fields = [
            ("requests_per_second", self.requests_per_second.map(Value::Float)),
            ("burst", self.burst.map(|n| whole(n.into()))),
            ("tokens_per_minute", self.tokens_per_minute.map(whole)),
            ("concurrent_streams", self.concurrent_streams.map(|n| whole(n.into()))),
        ];
        let table: Table = fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
        (!table.is_empty()).then_some(table)
    }
}

/// A time as RFC 3339 in UTC, quoted or not, or as seconds since 1970.
impl FromValue for UnixSeconds {
    fn from_value(value: &Value) -> Result<Self, String> {
        let text = match value {
            Value::Integer(n) => return u64::try_from(*n).map(Self).map_err(|_| "a time after 1970".into()),
            Value::Datetime(time) => time.to_string(),
            Value::String(text) => text.clone(),
            _ => String::new(),
        };
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};

    use super::*;
    use crate::auth::Scope;

    // SHA-256 of "one" and "two"
    const ONE: &str = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";
    const TWO: &str = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3";

    fn read(text: &str, mode: u32) -> Result<Option<Keys>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        fs::set_permissions(file.path(), Permissions::from_mode(mode)).unwrap();
        let config = format!("keys_file = {:?}", file.path());
        Raw::from_toml(&config, "t").unwrap().check(Keys::read).map_err(|e| e.to_string())
    }

    fn keys() -> Keys {
        let text = format!(
            "[[keys]]\nid = \"a\"\nsha256 = \"{ONE}\"\nowner = \"alice\"\n[[keys]]\nid = \"b\"\nsha256 = \"{TWO}\"\nowner = \"bob\"\n\
             expires = 2030-01-01T00:00:00Z\n"
        );
        read(&text, 0o600).ok().flatten().unwrap()
    }

    #[test]
    fn a_known_key_has_an_owner_until_it_expires() {
        let keys = keys();
        let (before, after) = (UnixSeconds(1_893_455_999), UnixSeconds(1_893_456_000));
        let owner = |key: &[u8], now| keys.principal(key, now).map(|principal| principal.owner.to_string());
        assert_eq!(owner(b"one", after).unwrap(), "alice");
        assert_eq!(owner(b"two", before).unwrap(), "bob");
        assert_eq!(owner(b"two", after).unwrap_err().code, "expired_api_key");
        assert_eq!(owner(b"three", before).unwrap_err().code, "invalid_api_key");
    }

    #[test]
    fn a_file_that_others_can_read_and_each_bad_key_is_a_problem() {
        let good = format!("[[keys]]\nid = \"a\"\nsha256 = \"{ONE}\"\nowner = \"alice\"\n");
        assert!(read(&good, 0o644).err().unwrap().contains("mode 644"));
        assert!(read(&good.repeat(2), 0o600).err().unwrap().contains("two keys"));
        let bad = "[[keys]]\nid = \"a\"\nsha256 = \"xyz\"\nowner = \"a b\"\nexpires = \"soon\"\nscopes = [\"root\"]";
        let text = read(bad, 0o600).err().unwrap();
        for part in ["keys[0].owner", "keys[0].expires", "keys[0].scopes[0]"] {
            assert!(text.contains(part), "{part} not in {text}");
        }
        let bad = "[[keys]]\nid = \"a\"\nsha256 = \"xyz\"\nowner = \"ab\"";
        assert!(read(bad, 0o600).err().unwrap().contains("keys[0].sha256"));
    }

    #[test]
    fn what_is_written_is_read_again_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (path, secret) = (dir.path().join("keys.toml"), dir.path().join("secret"));
        fs::write(&secret, [b'x'; 32]).unwrap();
        let secret = HashSecret::read(&secret).unwrap();
        let hash = KeyHash::of(b"one", Some(&secret));
        let grant = Grant {
            scopes: [Scope::Metrics, Scope::Inference].into_iter().collect(),
            models: Some(vec!["smol*".parse().unwrap()]),
            sites: Some(vec!["onprem".parse().unwrap()]),
            limits: crate::auth::KeyLimits {
                requests_per_second: Some(0.5),
                burst: Some(3),
                tokens_per_minute: Some(1000),
                concurrent_streams: Some(2),
            },
        };
        let key = KeyEntry {
            id: hash.id(),
            hash,
            owner: "alice".into(),
            grant,
            expires: Some(UnixSeconds(1_893_456_000)),
            revoked: Some(UnixSeconds(1_893_455_000)),
        };
        let plain = KeyEntry {
            hash: KeyHash::of(b"two", None),
            id: "plain".into(),
            expires: None,
            revoked: None,
            ..key.clone()
        };
        let file = KeysFile { keys: vec![key, plain] };
        file.write(&path).unwrap();
        assert_eq!(KeysFile::read(&path).unwrap(), file);
        let unnamed = Raw::from_toml(&format!("keys_file = {path:?}"), "t").unwrap().check(Keys::read);
        assert!(unnamed.err().unwrap().to_string().contains("hash_secret_file"));
        let keys = Keys { keys: Vec::new(), secret: Some(secret) };
        assert!(keys.find(KeyHash::of(b"one", None), Some(hash)).is_none());
    }

    #[test]
    fn a_keyed_hash_is_what_rfc_4231_says() {
        // test case 1 has a key of 20 bytes, so the secret is made by hand
        let secret = HashSecret(hmac::Key::new(hmac::HMAC_SHA256, &[0x0b; 20]));
        let (_, digits) = KeyHash::of(b"Hi There", Some(&secret)).shown();
        assert_eq!(digits, "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    }
}
