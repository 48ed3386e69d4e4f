//! Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115): biases on queries, keys and values. Qwen 3 (arXiv:2505.09388): norms over heads
//! in their place, and in its larger models a mixture of experts.

use super::{
    Architecture,
    plan::{Plan, Source},
    rope,
};
use crate::weights::LoadError;

pub(super) fn plan(source: &Source) -> Result<Plan, LoadError> {
    let plain = Plan::plain(source, rope::BASE)?;
    let is_third = source.arch != Architecture::Qwen2;
    let experts = match source.arch {
        Architecture::Qwen3Moe => Some(
            source
                .experts(true)?
                .ok_or_else(|| source.file.broken(format!("'{}' is missing", source.key("expert_count"))))?,
        ),
        _ => None,
    };
    Ok(Plan { needs_qkv_bias: !is_third, has_head_norms: is_third, experts, ..plain })
}
