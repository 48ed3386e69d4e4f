//! Doors for the fuzz targets below `fuzz/`; built for them alone.

use tidegate_common::config::Raw;

use crate::{
    audit::read::faults_of,
    auth::{self, KeysFile},
    body::Wish,
    policy::{Policies, Who},
    proxied,
    relay::{
        delivered::Delivered,
        events::{Events, Tail},
    },
};

/// Reads a generation's body; the status of the refusal, if it is refused.
pub fn body(bytes: &[u8]) -> Option<u16> {
    Wish::read(bytes).err().map(|error| error.status())
}

/// What a stream that comes in these parts has passed on, and the tokens counted of each choice; none when it is malformed.
pub fn pass(parts: &[&[u8]]) -> Option<(Vec<u8>, Vec<Vec<u32>>)> {
    let (mut events, mut delivered, mut passed) = (Events::default(), Delivered::new(1), Vec::new());
    for part in parts {
        let read = events.push(part, &mut delivered).ok()?;
        passed.extend_from_slice(&read.bytes);
        assert!(read.tail != Some(Tail::Handover) || !passed.ends_with(b"event: handover\n"));
    }
    Some((passed, delivered.resume().tokens))
}

/// Reads these bytes as a file of an audit log, and as an encrypted one; how many faults each has.
pub fn audit(bytes: &[u8]) -> (usize, usize) {
    faults_of(bytes)
}

/// Reads this text as policies, and asks them; how many problems it has.
pub fn policies(text: &str, action: &str, resource: &str) -> usize {
    let Ok(raw) = Raw::from_toml(text, "fuzz") else { return 1 };
    match raw.check(Policies::read) {
        Ok(policies) => {
            let who = Who { names: vec!["owner:alice".into()], address: None };
            let _ = policies.decide(&who, action, resource).to_string();
            0
        }
        Err(problems) => problems.0.len(),
    }
}

/// Reads this text as a file of keys and writes what it has; whether that reads as the same.
pub fn keys(text: &str) -> bool {
    let read = |text: &str| Raw::from_toml(text, "fuzz").ok()?.check(KeysFile::read_sections).ok();
    let Some(keys) = read(text) else { return true };
    read(&keys.to_text()).is_some_and(|again| again == keys)
}

/// Looks at a token that nobody has signed; the code of the refusal.
pub fn token(bytes: &[u8]) -> &'static str {
    auth::judge_unsigned(bytes).code
}

/// Reads a header of the PROXY protocol; whether it is one.
pub fn proxy_header(bytes: &[u8]) -> bool {
    proxied::parse(bytes).is_some()
}
