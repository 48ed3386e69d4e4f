//! Goal: the device chooses the tokens that sorting would. Method: random rows, cuts and draws, checked in f64.

use proptest::prelude::*;

use super::{emulated::Emulated, *};

/// The tokens that the device chooses, and the logits it gives back of rows without a pick.
fn choose<D: Device>(device: Arc<D>, logits: &[f32], picks: &[Option<Pick>]) -> (Vec<f32>, Vec<u32>) {
    let (mut cuda, width) = (Cuda::new(device, false), logits.len() / picks.len());
    let mut rows = Rows { count: picks.len(), ..cuda.rows(0, width) };
    rows.values.write(logits);
    let batch = Batch { picks: picks.to_vec(), ..Batch::default() };
    let (logits, tokens) = cuda.choose(&mut rows, &batch);
    (logits.to_vec(), tokens.to_vec())
}

/// Whether a choice is right, by sorting and in f64.
fn check(logits: &[f32], pick: Pick, token: u32) -> Result<(), TestCaseError> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if pick.temperature <= 0.0 || pick.top_k == 1 {
        prop_assert_eq!(Some(token as usize), logits.iter().position(|x| *x == top));
        return Ok(());
    }
    let weight = |x: f32| (f64::from(x - top) / f64::from(pick.temperature)).exp();
    let mut sorted: Vec<f32> = logits.iter().copied().filter(|x| weight(*x) >= f64::from(pick.min_p)).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let kth = if pick.top_k > 0 { sorted.get(pick.top_k as usize - 1) } else { None };
    let least = kth.copied().unwrap_or(f32::NEG_INFINITY);
    sorted.retain(|x| *x >= least);
    let total: f64 = sorted.iter().map(|x| weight(*x)).sum();
    let mut mass = 0.0;
    let last = sorted.iter().position(|x| {
        mass += weight(*x);
        mass >= f64::from(pick.top_p) * total - 1e-5
    });
    let least = last.map_or(f32::NEG_INFINITY, |i| sorted[i]);
    let kept = |x: &f32| *x >= least && weight(*x) >= f64::from(pick.min_p) - 1e-6;
    prop_assert!(kept(&logits[token as usize]), "token {token} was to be dropped");
    let up_to = |end: usize| logits[..end].iter().filter(|x| kept(x)).map(|x| weight(*x)).sum::<f64>();
    let (before, upto, all) = (up_to(token as usize), up_to(token as usize + 1), up_to(logits.len()));
    let draw = f64::from(pick.uniform) * all;
    // what stands at the edge of the cut may be counted or not
    let slack = 1e-3 * all + if pick.top_p < 1.0 { weight(least) } else { 0.0 };
    prop_assert!(before - slack <= draw && draw <= upto + slack, "{draw} is not between {before} and {upto}");
    Ok(())
}

fn a_pick() -> impl Strategy<Value = Pick> {
    let temperature = prop_oneof![Just(0.0f32), 0.05f32..3.0];
    let top_p = prop_oneof![Just(1.0f32), 0.01f32..1.0];
    let min_p = prop_oneof![Just(0.0f32), 0.0f32..0.5];
    let top_k = prop_oneof![Just(0), 1..50];
    (temperature, top_p, min_p, 0.0f32..1.0, top_k).prop_map(|(temperature, top_p, min_p, uniform, top_k)| Pick {
        temperature,
        top_p,
        min_p,
        uniform,
        top_k,
    })
}

fn a_row() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![4 => -8f32..8.0, 1 => (-3i32..4).prop_map(|x| x as f32)];
    prop::collection::vec(logit, 700)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_token_is_chosen_as_sorting_would_choose_it(rows in prop::collection::vec((a_row(), prop::option::of(a_pick())), 1..4)) {
        check_rows(Arc::new(Emulated::default()), &rows)?;
    }
}

#[cfg(feature = "cuda")]
proptest! {
    #[test]
    #[ignore = "needs a GPU: benches/gpu/run.sh runs it"]
    fn a_token_on_a_gpu_is_chosen_as_sorting_would_choose_it(
        rows in prop::collection::vec((a_row(), prop::option::of(a_pick())), 1..4),
    ) {
        check_rows(driver::Gpu::open(0).unwrap(), &rows)?;
    }
}

fn check_rows<D: Device>(device: Arc<D>, rows: &[(Vec<f32>, Option<Pick>)]) -> Result<(), TestCaseError> {
    let (logits, picks): (Vec<_>, Vec<_>) = rows.iter().cloned().unzip();
    let (others, tokens) = choose(device, &logits.concat(), &picks);
    let picked = rows.iter().filter_map(|(logits, pick)| Some((logits, (*pick)?)));
    prop_assert_eq!(picked.clone().count(), tokens.len());
    picked.zip(&tokens).try_for_each(|((logits, pick), token)| check(logits, pick, *token))?;
    let wanted: Vec<f32> =
        rows.iter().filter(|(_, pick)| pick.is_none()).flat_map(|(logits, _)| logits.clone()).collect();
    prop_assert_eq!(others, wanted);
    Ok(())
}
