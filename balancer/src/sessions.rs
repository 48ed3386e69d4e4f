//! Dialogues that the edge remembers for `POST /api/v1/chat` with a `session_id`: what was said so far goes with the next question, to the node
//! that answered the last one if that is possible, since it has the beginning in its prefix cache.
//!
//! A dialogue is its owner's alone. It ends when nobody has gone on with it for a time, and those that nobody went on with for longest make room.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytesize::ByteSize;
use lru::LruCache;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tidegate_common::{config::Reader, contract::ApiError, ids::NodeId};
use tokio::time::Instant;

use crate::config::read_size;

/// Longest name of a session.
const ID_BYTES_MAX: usize = 128;
/// What a message takes beside its text.
const MESSAGE_BYTES: usize = 64;

/// `[balancer.sessions]`.
#[derive(Debug, Clone)]
pub(crate) struct SessionsConfig {
    bytes_max: usize,
    ttl: Duration,
    /// Of one dialogue; the oldest turns are forgotten first.
    dialogue_bytes_max: usize,
}

impl SessionsConfig {
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        let this = Self {
            bytes_max: read_size(r, "memory", ByteSize::mib(64)),
            ttl: r.duration_or("ttl", Duration::from_secs(1800)),
            dialogue_bytes_max: read_size(r, "max_history", ByteSize::kib(16)),
        };
        if this.dialogue_bytes_max > this.bytes_max {
            r.problem(
                "max_history",
                "is more than the memory of all dialogues",
                "choose less, or more balancer.sessions.memory",
            );
        }
        this
    }

    /// Longest answer that is remembered.
    pub(crate) fn answer_bytes_max(&self) -> usize {
        // events are many times as long as the text in them
        32 * self.dialogue_bytes_max
    }
}

/// A question that goes on with a dialogue.
pub(crate) struct Question {
    id: String,
    query: String,
}

impl Question {
    /// Reads a body of `/api/v1/chat`; none where it names no session. A query that is none is the node's to refuse.
    pub(crate) fn read(body: &[u8]) -> Result<Option<Self>, ApiError> {
        #[derive(Deserialize)]
        struct Raw {
            session_id: Option<Value>,
            query: Option<Value>,
        }
        let raw = serde_json::from_slice::<Raw>(body).unwrap_or(Raw { session_id: None, query: None });
        match (raw.session_id, raw.query) {
            (None, _) => Ok(None),
            (Some(Value::String(id)), Some(Value::String(query))) => Ok(Some(Self { id, query })),
            (Some(Value::String(_)), _) => Ok(None),
            (Some(_), _) => Err(ApiError::invalid("session_id", "'session_id' must be text")),
        }
    }

    /// Of whose dialogue it is, and which.
    pub(crate) fn key(&self, owner: &str) -> Result<Key, ApiError> {
        key(owner, &self.id)
    }

    /// It was answered so.
    pub(crate) fn answered(self, answer: String, node: Option<NodeId>) -> Turn {
        Turn { query: self.query, answer, node }
    }
}

/// One dialogue of one owner.
pub(crate) type Key = [u8; 32];

/// The key of a session that a client has named.
fn key(owner: &str, id: &str) -> Result<Key, ApiError> {
    if id.is_empty() || id.len() > ID_BYTES_MAX || id.chars().any(char::is_control) {
        return Err(ApiError::invalid(
            "session_id",
            format!("'session_id' must be a text of 1 to {ID_BYTES_MAX} bytes"),
        ));
    }
    let mut hash = Sha256::new();
    hash.update((owner.len() as u64).to_le_bytes());
    hash.update(owner);
    hash.update(id);
    Ok(hash.finalize().into())
}

/// One thing said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Message {
    role: &'static str,
    content: String,
}

/// What was said so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Dialogue {
    pub(crate) messages: Vec<Message>,
    /// Who answered last.
    pub(crate) node: Option<NodeId>,
}

impl Dialogue {
    fn bytes(&self) -> usize {
        self.messages.iter().map(|message| message.content.len() + MESSAGE_BYTES).sum()
    }

    fn add(&mut self, query: String, answer: String, node: Option<NodeId>, bytes_max: usize) {
        self.messages
            .extend([Message { role: "user", content: query }, Message { role: "assistant", content: answer }]);
        self.node = node.or(self.node.take());
        // whole turns, so that a question never stands without its answer
        while self.bytes() > bytes_max {
            self.messages.drain(..2);
        }
    }
}

/// All dialogues.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<Shelf>);

#[derive(Debug)]
struct Shelf {
    dialogues: LruCache<Key, (Dialogue, Instant)>,
    bytes: usize,
}

impl Default for Shelf {
    fn default() -> Self {
        // bounded by bytes
        Self { dialogues: LruCache::unbounded(), bytes: 0 }
    }
}

/// What a dialogue takes beside what was said.
const DIALOGUE_BYTES: usize = 256;

