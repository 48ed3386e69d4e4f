//! Whether lines that were read are the chain that was written. Pure: one call for each line, in the order of the files.

use std::fmt;

use ring::hmac;

use super::line::{self, Flaw, Link};

/// What is wrong at one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Break {
    /// It is no line of an audit log.
    Malformed,
    /// Its own hash is another's: it was changed.
    Changed {
        /// The number it bears.
        seq: Option<u64>,
    },
    /// Its MAC was made with none of the keys.
    Forged {
        /// The number it bears.
        seq: Option<u64>,
    },
    /// It has no MAC, and lines before it have.
    Unauthenticated {
        /// The number it bears.
        seq: u64,
    },
    /// Lines before it are not there.
    Missing {
        /// The first of them.
        from: u64,
        /// The last of them.
        to: u64,
    },
    /// It stands behind lines that came after it, or twice.
    Misplaced {
        /// The number it bears.
        seq: u64,
        /// The number that should stand there.
        expected: u64,
    },
    /// It does not go on where the line before it ends: one of the two was put in another's place.
    Replaced {
        /// The number it bears.
        seq: u64,
    },
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bearing = |seq: &Option<u64>| seq.map_or_else(|| "a record".to_owned(), |seq| format!("record {seq}"));
        match self {
            Self::Malformed => f.write_str("this is no record of an audit log"),
            Self::Changed { seq } => write!(f, "{} was changed", bearing(seq)),
            Self::Forged { seq } => write!(f, "{} was not written with the key", bearing(seq)),
            Self::Unauthenticated { seq } => write!(f, "record {seq} has no MAC, and records before it have"),
            Self::Missing { from, to } if from == to => write!(f, "record {from} is missing"),
            Self::Missing { from, to } => write!(f, "records {from} to {to} are missing"),
            Self::Misplaced { seq, expected } => write!(f, "record {seq} stands where {expected} should"),
            Self::Replaced { seq } => write!(f, "record {seq} does not go on where {} ends", seq.saturating_sub(1)),
        }
    }
}

/// The chain as far as it was read.
pub(crate) struct Chain<'a> {
    keys: &'a [hmac::Key],
    last: Option<Link>,
    had_mac: bool,
    /// Lines that are as they were written.
    pub(crate) lines: u64,
    /// The first number.
    pub(crate) first: Option<u64>,
    /// The hash that the first line names as the one before it.
    pub(crate) first_prev: Option<[u8; 32]>,
}

impl<'a> Chain<'a> {
    pub(crate) fn new(keys: &'a [hmac::Key]) -> Self {
        Self { keys, last: None, had_mac: false, lines: 0, first: None, first_prev: None }
    }

    /// The newest place.
    pub(crate) fn last(&self) -> Option<Link> {
        self.last
    }

    /// Whether any line was authenticated.
    pub(crate) fn had_mac(&self) -> bool {
        self.had_mac
    }

    /// Takes the next line, without its end. A line that was changed is taken for its number's all the same, so that one change is one
    /// break.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn step(&mut self, text: &[u8]) -> Result<(), Break> {
        let line = match line::read(text, self.keys) {
            Ok(line) => line,
            Err(flaw) => return Err(self.step_over(flaw, line::number(text))),
        };
        self.lines += 1;
        let before = self.last.replace(line.link);
        let lacks_mac = !self.keys.is_empty() && self.had_mac && !line.has_mac;
        self.had_mac |= line.has_mac;
        let seq = line.link.seq;
        let Some(before) = before else {
            (self.first, self.first_prev) = (Some(seq), Some(line.prev));
            return Ok(());
        };
        match before.seq + 1 {
            expected if seq > expected => Err(Break::Missing { from: expected, to: seq - 1 }),
            expected if seq < expected => {
                // what was read stays, so that lines after it are where they should be
                self.last = Some(before);
                Err(Break::Misplaced { seq, expected })
            }
            _ if line.prev != before.hash && before.hash != UNKNOWN => Err(Break::Replaced { seq }),
            _ if lacks_mac => Err(Break::Unauthenticated { seq }),
            _ => Ok(()),
        }
    }

    fn step_over(&mut self, flaw: Flaw, seq: Option<u64>) -> Break {
        let is_next = self.last.is_none_or(|last| seq == last.seq.checked_add(1));
        if let Some(seq) = seq.filter(|_| is_next) {
            self.last = Some(Link { seq, hash: UNKNOWN });
            self.first.get_or_insert(seq);
        }
        match flaw {
            Flaw::Malformed => Break::Malformed,
            Flaw::Changed => Break::Changed { seq },
            Flaw::Forged => Break::Forged { seq },
        }
    }
}

