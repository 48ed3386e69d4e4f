//! Guesses at the next tokens, computed together with the last one: prompt-lookup speculative decoding. Pure; times are passed in.
//!
//! A step that decodes reads all weights for one token of each sequence, so a few more rows cost it little. Where a sequence repeats
//! something, [`Lookup`] guesses how it goes on; the guesses are computed as rows of their own, and what is sampled after each row is
//! the answer for as long as it is as guessed (Leviathan et al. 2023, arXiv:2211.17192; with guesses from the text itself: Saxena 2023,
//! "Prompt Lookup Decoding", and Yang et al. 2023, arXiv:2304.04487).
//!
//! It is exact by construction, greedy or seeded: a row's logits are those of its tokens whatever shares the step, the sampler's
//! randomness is a function of (seed, choice, position), and the sampler, with penalties, grammar and stop rule, sees the rows one by
//! one as it would have seen them step by step. No token is ever taken because it was guessed.
//!
//! # When it pays
//! - How likely a guess is right is measured for each sequence, by how long a text the guess rests on. That costs nothing: each token
//!   sampled is compared with the guess at it, computed or not. So a sequence that stops repeating itself gets no more rows at once, and
//!   gets them again once its guesses would have been right.
//! - What a row costs is measured too ([`Cost`]): a line through steps' rows and times.
//! - Of all guesses for a step, the likeliest are taken, as many as make most expected tokens a second ([`Prospects`]). Where a
//!   row costs as much as a token is worth, as in a full batch on a CPU, next to none are.
//! - Where the text says nothing and a draft model is configured, it guesses, when its own measured time and rate of right guesses say
//!   that it pays ([`Drafts`]).
//! - Steps that catch up on prompts get none: they are as large as they may be, and a row saves no more than it costs.

mod cost;
mod drafts;
mod lookup;

pub use cost::Cost;
pub use drafts::{DRAFTED_MAX, Drafts, Trust};
pub use lookup::Lookup;

use crate::sched::SeqId;

/// Most guesses for one sequence in a step.
pub const GUESSES_MAX: usize = 15;

/// A guess less likely than this is not worth the thought.
const CHANCE_MIN: f64 = 0.05;

/// A step is worth guesses when they make so many times as many tokens a second; less is within the error of what is measured.
pub(crate) const GAIN_MIN: f64 = 1.02;

/// Whether next tokens are guessed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Never.
    Off,
    /// When it pays.
    #[default]
    Auto,
    /// Whenever there is a guess, whatever it costs: to measure and to test with.
    Always,
}

/// The guesses that a step could compute, and how likely each is right.
#[derive(Debug, Default)]
pub struct Prospects {
    guesses: Vec<(f64, SeqId)>,
}

impl Prospects {
    /// Forgets those of the step before.
    pub fn clear(&mut self) {
        self.guesses.clear();
    }

    /// Guesses for one sequence; `chances` are how likely each is right if those before it are.
    pub fn add(&mut self, id: SeqId, chances: impl Iterator<Item = f64>) {
        let mut all_right = 1.0;
        for chance in chances.take(GUESSES_MAX) {
            all_right *= chance;
            if all_right < CHANCE_MIN {
                return;
            }
            self.guesses.push((all_right, id));
        }
    }

    /// Chooses at most `room` guesses for a step that decodes `rows` sequences: those with which it makes most expected tokens a second.
    /// Gives how many for each sequence that has any; a sequence's are always its first.
    pub fn choose(&mut self, speculation: Speculation, rows: usize, room: usize, cost: &Cost) -> Vec<(SeqId, usize)> {
        // the sort is stable and a sequence's chances never rise, so whatever is cut off is the end of each sequence's guesses
        self.guesses.sort_by(|a, b| b.0.total_cmp(&a.0));
        let count = match speculation {
            Speculation::Off => 0,
            Speculation::Auto => self.most_worth(rows, room, cost),
            Speculation::Always => room.min(self.guesses.len()),
        };
        let mut chosen: Vec<(SeqId, usize)> = Vec::new();
        for (_, id) in &self.guesses[..count] {
            match chosen.iter_mut().find(|(of, _)| of == id) {
                Some((_, count)) => *count += 1,
                None => chosen.push((*id, 1)),
            }
        }
        chosen
    }

