//! The tokens that a client has had, choice by choice: all it takes to go on elsewhere. Pure, and bounded: four bytes for each token, at
//! most twice that while a list grows, and nothing any more for a stream longer than [`TOKENS_MAX`].

use tidegate_common::{contract::Resume, ids::Fingerprint};

use crate::{body::CHOICES_MAX, record::Record};

/// Most tokens remembered for one request, a megabyte; a longer stream goes on but can no longer change its node.
pub(crate) const TOKENS_MAX: usize = 1 << 18;

/// Delivered tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delivered {
    choices: Vec<Vec<u32>>,
    total: usize,
    overflowed: bool,
    /// Of the nodes that made them.
    by: Option<Fingerprint>,
    /// How long the prompt is, once a node has said so.
    prompt_tokens: Option<u32>,
    /// Events of a foreign upstream, each of which has a token or so.
    foreign_events: usize,
}

/// The node's count of tokens is not ours: going on would lose or double some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutOfStep;

impl Delivered {
    /// Counts, and remembers nothing.
    pub(crate) fn counting() -> Self {
        Self { choices: Vec::new(), total: 0, overflowed: true, by: None, prompt_tokens: None, foreign_events: 0 }
    }

    /// Nothing yet, of this many choices.
    pub(crate) fn new(choices: u32) -> Self {
        let choices = vec![Vec::new(); choices.min(CHOICES_MAX) as usize];
        Self { choices, total: 0, overflowed: false, by: None, prompt_tokens: None, foreign_events: 0 }
    }

    /// An event with these tokens has passed.
    pub(crate) fn add(&mut self, choice: u32, offset: u32, tokens: &[u32]) -> Result<(), OutOfStep> {
        if choice >= CHOICES_MAX {
            return Err(OutOfStep);
        }
        self.total += tokens.len();
        if self.overflowed || self.total > TOKENS_MAX {
            self.overflowed = true;
            // a part of them is of no use
            self.choices = Vec::new();
            return Ok(());
        }
        let choice = choice as usize;
        if choice >= self.choices.len() {
            self.choices.resize_with(choice + 1, Vec::new);
        }
        let had = &mut self.choices[choice];
        if had.len() != offset as usize {
            return Err(OutOfStep);
        }
        had.extend_from_slice(tokens);
        Ok(())
    }

    /// What follows is made by nodes of this fingerprint.
    pub(crate) fn made_by(&mut self, fingerprint: Fingerprint) -> Result<(), OutOfStep> {
        if self.total > 0 && self.by.is_some_and(|by| by != fingerprint) {
            return Err(OutOfStep);
        }
        self.by = Some(fingerprint);
        Ok(())
    }

    /// A node has read the prompt.
    pub(crate) fn read_prompt(&mut self, tokens: u32) {
        self.prompt_tokens = Some(tokens);
    }

    /// Events of a foreign upstream have passed.
    pub(crate) fn passed_abroad(&mut self, events: usize) {
        self.foreign_events += events;
    }

    /// Notes what is known of the tokens so far.
    pub(crate) fn tell(&self, record: &mut Record) {
        record.tokens = self.total + self.foreign_events;
        record.prompt_tokens = self.prompt_tokens;
    }

    /// Which nodes could go on, as far as that is known.
    pub(crate) fn fingerprint(&self) -> Option<Fingerprint> {
        self.by
    }

    /// How many tokens have passed.
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Whether all of them are remembered.
    pub(crate) fn is_complete(&self) -> bool {
        !self.overflowed
    }

    /// What another node needs to go on.
    pub(crate) fn resume(&self) -> Resume {
        Resume { tokens: self.choices.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_kept_by_choice_and_gaps_are_seen() {
        let mut delivered = Delivered::new(1);
        delivered.add(0, 0, &[1, 2]).unwrap();
        delivered.add(2, 0, &[9]).unwrap();
        delivered.add(0, 2, &[3]).unwrap();
        assert_eq!(delivered.resume().tokens, [vec![1, 2, 3], vec![], vec![9]]);
        assert_eq!(delivered.add(0, 5, &[4]), Err(OutOfStep));
        assert_eq!(delivered.add(0, 1, &[4]), Err(OutOfStep));
        assert_eq!(delivered.add(CHOICES_MAX, 0, &[4]), Err(OutOfStep));
    }

    #[test]
    fn tokens_of_nodes_that_answer_otherwise_are_never_mixed() {
        let [a, b] = [1, 2].map(Fingerprint::new);
        let mut delivered = Delivered::new(1);
        delivered.made_by(a).unwrap();
        delivered.made_by(b).unwrap();
        delivered.add(0, 0, &[1]).unwrap();
        assert_eq!((delivered.made_by(b), delivered.made_by(a)), (Ok(()), Err(OutOfStep)));
        assert_eq!(delivered.fingerprint(), Some(b));
    }

    #[test]
    fn who_will_not_go_on_elsewhere_keeps_no_tokens() {
        let mut delivered = Delivered::counting();
        delivered.add(0, 0, &[1, 2]).unwrap();
        delivered.add(3, 0, &[1]).unwrap();
        assert_eq!((delivered.total(), delivered.is_complete(), delivered.choices.len()), (3, false, 0));
    }

    #[test]
    fn memory_is_bounded_and_a_stream_too_long_says_so() {
        let mut delivered = Delivered::new(1);
        let many = vec![7; TOKENS_MAX];
        delivered.add(0, 0, &many).unwrap();
        assert!(delivered.is_complete());
        delivered.add(0, TOKENS_MAX as u32, &[1]).unwrap();
        assert!(!delivered.is_complete());
        assert_eq!((delivered.total(), delivered.choices.capacity()), (TOKENS_MAX + 1, 0));
    }
}
