//! Rotary frequencies and the ways in which models stretch them to longer contexts.

use super::plan::{Shape, Source};
use crate::{kernels::Rope, weights::LoadError};

/// Base of the frequencies where a file names none.
pub(super) const BASE: f32 = 10_000.0;

/// Frequencies of one rotary table.
#[derive(Debug, Clone)]
pub(super) struct RopePlan {
    is_interleaved: bool,
    /// Angle per position of each pair.
    inverse: Vec<f64>,
    /// Growth of what is rotated.
    magnitude: f32,
    /// Other frequencies for contexts beyond a length.
    long: Option<(usize, Vec<f64>)>,
}

impl RopePlan {
    /// `base^(-2i/rotated)` for the pairs of the first `rotated` values of a head (arXiv:2104.09864).
    pub(super) fn plain(rotated: usize, base: f32, is_interleaved: bool) -> Self {
        let inverse = (0..rotated / 2).map(|i| f64::from(base).powf(-2.0 * i as f64 / rotated as f64)).collect();
        Self { is_interleaved, inverse, magnitude: 1.0, long: None }
    }

    /// The table that a file describes.
    ///
    /// # Errors
    /// When a value is absurd, or the kind of scaling is not known.
    pub(super) fn read(source: &Source, shape: &Shape, base: f32) -> Result<Self, LoadError> {
        let rotated = source.optional("rope.dimension_count", shape.heads.dim)?.unwrap_or(shape.heads.dim);
        if !rotated.is_multiple_of(2) {
            return Err(source.file.broken(format!("'{}' is {rotated}, not even", source.key("rope.dimension_count"))));
        }
        let base = source.real("rope.freq_base", 1.0..=1e15)?.unwrap_or(base);
        let plain = Self::plain(rotated, base, source.file.has_interleaved_rotary());
        let scaled = plain.scaled(source, shape, rotated, base)?;
        match factors(source, "rope_freqs.weight", rotated / 2)? {
            Some(factors) => Ok(Self { inverse: divided(&scaled.inverse, &factors), ..scaled }),
            None => Ok(scaled),
        }
    }

    fn scaled(self, source: &Source, shape: &Shape, rotated: usize, base: f32) -> Result<Self, LoadError> {
        let kind = source.file.text(&source.key("rope.scaling.type")).unwrap_or("none");
        let has_factors = source.file.has("rope_factors_long.weight");
        match kind {
            "none" | "longrope" | "su" if has_factors => self.longrope(source, shape, rotated),
            "none" => Ok(match source.real("rope.scale_linear", FACTORS)? {
                Some(factor) => self.linear(factor),
                None => self,
            }),
            "linear" => Ok(self.linear(factor(source)?)),
            "llama3" => self.llama3(source),
            "yarn" => self.yarn(source, shape, rotated, base),
            other => Err(LoadError::Unsupported(format!(
                "this model scales its rotary positions by '{other}' ('{}'), which is not supported; supported: linear, \
                 llama3, yarn, longrope",
                source.key("rope.scaling.type")
            ))),
        }
    }

    /// Positions squeezed by a factor (Chen et al. 2023, arXiv:2306.15595).
    fn linear(mut self, factor: f32) -> Self {
        self.inverse.iter_mut().for_each(|f| *f /= f64::from(factor));
        self
    }

    /// Llama 3.1: long waves squeezed, short ones left, a ramp between (Grattafiori et al. 2024, arXiv:2407.21783).
    fn llama3(mut self, source: &Source) -> Result<Self, LoadError> {
        let factor = f64::from(factor(source)?);
        let low = f64::from(source.real("rope.scaling.low_freq_factor", FACTORS)?.unwrap_or(1.0));
        let high = f64::from(source.real("rope.scaling.high_freq_factor", FACTORS)?.unwrap_or(4.0));
        let original = original_context(source)?.unwrap_or(8192) as f64;
        if low >= high {
            return Err(source.file.broken(format!("the rotary scaling goes from {low} up to {high}")));
        }
        for f in &mut self.inverse {
            // how many turns a wave makes within the original context
            let turns = original * *f / std::f64::consts::TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            *f = *f * kept + *f / factor * (1.0 - kept);
        }
        Ok(self)
    }