    fn most_worth(&self, rows: usize, room: usize, cost: &Cost) -> usize {
        let mut tokens = rows as f64;
        let (mut best, mut count) = (GAIN_MIN * tokens / cost.seconds(rows), 0);
        for (i, (chance, _)) in self.guesses.iter().take(room).enumerate() {
            tokens += chance;
            let rate = tokens / cost.seconds(rows + i + 1);
            if rate > best {
                (best, count) = (rate, i + 1);
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// Steps cost `fixed` and `row` for each row.
    fn measured(fixed: f64, row: f64) -> Cost {
        let mut cost = Cost::default();
        for rows in (1..40).cycle().take(400) {
            cost.note_step(rows, Duration::from_secs_f64(fixed + row * rows as f64));
        }
        cost
    }

    fn chosen(chances: &[f64], rows: usize, cost: &Cost) -> usize {
        let mut prospects = Prospects::default();
        for i in 0..rows {
            prospects.add(SeqId(i as u64), chances.iter().copied());
        }
        prospects.choose(Speculation::Auto, rows, 512, cost).iter().map(|(_, count)| count).sum()
    }

    #[test]
    fn guesses_are_computed_when_rows_are_cheap_and_not_when_each_costs_its_worth() {
        let (cheap, dear) = (measured(2.5e-3, 0.25e-3), measured(0.0, 2e-3));
        assert_eq!(chosen(&[0.95; 15], 1, &cheap), 15);
        assert!((3..8).contains(&chosen(&[0.7; 15], 1, &cheap)));
        assert_eq!(chosen(&[0.1; 15], 1, &cheap), 0);
        assert_eq!(chosen(&[0.99; 15], 1, &dear), 0);
        // a full batch has paid for the weights already: only what is all but sure is worth a row
        assert_eq!(chosen(&[0.6; 15], 32, &cheap), 0);
        assert!(chosen(&[0.97; 15], 32, &cheap) > 32);
    }

    #[test]
    fn a_sequences_guesses_are_its_first_and_the_likeliest_of_all_go_first() {
        let mut prospects = Prospects::default();
        prospects.add(SeqId(1), [0.5, 0.5, 0.5].into_iter());
        prospects.add(SeqId(2), [0.9, 0.9, 0.01].into_iter());
        let cost = Cost::default();
        assert_eq!(prospects.choose(Speculation::Always, 2, 3, &cost), [(SeqId(2), 2), (SeqId(1), 1)]);
        assert_eq!(prospects.choose(Speculation::Always, 2, 9, &cost), [(SeqId(2), 2), (SeqId(1), 3)]);
        assert_eq!(prospects.choose(Speculation::Off, 2, 9, &cost), []);
        prospects.clear();
        assert_eq!(prospects.choose(Speculation::Always, 2, 9, &cost), []);
    }

    proptest! {
        /// Law: never more than there is room for, never more for a sequence than it has, and the expected rate is no less than without.
        #[test]
        fn no_choice_is_worse_than_none(
            chances in prop::collection::vec(prop::collection::vec(0f64..1.0, 0..20), 1..12),
            room in 0usize..40, fixed in 0f64..1e-2, row in 0f64..1e-2,
        ) {
            let cost = measured(fixed, row + 1e-9);
            let mut prospects = Prospects::default();
            (0..).zip(&chances).for_each(|(i, chances)| prospects.add(SeqId(i), chances.iter().copied()));
            let rows = chances.len();
            let chosen = prospects.choose(Speculation::Auto, rows, room, &cost);
            let (mut tokens, mut computed) = (rows as f64, rows);
            for (id, count) in chosen {
                let of = &chances[id.0 as usize];
                prop_assert!(count <= of.len().min(GUESSES_MAX));
                tokens += (1..=count).map(|k| of[..k].iter().product::<f64>()).sum::<f64>();
                computed += count;
            }
            prop_assert!(computed - rows <= room);
            prop_assert!(tokens / cost.seconds(computed) >= rows as f64 / cost.seconds(rows) * (1.0 - 1e-9));
        }
    }
}
