//! From logits to a token. Pure: the randomness is a function of (seed, choice, position), so a sequence that is preempted, resumed on
//! another node or batched with others draws the same numbers.

use std::{cmp::Ordering, collections::HashMap, sync::Arc};

use crate::batch::Pick;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this; 1 keeps all (Holtzman et al. 2019, arXiv:1904.09751).
    pub top_p: f32,
    /// Most tokens to choose from; 0 keeps all.
    pub top_k: usize,
    /// Tokens less likely than this share of the likeliest are dropped; 0 keeps all.
    pub min_p: f32,
    /// Seed of the randomness.
    pub seed: u64,
    /// What tokens lose by having been said.
    pub penalties: Penalties,
    /// Added to the logits of single tokens, before anything else.
    pub bias: Arc<[(u32, f32)]>,
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy(seed: u64) -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed,
            penalties: Penalties::default(),
            bias: Arc::default(),
        }
    }
}

/// What a token loses by having been said before. The first two count the answer's tokens, the third the prompt's too, as in vLLM.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalties {
    /// Taken from the logit of a token that has been said; 0 for none.
    pub presence: f32,
    /// Taken for each time it has been said; 0 for none.
    pub frequency: f32,
    /// Positive logits are divided by it and negative ones multiplied; 1 for none (Keskar et al. 2019, arXiv:1909.05858).
    pub repetition: f32,
}

impl Default for Penalties {
    fn default() -> Self {
        Self { presence: 0.0, frequency: 0.0, repetition: 1.0 }
    }
}

/// Which draw of a request this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Index of the choice, below the request's `n`.
    pub choice: u32,
    /// How many tokens of this choice came before.
    pub position: u32,
}

/// Philox4x32-10, a counter-based generator: ten rounds of multiply and exchange over a counter of 128 bits under a key of 64.
///
/// # Source
/// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter;
    let mut k = key;
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// How a device is to choose the token of this draw, with the same number as [`sample`].
pub fn pick(sampling: &Sampling, draw: Draw) -> Pick {
    let Sampling { temperature, top_p, top_k, min_p, seed, .. } = *sampling;
    let top_k = i32::try_from(top_k).unwrap_or(0);
    Pick { temperature, top_p, min_p, uniform: uniform(seed, draw), top_k }
}

/// A number in [0, 1) with 24 random bits.
fn uniform(seed: u64, draw: Draw) -> f32 {
    let [bits, ..] = philox([draw.position, draw.choice, 0, 0], [seed as u32, (seed >> 32) as u32]);
    (bits >> 8) as f32 / (1u32 << 24) as f32
}

/// Which tokens have been said, and how often in the answer; kept only for sequences whose sampling asks.
#[derive(Debug, Default, Clone)]
pub struct Said {
    /// Times in the answer; zero for tokens that only the prompt has.
    times: HashMap<u32, u32>,
}

impl Said {
    /// What a sequence has said, when its sampling needs to know.
    pub fn of(sampling: &Sampling, prompt: &[u32], answer: &[u32]) -> Option<Self> {
        if sampling.penalties == Penalties::default() {
            return None;
        }
        let mut said = Self { times: prompt.iter().map(|token| (*token, 0)).collect() };
        answer.iter().for_each(|token| said.push(*token));
        Some(said)
    }

    /// The answer's next token.
    pub fn push(&mut self, token: u32) {
        *self.times.entry(token).or_default() += 1;
    }
}

/// Moves the logits by bias and penalties, `logits[V]`. Each token's change depends on that token alone.
pub fn adjust(logits: &mut [f32], sampling: &Sampling, said: Option<&Said>) {
    for (token, bias) in &*sampling.bias {
        logits[*token as usize] += bias;
    }
    let Some(said) = said else { return };
    let Penalties { presence, frequency, repetition } = sampling.penalties;
    for (token, times) in &said.times {
        let logit = &mut logits[*token as usize];
        *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        if *times > 0 {
            *logit -= presence + frequency * *times as f32;
        }
    }
}

/// Natural logarithms of probabilities, before bias, penalties and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen or given.
    pub chosen: f32,
    /// The likeliest tokens, likelier first.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Of `token` and of the `top` likeliest, `logits[V]`.
    pub fn of(logits: &[f32], token: u32, top: usize, scratch: &mut Vec<(f32, u32)>) -> Self {
        let total = log_sum_exp(logits);
        first_in_order(logits, top, scratch);
        let top = scratch.iter().map(|(logit, id)| (*id, logit - total)).collect();
        Self { chosen: logits[token as usize] - total, top }
    }
}

fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits[likeliest(logits) as usize];
    let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
    max + sum.ln() as f32
}

/// Chooses the next token. `scratch` keeps its memory from call to call.
///
/// # Shapes
/// `logits`: `[V]`, not empty.
pub fn sample(logits: &[f32], sampling: &Sampling, draw: Draw, scratch: &mut Vec<(f32, u32)>) -> u32 {
    if sampling.temperature <= 0.0 || sampling.top_k == 1 {
        return likeliest(logits);
    }
    candidates(logits, sampling, scratch);
    draw_from(scratch, uniform(sampling.seed, draw))
}

