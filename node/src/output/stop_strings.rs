//! Texts that end an answer and are not part of it. What could still become one is held back.

/// Looks for stop strings in a text that comes in pieces.
#[derive(Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    pub(super) fn new(stops: &[String]) -> Self {
        Self { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Appends to `out` what cannot be part of a stop string any more. Says which one has come; nothing after it goes out.
    pub(super) fn push(&mut self, text: &str, out: &mut String) -> Option<usize> {
        if self.stops.is_empty() {
            out.push_str(text);
            return None;
        }
        self.held.push_str(text);
        if let Some((at, which)) = first(&self.held, &self.stops) {
            out.push_str(&self.held[..at]);
            self.held.clear();
            return Some(which);
        }
        let certain = self.held.len() - undecided(&self.held, &self.stops);
        out.push_str(&self.held[..certain]);
        self.held.drain(..certain);
        None
    }

    /// Gives out what was held back; the text ended otherwise.
    pub(super) fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }
}

/// Where the first of `words` begins in `text`, and which it is.
pub(super) fn first(text: &str, words: &[impl AsRef<str>]) -> Option<(usize, usize)> {
    words.iter().enumerate().filter_map(|(i, word)| Some((text.find(word.as_ref())?, i))).min()
}

/// Bytes of the longest end of `text` that begins one of `words`.
pub(super) fn undecided(text: &str, words: &[impl AsRef<str>]) -> usize {
    let longest = |word: &str| {
        let ends = text.char_indices().map(|(at, _)| &text[at..]);
        ends.filter(|end| word.starts_with(*end)).map(str::len).max()
    };
    words.iter().filter_map(|word| longest(word.as_ref())).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let (mut stops, mut out) = (StopStrings::new(&stops), String::new());
        for piece in pieces {
            if stops.push(piece, &mut out).is_some() {
                return (out, true);
            }
        }
        stops.finish(&mut out);
        (out, false)
    }

    #[test]
    fn a_stop_string_over_piece_borders_ends_the_text() {
        assert_eq!(run(&["END"], &["a", "E", "N", "D", "b"]), ("a".into(), true));
        assert_eq!(run(&["END"], &["a", "E", "N", "d"]), ("aENd".into(), false));
        assert_eq!(run(&["aab"], &["aa", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&["xyz", "b"], &["xy", "b", "xyz"]), ("xy".into(), true));
    }

    proptest! {
        /// Law: however the text is cut, what comes out is the text before the first stop string.
        #[test]
        fn any_cut_gives_the_text_before_the_first_stop(text in "[abü]{0,30}", stop in "[abü]{1,4}", size in 1usize..5) {
            let chars: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = chars.chunks(size).map(|c| c.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            // a later piece may complete an earlier-starting stop string only at its own end, so the first to be whole wins
            let first = text.find(&stop);
            let (out, stopped) = run(&[&stop], &pieces);
            prop_assert_eq!(stopped, first.is_some());
            prop_assert_eq!(out, &text[..first.unwrap_or(text.len())]);
        }
    }
}
