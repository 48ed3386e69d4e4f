//! What a node computes on: this machine's cores, or one of its GPUs.

#[cfg(feature = "cuda")]
use std::sync::Arc;

use crate::{
    config::{DeviceConfig, NodeConfig},
    kernels::{Backend, CacheShape, cpu::Cpu},
    machine::Memory,
    model::{self, Capacity, Model},
    weights::{Checkpoint, LoadError},
};
#[cfg(feature = "cuda")]
use crate::{
    kernels::cuda::{Cuda, HEAD_MAX, INPUTS_MULTIPLE, driver::Gpu},
    model::{Plan, Shape},
};

/// Of the machine's available memory at start, the share that models may take when the configuration does not say.
const SHARE_OF_MEMORY: (u64, u64) = (7, 8);

/// Share of the memory that is left for a model's keys and values when nothing names their size: one part of so many. Other programs
/// want the machine's memory too; a GPU's has no other use.
const CACHE_SHARE_OF_MACHINE: u64 = 8;

/// An open device.
#[derive(Clone)]
pub(super) enum Compute {
    Cpu {
        threads: usize,
    },
    #[cfg(feature = "cuda")]
    Gpu {
        gpu: Arc<Gpu>,
        /// `gpu_memory_utilization`
        share: f64,
        is_invariant: bool,
    },
}

impl Compute {
    /// Opens what the configuration names.
    ///
    /// # Errors
    /// When it is a GPU that cannot be had.
    pub(super) fn open(config: &NodeConfig) -> Result<Self, LoadError> {
        match config.device {
            DeviceConfig::Cpu => Ok(Self::Cpu { threads: config.engine.threads }),
            #[cfg(feature = "cuda")]
            DeviceConfig::Cuda { gpu, memory_share, is_invariant } => {
                let gpu = Gpu::open(gpu).map_err(|e| LoadError::Config(e.to_string()))?;
                Ok(Self::Gpu { gpu, share: memory_share, is_invariant })
            }
        }
    }

    /// Memory for models, and what bounds it.
    pub(super) fn memory(&self) -> Memory {
        match self {
            Self::Cpu { .. } => {
                let (share, of) = SHARE_OF_MEMORY;
                let Memory { bytes, bound } = Memory::available();
                Memory { bytes: bytes / of * share, bound }
            }
            #[cfg(feature = "cuda")]
            Self::Gpu { gpu, share, .. } => {
                let (free, total) = gpu.memory().unwrap_or_default();
                let bytes = (total as f64 * share) as usize;
                // what others have taken of it is theirs
                let bytes = bytes.saturating_sub(total - free) as u64;
                Memory { bytes, bound: "the GPU's free memory within node.gpu_memory_utilization" }
            }
        }
    }

    /// Memory for keys and values of a model whose weights take `weight_bytes`, where all models may take `bytes_max`: what is free
    /// beside the weights, and which part of it is theirs when nothing names their size, one of so many.
    pub(super) fn cache_memory(&self, weight_bytes: u64, bytes_max: u64) -> (Memory, u64) {
        let (free, share) = match self {
            Self::Cpu { .. } => (Memory::available(), CACHE_SHARE_OF_MACHINE),
            #[cfg(feature = "cuda")]
            Self::Gpu { .. } => (self.memory(), 1),
        };
        let bound = if bytes_max < free.bytes { "node.models_memory" } else { free.bound };
        (Memory { bytes: free.bytes.min(bytes_max).saturating_sub(weight_bytes), bound }, share)
    }

    pub(super) fn block_bytes(&self, shape: CacheShape) -> usize {
        match self {
            Self::Cpu { .. } => Cpu::block_bytes(shape),
            #[cfg(feature = "cuda")]
            Self::Gpu { .. } => Cuda::<Gpu>::block_bytes(shape),
        }
    }

    pub(super) fn load(&self, checkpoint: &Checkpoint, capacity: Capacity) -> Result<Box<dyn Model>, LoadError> {
        match self {
            Self::Cpu { threads } => model::load(checkpoint, Cpu::new(*threads), capacity),
            #[cfg(feature = "cuda")]
            Self::Gpu { gpu, is_invariant, .. } => {
                check_shape(&Plan::read(checkpoint)?.shape)?;
                model::load(checkpoint, Cuda::new(gpu.clone(), *is_invariant), capacity)
            }
        }
    }
}

/// Refuses what the GPU's kernels cannot compute.
#[cfg(feature = "cuda")]
fn check_shape(shape: &Shape) -> Result<(), LoadError> {
    let unsupported = |what: String| Err(LoadError::Unsupported(format!("{what}; node.device = \"cpu\" serves it")));
    if shape.heads.dim > HEAD_MAX {
        return unsupported(format!(
            "heads of {} values are wider than the {HEAD_MAX} of the GPU's attention",
            shape.heads.dim
        ));
    }
    let widths = [shape.width, shape.gate_width, shape.heads.query_width()];
    match widths.into_iter().find(|width| !width.is_multiple_of(INPUTS_MULTIPLE)) {
        Some(width) => unsupported(format!(
            "a matrix with {width} inputs does not divide into the {INPUTS_MULTIPLE} that the GPU multiplies at once"
        )),
        None => Ok(()),
    }
}