/// Logits that are looked at together; the compiler makes vector instructions of loops over so many.
const LANES: usize = 32;

/// The first of the greatest; a NaN is never chosen.
fn likeliest(logits: &[f32]) -> u32 {
    // the greatest of each lane so far, and in which chunk it stands
    let (mut tops, mut chunks) = ([f32::NEG_INFINITY; LANES], [u32::MAX; LANES]);
    let (whole, rest) = logits.as_chunks::<LANES>();
    for (chunk, i) in whole.iter().zip(0u32..) {
        for lane in 0..LANES {
            let is_greater = chunk[lane] > tops[lane];
            tops[lane] = if is_greater { chunk[lane] } else { tops[lane] };
            chunks[lane] = if is_greater { i } else { chunks[lane] };
        }
    }
    let lanes = (0..LANES).filter(|lane| chunks[*lane] != u32::MAX);
    let firsts = lanes.map(|lane| (tops[lane], chunks[lane] * LANES as u32 + lane as u32));
    let rest = rest.iter().zip((whole.len() * LANES) as u32..).map(|(x, id)| (*x, id));
    let all = firsts.chain(rest.filter(|(x, _)| *x > f32::NEG_INFINITY));
    let best = all.reduce(|a, b| if b.0 > a.0 || (b.0 == a.0 && b.1 < a.1) { b } else { a });
    // where nothing is possible, the first that is a number
    best.map_or_else(|| logits.iter().position(|x| !x.is_nan()).unwrap_or(0) as u32, |(_, id)| id)
}

/// The `count` likeliest, likelier first.
fn first_in_order(logits: &[f32], count: usize, out: &mut Vec<(f32, u32)>) {
    out.clear();
    let count = count.min(logits.len());
    for (logit, id) in logits.iter().copied().zip(0u32..) {
        let new = (logit, id);
        if let Some(worst) = out.get(count.wrapping_sub(1)) {
            // most end here; what compares as less stands later in the order, too
            if logit < worst.0 || order(&new, worst).is_gt() {
                continue;
            }
            out.pop();
        }
        if count > 0 {
            out.insert(out.partition_point(|kept| order(kept, &new).is_lt()), new);
        }
    }
}

