//! From tokens to the text a client gets: bytes to whole characters, then stop strings. Pure; the same pieces in give the same text
//! out however they are cut, so a resumed stream can replay its tokens and go on at the next character.

mod stop_strings;
mod utf8;

use crate::{stop::Finish, text::Tokenizer};
use stop_strings::StopStrings;
use utf8::Utf8Pieces;

/// The text of one choice, as it grows.
#[derive(Debug)]
pub struct Text {
    pieces: Utf8Pieces,
    stops: StopStrings,
    whole: String,
    /// Bytes of `whole` that were given out.
    given: usize,
    finish: Option<Finish>,
    tokens: u32,
}

impl Text {
    /// An empty text that ends before any of `stops`.
    pub fn new(stops: &[String]) -> Self {
        Self {
            pieces: Utf8Pieces::default(),
            stops: StopStrings::new(stops),
            whole: String::new(),
            given: 0,
            finish: None,
            tokens: 0,
        }
    }

    /// Adds a token; `finish` when the engine ended the choice with it.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32, finish: Option<Finish>) {
        if self.finish.is_some() {
            return;
        }
        self.tokens += 1;
        let mut fresh = String::new();
        self.pieces.push(tokenizer.token_bytes(token), &mut fresh);
        if finish.is_some() {
            self.pieces.finish(&mut fresh);
        }
        let stopped = self.stops.push(&fresh, &mut self.whole);
        if stopped {
            self.finish = Some(Finish::Stop);
        } else if finish.is_some() {
            self.stops.finish(&mut self.whole);
            self.finish = finish;
        }
    }

    /// What has become certain since the last call.
    pub fn take(&mut self) -> &str {
        let start = std::mem::replace(&mut self.given, self.whole.len());
        &self.whole[start..]
    }

    /// All that is certain.
    pub fn whole(&self) -> &str {
        &self.whole
    }

    /// Why the choice ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }
}
