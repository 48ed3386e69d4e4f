//! From tokens to what a client gets: bytes to whole characters, then stop strings ([`Text`]), then reasoning and tool calls
//! ([`Parser`]). Pure; the same pieces in give the same out however they are cut, so a resumed stream can replay its tokens and go on at
//! the next character.

mod utf8;
mod stop_strings;
mod reasoning;
mod tool_calls;
mod parser;

use crate::stop::Finish;
use stop_strings::StopStrings;
use utf8::Utf8Pieces;

pub use parser::{Parser, Piece};
pub use tool_calls::{ToolFormat, Tools};

/// The text of one choice, as it grows.
#[derive(Debug)]
pub struct Text {
    pieces: Utf8Pieces,
    stops: StopStrings,
    stopped_by: Option<usize>,
    finish: Option<Finish>,
    tokens: u32,
}

impl Text {
    /// An empty text that ends before any of `stops`.
    pub fn new(stops: &[String]) -> Self {
        Self {
            pieces: Utf8Pieces::default(),
            stops: StopStrings::new(stops),
            stopped_by: None,
            finish: None,
            tokens: 0,
        }
    }

    /// Adds a token by its bytes; `finish` when the engine ended the choice with it. What has become certain goes to `out`.
    pub fn push(&mut self, bytes: &[u8], finish: Option<Finish>, out: &mut String) {
        if self.finish.is_some() {
            return;
        }
        self.tokens += 1;
        let mut fresh = String::new();
        self.pieces.push(bytes, &mut fresh);
        if finish.is_some() {
            self.pieces.finish(&mut fresh);
        }
        self.stopped_by = self.stops.push(&fresh, out);
        if self.stopped_by.is_some() {
            self.finish = Some(Finish::Stop);
        } else if finish.is_some() {
            self.stops.finish(out);
            self.finish = finish;
        }
    }

    /// Why the choice ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Which of the stop strings ended it.
    pub fn stopped_by(&self) -> Option<usize> {
        self.stopped_by
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }
}
