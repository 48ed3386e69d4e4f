//! A node's byte stream cut into whole events: `id:` lines are kept and dropped, all other bytes pass as they are. Data without an id
//! belongs to the next event that has one and passes with it, so that what one token makes is never cut in two.
//!
//! Each byte is looked at once, whatever the reads cut: what is unfinished waits, as a line or as an event, and the finished events of one
//! read leave as one piece. Pure; the relay does the reading and writing.

use bytes::{Bytes, BytesMut};
use tidegate_common::contract::{EventId, Refusal, event};

use super::delivered::Delivered;

/// Largest unfinished event kept; a whole JSON answer is one event.
pub(super) const EVENT_BYTES_MAX: usize = 32 << 20;

/// How a stream ends as its node wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tail {
    /// This was the last event.
    End,
    /// Another node is to go on.
    Handover,
    /// There is no answer, for this reason.
    Refused(Box<Refusal>),
}

/// Events that are for the edge alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Handover,
    Refused,
}

/// What one read has finished.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Whole events; may be empty.
    pub(crate) bytes: Bytes,
    /// What comes next, if not more of the same.
    pub(crate) tail: Option<Tail>,
}

/// The stream is not what a node writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// The cutter.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// Finished events of this read, then the lines of the unfinished one.
    out: BytesMut,
    /// Where in `out` the unfinished event begins.
    finished: usize,
    /// The beginning of a line whose end has not come.
    line: BytesMut,
    id: Option<EventId>,
    /// Whether the unfinished event, or events that wait for an id, have data.
    has_data: bool,
    word: Option<Word>,
    tail: Option<Tail>,
}

impl Events {
    /// Takes one read. The tokens of the events it finished are added to `delivered`; after a tail, the rest is ignored.
    pub(crate) fn push(&mut self, mut chunk: &[u8], delivered: &mut Delivered) -> Result<Passed, Malformed> {
        self.out.reserve(chunk.len() + self.line.len());
        while self.tail.is_none() {
            let Some(at) = memchr::memchr(b'\n', chunk) else {
                self.line.extend_from_slice(chunk);
                break;
            };
            let (line, rest) = (&chunk[..=at], &chunk[at + 1..]);
            if self.line.is_empty() {
                self.take_line(line, delivered)?;
            } else {
                self.line.extend_from_slice(line);
                let whole = std::mem::take(&mut self.line);
                self.take_line(&whole, delivered)?;
            }
            chunk = rest;
        }
        if self.line.len() + self.out.len() - self.finished > EVENT_BYTES_MAX {
            return Err(Malformed);
        }
        let bytes = self.out.split_to(std::mem::take(&mut self.finished)).freeze();
        Ok(Passed { bytes, tail: self.tail.clone() })
    }

    /// One line with its line feed.
    fn take_line(&mut self, line: &[u8], delivered: &mut Delivered) -> Result<(), Malformed> {
        let text = line.strip_suffix(b"\n").unwrap_or(line);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        if text.is_empty() {
            return self.finish_event(line, delivered);
        }
        if let Some(id) = text.strip_prefix(b"id:") {
            let id = std::str::from_utf8(id).map_err(|_| Malformed)?;
            self.id = Some(id.trim_start().parse().map_err(|_| Malformed)?);
            return Ok(());
        }
        if let Some(name) = text.strip_prefix(b"event:") {
            match name.trim_ascii() {
                b"handover" => self.word = Some(Word::Handover),
                name if name == event::REFUSED.as_bytes() => self.word = Some(Word::Refused),
                _ => {}
            }
        }
        self.has_data |= text.starts_with(b"data:");
        self.out.extend_from_slice(line);
        Ok(())
    }

