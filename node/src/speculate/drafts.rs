//! How many tokens a draft model is to guess, in a step of a batch.

use super::{Cost, GAIN_MIN, Speculation};

/// Most tokens drafted for a sequence in a step.
pub const DRAFTED_MAX: usize = 5;

/// When drafting does not pay, it is tried again after so many steps: unlike a look at the text, its rate shows only when it is asked.
const PAUSE_STEPS: usize = 64;

/// How much of what was counted before a draft still counts after it.
const MEMORY: f64 = 0.9;

/// How often what was drafted for a sequence came true.
#[derive(Debug)]
pub struct Trust {
    right: f64,
    all: f64,
}

impl Default for Trust {
    /// What to expect at first, worth three guesses.
    fn default() -> Self {
        Self { right: 2.1, all: 3.0 }
    }
}

impl Trust {
    /// Of so many drafted tokens the first `right` came true. Those after the first wrong one were not judged.
    pub fn note(&mut self, drafted: usize, right: usize) {
        self.right = self.right * MEMORY + right as f64;
        self.all = self.all * MEMORY + drafted.min(right + 1) as f64;
    }

    /// How likely the next one is right if those before it are.
    pub fn chance(&self) -> f64 {
        self.right / self.all
    }
}

/// Decides step by step how many tokens are drafted.
#[derive(Debug, Default)]
pub struct Drafts {
    /// Steps since the last with drafts.
    pause: usize,
}

impl Drafts {
    /// How many tokens to draft for each of the sequences with these chances, in a step that decodes `rows` of all and has `room` for
    /// guesses: the number that makes most expected tokens a second.
    pub fn choose(
        &mut self,
        speculation: Speculation,
        chances: &[f64],
        (rows, room): (usize, usize),
        step: &Cost,
        draft: Option<&Cost>,
    ) -> usize {
        let most = if chances.is_empty() { 0 } else { (room / chances.len()).min(DRAFTED_MAX) };
        let count = match (speculation, draft) {
            (Speculation::Off, _) => 0,
            (Speculation::Always, _) => most,
            // nothing is known of it, or nothing new: it is tried
            (Speculation::Auto, None) => most.min(2),
            (Speculation::Auto, Some(_)) if self.pause >= PAUSE_STEPS => most.min(2),
            (Speculation::Auto, Some(draft)) => most_worth(chances, rows, most, step, draft),
        };
        self.pause = if count > 0 || most == 0 { 0 } else { self.pause + 1 };
        count
    }
}

fn most_worth(chances: &[f64], rows: usize, most: usize, step: &Cost, draft: &Cost) -> usize {
    let (mut tokens, drafted) = (rows as f64, chances.len());
    let (mut best, mut best_count) = (GAIN_MIN * tokens / step.seconds(rows), 0);
    for count in 1..=most {
        tokens += chances.iter().map(|chance| chance.powi(count as i32)).sum::<f64>();
        let rate = tokens / (step.seconds(rows + drafted * count) + count as f64 * draft.seconds(drafted));
        if rate > best {
            (best, best_count) = (rate, count);
        }
    }
    best_count
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn measured(fixed_ms: f64, row_ms: f64) -> Cost {
        let mut cost = Cost::default();
        for rows in (1..20).cycle().take(300) {
            cost.note_step(rows, Duration::from_secs_f64(1e-3 * (fixed_ms + row_ms * rows as f64)));
        }
        cost
    }

    #[test]
    fn a_draft_pays_when_it_is_right_and_cheap_and_is_tried_again_after_a_pause() {
        let (step, cheap, dear) = (measured(20.0, 0.5), measured(1.0, 0.1), measured(15.0, 1.0));
        let choose = |drafts: &mut Drafts, chance: f64, cost| {
            drafts.choose(Speculation::Auto, &[chance], (1, 32), &step, Some(cost))
        };
        assert_eq!(choose(&mut Drafts::default(), 0.9, &cheap), DRAFTED_MAX);
        assert_eq!(choose(&mut Drafts::default(), 0.6, &dear), 0);
        let mut drafts = Drafts::default();
        let counts: Vec<usize> = (0..200).map(|_| choose(&mut drafts, 0.01, &cheap)).collect();
        assert_eq!(counts.iter().filter(|count| **count > 0).count(), 3);
        assert_eq!(drafts.choose(Speculation::Auto, &[0.9; 8], (8, 7), &step, Some(&cheap)), 0, "no room for one each");
        assert_eq!(drafts.choose(Speculation::Auto, &[], (8, 32), &step, Some(&cheap)), 0);
        assert_eq!(drafts.choose(Speculation::Always, &[0.0], (8, 32), &step, None), DRAFTED_MAX);
    }

    #[test]
    fn trust_follows_what_came_true_and_what_was_not_judged_does_not_count() {
        let (mut good, mut bad) = (Trust::default(), Trust::default());
        for _ in 0..40 {
            good.note(5, 5);
            bad.note(5, 0);
        }
        assert!(good.chance() > 0.95 && bad.chance() < 0.05);
        let mut half = Trust::default();
        (0..60).for_each(|_| half.note(5, 1));
        assert!((half.chance() - 0.5).abs() < 0.05);
    }
}
