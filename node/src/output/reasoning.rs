//! What a model thinks aloud before it answers: text between `<think>` and `</think>`. Blanks around both parts are dropped.

use super::stop_strings::undecided;

/// Opens the thoughts, unless the prompt has done it.
const OPEN: &str = "<think>";

/// Closes them.
const CLOSE: &str = "</think>";

/// Splits thoughts from the answer.
#[derive(Debug)]
pub(super) struct Reasoning {
    state: State,
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but blanks has come.
    Start,
    /// Thinking; `begun` once there was more than blanks.
    Inside { begun: bool },
    /// Thinking is over, and nothing but blanks has come since.
    Gap,
    /// The answer.
    Outside,
}

/// Where a text goes.
pub(super) enum Side<'a> {
    Thoughts(&'a str),
    Answer(&'a str),
}

impl Reasoning {
    /// `is_open` when the prompt ends within the thoughts.
    pub(super) fn new(is_open: bool) -> Self {
        let state = if is_open { State::Inside { begun: false } } else { State::Start };
        Self { state, held: String::new() }
    }

    /// No thoughts are looked for.
    pub(super) fn none() -> Self {
        Self { state: State::Outside, held: String::new() }
    }

    /// Whether what comes now is thoughts.
    pub(super) fn is_inside(&self) -> bool {
        matches!(self.state, State::Inside { .. })
    }

    pub(super) fn push(&mut self, text: &str, mut out: impl FnMut(Side<'_>)) {
        self.held.push_str(text);
        while self.advance(&mut out) {}
    }

    /// The text has ended: what was held back goes where it was on its way to.
    pub(super) fn finish(&mut self, mut out: impl FnMut(Side<'_>)) {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Inside { .. } => out(Side::Thoughts(held.trim_end())),
            State::Start | State::Outside => out(Side::Answer(&held)),
            State::Gap => {}
        }
    }

    /// One move; false when more text is needed.
    fn advance(&mut self, out: &mut impl FnMut(Side<'_>)) -> bool {
        match self.state {
            State::Start => self.leave_start(),
            State::Inside { begun } => self.think(begun, out),
            State::Gap => {
                self.held = self.held.trim_start().to_owned();
                let is_over = !self.held.is_empty();
                if is_over {
                    self.state = State::Outside;
                }
                is_over
            }
            State::Outside => {
                if !self.held.is_empty() {
                    out(Side::Answer(&std::mem::take(&mut self.held)));
                }
                false
            }
        }
    }

    fn leave_start(&mut self) -> bool {
        let text = self.held.trim_start();
        if let Some(rest) = text.strip_prefix(OPEN) {
            self.held = rest.to_owned();
            self.state = State::Inside { begun: false };
            return true;
        }
        let decided = !OPEN.starts_with(text);
        if decided {
            self.state = State::Outside;
        }
        decided
    }

    fn think(&mut self, begun: bool, out: &mut impl FnMut(Side<'_>)) -> bool {
        if !begun {
            self.held = self.held.trim_start().to_owned();
        }
        if let Some(at) = self.held.find(CLOSE) {
            let rest = self.held.split_off(at + CLOSE.len());
            out(Side::Thoughts(self.held[..at].trim_end()));
            (self.held, self.state) = (rest, State::Gap);
            return true;
        }
        let certain = self.held[..self.held.len() - undecided(&self.held, &[CLOSE])].trim_end().len();
        if certain > 0 {
            out(Side::Thoughts(&self.held[..certain]));
            self.held.drain(..certain);
            self.state = State::Inside { begun: true };
        }
        false
    }
}
