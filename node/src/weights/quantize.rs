//! Weights quantized while they are read, row by row: only what comes out is ever held.
// finished blocks are seen as the bytes that they are
#![allow(unsafe_code)]

use bytes::Bytes;
use candle_core::quantized::{
    GgmlDType, GgmlType,
    k_quants::{BlockQ4_1, BlockQ8_0},
};

use super::{LoadError, Weight};

/// How matrices are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantize {
    /// As they stand on disk.
    #[default]
    None,
    /// 8.5 bits a weight: blocks of 32 with a scale (GGML's `Q8_0`).
    Int8,
    /// 5 bits a weight: blocks of 32 with a scale and a minimum (GGML's `Q4_1`); embedding and head as with `Int8`.
    Int4,
}

impl Quantize {
    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// The type that a tensor has in memory. Vectors, norms and the router of experts stay as they are: they are small, and what they
    /// lose would be felt.
    pub(super) fn target(self, name: &str, dtype: GgmlDType, dims: &[usize]) -> GgmlDType {
        let fits = dims.last().is_some_and(|cols| cols.is_multiple_of(GgmlDType::Q8_0.block_size()));
        match self {
            Self::None => dtype,
            _ if !is_matrix(name, dims) || !fits => dtype,
            Self::Int4 if !matches!(name, "token_embd.weight" | "output.weight") => GgmlDType::Q4_1,
            _ => GgmlDType::Q8_0,
        }
    }
}

/// Whether the tensor is a matrix, or several, that activations are multiplied with.
pub(super) fn is_matrix(name: &str, dims: &[usize]) -> bool {
    dims.len() > 1 && name.ends_with(".weight") && !name.ends_with("ffn_gate_inp.weight")
}

/// The weight in blocks of another type.
pub(super) fn quantized(weight: Weight, target: GgmlDType) -> Result<Weight, LoadError> {
    let bytes = match target {
        dtype if dtype == weight.dtype() => return Ok(weight),
        GgmlDType::Q8_0 => blocks::<BlockQ8_0>(&weight),
        GgmlDType::Q4_1 => blocks::<BlockQ4_1>(&weight),
        other => return Err(LoadError::Unsupported(format!("weights are not quantized to {other:?} here"))),
    };
    Weight::new(target, weight.rows(), weight.cols(), bytes)
}

fn blocks<Block: GgmlType + 'static>(weight: &Weight) -> Bytes {
    let row_blocks = weight.cols() / Block::BLCK_SIZE;
    let mut blocks = vec![Block::zeros(); weight.rows() * row_blocks];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let rows_each = weight.rows().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (part, out) in blocks.chunks_mut((rows_each * row_blocks).max(1)).enumerate() {
            scope.spawn(move || {
                let mut row = vec![0.0; weight.cols()];
                for (i, out) in out.chunks_mut(row_blocks).enumerate() {
                    weight.dequantize_row(part * rows_each + i, &mut row);
                    Block::from_float(&row, out);
                }
            });
        }
    });
    Bytes::from_owner(Blocks(blocks))
}

struct Blocks<Block>(Vec<Block>);

impl<Block> AsRef<[u8]> for Blocks<Block> {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the vector's blocks are initialized and lie one after another; GGML's blocks are `repr(C)` of halves and bytes without
        // padding, so each of their bytes is initialized
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), size_of_val(self.0.as_slice())) }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, quantized::QTensor};

    use super::*;
    use crate::{model::tiny, weights::Checkpoint};

    fn weight(rows: usize, cols: usize) -> (Weight, Vec<f32>) {
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        (Weight::new(GgmlDType::F32, rows, cols, Bytes::from(bytes)).unwrap(), values)
    }

    /// Row by row on several threads gives what candle gives for the whole.
    #[test]
    fn the_blocks_are_those_of_the_whole_matrix() {
        for rows in [1, 2, 7, 33] {
            let (dense, values) = weight(rows, 64);
            let tensor = Tensor::from_vec(values, (rows, 64), &Device::Cpu).unwrap();
            for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_1] {
                let expected = QTensor::quantize(&tensor, dtype).unwrap();
                let expected =
                    expected.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let ours = quantized(dense.clone(), dtype).unwrap();
                assert_eq!((ours.dtype(), ours.dequantize()), (dtype, expected));
            }
        }
    }

    #[test]
    fn matrices_are_quantized_and_nothing_else() {
        let dense = tiny::llama(3, GgmlDType::F16);
        let stored = dense.sizes();
        assert_eq!(stored.stored, stored.loaded);
        let dtypes = |checkpoint: &Checkpoint| {
            ["token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_norm.weight"]
                .map(|name| checkpoint.weight(name).unwrap().dtype())
        };
        let int8 = dense.quantized(Quantize::Int8).unwrap();
        assert_eq!(dtypes(&int8), [GgmlDType::Q8_0, GgmlDType::Q8_0, GgmlDType::F32]);
        let int4 = tiny::llama(3, GgmlDType::F16).quantized(Quantize::Int4).unwrap();
        assert_eq!(dtypes(&int4), [GgmlDType::Q8_0, GgmlDType::Q4_1, GgmlDType::F32]);
        assert!(int4.sizes().loaded < int8.sizes().loaded && int8.sizes().loaded < stored.loaded);
    }

    #[test]
    fn what_is_quantized_already_is_refused() {
        let error = tiny::llama(3, GgmlDType::Q4_1).quantized(Quantize::Int8).unwrap_err().to_string();
        assert!(error.contains("node.quantize") && error.contains("Q4_1"), "{error}");
        assert!(tiny::llama(3, GgmlDType::Q4_1).quantized(Quantize::None).is_ok());
    }
}
