//! One line of the audit log, and the chain that the lines make. Pure: no clock, no file.
//!
//! A line is a JSON object in one fixed order of bytes: `{"seq":N,"prev":"H",` what happened `,"hash":"H"}`. `prev` is the hash of the line
//! before, `hash` the SHA-256 of all bytes of this line before `,"hash"`. With a key there follows `,"mac":"H"`, an HMAC-SHA256 over all
//! bytes before it: who can write the file can make hashes anew, and no MACs.

use std::io::Write;

use ring::hmac;
use sha2::{Digest, Sha256};

/// Longest line that is read, in bytes; none that is written comes near.
pub(crate) const LINE_BYTES_MAX: usize = 16 << 20;

const HASH: &[u8] = b",\"hash\":\"";
const MAC: &[u8] = b",\"mac\":\"";
const HEX: usize = 64;

/// A place in the chain: a line's number and hash. Lines are numbered from 1; before them is [`Link::START`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) seq: u64,
    pub(crate) hash: [u8; 32],
}

impl Link {
    /// Before the first line.
    pub(crate) const START: Self = Self { seq: 0, hash: [0; 32] };
}

/// Writes the line after `before`, with its end, and returns its place. `content` is JSON fields without braces.
pub(crate) fn seal(out: &mut Vec<u8>, before: Link, content: &[u8], key: Option<&hmac::Key>) -> Link {
    let (start, seq) = (out.len(), before.seq + 1);
    let _ = write!(out, "{{\"seq\":{seq},\"prev\":\"{}\",", hex(&before.hash)); // writing to memory does not fail
    out.extend_from_slice(content);
    let hash = close(out, start, key);
    out.push(b'\n');
    Link { seq, hash }
}

/// Ends the JSON object that begins at `start` with its hash and MAC.
pub(crate) fn close(out: &mut Vec<u8>, start: usize, key: Option<&hmac::Key>) -> [u8; 32] {
    let hash: [u8; 32] = Sha256::digest(&out[start..]).into();
    out.extend_from_slice(HASH);
    out.extend_from_slice(hex(&hash).as_bytes());
    out.push(b'"');
    if let Some(key) = key {
        let mac = hmac::sign(key, &out[start..]);
        out.extend_from_slice(MAC);
        out.extend_from_slice(hex(mac.as_ref()).as_bytes());
        out.push(b'"');
    }
    out.push(b'}');
    hash
}

/// Why a line is not as it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// It is none of ours.
    Malformed,
    /// Its hash is another's.
    Changed,
    /// Its MAC was made with none of the keys.
    Forged,
}

/// A line that is as it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) link: Link,
    pub(crate) prev: [u8; 32],
    pub(crate) has_mac: bool,
}

/// An object's bytes up to its hash, the hash, and whether a MAC follows; checked.
pub(crate) fn open<'a>(object: &'a [u8], keys: &[hmac::Key]) -> Result<(&'a [u8], [u8; 32], bool), Flaw> {
    let body = object.strip_suffix(b"\"}").ok_or(Flaw::Malformed)?;
    let (body, last) = split_hex(body).ok_or(Flaw::Malformed)?;
    let (content, hash, has_mac) = match (body.strip_suffix(HASH), body.strip_suffix(MAC)) {
        (Some(content), _) => (content, last, false),
        (None, Some(sealed)) => {
            let body = sealed.strip_suffix(b"\"").ok_or(Flaw::Malformed)?;
            let (body, hash) = split_hex(body).ok_or(Flaw::Malformed)?;
            let content = body.strip_suffix(HASH).ok_or(Flaw::Malformed)?;
            if !keys.is_empty() && !keys.iter().any(|key| hmac::verify(key, sealed, &last).is_ok()) {
                return Err(Flaw::Forged);
            }
            (content, hash, true)
        }
        (None, None) => return Err(Flaw::Malformed),
    };
    let actual: [u8; 32] = Sha256::digest(content).into();
    if actual == hash { Ok((content, hash, has_mac)) } else { Err(Flaw::Changed) }
}

/// Reads a line without its end, and checks it by itself.
pub(crate) fn read(line: &[u8], keys: &[hmac::Key]) -> Result<Line, Flaw> {
    let (content, hash, has_mac) = open(line, keys)?;
    let (seq, prev) = frame(content).ok_or(Flaw::Malformed)?;
    Ok(Line { link: Link { seq, hash }, prev, has_mac })
}

/// The number that a line bears, whatever else is wrong with it.
pub(crate) fn number(line: &[u8]) -> Option<u64> {
    let rest = line.strip_prefix(b"{\"seq\":")?;
    let end = rest.iter().position(|b| !b.is_ascii_digit())?;
    std::str::from_utf8(&rest[..end]).ok()?.parse().ok()
}

fn frame(content: &[u8]) -> Option<(u64, [u8; 32])> {
    let seq = number(content)?;
    let rest = content.strip_prefix(format!("{{\"seq\":{seq},\"prev\":\"").as_bytes())?;
    Some((seq, unhex(rest.get(..HEX)?)?))
}

fn split_hex(bytes: &[u8]) -> Option<(&[u8], [u8; 32])> {
    let (rest, digits) = bytes.split_at_checked(bytes.len().checked_sub(HEX)?)?;
    Some((rest, unhex(digits)?))
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]).map(char::from).collect()
}

/// 32 bytes of 64 lower-case hexadecimal digits: one form only, so that two texts never stand for one hash.
pub(crate) fn unhex(digits: &[u8]) -> Option<[u8; 32]> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 32];
    if digits.len() != HEX {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &[byte; 32])
    }

    proptest! {
        #[test]
        fn a_line_reads_back_and_no_other_byte_passes(seq in 0u64..1 << 40, text in "[a-z\"\\\\é]{0,40}", at: prop::sample::Index, to: u8, keyed: bool) {
            let before = Link { seq, hash: [7; 32] };
            let content = format!("\"event\":{}", serde_json::to_string(&text).unwrap());
            let mut out = Vec::new();
            let link = seal(&mut out, before, content.as_bytes(), keyed.then(|| key(1)).as_ref());
            prop_assert_eq!(out.pop(), Some(b'\n'));
            let keys = [key(1)];
            prop_assert_eq!(read(&out, &keys), Ok(Line { link, prev: before.hash, has_mac: keyed }));
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&out).is_ok());
            let at = at.index(out.len());
            prop_assume!(out[at] != to);
            out[at] = to;
            prop_assert!(read(&out, &keys).is_err());
        }
    }

    #[test]
    fn only_who_has_the_key_makes_a_mac() {
        let mut forged = Vec::new();
        seal(&mut forged, Link::START, b"\"a\":1", Some(&key(2)));
        forged.pop();
        assert_eq!(read(&forged, &[key(1)]), Err(Flaw::Forged));
        assert!(read(&forged, &[key(1), key(2)]).is_ok());
        assert!(read(&forged, &[]).unwrap().has_mac, "without a key the hashes alone are checked");
    }
}
