//! Doors for the fuzz targets below `fuzz/`; built for them alone.

use crate::{
    audit::read::faults_of,
    body::Wish,
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
