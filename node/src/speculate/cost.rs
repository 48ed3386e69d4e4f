//! What a row more costs a step.

use std::time::Duration;

/// How much of what was measured before a step still counts after it.
const MEMORY: f64 = 0.98;

/// Until steps of different sizes have been seen: a step without rows takes as long as so many rows.
const FIXED_ROWS: f64 = 8.0;

/// How much of that to believe, as the variance of rows that outweighs it. What was measured fades, so after a while of steps of one
/// size a row is tried again that seemed too dear.
const DOUBT: f64 = 4.0;

/// A step that took so many times longer than expected was held up by something else.
const OUTLIER: f64 = 3.0;

/// A line through the rows and times of steps that only decoded, the recent ones most.
#[derive(Debug, Default)]
pub struct Cost {
    weight: f64,
    rows: f64,
    seconds: f64,
    rows_rows: f64,
    rows_seconds: f64,
}

impl Cost {
    /// A step of so many rows took so long.
    pub fn note_step(&mut self, rows: usize, time: Duration) {
        let mut seconds = time.as_secs_f64();
        if self.weight > 0.0 {
            seconds = seconds.min(OUTLIER * self.seconds(rows));
        }
        let rows = rows as f64;
        for (sum, new) in [
            (&mut self.weight, 1.0),
            (&mut self.rows, rows),
            (&mut self.seconds, seconds),
            (&mut self.rows_rows, rows * rows),
            (&mut self.rows_seconds, rows * seconds),
        ] {
            *sum = *sum * MEMORY + new;
        }
    }

    /// Whether a step has been seen.
    pub fn is_measured(&self) -> bool {
        self.weight > 0.0
    }

    /// How long a step of so many rows takes; before the first one in an unknown unit. Never less for more rows, nor more for each of
    /// them.
    pub fn seconds(&self, rows: usize) -> f64 {
        let rows = rows as f64;
        if self.weight == 0.0 {
            return FIXED_ROWS + rows;
        }
        let (mean_rows, mean_seconds) = (self.rows / self.weight, self.seconds / self.weight);
        let variance = self.rows_rows - self.rows * mean_rows;
        let covariance = self.rows_seconds - self.rows * mean_seconds;
        let guess = mean_seconds / (mean_rows + FIXED_ROWS);
        let row = ((covariance + DOUBT * guess) / (variance + DOUBT)).clamp(0.0, mean_seconds / mean_rows);
        // a clock too coarse to see a step must not make it free
        (mean_seconds + row * (rows - mean_rows)).max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(x: f64) -> Duration {
        Duration::from_secs_f64(x * 1e-3)
    }

    #[test]
    fn a_line_is_found_and_followed_and_one_hitch_does_not_bend_it() {
        let mut cost = Cost::default();
        (0..300).for_each(|i| cost.note_step(1 + i % 6, ms(10.0 + (1 + i % 6) as f64)));
        assert!((cost.seconds(5) * 1e3 - 15.0).abs() < 0.5);
        cost.note_step(1, ms(9000.0));
        assert!((cost.seconds(5) * 1e3 - 15.0).abs() < 1.5);
        (0..300).for_each(|i| cost.note_step(1 + i % 6, ms(4.0 * (1 + i % 6) as f64)));
        assert!((cost.seconds(5) * 1e3 - 20.0).abs() < 1.5, "{}", cost.seconds(5));
    }

    #[test]
    fn rows_that_seemed_too_dear_are_tried_again_after_a_while() {
        let mut cost = Cost::default();
        (0..100).for_each(|i| cost.note_step(1 + i % 6, ms(4.0 * (1 + i % 6) as f64)));
        let relative = |cost: &Cost| (cost.seconds(2) - cost.seconds(1)) / cost.seconds(1);
        assert!(relative(&cost) > 0.9);
        (0..400).for_each(|_| cost.note_step(1, ms(4.0)));
        assert!(relative(&cost) < 0.2);
    }

    proptest! {
        /// Law: whatever was measured, more rows never take less time, and no more for each row.
        #[test]
        fn more_rows_never_cost_less_in_all_nor_more_each(
            steps in prop::collection::vec((1usize..300, 0u64..1_000_000_000), 0..60), rows in 1usize..600,
        ) {
            let mut cost = Cost::default();
            steps.iter().for_each(|(rows, nanos)| cost.note_step(*rows, Duration::from_nanos(*nanos)));
            let (one, more) = (cost.seconds(rows), cost.seconds(rows + 1));
            prop_assert!(one > 0.0 && more >= one);
            prop_assert!(more / (rows + 1) as f64 <= one / rows as f64 * (1.0 + 1e-9));
        }
    }
}
