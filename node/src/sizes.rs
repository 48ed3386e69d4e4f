//! How many KV blocks a model gets, and what is printed of every size and its reason. Pure; the machine's figures are passed in.

use tracing::info;

use crate::{config::EngineLimits, kv::BLOCK_TOKENS, machine::Memory, model::Capacity, weights::LoadError};

/// A size, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Size {
    /// The configuration's key.
    pub key: &'static str,
    /// In the key's own unit.
    pub value: u64,
    /// Why it is so large.
    pub why: String,
}

impl Size {
    /// One line of the log.
    pub(crate) fn print(&self) {
        info!(size = %format_args!("node.{}", self.key), value = self.value, why = self.why, "size");
    }
}

/// What a model's cache may be, in the words of the configuration.
pub(crate) struct Wish<'a> {
    pub(crate) limits: &'a EngineLimits,
    /// Most positions that the model was made for.
    pub(crate) model_context: usize,
    /// Bytes of one block in all layers.
    pub(crate) block_bytes: usize,
    pub(crate) memory: Memory,
    /// Which part of the memory the cache takes when the configuration names none: one of so many.
    pub(crate) cache_share: u64,
}

impl Wish<'_> {
    /// Sizes from the configuration, or sane ones from the machine: a share of the free memory for keys and values, but no less than
    /// one sequence of full length, and no more than a whole batch of them.
    ///
    /// # Errors
    /// When one sequence of full length does not fit into what is configured or free.
    pub(crate) fn capacity(&self) -> Result<(Capacity, [Size; 2]), LoadError> {
        let Self { limits, memory, .. } = self;
        let context = limits.context_max.unwrap_or(self.model_context).min(self.model_context);
        let mut capacity =
            Capacity { batch_tokens_max: limits.batch_tokens_max, context, blocks: 0, kv_dtype: limits.kv_dtype };
        let least = capacity.blocks_per_sequence();
        let (free, needed) = (memory.bytes >> 20, self.mib(least));
        if needed > free {
            return Err(LoadError::Config(format!(
                "one sequence of {context} tokens takes {needed} MiB for keys and values, and {free} MiB are free ({}): lower node.max_context",
                memory.bound
            )));
        }
        capacity.blocks = self.blocks(least);
        let taken = self.mib(capacity.blocks);
        if capacity.blocks < least {
            return Err(LoadError::Config(format!(
                "node.kv_cache_memory holds {} blocks, and one sequence of {context} tokens takes {least}: raise it to {needed} MiB, or lower node.max_context",
                capacity.blocks
            )));
        }
        if taken > free {
            return Err(LoadError::Config(format!(
                "node.kv_cache_memory is {taken} MiB, and {free} MiB are free ({}): lower it",
                memory.bound
            )));
        }
        Ok((capacity, [self.context_size(context), self.cache_size(&capacity, least)]))
    }

    fn blocks(&self, least: usize) -> usize {
        let fit = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX) / self.block_bytes.max(1);
        let blocks = match self.limits.kv_cache_bytes {
            Some(bytes) => fit(bytes),
            None => {
                fit(self.memory.bytes / self.cache_share).clamp(least, least.saturating_mul(self.limits.batch_size_max))
            }
        };
        // a slot's number must fit 32 bits
        blocks.min(u32::MAX as usize / BLOCK_TOKENS)
    }

    fn part(&self) -> String {
        if self.cache_share == 1 { String::new() } else { format!("1/{} of ", self.cache_share) }
    }

    fn mib(&self, blocks: usize) -> u64 {
        (blocks as u64).saturating_mul(self.block_bytes as u64).div_ceil(1 << 20)
    }

    fn context_size(&self, context: usize) -> Size {
        let why = match self.limits.context_max {
            Some(asked) if asked > context => format!("configured as {asked}, and the model was made for no more"),
            Some(_) => "configured".into(),
            None => "what the model was made for".into(),
        };
        Size { key: "max_context", value: context as u64, why }
    }

    fn cache_size(&self, capacity: &Capacity, least: usize) -> Size {
        let blocks = capacity.blocks;
        let mut why = match self.limits.kv_cache_bytes {
            Some(_) => "configured".into(),
            None if blocks == least => {
                format!("one sequence of full length, which is more than {}the free memory", self.part())
            }
            None if blocks == least.saturating_mul(self.limits.batch_size_max) => {
                "a whole batch of sequences of full length".into()
            }
            None => format!("{}{} MiB, {}", self.part(), self.memory.bytes >> 20, self.memory.bound),
        };
        why += &format!("; {blocks} blocks of {BLOCK_TOKENS} tokens in {}", capacity.kv_dtype.name());
        Size { key: "kv_cache_memory", value: blocks as u64 * self.block_bytes as u64, why }
    }
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;
    use crate::config::NodeConfig;

    fn capacity(lines: &str, free_mib: u64) -> Result<(Capacity, [Size; 2]), String> {
        let raw = Raw::from_toml(&format!("[node]\nmax_batch_size = 4\n{lines}"), "t").unwrap();
        let limits = raw.check(NodeConfig::read).unwrap().engine;
        let memory = Memory { bytes: free_mib << 20, bound: "the machine's free memory" };
        let wish = Wish { limits: &limits, model_context: 1024, block_bytes: 1 << 20, memory, cache_share: 8 };
        wish.capacity().map_err(|e| e.to_string())
    }

    #[test]
    fn without_a_word_it_is_an_eighth_of_what_is_free_within_bounds() {
        // one sequence takes 64 blocks, a whole batch 256
        for (free_mib, blocks) in [(100, 64), (800, 100), (80_000, 256)] {
            let (capacity, sizes) = capacity("", free_mib).unwrap();
            assert_eq!((capacity.context, capacity.blocks), (1024, blocks));
            assert_eq!(sizes[1].value, (blocks as u64) << 20);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_key_that_moves_it() {
        for (lines, free_mib, part) in [
            ("kv_cache_memory = \"63MiB\"", 900, "raise it to 64 MiB"),
            ("kv_cache_memory = \"0B\"", 900, "holds 0 blocks"),
            ("kv_cache_memory = \"1GiB\"", 900, "900 MiB are free (the machine's free memory): lower it"),
            ("", 63, "lower node.max_context"),
        ] {
            let error = capacity(lines, free_mib).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let (small, sizes) = capacity("max_context = 512\nkv_cache_memory = \"63MiB\"", 900).unwrap();
        assert_eq!((small.context, small.blocks), (512, 63));
        assert_eq!(sizes[0].why, "configured");
    }
}
