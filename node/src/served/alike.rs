//! Which nodes answer alike: a short hash of all that a model's answers depend on at this one, beside the request itself.
//!
//! What only decides whether a request is taken, how fast it is answered or who is served first stands not in it: by the law that a row's
//! result depends on no other, it changes no answer.

use sha2::{Digest, Sha256};
use tidegate_common::ids::Fingerprint;

use crate::{
    config::NodeConfig,
    model::Capacity,
    weights::{Quantize, Recommended},
};

/// Raised by whoever changes answers by a change of the code, which `tests/golden.rs` tells.
const CODE: u32 = 1;

/// What a model's answers depend on.
pub(super) struct Basis<'a> {
    /// A digest of its files.
    pub(super) files: [u8; 32],
    pub(super) quantize: Quantize,
    pub(super) capacity: Capacity,
    /// Device class.
    pub(super) device: &'a str,
    /// What its makers recommend.
    pub(super) sampling: Recommended,
}

impl Basis<'_> {
    /// The hash, at a node of this configuration.
    pub(super) fn fingerprint(&self, node: &NodeConfig) -> Fingerprint {
        let defaults = &node.defaults;
        let sampled = (defaults.temperature(&self.sampling), defaults.top_p(&self.sampling), defaults.tokens_max);
        let model = (self.files, self.quantize.name(), self.capacity.context, self.capacity.kv_dtype.name());
        let text = (node.tool_parser, node.reasoning_parser, node.embeddings);
        let all = format!("{:?}", (CODE, self.device, model, sampled, self.sampling, text));
        let digest = Sha256::digest(all.as_bytes());
        Fingerprint::new(digest[..8].try_into().map(u64::from_be_bytes).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;
    use crate::kernels::KvDtype;

    fn of(lines: &str, change: impl FnOnce(&mut Basis<'_>)) -> Fingerprint {
        let raw = Raw::from_toml(&format!("[node]\nmax_batch_size = 4\n{lines}"), "t").unwrap();
        let capacity = Capacity { batch_tokens_max: 64, context: 512, blocks: 99, kv_dtype: KvDtype::F16 };
        let (sampling, quantize) = (Recommended::default(), Quantize::None);
        let mut basis = Basis { files: [7; 32], quantize, capacity, device: "cpu", sampling };
        change(&mut basis);
        basis.fingerprint(&raw.check(NodeConfig::read).unwrap())
    }

    #[test]
    fn what_changes_answers_changes_it_and_nothing_else_does() {
        let plain = of("", |_| {});
        for lines in [
            "defaults.temperature = 0.5",
            "defaults.top_p = 0.5",
            "defaults.max_tokens = 5",
            "tool_parser = \"json\"",
            "reasoning_parser = \"none\"",
            "embeddings = \"last\"",
        ] {
            assert_ne!(of(lines, |_| {}), plain, "{lines}");
        }
        let changes: [fn(&mut Basis<'_>); 6] = [
            |basis| basis.files[31] = 8,
            |basis| basis.quantize = Quantize::Int8,
            |basis| basis.capacity.context = 511,
            |basis| basis.capacity.kv_dtype = KvDtype::Int8,
            |basis| basis.device = "cuda-sm90",
            |basis| basis.sampling.top_k = Some(9),
        ];
        for (i, change) in changes.into_iter().enumerate() {
            assert_ne!(of("", change), plain, "change {i}");
        }
        // the default said in words, and what decides when and not what
        for lines in [
            "defaults.temperature = 0.7\ndefaults.top_p = 0.92",
            "threads = 1\nspeculative = \"off\"\nmax_queue = 9\nversion = \"2\"",
        ] {
            assert_eq!(of(lines, |_| {}), plain, "{lines}");
        }
        assert_eq!(of("", |basis| (basis.capacity.blocks, basis.capacity.batch_tokens_max) = (5, 5)), plain);
    }
}
