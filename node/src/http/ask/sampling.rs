//! The fields that choose tokens and end answers, whatever an API calls them.

use std::collections::BTreeMap;

use tidegate_common::contract::ApiError;

use super::{App, check, held::Held, tools::Tools};
use crate::{
    config::Defaults,
    sample::{Penalties, Sampling},
    served::Loaded,
    weights::Recommended,
};

/// Most stop strings of a request.
pub(super) const STOPS_MAX: usize = 16;

/// Longest stop string, in bytes.
const STOP_BYTES_MAX: usize = 1024;

/// Most tokens with a bias.
const BIASES_MAX: usize = 1024;

/// What a request says about sampling and its end; none is the default.
#[derive(Debug, Default)]
pub(super) struct Knobs {
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f64>,
    pub(super) seed: Option<i64>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) repetition_penalty: Option<f64>,
    pub(super) logit_bias: Option<BTreeMap<String, f64>>,
    pub(super) n: Option<i64>,
    pub(super) ignore_eos: Option<bool>,
    /// Stop strings, and the field that holds them.
    pub(super) stops: Option<(&'static str, Vec<String>)>,
    /// Most tokens, and the field that says so.
    pub(super) tokens_max: Option<(&'static str, i64)>,
}

/// What answers are sampled with where nobody says.
const TOP_K_MAX: i64 = 1_000_000;

impl Knobs {
    /// What the request says; else what the node's configuration says, else what the model's makers recommend.
    pub(super) fn sampling(
        &self,
        defaults: &Defaults,
        recommended: &Recommended,
        seed: u64,
        vocab: usize,
    ) -> Result<Sampling, ApiError> {
        let (temperature, top_p) = (defaults.temperature(recommended), defaults.top_p(recommended));
        let top_k = recommended.top_k.map_or(0, |k| k.min(TOP_K_MAX as usize) as i64);
        Ok(Sampling {
            temperature: check::real("temperature", self.temperature, 0.0..=2.0)?.unwrap_or(temperature),
            top_p: check::real("top_p", self.top_p, 0.0..=1.0)?.unwrap_or(top_p),
            // -1 means all, as in vLLM
            top_k: check::whole("top_k", self.top_k, -1..=TOP_K_MAX, top_k)?.max(0) as usize,
            min_p: check::real("min_p", self.min_p, 0.0..=1.0)?.or(recommended.min_p).unwrap_or(0.0),
            seed: self.seed.map_or(seed, i64::cast_unsigned),
            penalties: Penalties {
                presence: check::real("presence_penalty", self.presence_penalty, -2.0..=2.0)?.unwrap_or(0.0),
                frequency: check::real("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?.unwrap_or(0.0),
                repetition: check::real("repetition_penalty", self.repetition_penalty, 0.01..=100.0)?
                    .or(recommended.repetition_penalty)
                    .unwrap_or(1.0),
            },
            bias: self.bias(vocab)?.into(),
        })
    }

    fn bias(&self, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let given = self.logit_bias.iter().flatten();
        let found = given.map(|(key, bias)| {
            let token = key.parse::<u32>().ok().filter(|token| (*token as usize) < vocab).ok_or_else(|| {
                let key: String = key.chars().take(40).collect();
                ApiError::invalid("logit_bias", format!("logit_bias: '{key}' is no token id below {vocab}"))
            })?;
            let bias = check::real("logit_bias", Some(*bias), -100.0..=100.0)?;
            Ok((token, bias.unwrap_or(0.0)))
        });
        let found = found.collect::<Result<Vec<_>, ApiError>>()?;
        if found.len() > BIASES_MAX {
            let message = format!("{} biases are more than the {BIASES_MAX} allowed", found.len());
            return Err(ApiError::invalid("logit_bias", message));
        }
        Ok(found)
    }

    pub(super) fn stops(&self) -> Result<Vec<String>, ApiError> {
        let Some((field, stops)) = &self.stops else { return Ok(Vec::new()) };
        if stops.len() > STOPS_MAX {
            let message = format!("{} stop strings are more than the {STOPS_MAX} allowed", stops.len());
            return Err(ApiError::invalid(*field, message));
        }
        if stops.iter().any(|s| s.is_empty() || s.len() > STOP_BYTES_MAX) {
            return Err(ApiError::invalid(*field, format!("a stop string must have 1 to {STOP_BYTES_MAX} bytes")));
        }
        Ok(stops.clone())
    }

    /// Most tokens as the request says, with the field that says so.
    pub(super) fn tokens_asked(&self, echo: bool) -> Result<Option<(&'static str, usize)>, ApiError> {
        let Some((field, asked)) = self.tokens_max else { return Ok(None) };
        let asked = check::whole(field, Some(asked), i64::from(!echo)..=i64::MAX, 1)?;
        Ok(Some((field, asked as usize)))
    }

    /// Most tokens after a prompt; none at all only where the prompt itself is the answer.
    pub(super) fn tokens_max(
        &self,
        prompt_len: usize,
        echo: bool,
        app: &App,
        loaded: &Loaded,
    ) -> Result<usize, ApiError> {
        let room = loaded.context.saturating_sub(prompt_len);
        let Some((field, asked)) = self.tokens_asked(echo)? else {
            return Ok(app.config.defaults.tokens_max.min(room.max(1)));
        };
        if asked > room && room > 0 {
            let message = format!(
                "{field} = {asked} with a prompt of {prompt_len} tokens is more than the context of {} tokens; node.max_context sets it, up to what the model was made for",
                loaded.context
            );
            return Err(ApiError::invalid(field, message));
        }
        Ok(asked)
    }

    /// What cannot be asked for together.
    pub(super) fn check_exclusive(&self, held: Option<&Held>, tools: Option<&Tools>) -> Result<(), ApiError> {
        let forced = tools.filter(|tools| tools.is_forced()).map(|_| "tool_choice");
        let both = |a: &str, b: &str| {
            Err(ApiError::invalid(
                a,
                format!("'{a}' and '{b}' cannot be given together: each says what the answer must be"),
            ))
        };
        match (held, forced) {
            (Some(held), Some(forced)) => return both(held.field, forced),
            (Some(held), None) if tools.is_some_and(Tools::are_free) && !held.is_json() => {
                return both(held.field, "tools");
            }
            _ => {}
        }
        if self.ignore_eos == Some(true)
            && let Some(field) = held.map(|h| h.field).or(forced)
        {
            let message =
                format!("'ignore_eos' and '{field}' cannot be given together: what must have a form has an end");
            return Err(ApiError::invalid("ignore_eos", message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_comes_before_the_configuration_and_that_before_the_model() {
        let defaults = |temperature| Defaults { temperature, top_p: None, tokens_max: 1 };
        let recommended =
            Recommended { temperature: Some(0.6), top_p: Some(0.5), top_k: Some(20), ..Recommended::default() };
        let sampled = |knobs: &Knobs, configured, recommended: &Recommended| {
            let s = knobs.sampling(&defaults(configured), recommended, 1, 10).unwrap();
            (s.temperature, s.top_p, s.top_k)
        };
        let asked = Knobs { temperature: Some(0.1), top_k: Some(-1), ..Knobs::default() };
        assert_eq!(sampled(&asked, Some(0.3), &recommended), (0.1, 0.5, 0));
        assert_eq!(sampled(&Knobs::default(), Some(0.3), &recommended), (0.3, 0.5, 20));
        assert_eq!(sampled(&Knobs::default(), None, &recommended), (0.6, 0.5, 20));
        assert_eq!(sampled(&Knobs::default(), None, &Recommended::default()), (0.7, 0.92, 0));
    }
}
