//! The Llama family (Touvron et al. 2023, arXiv:2302.13971) and what is built like it: SmolLM2, Mistral with its sliding window (Jiang et
//! al. 2023, arXiv:2310.06825), Mixtral (arXiv:2401.04088). The plain decoder; GGUF files hold its query and key rows in interleaved
//! rotary order.

use super::{
    plan::{Plan, Source},
    rope,
};
use crate::weights::LoadError;

pub(super) fn plan(source: &Source) -> Result<Plan, LoadError> {
    let plain = Plan::plain(source, rope::BASE)?;
    Ok(Plan { experts: source.experts(true)?, ..plain }.with_window(source.window()?))
}
