//! A model file on disk: GGUF, memory-mapped and never trusted. What leaves this module has been checked against the file's size.
// a memory map is unsafe because another process could cut the file while we read
#![allow(unsafe_code)]

use std::{
    fs::File,
    io::Cursor,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use candle_core::quantized::{
    GgmlDType, GgmlType,
    gguf_file::{Content, Value},
    k_quants,
};
use memmap2::Mmap;

/// Why a model file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not there, or not readable.
    #[error("model file {path} cannot be read: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Not GGUF, or broken.
    #[error("{path} is not a sound GGUF file: {reason}")]
    Broken {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Sound, but asks for what this build cannot do.
    #[error("{0}")]
    Unsupported(String),
    /// The configuration and the model do not fit.
    #[error("{0}")]
    Config(String),
}

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
        if !bytes.as_ptr().cast::<f32>().is_aligned() {
            return Err(LoadError::Unsupported(
                "tensor data does not begin at a multiple of 4 bytes; is general.alignment wrong?".into(),
            ));
        }
        Ok(Self { dtype, rows, cols, bytes })
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

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    content: Content,
    bytes: Bytes,
}

impl Gguf {
    /// Maps a file and reads its head.
    ///
    /// # Errors
    /// When it cannot be read or is not sound.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read only; a file that is cut while it is mapped can end the process, which the store rules out by
        // replacing files whole and never writing into them
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Self::from_bytes(path, Bytes::from_owner(map))
    }

    /// Reads the head of a file that is in memory.
    ///
    /// # Errors
    /// When it is not sound.
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self, LoadError> {
        // candle divides by the file's own alignment, which may be zero
        let read = std::panic::catch_unwind(|| Content::read(&mut Cursor::new(&bytes[..])));
        let panicked = |_| LoadError::Broken { path: path.to_owned(), reason: "its head cannot be read".to_owned() };
        let content = read
            .map_err(panicked)?
            .map_err(|e| LoadError::Broken { path: path.to_owned(), reason: first_line(&e.to_string()) })?;
        Ok(Self { path: path.to_owned(), content, bytes })
    }

    /// A weight by name, checked against the file's size.
    ///
    /// # Errors
    /// When it is missing, of an unknown type, or reaches past the end of the file.
    pub fn weight(&self, name: &str) -> Result<Weight, LoadError> {
        let info =
            self.content.tensor_infos.get(name).ok_or_else(|| self.broken(format!("tensor '{name}' is missing")))?;
        if !crate::kernels::supports(info.ggml_dtype) {
            return Err(LoadError::Unsupported(format!(
                "tensor '{name}' has the type {:?}, which is not for weights",
                info.ggml_dtype
            )));
        }
        let (rows, cols) = match info.shape.dims() {
            [cols] => (1, *cols),
            [rows, cols] => (*rows, *cols),
            dims => return Err(self.broken(format!("tensor '{name}' has {} dimensions", dims.len()))),
        };
        let blocks = rows.checked_mul(cols).map(|n| n / info.ggml_dtype.block_size());
        let size = blocks.and_then(|n| n.checked_mul(info.ggml_dtype.type_size()));
        let start = usize::try_from(self.content.tensor_data_offset.saturating_add(info.offset)).ok();
        let range = start.zip(size).and_then(|(start, size)| Some(start..start.checked_add(size)?));
        match range {
            Some(range) if range.end <= self.bytes.len() => {
                Weight::new(info.ggml_dtype, rows, cols, self.bytes.slice(range))
            }
            _ => Err(self.broken(format!("tensor '{name}' reaches past the end of the file; is it cut off?"))),
        }
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// A raw metadata value.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number of any width that is not negative.
    pub fn number(&self, key: &str) -> Option<usize> {
        whole_number(self.value(key)?)
    }

    /// A whole number that must be there, within `range`.
    ///
    /// # Errors
    /// When it is missing or outside.
    pub fn number_in(&self, key: &str, range: std::ops::RangeInclusive<usize>) -> Result<usize, LoadError> {
        match self.number(key) {
            Some(n) if range.contains(&n) => Ok(n),
            Some(n) => Err(self.broken(format!("'{key}' is {n}, outside {} to {}", range.start(), range.end()))),
            None => Err(self.broken(format!("'{key}' is missing"))),
        }
    }

    /// A real number.
    pub fn real(&self, key: &str) -> Option<f32> {
        match self.value(key)? {
            Value::F32(x) => Some(*x),
            Value::F64(x) => Some(*x as f32),
            _ => None,
        }
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.value(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// When it is missing or holds something else.
    pub fn texts(&self, key: &str) -> Result<Vec<&str>, LoadError> {
        let wrong = || self.broken(format!("'{key}' is missing or not a list of texts"));
        let Some(Value::Array(items)) = self.value(key) else { return Err(wrong()) };
        items.iter().map(|item| if let Value::String(text) = item { Ok(text.as_str()) } else { Err(wrong()) }).collect()
    }

    /// An error about this file.
    pub fn broken(&self, reason: impl Into<String>) -> LoadError {
        LoadError::Broken { path: self.path.clone(), reason: reason.into() }
    }
}

/// A whole number of any width that is not negative.
pub fn whole_number(value: &Value) -> Option<usize> {
    match value {
        Value::U8(n) => Some(usize::from(*n)),
        Value::U16(n) => Some(usize::from(*n)),
        Value::U32(n) => usize::try_from(*n).ok(),
        Value::U64(n) => usize::try_from(*n).ok(),
        Value::I8(n) => usize::try_from(*n).ok(),
        Value::I16(n) => usize::try_from(*n).ok(),
        Value::I32(n) => usize::try_from(*n).ok(),
        Value::I64(n) => usize::try_from(*n).ok(),
        _ => None,
    }
}

/// candle appends a backtrace to its messages.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_or_foreign_file_is_an_error_that_names_it() {
        let path = Path::new("m.gguf");
        for bytes in [
            &b""[..],
            b"GGUF",
            b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"PK\x03\x04 not a model",
        ] {
            let error = Gguf::from_bytes(path, Bytes::copy_from_slice(bytes)).unwrap_err().to_string();
            assert!(error.contains("m.gguf"), "{error}");
        }
    }

    #[test]
    fn a_weight_of_the_wrong_size_is_refused() {
        assert!(Weight::new(GgmlDType::Q4_1, 2, 32, Bytes::from(vec![0; 40])).is_ok());
        assert!(Weight::new(GgmlDType::Q4_1, 2, 32, Bytes::from(vec![0; 39])).is_err());
        assert!(Weight::new(GgmlDType::Q4_1, 2, 33, Bytes::from(vec![0; 40])).is_err());
        assert!(Weight::new(GgmlDType::F32, usize::MAX, 2, Bytes::new()).is_err());
    }
}
