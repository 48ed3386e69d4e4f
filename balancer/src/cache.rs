//! Answers that would be the same again: those of requests whose randomness is fixed, kept for a while and within a bound of memory.
//!
//! What an answer depends on is its key: the path, the body but for its layout and the end user's name, the model, and the fingerprint that all of
//! the model's nodes share. Where they differ, or one of them has not said, nothing is kept. Unless the configuration shares them, answers are kept for
//! each owner apart, so that nobody learns by the time it takes what others have asked.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use bytesize::ByteSize;
use lru::LruCache;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tidegate_common::{
    config::Reader,
    contract::paths,
    ids::{Fingerprint, SiteName},
};
use tokio::time::Instant;

use crate::{body::Wish, config::read_size};

/// `[balancer.cache]`.
#[derive(Debug, Clone)]
pub(crate) struct CacheConfig {
    /// Of all answers and what it takes to keep them.
    bytes_max: usize,
    /// How long an answer is good for.
    ttl: Duration,
    /// Largest answer that is kept.
    pub(crate) answer_bytes_max: usize,
    /// Whether owners get each other's.
    is_shared: bool,
}

impl CacheConfig {
    /// Reads the section; none where there is none.
    pub(crate) fn read(r: &Reader<'_>) -> Option<Self> {
        let this = Self {
            bytes_max: read_size(r, "memory", ByteSize::mib(64)),
            ttl: r.duration_or("ttl", Duration::from_secs(300)),
            answer_bytes_max: read_size(r, "max_answer", ByteSize::kib(256)),
            is_shared: r.get_or("shared", false),
        };
        if this.answer_bytes_max > this.bytes_max {
            r.problem(
                "max_answer",
                "is more than the memory of all answers",
                "choose less, or more balancer.cache.memory",
            );
        }
        r.is_present().then_some(this)
    }
}

/// What an answer goes by.
pub(crate) type Key = [u8; 32];

/// An answer as its first client got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) media_type: &'static str,
    pub(crate) body: Bytes,
}

/// A request, as far as its answer depends on it.
pub(crate) struct Asked<'a> {
    pub(crate) path: &'static str,
    pub(crate) model: &'a str,
    /// Shared by all of the model's nodes.
    pub(crate) fingerprint: Fingerprint,
    /// Whose it is.
    pub(crate) owner: &'a str,
    /// Sites that it may not leave.
    pub(crate) sites: &'a [SiteName],
    pub(crate) body: &'a [u8],
    pub(crate) wish: &'a Wish,
}

impl Asked<'_> {
    /// The key, where the answer would be the same again.
    pub(crate) fn key(&self, config: &CacheConfig) -> Option<Key> {
        let is_fixed = matches!(self.path, paths::EMBEDDINGS | paths::TOKENIZE | paths::DETOKENIZE);
        if !is_fixed && !self.wish.seeded && !self.wish.is_greedy {
            return None;
        }
        let mut body: Value = serde_json::from_slice(self.body).ok()?;
        body.as_object_mut()?.remove("user");
        let owner = if config.is_shared { "" } else { self.owner };
        let sites: Vec<&str> = self.sites.iter().map(SiteName::as_str).collect();
        let mut hash = Sha256::new();
        for part in [self.path, self.model, &self.fingerprint.to_string(), owner, &sites.join(",")] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        update(&mut hash, &body);
        Some(hash.finalize().into())
    }
}

