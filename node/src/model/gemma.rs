//! Gemma 3 (arXiv:2503.19786), its text part: scaled embeddings, GELU gates, norms on both sides of attention and gated layer and over
//! heads, and five layers with a window to each that sees everything. GGUF files hold the gains of norms with their one added.

use candle_core::quantized::gguf_file::Value;

use super::{
    plan::{Plan, Source},
    rope::{self, RopePlan},
};
use crate::{kernels::Activation, weights::LoadError};

/// One layer in so many sees everything.
const PERIOD: usize = 6;

/// Base of the frequencies of layers that see everything.
const GLOBAL_BASE: f32 = 1_000_000.0;

/// Layers of the 27B model, whose scores are scaled by the width over the heads and not by a head's own width.
const LAYERS_27B: usize = 62;

const GLOBAL: usize = 0;
const LOCAL: usize = 1;

pub(super) fn plan(source: &Source) -> Result<Plan, LoadError> {
    let mut plan = Plan::plain(source, GLOBAL_BASE)?;
    let local_base = source.real("rope.freq_base_swa", 1.0..=1e15)?.unwrap_or(rope::BASE);
    plan.ropes.push(RopePlan::plain(plan.shape.heads.dim, local_base, false));
    let window = source.window()?;
    let is_local = local_layers(source, plan.shape.layers)?;
    for (layer, is_local) in plan.layers.iter_mut().zip(is_local) {
        layer.rope = if is_local { LOCAL } else { GLOBAL };
        layer.view.window = window.filter(|_| is_local);
        if plan.shape.layers == LAYERS_27B && source.file.value(&source.key("attention.scale")).is_none() {
            layer.view.scale = 1.0 / ((plan.shape.width / plan.shape.heads.query) as f32).sqrt();
        }
    }
    Ok(Plan {
        embedding_scale: (plan.shape.width as f32).sqrt(),
        activation: Activation::GeluTanh,
        has_head_norms: true,
        has_output_norms: true,
        ..plan
    })
}

/// Which layers have the window: a list for each layer, or all but one in a period.
fn local_layers(source: &Source, layers: usize) -> Result<Vec<bool>, LoadError> {
    let key = "attention.sliding_window_pattern";
    if let Some(Value::Array(items)) = source.file.value(&source.key(key)) {
        let flags: Vec<bool> =
            items.iter().filter_map(|item| if let Value::Bool(flag) = item { Some(*flag) } else { None }).collect();
        let wrong = || source.file.broken(format!("'{}' is not one flag for each layer", source.key(key)));
        return if flags.len() == layers && items.len() == layers { Ok(flags) } else { Err(wrong()) };
    }
    let period = source.optional(key, layers.max(PERIOD))?.unwrap_or(PERIOD);
    Ok((0..layers).map(|i| !(i + 1).is_multiple_of(period)).collect())
}