/// The hash of a line that was changed: the one it had is not known here.
const UNKNOWN: [u8; 32] = [0xff; 32];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn log(count: usize) -> Vec<Vec<u8>> {
        let (mut link, mut lines) = (Link::START, Vec::new());
        for i in 0..count {
            let mut line = Vec::new();
            link = line::seal(&mut line, link, format!("\"n\":{i}").as_bytes(), None);
            line.pop();
            lines.push(line);
        }
        lines
    }

    fn breaks(lines: &[Vec<u8>]) -> Vec<Break> {
        let mut chain = Chain::new(&[]);
        lines.iter().filter_map(|line| chain.step(line).err()).collect()
    }

    #[test]
    fn each_kind_of_change_is_told_as_what_it_is() {
        let whole = log(9);
        assert_eq!(breaks(&whole), []);
        let edit = |change: fn(&mut Vec<Vec<u8>>)| {
            let mut lines = whole.clone();
            change(&mut lines);
            breaks(&lines)
        };
        assert_eq!(edit(|l| drop(l.remove(3))), [Break::Missing { from: 4, to: 4 }]);
        assert_eq!(edit(|l| drop(l.drain(2..6))), [Break::Missing { from: 3, to: 6 }]);
        assert_eq!(edit(|l| l[3][80] ^= 1).len(), 1);
        assert!(matches!(
            edit(|l| {
                let at = l[3].windows(4).position(|w| w == b"\"n\":").unwrap();
                l[3][at + 4] = b'7'
            })[..],
            [Break::Changed { seq: Some(4) }]
        ));
        let swapped = edit(|l| l.swap(3, 4));
        assert_eq!(swapped[..2], [Break::Missing { from: 4, to: 4 }, Break::Misplaced { seq: 4, expected: 6 }]);
        assert_eq!(
            edit(|l| {
                let line = l[3].clone();
                l.insert(4, line)
            }),
            [Break::Misplaced { seq: 4, expected: 5 }]
        );
        assert_eq!(edit(|l| l[3] = b"{}".to_vec()), [Break::Malformed, Break::Missing { from: 4, to: 4 }]);
        // a line that is right by itself, and of another chain
        let other = {
            let mut line = Vec::new();
            line::seal(&mut line, Link { seq: 3, hash: [5; 32] }, b"\"n\":3", None);
            line.pop();
            line
        };
        let mut lines = whole.clone();
        lines[3] = other;
        assert_eq!(breaks(&lines), [Break::Replaced { seq: 4 }, Break::Replaced { seq: 5 }]);
    }

    proptest! {
        #[test]
        fn no_edit_but_of_the_ends_passes(count in 3usize..12, from: prop::sample::Index, to: prop::sample::Index) {
            let (from, to) = (from.index(count), to.index(count));
            prop_assume!(from != to);
            let mut lines = log(count);
            lines.swap(from, to);
            prop_assert!(!breaks(&lines).is_empty());
            let mut lines = log(count);
            let moved = lines.remove(from);
            if from > 0 && from < count - 1 {
                prop_assert!(!breaks(&lines).is_empty());
            }
            lines.insert(to, moved);
            prop_assert!(!breaks(&lines).is_empty());
        }
    }
}