/// Takes in a value, whatever its layout and the order of its fields.
fn update(hash: &mut Sha256, value: &Value) {
    match value {
        Value::Object(fields) => {
            let mut names: Vec<&String> = fields.keys().collect();
            names.sort_unstable();
            hash.update(b"{");
            for name in names {
                update(hash, &Value::from(name.as_str()));
                update(hash, &fields[name]);
            }
            hash.update(b"}");
        }
        Value::Array(items) => {
            hash.update(b"[");
            items.iter().for_each(|item| update(hash, item));
            hash.update(b"]");
        }
        plain => {
            let text = plain.to_string();
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
    }
}

/// The answers that are kept.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<Shelf>);

#[derive(Debug)]
struct Shelf {
    answers: LruCache<Key, (Kept, Instant)>,
    bytes: usize,
}

impl Default for Shelf {
    fn default() -> Self {
        // bounded by bytes
        Self { answers: LruCache::unbounded(), bytes: 0 }
    }
}

/// What an entry takes beside its answer.
const ENTRY_BYTES: usize = 160;

impl Cache {
    /// The answer of this key, while it is good.
    pub(crate) fn get(&self, key: &Key, now: Instant) -> Option<Kept> {
        let mut shelf = self.shelf();
        let (kept, until) = shelf.answers.get(key)?;
        if now < *until {
            return Some(kept.clone());
        }
        shelf.remove(key);
        None
    }

    /// Keeps an answer; those that were asked for longest ago make room.
    pub(crate) fn put(&self, key: Key, kept: Kept, config: &CacheConfig, now: Instant) {
        let size = kept.body.len() + ENTRY_BYTES;
        if kept.body.len() > config.answer_bytes_max || size > config.bytes_max {
            return;
        }
        let mut shelf = self.shelf();
        shelf.remove(&key);
        shelf.answers.put(key, (kept, now + config.ttl));
        shelf.bytes += size;
        while shelf.bytes > config.bytes_max {
            let Some((_, (kept, _))) = shelf.answers.pop_lru() else { break };
            shelf.bytes -= kept.body.len() + ENTRY_BYTES;
        }
    }

    /// How many answers are kept, and what they take.
    pub(crate) fn size(&self) -> (usize, usize) {
        let shelf = self.shelf();
        (shelf.answers.len(), shelf.bytes)
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn remove(&mut self, key: &Key) {
        if let Some((kept, _)) = self.answers.pop(key) {
            self.bytes -= kept.body.len() + ENTRY_BYTES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(bytes_max: usize) -> CacheConfig {
        CacheConfig { bytes_max, ttl: Duration::from_secs(10), answer_bytes_max: 1000, is_shared: false }
    }

    fn key(body: &str, owner: &str, config: &CacheConfig) -> Option<Key> {
        let wish = Wish::read(body.as_bytes()).unwrap();
        let fingerprint = Fingerprint::new(1);
        let body = body.as_bytes();
        Asked { path: paths::CHAT_COMPLETIONS, model: "m", fingerprint, owner, sites: &[], body, wish: &wish }
            .key(config)
    }

    #[test]
    fn what_an_answer_depends_on_is_its_key_and_layout_is_not() {
        let config = config(1000);
        let one = key(r#"{"temperature": 0, "messages": [{"role": "user", "content": "a"}]}"#, "", &config).unwrap();
        let same = r#"{"messages":[{"content":"a","role":"user"}],"temperature":0,"user":"u"}"#;
        assert_eq!(key(same, "", &config), Some(one));
        assert_ne!(key(same, "alice", &config), Some(one));
        assert_eq!(key(same, "alice", &CacheConfig { is_shared: true, ..config.clone() }), Some(one));
        let other = r#"{"messages":[{"content":"a","role":"user"}],"temperature":0,"max_tokens":3}"#;
        assert_ne!(key(other, "", &config), Some(one));
        assert_ne!(
            key(r#"{"temperature":0,"a":["b","c"]}"#, "", &config),
            key(r#"{"temperature":0,"a":["bc"]}"#, "", &config)
        );
    }

    #[test]
    fn what_is_drawn_anew_each_time_has_no_key() {
        let config = config(1000);
        for (body, is_kept) in [
            (r#"{"temperature":0.7}"#, false),
            ("{}", false),
            (r#"{"temperature":0.7,"seed":1}"#, true),
            (r#"{"temperature":0.0}"#, true),
            (r#"{"seed":null}"#, false),
        ] {
            assert_eq!(key(body, "", &config).is_some(), is_kept, "{body}");
        }
    }

    #[test]
    fn memory_is_bounded_and_answers_end() {
        let (cache, config, now) = (Cache::default(), config(3 * (100 + ENTRY_BYTES)), Instant::now());
        let kept = |byte| Kept { media_type: "t", body: Bytes::from(vec![byte; 100]) };
        for byte in 0..3 {
            cache.put([byte; 32], kept(byte), &config, now);
        }
        assert_eq!(cache.get(&[0; 32], now), Some(kept(0)), "and asked for it is the newest");
        cache.put([3; 32], kept(3), &config, now);
        assert_eq!(cache.get(&[1; 32], now), None);
        assert_eq!(cache.size(), (3, 3 * (100 + ENTRY_BYTES)));
        cache.put([4; 32], Kept { media_type: "t", body: Bytes::from(vec![0; 1001]) }, &config, now);
        assert_eq!(cache.size().0, 3, "too large to keep");
        assert_eq!(cache.get(&[0; 32], now + Duration::from_secs(10)), None);
        assert_eq!(cache.size(), (2, 2 * (100 + ENTRY_BYTES)));
    }
}