/// Likelier first; among equals the smaller id.
fn order(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Weights of the tokens that may be chosen, relative to the likeliest, in an order that only depends on the logits.
fn candidates(logits: &[f32], sampling: &Sampling, out: &mut Vec<(f32, u32)>) {
    let top = logits[likeliest(logits) as usize];
    // what is below this weighs less than 2^-24 of the likeliest: f32 sums would not see it
    let floor = (sampling.min_p.max(f32::EPSILON / 2.0)).ln() * sampling.temperature + top;
    above(logits, floor, out);
    let is_cut = sampling.top_k > 0 && out.len() > sampling.top_k;
    if is_cut {
        out.select_nth_unstable_by(sampling.top_k - 1, order);
        out.truncate(sampling.top_k);
    }
    for candidate in out.iter_mut() {
        candidate.0 = ((candidate.0 - top) / sampling.temperature).exp();
    }
    if sampling.top_p < 1.0 {
        out.sort_unstable_by(order);
        keep_mass(out, sampling.top_p);
    } else if is_cut {
        out.sort_unstable_by_key(|c| c.1);
    }
}

/// Logits of at least `floor` with their tokens, in the order of the vocabulary. Most of it is far below, and passed by in chunks.
fn above(logits: &[f32], floor: f32, out: &mut Vec<(f32, u32)>) {
    out.clear();
    for (chunk, first) in logits.chunks(LANES).zip((0u32..).step_by(LANES)) {
        if chunk.iter().fold(false, |any, x| any | (*x >= floor)) {
            out.extend(chunk.iter().copied().zip(first..).filter(|(x, _)| *x >= floor));
        }
    }
}

/// Cuts a sorted list where its weight reaches `share` of the whole; at least one stays.
fn keep_mass(sorted: &mut Vec<(f32, u32)>, share: f32) {
    let total: f32 = sorted.iter().map(|c| c.0).sum();
    let mut mass = 0.0;
    let enough = sorted.iter().position(|c| {
        mass += c.0;
        mass >= share * total
    });
    sorted.truncate(enough.map_or(sorted.len(), |i| i + 1));
}

fn draw_from(candidates: &[(f32, u32)], uniform: f32) -> u32 {
    let total: f32 = candidates.iter().map(|c| c.0).sum();
    let mut left = uniform * total;
    for (weight, id) in candidates {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    candidates.last().map_or(0, |c| c.1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::greedy(7) }
    }

    fn draw(logits: &[f32], sampling: &Sampling, position: u32) -> u32 {
        sample(logits, sampling, Draw { choice: 0, position }, &mut Vec::new())
    }

    /// Known answers of the authors' own library, Random123 (`kat_vectors`).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn greedy_takes_the_first_of_the_greatest_and_never_a_nan() {
        let greedy = Sampling::greedy(7);
        assert_eq!(draw(&[0.0, 3.0, f32::NAN, 3.0], &greedy, 0), 1);
        assert_eq!(draw(&[f32::NAN, f32::NAN], &greedy, 0), 0);
    }

    #[test]
    fn shares_follow_the_probabilities() {
        let logits = [0.1f32.ln(), 0.2f32.ln(), 0.7f32.ln()];
        let mut counts = [0u32; 3];
        (0..20_000).for_each(|i| counts[draw(&logits, &plain(), i) as usize] += 1);
        for (count, share) in counts.iter().zip([0.1, 0.2, 0.7]) {
            assert!((f64::from(*count) / 20_000.0 - share).abs() < 0.012, "{counts:?}");
        }
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        let seen =
            |s: Sampling| (0..500).map(|i| draw(&logits, &s, i)).collect::<std::collections::BTreeSet<u32>>().len();
        assert_eq!(seen(plain()), 4);
        assert_eq!(seen(Sampling { top_k: 2, ..plain() }), 2);
        assert_eq!(seen(Sampling { top_p: 0.79, ..plain() }), 2);
        assert_eq!(seen(Sampling { min_p: 0.2, ..plain() }), 3);
        assert_eq!(seen(Sampling { top_p: 0.0, ..plain() }), 1);
    }

    #[test]
    fn bias_and_penalties_move_the_tokens_they_name() {
        let sampling = Sampling {
            bias: [(3, -100.0)].into(),
            penalties: Penalties { presence: 0.5, frequency: 0.25, repetition: 2.0 },
            ..plain()
        };
        let mut logits = [4.0, -4.0, 4.0, 4.0, 1.0];
        // 0 and 1 stand in the prompt, 1 and 2 in the answer, 2 twice
        let said = Said::of(&sampling, &[0, 1], &[1, 2, 2]).unwrap();
        adjust(&mut logits, &sampling, Some(&said));
        assert_eq!(logits, [2.0, -8.75, 1.0, -96.0, 1.0]);
        assert!(Said::of(&plain(), &[0], &[1]).is_none());
    }

    #[test]
    fn logprobs_are_those_of_the_softmax_likelier_first() {
        let logits = [0.1f32.ln() + 3.0, 0.6f32.ln() + 3.0, 0.3f32.ln() + 3.0];
        let found = Logprobs::of(&logits, 0, 2, &mut Vec::new());
        assert!((found.chosen - 0.1f32.ln()).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!((found.top[0].1 - 0.6f32.ln()).abs() < 1e-6);
        assert_eq!(Logprobs::of(&logits, 1, 0, &mut Vec::new()).top, []);
    }

    /// Any number, more often than by chance one of those that need care.
    fn any_logit() -> impl Strategy<Value = f32> {
        let special = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MIN_POSITIVE];
        prop_oneof![4 => -3f32..3.0, 1 => prop::sample::select(special.to_vec()), 1 => prop::sample::select(vec![1.0f32, 2.0])]
    }

    proptest! {
        /// Law: what is found in chunks is what plain loops find, whatever the numbers.
        #[test]
        fn chunks_find_what_plain_loops_find(
            logits in prop::collection::vec(any_logit(), 1..150), floor in any_logit(), count in 0usize..40,
            only in prop::option::of(any_logit()),
        ) {
            let logits = only.map_or(logits.clone(), |only| vec![only; logits.len()]);
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
            prop_assert_eq!(likeliest(&logits), logits.iter().position(|x| *x == top).unwrap_or(0) as u32);

            let bits = |found: &[(f32, u32)]| found.iter().map(|(x, id)| (x.to_bits(), *id)).collect::<Vec<_>>();
            let all: Vec<(f32, u32)> = logits.iter().copied().zip(0u32..).collect();
            let mut found = Vec::new();
            above(&logits, floor, &mut found);
            prop_assert_eq!(bits(&found), bits(&all.iter().copied().filter(|(x, _)| *x >= floor).collect::<Vec<_>>()));

            let mut sorted = all;
            sorted.sort_unstable_by(order);
            sorted.truncate(count);
            first_in_order(&logits, count, &mut found);
            prop_assert_eq!(bits(&found), bits(&sorted));
        }

        /// Law: whatever the logits and settings, the token is one of the vocabulary, and the same draw gives the same token.
        #[test]
        fn any_setting_gives_a_token_and_gives_it_again(
            logits in prop::collection::vec(-1e30f32..1e30, 1..80),
            temperature in 0f32..5.0, top_p in 0f32..=1.0, top_k in 0usize..90, min_p in 0f32..=1.0, seed: u64, position: u32,
        ) {
            let sampling = Sampling { temperature, top_p, top_k, min_p, ..Sampling::greedy(seed) };
            let token = draw(&logits, &sampling, position);
            prop_assert!((token as usize) < logits.len());
            prop_assert_eq!(token, draw(&logits, &sampling, position));
        }
    }
}
