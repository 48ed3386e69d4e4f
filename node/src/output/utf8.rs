//! Bytes that come in pieces, out as whole characters.

/// Holds back the bytes of a character that is not whole yet.
#[derive(Debug, Default)]
pub(super) struct Utf8Pieces {
    held: Vec<u8>,
}

impl Utf8Pieces {
    /// Appends to `out` what is whole; bytes that can never be part of a character become U+FFFD.
    pub(super) fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.held.extend_from_slice(bytes);
        let mut rest = self.held.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (good, bad) = rest.split_at(e.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(good));
                    rest = bad;
                    // without a length the character may still become whole
                    let Some(length) = e.error_len() else { break };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[length..];
                }
            }
        }
        let kept = self.held.len() - rest.len();
        self.held.drain(..kept);
    }

    /// Gives up on a character that did not become whole.
    pub(super) fn finish(&mut self, out: &mut String) {
        if !std::mem::take(&mut self.held).is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Law: any bytes cut anywhere give what the whole gives.
        #[test]
        fn pieces_join_to_the_whole(bytes: Vec<u8>, cuts in prop::collection::vec(0usize..40, 0..6)) {
            let (mut pieces, mut out, mut start) = (Utf8Pieces::default(), String::new(), 0);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.sort_unstable();
            for end in cuts.into_iter().chain([bytes.len()]) {
                pieces.push(&bytes[start..end], &mut out);
                start = end;
            }
            pieces.finish(&mut out);
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