    /// YaRN: squeezed below a ramp over the pairs, left above it, and all scores a little sharper (Peng et al. 2023, arXiv:2309.00071).
    fn yarn(mut self, source: &Source, shape: &Shape, rotated: usize, base: f32) -> Result<Self, LoadError> {
        let factor = f64::from(factor(source)?);
        let original = original_context(source)?.unwrap_or(shape.context) as f64;
        let beta = |key: &str, default: f32| Ok(f64::from(source.real(key, FACTORS)?.unwrap_or(default)));
        let (fast, slow) = (beta("rope.scaling.yarn_beta_fast", 32.0)?, beta("rope.scaling.yarn_beta_slow", 1.0)?);
        // the pair that makes so many turns within the original context
        let pair = |turns: f64| {
            rotated as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * f64::from(base).ln())
        };
        let (low, high) = (pair(fast).floor().max(0.0), pair(slow).ceil().min(rotated as f64 - 1.0));
        for (i, f) in self.inverse.iter_mut().enumerate() {
            let squeezed = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            *f = *f / factor * squeezed + *f * (1.0 - squeezed);
        }
        let sharper = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
        self.magnitude = sharper as f32 * source.real("rope.scaling.attn_factor", FACTORS)?.unwrap_or(1.0);
        Ok(self)
    }

    /// LongRoPE: a factor for each pair, one set for the original context and one beyond it (Ding et al. 2024, arXiv:2402.13753).
    fn longrope(mut self, source: &Source, shape: &Shape, rotated: usize) -> Result<Self, LoadError> {
        let set = |name: &str| {
            let missing = || source.file.broken(format!("tensor '{name}' is missing"));
            factors(source, name, rotated / 2)?.ok_or_else(missing)
        };
        let original = original_context(source)?.unwrap_or(shape.context);
        let stretched = shape.context as f64 / original as f64;
        let sharper = if stretched > 1.0 { (1.0 + stretched.ln() / (original as f64).ln()).sqrt() } else { 1.0 };
        self.magnitude = source.real("rope.scaling.attn_factor", FACTORS)?.unwrap_or(sharper as f32);
        self.long = Some((original, divided(&self.inverse, &set("rope_factors_long.weight")?)));
        self.inverse = divided(&self.inverse, &set("rope_factors_short.weight")?);
        Ok(self)
    }

    /// The table for a context. It decides between short and long frequencies once, so that an answer does not depend on how long it
    /// grows.
    pub(super) fn table(&self, context: usize) -> Rope {
        let inverse = match &self.long {
            Some((original, long)) if context > *original => long,
            _ => &self.inverse,
        };
        Rope::new(context, inverse, self.magnitude, self.is_interleaved)
    }
}

/// What a factor may be.
const FACTORS: std::ops::RangeInclusive<f32> = 1e-3..=1e6;

fn factor(source: &Source) -> Result<f32, LoadError> {
    let missing = || source.file.broken(format!("'{}' is missing", source.key("rope.scaling.factor")));
    source.real("rope.scaling.factor", FACTORS)?.ok_or_else(missing)
}

fn original_context(source: &Source) -> Result<Option<usize>, LoadError> {
    source.optional("rope.scaling.original_context_length", 1 << 24)
}

/// A tensor of one divisor for each pair.
fn factors(source: &Source, name: &str, pairs: usize) -> Result<Option<Vec<f32>>, LoadError> {
    if !source.file.has(name) {
        return Ok(None);
    }
    let weight = source.file.weight(name)?;
    if (weight.rows(), weight.cols()) != (1, pairs) {
        let text = format!("tensor '{name}' is {} x {}, not 1 x {pairs}", weight.rows(), weight.cols());
        return Err(source.file.broken(text));
    }
    let factors = weight.dequantize();
    match factors.iter().find(|f| !FACTORS.contains(f)) {
        Some(f) => Err(source.file.broken(format!("tensor '{name}' holds {f}, which cannot divide a frequency"))),
        None => Ok(Some(factors)),
    }
}

fn divided(inverse: &[f64], factors: &[f32]) -> Vec<f64> {
    inverse.iter().zip(factors).map(|(f, by)| f / f64::from(*by)).collect()
}
