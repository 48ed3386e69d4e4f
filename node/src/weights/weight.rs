//! One matrix in GGML's layout: what backends pack, and tests dequantize.
// blocks are read where they lie in the file's bytes
#![allow(unsafe_code)]

use bytes::Bytes;
use candle_core::quantized::{GgmlDType, GgmlType, k_quants};

use super::LoadError;

/// One weight matrix, or a vector of one row, as it stands in the file.
#[derive(Debug, Clone)]
pub struct Weight {
    dtype: GgmlDType,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

macro_rules! to_float {
    ($bytes:expr, $out:expr, $block:ty) => {{
        let bytes: &[u8] = $bytes;
        let count = bytes.len() / size_of::<$block>();
        assert!(bytes.as_ptr().cast::<$block>().is_aligned(), "tensor data is aligned to its blocks");
        // SAFETY: the pointer is aligned, `count` blocks lie within `bytes`, and every bit pattern is a valid block
        let blocks = unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<$block>(), count) };
        <$block>::to_float(blocks, $out)
    }};
}

impl Weight {
    /// A matrix `[rows, cols]` of `bytes` in GGML's layout.
    ///
    /// # Errors
    /// When the shape does not fit the type's blocks or the number of bytes.
    pub fn new(dtype: GgmlDType, rows: usize, cols: usize, bytes: Bytes) -> Result<Self, LoadError> {
        if rows == 0 || cols == 0 {
            return Err(LoadError::Unsupported(format!("a {rows} x {cols} matrix has nothing in it")));
        }
        if !cols.is_multiple_of(dtype.block_size()) {
            return Err(LoadError::Unsupported(format!(
                "a row of {cols} values does not divide into blocks of {dtype:?}"
            )));
        }
        let expected =
            rows.checked_mul(cols / dtype.block_size()).and_then(|blocks| blocks.checked_mul(dtype.type_size()));
        if expected != Some(bytes.len()) {
            return Err(LoadError::Unsupported(format!(
                "a {rows} x {cols} matrix of {dtype:?} does not have {} bytes",
                bytes.len()
            )));
        }
        Ok(Self { dtype, rows, cols, bytes: aligned(bytes) })
    }

    /// Type of the blocks.
    pub fn dtype(&self) -> GgmlDType {
        self.dtype
    }

    /// Outputs, `N`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs, `K`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The blocks of one row.
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        let bytes = self.cols / self.dtype.block_size() * self.dtype.type_size();
        &self.bytes[row * bytes..][..bytes]
    }

    /// One row as f32, `out[K]`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.row_bytes(row);
        match self.dtype {
            GgmlDType::F32 => to_float!(bytes, out, f32),
            GgmlDType::F16 => to_float!(bytes, out, half::f16),
            GgmlDType::BF16 => to_float!(bytes, out, half::bf16),
            GgmlDType::Q4_0 => to_float!(bytes, out, k_quants::BlockQ4_0),
            GgmlDType::Q4_1 => to_float!(bytes, out, k_quants::BlockQ4_1),
            GgmlDType::Q5_0 => to_float!(bytes, out, k_quants::BlockQ5_0),
            GgmlDType::Q5_1 => to_float!(bytes, out, k_quants::BlockQ5_1),
            GgmlDType::Q8_0 => to_float!(bytes, out, k_quants::BlockQ8_0),
            GgmlDType::Q2K => to_float!(bytes, out, k_quants::BlockQ2K),
            GgmlDType::Q3K => to_float!(bytes, out, k_quants::BlockQ3K),
            GgmlDType::Q4K => to_float!(bytes, out, k_quants::BlockQ4K),
            GgmlDType::Q5K => to_float!(bytes, out, k_quants::BlockQ5K),
            GgmlDType::Q6K => to_float!(bytes, out, k_quants::BlockQ6K),
            GgmlDType::Q8_1 | GgmlDType::Q8K => unreachable!("refused when the file was read"),
        }
    }

    /// The whole matrix as f32, `[N, K]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        out.chunks_exact_mut(self.cols).enumerate().for_each(|(row, out)| self.dequantize_row(row, out));
        out
    }
}

/// The same bytes, beginning at a multiple of what the widest blocks need; copied only when they do not.
fn aligned(bytes: Bytes) -> Bytes {
    const ALIGN: usize = align_of::<f32>();
    if bytes.as_ptr().align_offset(ALIGN) == 0 {
        return bytes;
    }
    let mut copy = vec![0; bytes.len() + ALIGN];
    let start = copy.as_ptr().align_offset(ALIGN);
    copy[start..start + bytes.len()].copy_from_slice(&bytes);
    Bytes::from(copy).slice(start..start + bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_of_the_wrong_size_is_refused() {
        assert!(Weight::new(GgmlDType::Q4_1, 2, 32, Bytes::from(vec![0; 40])).is_ok());
        assert!(Weight::new(GgmlDType::Q4_1, 2, 32, Bytes::from(vec![0; 39])).is_err());
        assert!(Weight::new(GgmlDType::Q4_1, 2, 33, Bytes::from(vec![0; 40])).is_err());
        assert!(Weight::new(GgmlDType::F32, usize::MAX, 2, Bytes::new()).is_err());
        assert!(Weight::new(GgmlDType::F32, 4, 0, Bytes::new()).is_err());
    }

    #[test]
    fn bytes_at_an_odd_place_are_read_as_well() {
        let values = [1.5f32, -2.0, 3.25];
        let mut bytes = vec![0];
        values.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        let bytes = Bytes::from(bytes);
        for start in [1, bytes.as_ptr().align_offset(4) + 1] {
            let mut odd = vec![0; start];
            odd.extend_from_slice(&bytes[1..]);
            let weight = Weight::new(GgmlDType::F32, 1, 3, Bytes::from(odd).slice(start..)).unwrap();
            assert_eq!(weight.dequantize(), values);
        }
    }
}
