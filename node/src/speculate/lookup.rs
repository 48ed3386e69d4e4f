//! Guesses from the sequence's own tokens: what came last time after the text that it ends in.
//!
//! The index is that of LZ77 compressors: for each pair of tokens the newest position, and from each position the one before it with the
//! same pair, so that candidates come newest first and their matches are measured backwards.
//!
//! # Memory
//! 8 to 12 bytes for each token of a sequence that decodes; the keys and values of that token take a thousand times as much.
//!
//! # Source
//! Deutsch, RFC 1951, section 4 (hash chains).

/// Shortest text that a guess rests on.
const MATCH_MIN: usize = 2;

/// No match is measured further back.
const MATCH_MAX: usize = 32;

/// A match of so many tokens is followed without looking for a better one.
const MATCH_GOOD: usize = 8;

/// Most candidates of one search.
const CANDIDATES_MAX: usize = 16;

const NONE: u32 = u32::MAX;

/// One sequence's index, and how well its guesses did.
#[derive(Debug, Default)]
pub struct Lookup {
    /// Newest position of each pair, by its hash; a power of two.
    heads: Vec<u32>,
    /// For each position the one before it with the same hash.
    earlier: Vec<u32>,
    found: Option<Match>,
    rates: Rates,
}

/// The text that the sequence ends in stands earlier in it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Match {
    /// Position after the earlier one: the guess at the next token.
    next: usize,
    /// How many tokens agree.
    len: usize,
}

impl Match {
    fn longer(self) -> Self {
        Self { next: self.next + 1, len: self.len + 1 }
    }
}

impl Lookup {
    /// Takes in what `tokens` has more than the last time, all of the sequence's tokens. Those of the first time are not judged by: what
    /// a prompt repeats says little about the answer.
    pub fn extend(&mut self, tokens: &[u32]) {
        let is_first = self.earlier.is_empty();
        self.make_room(tokens);
        for at in self.earlier.len()..tokens.len() {
            self.insert(tokens, at);
            if !is_first {
                self.found = self.after(tokens, at);
            }
        }
        if is_first && !tokens.is_empty() {
            self.found = self.search(tokens, tokens.len() - 1);
        }
    }

    /// How likely each of the guesses is right if those before it are, without end; none when there is no guess.
    pub fn chances(&self) -> impl Iterator<Item = f64> + '_ {
        self.found.into_iter().flat_map(|found| (found.len..).map(|len| self.rates.chance(len)))
    }

    /// Whether there is a guess that is likelier right than wrong.
    pub fn is_sure(&self) -> bool {
        self.chances().next().is_some_and(|chance| chance > 0.5)
    }

    /// Guesses at the next `count` tokens. A match that reaches the sequence's end goes on into the guesses: it repeats itself.
    pub fn guess(&self, tokens: &[u32], count: usize, out: &mut Vec<u32>) {
        out.clear();
        let Some(Match { next, .. }) = self.found else { return };
        for at in next..next + count {
            let token = tokens.get(at).copied().unwrap_or_else(|| out[at - tokens.len()]);
            out.push(token);
        }
    }

    /// The match after one more token, which is judged by.
    fn after(&mut self, tokens: &[u32], at: usize) -> Option<Match> {
        let followed = self.found.filter(|found| tokens[found.next] == tokens[at]);
        if let Some(Match { len, .. }) = self.found {
            self.rates.note(len, followed.is_some());
        }
        match followed.map(Match::longer) {
            Some(found) if found.len >= MATCH_GOOD => Some(found),
            found => self.search(tokens, at).filter(|new| found.is_none_or(|old| new.len > old.len)).or(found),
        }
    }

    /// The longest match of what ends at `at`, of the newest candidates; among equals the newest.
    fn search(&self, tokens: &[u32], at: usize) -> Option<Match> {
        let mut best: Option<Match> = None;
        let mut candidate = self.earlier[at];
        for _ in 0..CANDIDATES_MAX {
            if candidate == NONE {
                break;
            }
            let end = candidate as usize;
            let len = agreement(&tokens[..=end], &tokens[..=at]);
            if len >= MATCH_MIN && best.is_none_or(|best| len > best.len) {
                best = Some(Match { next: end + 1, len });
            }
            candidate = self.earlier[end];
        }
        best
    }

    fn insert(&mut self, tokens: &[u32], at: usize) {
        let mut earlier = NONE;
        if at > 0 {
            let bucket = self.bucket(tokens[at - 1], tokens[at]);
            earlier = std::mem::replace(&mut self.heads[bucket], at as u32);
        }
        self.earlier.push(earlier);
    }

    /// Keeps a bucket for each token, by building all anew when they have doubled.
    fn make_room(&mut self, tokens: &[u32]) {
        if tokens.len() <= self.heads.len() {
            return;
        }
        let had = self.earlier.len();
        self.heads = vec![NONE; tokens.len().next_power_of_two()];
        self.earlier.clear();
        (0..had).for_each(|at| self.insert(tokens, at));
    }

    fn bucket(&self, a: u32, b: u32) -> usize {
        let pair = (u64::from(a) << 32) | u64::from(b);
        // Fibonacci hashing (Knuth, TAOCP 3, section 6.4): the upper bits are the mixed ones
        (pair.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize & (self.heads.len() - 1)
    }
}

