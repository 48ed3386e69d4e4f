//! A model on disk, memory-mapped and never trusted. What leaves this module has been checked against the files' sizes.
//!
//! Whatever form a model has on disk, it is seen under one vocabulary of names: GGUF's metadata keys and tensor names
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, and llama.cpp's `gguf-py/gguf/constants.py` for the architectures).

mod gguf;
mod map;
mod weight;

use std::{
    collections::HashMap,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use candle_core::quantized::{GgmlDType, gguf_file::Value};

pub use weight::Weight;

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
    /// Of no known form, or broken.
    #[error("{path} is not a sound model file: {reason}")]
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

/// An open model: its metadata, and its tensors where they lie.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Stored>,
    has_interleaved_rotary: bool,
}

/// A tensor as it stands on disk; its bytes have the size that type and dimensions ask for.
#[derive(Debug)]
struct Stored {
    dtype: GgmlDType,
    /// Outermost first.
    dims: Vec<usize>,
    bytes: Bytes,
}

impl Checkpoint {
    /// Maps the model at `path`, a GGUF file, and reads its head.
    ///
    /// # Errors
    /// When it cannot be read or is not sound.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        Self::from_bytes(path, map::file(path)?)
    }

    /// Reads a GGUF file that is in memory; `path` is its name in errors.
    ///
    /// # Errors
    /// When it is not sound.
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self, LoadError> {
        gguf::read(path, &bytes)
    }

    /// A matrix, or a vector as one row.
    ///
    /// # Errors
    /// When it is missing, of a type that is not for weights, or has more than two dimensions.
    pub fn weight(&self, name: &str) -> Result<Weight, LoadError> {
        let stored = self.stored(name)?;
        match *stored.dims.as_slice() {
            [cols] => Weight::new(stored.dtype, 1, cols, stored.bytes.clone()),
            [rows, cols] => Weight::new(stored.dtype, rows, cols, stored.bytes.clone()),
            ref dims => Err(self.broken(format!("tensor '{name}' has {} dimensions", dims.len()))),
        }
    }

    /// Matrix `i` of a tensor `[of, rows, cols]`, such as one expert's weights.
    ///
    /// # Errors
    /// As [`Self::weight`], and when the tensor does not hold `of` matrices.
    pub fn expert(&self, name: &str, i: usize, of: usize) -> Result<Weight, LoadError> {
        let stored = self.stored(name)?;
        let [count, rows, cols] = *stored.dims.as_slice() else {
            return Err(self.broken(format!("tensor '{name}' has {} dimensions, not 3", stored.dims.len())));
        };
        if count != of || i >= of {
            return Err(self.broken(format!("tensor '{name}' holds {count} matrices, not {of}")));
        }
        let size = stored.bytes.len() / count;
        Weight::new(stored.dtype, rows, cols, stored.bytes.slice(i * size..(i + 1) * size))
    }

    fn stored(&self, name: &str) -> Result<&Stored, LoadError> {
        let stored = self.tensors.get(name).ok_or_else(|| self.broken(format!("tensor '{name}' is missing")))?;
        match crate::kernels::supports(stored.dtype) {
            true => Ok(stored),
            false => Err(LoadError::Unsupported(format!(
                "tensor '{name}' has the type {:?}, which is not for weights",
                stored.dtype
            ))),
        }
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's dimensions, outermost first: `[rows, cols]` of a matrix.
    pub fn dims(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|stored| stored.dims.as_slice())
    }

    /// Whether the rows of query and key matrices stand in interleaved rotary order (pairs `2i, 2i + 1`) rather than in halves
    /// (`i, i + D/2`): llama.cpp's converter reorders them for the architecture `llama`, and for no other.
    pub fn has_interleaved_rotary(&self) -> bool {
        self.has_interleaved_rotary
    }

    /// A raw metadata value.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
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
    pub fn number_in(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize, LoadError> {
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

    /// An error about this model.
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

/// Bytes of a tensor; None when its rows do not divide into blocks, or the number does not exist.
fn bytes_of(dtype: GgmlDType, dims: &[usize]) -> Option<usize> {
    let (cols, outer) = dims.split_last()?;
    if !cols.is_multiple_of(dtype.block_size()) {
        return None;
    }
    let row = (cols / dtype.block_size()).checked_mul(dtype.type_size())?;
    outer.iter().try_fold(row, |size, n| size.checked_mul(*n))
}
