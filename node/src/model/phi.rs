//! Phi-3 (arXiv:2404.14219) and Phi-4-mini: queries, keys and values in one tensor, gate and up in another, LongRoPE, a sliding window,
//! and in the latter partly rotated heads.

use super::{
    plan::{Plan, Source},
    rope,
};
use crate::weights::LoadError;

pub(super) fn plan(source: &Source) -> Result<Plan, LoadError> {
    let plain = Plan::plain(source, rope::BASE)?;
    Ok(Plan { is_fused: true, ..plain }.with_window(source.window()?))
}