/// How many tokens at the ends of both agree.
fn agreement(a: &[u32], b: &[u32]) -> usize {
    a.iter().rev().zip(b.iter().rev()).take(MATCH_MAX).take_while(|(a, b)| a == b).count()
}

/// How often guesses were right, by how long a text they rested on.
#[derive(Debug)]
struct Rates {
    /// Right ones, and all.
    counts: [(f64, f64); 5],
}

/// How much of what was counted before a guess still counts after it.
const MEMORY: f64 = 0.95;

impl Default for Rates {
    /// What to expect at first, worth two guesses each.
    fn default() -> Self {
        Self { counts: [0.3, 0.5, 0.7, 0.85, 0.95].map(|rate| (2.0 * rate, 2.0)) }
    }
}

impl Rates {
    fn chance(&self, len: usize) -> f64 {
        let (right, all) = self.counts[Self::class(len)];
        right / all
    }

    fn note(&mut self, len: usize, is_right: bool) {
        let (right, all) = &mut self.counts[Self::class(len)];
        *right = *right * MEMORY + f64::from(u8::from(is_right));
        *all = *all * MEMORY + 1.0;
    }

    /// Two tokens, three, four to seven, eight to fifteen, and more.
    fn class(len: usize) -> usize {
        match len {
            0..=2 => 0,
            3 => 1,
            4..=7 => 2,
            8..=15 => 3,
            _ => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn guess(lookup: &Lookup, tokens: &[u32], count: usize) -> Vec<u32> {
        let mut out = vec![99];
        lookup.guess(tokens, count, &mut out);
        out
    }

    fn indexed(tokens: &[u32]) -> Lookup {
        let mut lookup = Lookup::default();
        lookup.extend(tokens);
        lookup
    }

    #[test]
    fn the_longest_match_goes_first_and_among_equals_the_newest() {
        let tokens = [1, 2, 3, 70, 9, 2, 3, 80, 5, 2, 3, 90, 1, 2, 3];
        assert_eq!(guess(&indexed(&tokens), &tokens, 2), [70, 9]);
        let tokens = [9, 2, 3, 80, 5, 2, 3, 90, 6, 2, 3];
        assert_eq!(guess(&indexed(&tokens), &tokens, 3), [90, 6, 2]);
        assert!(guess(&indexed(&[1, 2, 3, 4]), &[1, 2, 3, 4], 3).is_empty());
        assert!(guess(&indexed(&[5]), &[5], 3).is_empty());
    }

    #[test]
    fn what_repeats_itself_is_guessed_to_go_on_so() {
        let tokens = [4, 1, 2, 3, 1, 2, 3];
        assert_eq!(guess(&indexed(&tokens), &tokens, 7), [1, 2, 3, 1, 2, 3, 1]);
    }

    #[test]
    fn chances_follow_what_came_true() {
        // a text that says the same again and again, and one whose pairs never go on alike
        let (mut same, mut other): (Vec<u32>, Vec<u32>) = ((0..40).collect(), vec![1, 2]);
        let (mut right, mut wrong) = (indexed(&same), indexed(&other));
        for i in 0..120 {
            same.push(i % 40);
            right.extend(&same);
            other.extend([100 + i, 1, 2]);
            wrong.extend(&other);
        }
        assert!(right.chances().take(15).product::<f64>() > 0.9);
        assert!(wrong.chances().next().is_none_or(|chance| chance < 0.05));
        // a guess or two that come true do not make it sure of itself, and hundreds do
        assert!(indexed(&[1, 2, 3, 1, 2]).chances().next() == Some(0.3));
    }

    /// The longest match by looking everywhere: the position after it, and its length.
    fn slow(tokens: &[u32]) -> Option<usize> {
        let ends = 1..tokens.len() - 1;
        ends.map(|end| agreement(&tokens[..=end], tokens)).filter(|len| *len >= MATCH_MIN).max()
    }

    proptest! {
        /// Law: however the tokens come, the index knows each pair, what it finds does match, and a match that it searched for is as
        /// long as any among so few candidates.
        #[test]
        fn a_match_is_a_match(tokens in prop::collection::vec(0u32..4, 2..200), cuts in prop::collection::vec(1usize..9, 1..60)) {
            let (mut lookup, mut end) = (Lookup::default(), 0);
            for cut in cuts {
                end = tokens.len().min(end + cut);
                lookup.extend(&tokens[..end]);
                prop_assert_eq!(lookup.earlier.len(), end);
                if let Some(Match { next, len }) = lookup.found {
                    prop_assert!(len >= MATCH_MIN && next < end);
                    let seen = agreement(&tokens[..next], &tokens[..end]);
                    prop_assert!(seen >= len.min(MATCH_MAX));
                    prop_assert!(lookup.chances().take(20).all(|chance| (0.0..=1.0).contains(&chance)));
                }
            }
            let short = &tokens[..tokens.len().min(CANDIDATES_MAX)];
            if short.len() > 2 {
                prop_assert_eq!(indexed(short).found.map(|found| found.len), slow(short));
            }
        }
    }
}
