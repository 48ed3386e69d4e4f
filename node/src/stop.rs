//! When a sequence ends. Pure. Ends that show in tokens are decided here, in the engine; stop strings show in text and are decided by
//! [`crate::output`].

use serde::Serialize;

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model's end token, or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// The ends of one sequence that show in its tokens.
#[derive(Debug, Clone)]
pub struct StopRule {
    /// The model's end tokens.
    pub end_tokens: std::sync::Arc<[u32]>,
    /// Most tokens to generate; the context's end is part of it.
    pub tokens_max: usize,
}

impl StopRule {
    /// Whether the sequence ends with its newest token, the `generated`th.
    pub fn after(&self, token: u32, generated: usize) -> Option<Finish> {
        if self.end_tokens.contains(&token) {
            return Some(Finish::Stop);
        }
        (generated >= self.tokens_max).then_some(Finish::Length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_token_wins_over_the_length() {
        let rule = StopRule { end_tokens: [2].into(), tokens_max: 3 };
        assert_eq!(rule.after(7, 2), None);
        assert_eq!(rule.after(7, 3), Some(Finish::Length));
        assert_eq!(rule.after(2, 3), Some(Finish::Stop));
    }
}