impl Sessions {
    /// What was said so far; nothing in a session that is new, or over.
    pub(crate) fn get(&self, key: &Key, now: Instant) -> Dialogue {
        let mut shelf = self.shelf();
        match shelf.dialogues.get(key) {
            Some((dialogue, until)) if now < *until => dialogue.clone(),
            Some(_) => {
                shelf.take(key);
                Dialogue::default()
            }
            None => Dialogue::default(),
        }
    }

    /// A question has been answered.
    pub(crate) fn add(&self, key: Key, turn: Turn, config: &SessionsConfig, now: Instant) {
        let mut shelf = self.shelf();
        let mut dialogue =
            shelf.take(&key).filter(|(_, until)| now < *until).map(|(dialogue, _)| dialogue).unwrap_or_default();
        dialogue.add(turn.query, turn.answer, turn.node, config.dialogue_bytes_max);
        shelf.bytes += dialogue.bytes() + DIALOGUE_BYTES;
        shelf.dialogues.put(key, (dialogue, now + config.ttl));
        while shelf.bytes > config.bytes_max {
            let Some((_, (dialogue, _))) = shelf.dialogues.pop_lru() else { break };
            shelf.bytes -= dialogue.bytes() + DIALOGUE_BYTES;
        }
    }

    /// How many dialogues there are, and what they take.
    pub(crate) fn size(&self) -> (usize, usize) {
        let shelf = self.shelf();
        (shelf.dialogues.len(), shelf.bytes)
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn take(&mut self, key: &Key) -> Option<(Dialogue, Instant)> {
        let found = self.dialogues.pop(key)?;
        self.bytes -= found.0.bytes() + DIALOGUE_BYTES;
        Some(found)
    }
}

/// A question with its answer.
pub(crate) struct Turn {
    query: String,
    answer: String,
    /// Who answered, where that was a node.
    node: Option<NodeId>,
}

/// The text in an answer of `/api/v1/chat`, whole or as events.
pub(crate) fn answer_in(body: &[u8], is_stream: bool) -> Option<String> {
    #[derive(Deserialize)]
    struct Piece {
        answer: String,
    }
    if !is_stream {
        return serde_json::from_slice::<Piece>(body).ok().map(|piece| piece.answer);
    }
    let lines = body.split(|b| *b == b'\n').filter_map(|line| line.strip_prefix(b"data: "));
    lines
        .filter(|data| data.starts_with(b"{"))
        .map(|data| Some(serde_json::from_slice::<Piece>(data).ok()?.answer))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> SessionsConfig {
        let turn = 2 * (10 + MESSAGE_BYTES);
        SessionsConfig {
            bytes_max: 2 * (2 * turn + DIALOGUE_BYTES),
            ttl: Duration::from_secs(60),
            dialogue_bytes_max: 2 * turn,
        }
    }

    fn turn(n: u8) -> Turn {
        Turn { query: format!("question {n}"), answer: format!("answer   {n}"), node: None }
    }

    fn first(dialogue: &Dialogue) -> &str {
        dialogue.messages.first().map_or("", |message| &message.content)
    }

    #[test]
    fn a_dialogue_is_its_owners_and_forgets_its_oldest_turns() {
        let (sessions, config, now) = (Sessions::default(), config(), Instant::now());
        let (alice, bob) = (key("alice", "s").unwrap(), key("bob", "s").unwrap());
        for n in 0..3 {
            sessions.add(alice, turn(n), &config, now);
        }
        let dialogue = sessions.get(&alice, now);
        assert_eq!((dialogue.messages.len(), first(&dialogue)), (4, "question 1"));
        assert_eq!(sessions.get(&bob, now), Dialogue::default());
        assert_ne!(key("a", "bc").unwrap(), key("ab", "c").unwrap());
    }

    #[test]
    fn dialogues_end_after_a_time_and_make_room_for_others() {
        let (sessions, config, now) = (Sessions::default(), config(), Instant::now());
        let keys: Vec<_> = ["a", "b", "c"].iter().map(|id| key("o", id).unwrap()).collect();
        for key in &keys {
            (0..2).for_each(|n| sessions.add(*key, turn(n), &config, now));
        }
        assert_eq!(sessions.size(), (2, config.bytes_max));
        assert_eq!(sessions.get(&keys[0], now), Dialogue::default());
        let later = now + config.ttl;
        assert_eq!(sessions.get(&keys[2], later), Dialogue::default());
        sessions.add(keys[1], turn(7), &config, later);
        assert_eq!(first(&sessions.get(&keys[1], later)), "question 7", "what was over does not come back");
    }

    #[test]
    fn the_text_is_read_of_whole_answers_and_of_events() {
        assert_eq!(answer_in(br#"{"id":"x","answer":"ab"}"#, false).as_deref(), Some("ab"));
        let events = b": wait\n\ndata: {\"answer\":\"a\"}\n\ndata: {\"answer\":\"b\",\"usage\":{}}\n\ndata: [DONE]\n\n";
        assert_eq!(answer_in(events, true).as_deref(), Some("ab"));
        assert_eq!(answer_in(b"data: {\"error\":{}}\n\n", true), None);
        assert!(key("o", "").is_err() && key("o", &"x".repeat(129)).is_err() && key("o", "a\nb").is_err());
    }
}