    fn finish_event(&mut self, blank: &[u8], delivered: &mut Delivered) -> Result<(), Malformed> {
        if let Some(word) = self.word {
            self.tail = Some(match word {
                Word::Handover => Tail::Handover,
                Word::Refused => Tail::Refused(Box::new(refusal(&self.out[self.finished..])?)),
            });
            self.out.truncate(self.finished);
            return Ok(());
        }
        match self.id.take() {
            Some(EventId::Tokens { choice, offset, tokens }) => {
                delivered.add(choice, offset, &tokens).map_err(|_| Malformed)?;
            }
            Some(EventId::By(fingerprint)) => delivered.made_by(fingerprint).map_err(|_| Malformed)?,
            Some(EventId::Prompt(tokens)) => delivered.read_prompt(tokens),
            Some(EventId::End) => self.tail = Some(Tail::End),
            None if self.has_data => {
                self.out.extend_from_slice(blank);
                return Ok(());
            }
            None => {}
        }
        self.has_data = false;
        if self.out.len() > self.finished {
            self.out.extend_from_slice(blank);
            self.finished = self.out.len();
        }
        Ok(())
    }
}

/// The refusal in the lines of its event.
fn refusal(lines: &[u8]) -> Result<Refusal, Malformed> {
    let refusal: Option<Refusal> = last_data(lines).and_then(|data| serde_json::from_slice(data).ok());
    refusal.filter(|refusal| (400..600).contains(&refusal.status)).ok_or(Malformed)
}

