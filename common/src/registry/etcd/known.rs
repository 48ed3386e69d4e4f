//! What listings and events of etcd add up to: a map of nodes. No I/O, so that a test calls it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use tracing::warn;

use crate::{
    contract::{NodeRecord, RECORD_VERSION},
    ids::NodeId,
};

/// One event of a watch.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change<'a> {
    /// A key was written.
    Put { key: &'a [u8], value: &'a [u8] },
    /// A key was deleted, or its lease ran out.
    Delete { key: &'a [u8] },
}

/// Nodes as etcd last told of them.
#[derive(Debug)]
pub(super) struct Known {
    prefix: String,
    nodes: BTreeMap<NodeId, NodeRecord>,
    /// Keys passed over, so that each is warned of once and not at every listing.
    skipped: BTreeSet<Vec<u8>>,
}

/// Why a key is passed over.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Unreadable {
    #[error("version {0} is later than {RECORD_VERSION}, which this build reads; upgrade it")]
    LaterVersion(u32),
    #[error("not a node record: {0}")]
    Malformed(String),
    #[error("the record is of another node, '{0}'")]
    OtherNode(NodeId),
}

impl Known {
    /// Nothing known yet of the keys below `prefix`.
    pub(super) fn new(prefix: String) -> Self {
        Self { prefix, nodes: BTreeMap::new(), skipped: BTreeSet::new() }
    }

    /// The nodes.
    pub(super) fn nodes(&self) -> &BTreeMap<NodeId, NodeRecord> {
        &self.nodes
    }

    /// Takes a whole listing in place of what was known. Whether anything is different now.
    pub(super) fn replace<'a>(&mut self, entries: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> bool {
        let before = std::mem::take(&mut self.nodes);
        let warned = std::mem::take(&mut self.skipped);
        for (key, value) in entries {
            self.put(key, value, &warned);
        }
        before != self.nodes
    }

    /// Takes one event.
    pub(super) fn apply(&mut self, change: Change<'_>) {
        match change {
            Change::Put { key, value } => {
                self.remove(key);
                self.put(key, value, &BTreeSet::new());
            }
            Change::Delete { key } => self.remove(key),
        }
    }

    fn put(&mut self, key: &[u8], value: &[u8], warned: &BTreeSet<Vec<u8>>) {
        match self.read(key, value) {
            Ok(record) => {
                self.nodes.insert(record.id.clone(), record);
            }
            Err(reason) => {
                if !warned.contains(key) {
                    warn!(key = %String::from_utf8_lossy(key), %reason, "passing over a key of the registry");
                }
                self.skipped.insert(key.to_vec());
            }
        }
    }

    fn remove(&mut self, key: &[u8]) {
        self.skipped.remove(key);
        if let Some(id) = self.id_of(key) {
            self.nodes.remove(&id);
        }
    }

    fn read(&self, key: &[u8], value: &[u8]) -> Result<NodeRecord, Unreadable> {
        #[derive(Deserialize)]
        struct Version {
            v: u32,
        }
        let malformed = |e: serde_json::Error| Unreadable::Malformed(e.to_string());
        // the version first: a later record may not even parse as ours
        let Version { v } = serde_json::from_slice(value).map_err(malformed)?;
        if v > RECORD_VERSION {
            return Err(Unreadable::LaterVersion(v));
        }
        let record: NodeRecord = serde_json::from_slice(value).map_err(malformed)?;
        if self.id_of(key).as_ref() == Some(&record.id) { Ok(record) } else { Err(Unreadable::OtherNode(record.id)) }
    }

    fn id_of(&self, key: &[u8]) -> Option<NodeId> {
        std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFIX: &str = "/tidegate/v1/c/nodes/";

    fn entry(id: &str, address: &str) -> (Vec<u8>, Vec<u8>) {
        let record = NodeRecord::new(id.parse().unwrap(), address.into(), "m".into());
        (format!("{PREFIX}{id}").into_bytes(), serde_json::to_vec(&record).unwrap())
    }

    fn put(known: &mut Known, (key, value): &(Vec<u8>, Vec<u8>)) {
        known.apply(Change::Put { key, value });
    }

    fn ids(known: &Known) -> Vec<&str> {
        known.nodes().keys().map(NodeId::as_str).collect()
    }

    fn listing(entries: &[(Vec<u8>, Vec<u8>)]) -> impl Iterator<Item = (&[u8], &[u8])> {
        entries.iter().map(|(k, v)| (k.as_slice(), v.as_slice()))
    }

    #[test]
    fn events_put_change_and_take_out() {
        let mut known = Known::new(PREFIX.into());
        put(&mut known, &entry("a", "1"));
        put(&mut known, &entry("b", "2"));
        put(&mut known, &entry("a", "3"));
        assert_eq!(ids(&known), ["a", "b"]);
        assert_eq!(known.nodes().values().next().unwrap().address, "3");
        known.apply(Change::Delete { key: &entry("a", "").0 });
        known.apply(Change::Delete { key: b"/elsewhere/b" });
        assert_eq!(ids(&known), ["b"]);
    }

    #[test]
    fn a_listing_replaces_and_says_whether_it_differs() {
        let mut known = Known::new(PREFIX.into());
        let both = [entry("a", "1"), entry("b", "2")];
        assert!(known.replace(listing(&both)));
        assert!(!known.replace(listing(&both)));
        assert!(known.replace(listing(&both[1..])));
        assert_eq!(ids(&known), ["b"]);
        assert!(known.replace([]), "an empty listing is told as it is");
        assert!(known.nodes().is_empty());
    }

    #[test]
    fn a_key_that_cannot_be_read_hides_no_other() {
        let mut known = Known::new(PREFIX.into());
        let later = (entry("a", "").0, br#"{"v":2,"id":{"new":"form"}}"#.to_vec());
        let broken = (entry("b", "").0, b"\xff{".to_vec());
        let foreign = (entry("c", "").0, entry("d", "1").1);
        known.replace(listing(&[later.clone(), broken, foreign, entry("e", "1")]));
        assert_eq!(ids(&known), ["e"]);
        assert_eq!(known.read(&later.0, &later.1), Err(Unreadable::LaterVersion(2)));
    }

    #[test]
    fn a_node_that_writes_a_later_record_leaves_the_view() {
        let mut known = Known::new(PREFIX.into());
        put(&mut known, &entry("a", "1"));
        put(&mut known, &(entry("a", "").0, br#"{"v":9}"#.to_vec()));
        assert!(known.nodes().is_empty());
        put(&mut known, &entry("a", "1"));
        assert_eq!(ids(&known), ["a"]);
    }

    #[test]
    fn each_skipped_key_is_remembered_until_it_is_gone_or_readable() {
        let mut known = Known::new(PREFIX.into());
        let later = (entry("a", "").0, br#"{"v":2}"#.to_vec());
        known.replace(listing(std::slice::from_ref(&later)));
        assert!(known.skipped.contains(&later.0));
        put(&mut known, &entry("a", "1"));
        assert!(known.skipped.is_empty());
    }
}