/// The content of the last `data:` line in whole events, unless it is the mark `[DONE]`.
pub(crate) fn last_data(events: &[u8]) -> Option<&[u8]> {
    let lines = events.rsplit(|b| *b == b'\n');
    let data = lines.filter_map(|line| line.strip_prefix(b"data:")).map(<[u8]>::trim_ascii);
    data.into_iter().find(|data| *data != b"[DONE]")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tidegate_common::contract::event;

    use super::*;

    fn all(stream: &[u8], cuts: &[usize]) -> Result<(Vec<u8>, Delivered, Option<Tail>), Malformed> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let (mut events, mut delivered) = (Events::default(), Delivered::new(1));
        let (mut out, mut tail) = (Vec::new(), None);
        for pair in cuts.windows(2) {
            if tail.is_none() {
                let passed = events.push(&stream[pair[0]..pair[1]], &mut delivered)?;
                out.extend_from_slice(&passed.bytes);
                tail = passed.tail;
            }
        }
        Ok((out, delivered, tail))
    }

    #[test]
    fn ids_are_kept_back_and_data_passes_untouched() {
        let stream =
            b": wait\n\nid: 0:0:5\ndata: {\"a\":1}\n\nid: 0:1:6,7\n\ndata: x\n\nid: end\ndata: [DONE]\n\nid: 0:9:9\n\n";
        let (out, delivered, tail) = all(stream, &[]).unwrap();
        assert_eq!(out, b": wait\n\ndata: {\"a\":1}\n\ndata: x\n\ndata: [DONE]\n\n");
        assert_eq!(delivered.resume().tokens, [vec![5, 6, 7]]);
        assert_eq!(tail, Some(Tail::End));
    }

    #[test]
    fn what_a_node_says_of_the_prompt_is_kept_and_not_passed_on() {
        let (out, delivered, _) = all(b"id: prompt:12\n\nid: 0:0:5\ndata: a\n\n", &[]).unwrap();
        let mut expected = Delivered::new(1);
        expected.read_prompt(12);
        expected.add(0, 0, &[5]).unwrap();
        assert_eq!((out.as_slice(), delivered), (&b"data: a\n\n"[..], expected));
    }

    #[test]
    fn half_an_event_passes_neither_bytes_nor_tokens() {
        let (out, delivered, tail) = all(b"id: 0:0:5\ndata: a\n\nid: 0:1:6\ndata: b\n", &[]).unwrap();
        assert_eq!((out.as_slice(), delivered.total(), tail), (&b"data: a\n\n"[..], 1, None));
    }

    #[test]
    fn the_events_of_one_token_pass_together_or_not_at_all() {
        let whole = b": wait\n\nevent: a\ndata: 1\n\nevent: b\ndata: 2\n\nid: 0:0:5\nevent: c\ndata: 3\n\n";
        let (out, delivered, _) = all(whole, &[]).unwrap();
        let expected = b": wait\n\nevent: a\ndata: 1\n\nevent: b\ndata: 2\n\nevent: c\ndata: 3\n\n";
        assert_eq!((out.as_slice(), delivered.total()), (&expected[..], 1));
        let (out, delivered, _) = all(&whole[..whole.len() - 1], &[]).unwrap();
        assert_eq!((out.as_slice(), delivered.total()), (&b": wait\n\n"[..], 0));
        let lost = [b"data: usage\n\n".as_slice(), event::HANDOVER].concat();
        assert_eq!(all(&lost, &[]).unwrap().0, b"");
    }

    #[test]
    fn a_handover_is_between_node_and_edge() {
        let mut stream = b"id: 0:0:5\ndata: a\n\n".to_vec();
        stream.extend_from_slice(event::HANDOVER);
        let (out, delivered, tail) = all(&stream, &[]).unwrap();
        assert_eq!((out.as_slice(), delivered.total(), tail), (&b"data: a\n\n"[..], 1, Some(Tail::Handover)));
    }

    #[test]
    fn foreign_ids_and_wrong_offsets_are_seen() {
        assert_eq!(all(b"id: 7\ndata: a\n\n", &[]), Err(Malformed));
        assert_eq!(all(b"id: 0:1:5\ndata: a\n\n", &[]), Err(Malformed));
    }

    #[test]
    fn the_last_data_is_the_whole_answer() {
        assert_eq!(last_data(b": wait\n\ndata: {\"a\": 1}\n\ndata: [DONE]\n\n"), Some(&b"{\"a\": 1}"[..]));
        assert_eq!(last_data(b": wait\n\n"), None);
    }

    fn any_stream() -> impl Strategy<Value = Vec<u8>> {
        let tokens = (prop::collection::vec(any::<u32>(), 1..4), any::<bool>(), "[ -~]{0,40}");
        let piece = prop_oneof![Just(None), tokens.prop_map(Some)];
        (prop::collection::vec(piece, 0..20), any::<bool>()).prop_map(|(pieces, handover)| {
            let (mut out, mut offset) = (Vec::new(), 0);
            for piece in pieces {
                let Some((tokens, before, text)) = piece else {
                    out.extend_from_slice(event::WAIT);
                    continue;
                };
                if before {
                    event::write(&mut out, None, Some("before"), Some(b"{}"));
                }
                let next = offset + tokens.len() as u32;
                let id = EventId::Tokens { choice: 0, offset, tokens };
                let data = (!text.is_empty()).then_some(text.as_bytes());
                event::write(&mut out, Some(&id), None, data);
                offset = next;
            }
            if handover {
                out.extend_from_slice(event::HANDOVER);
            } else {
                event::write(&mut out, Some(&EventId::End), None, Some(b"[DONE]"));
            }
            out
        })
    }

    #[test]
    fn a_refusal_is_for_the_edge_alone_and_must_be_one() {
        let of = |data: &str| all(format!("id: 0:0:5\n\nevent: refused\ndata: {data}\n\ndata: x\n\n").as_bytes(), &[]);
        let (out, delivered, tail) = of(r#"{"status":504,"body":{"error":{}}}"#).unwrap();
        assert_eq!((out.len(), delivered.total()), (0, 1));
        let Some(Tail::Refused(refusal)) = tail else { panic!("{tail:?}") };
        assert_eq!((refusal.status, refusal.retry_after_s), (504, None));
        for bad in ["", "{}", r#"{"status":200,"body":{}}"#, r#"{"status":700,"body":{}}"#] {
            assert_eq!(of(bad), Err(Malformed), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn where_reads_cut_the_stream_makes_no_difference(
            stream in any_stream(),
            cuts in prop::collection::vec(any::<usize>(), 0..40),
        ) {
            prop_assert_eq!(all(&stream, &cuts), all(&stream, &[]));
        }

        #[test]
        fn one_byte_at_a_time_makes_no_difference(stream in any_stream()) {
            let cuts: Vec<usize> = (0..stream.len()).collect();
            prop_assert_eq!(all(&stream, &cuts), all(&stream, &[]));
        }

        #[test]
        fn any_bytes_are_read_without_panic(stream: Vec<u8>, cuts in prop::collection::vec(any::<usize>(), 0..9)) {
            let _ = all(&stream, &cuts);
        }
    }
}
