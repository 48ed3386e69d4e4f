//! A model on disk, memory-mapped and never trusted. What leaves this module has been checked against the files' sizes.
//!
//! Whatever form a model has on disk, it is seen under one vocabulary of names: GGUF's metadata keys and tensor names
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, and llama.cpp's `gguf-py/gguf/constants.py` for the architectures).

mod folder;
mod gguf;
mod map;
mod quantize;
mod weight;

use std::{
    collections::HashMap,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use candle_core::quantized::{GgmlDType, gguf_file::Value};

pub use quantize::Quantize;
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
    quantize: Quantize,
}

/// Bytes of all weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// On disk.
    pub stored: usize,
    /// In memory, with what [`Checkpoint::quantized`] was told.
    pub loaded: usize,
}

/// What a model's makers recommend to sample with, as far as they do.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Recommended {
    /// `temperature`
    pub temperature: Option<f32>,
    /// `top_p`
    pub top_p: Option<f32>,
    /// `top_k`
    pub top_k: Option<usize>,
    /// `min_p`
    pub min_p: Option<f32>,
    /// `repetition_penalty`
    pub repetition_penalty: Option<f32>,
}

/// A tensor as it stands on disk; its bytes have the size that type and dimensions ask for.
#[derive(Debug)]
struct Stored {
    dtype: GgmlDType,
    /// Outermost first.
    dims: Vec<usize>,
    /// All of it, or one for each step of the first dimension.
    pieces: Vec<Bytes>,
}

impl Stored {
    /// The bytes of matrix `i` of those that the tensor holds.
    fn matrix(&self, rows: usize, cols: usize, i: usize) -> Result<Weight, LoadError> {
        let size = bytes_of(self.dtype, &[rows, cols]).unwrap_or_default();
        let bytes = match self.pieces.as_slice() {
            [one] => one.slice(i * size..(i + 1) * size),
            pieces => pieces[i].clone(),
        };
        Weight::new(self.dtype, rows, cols, bytes)
    }
}

impl Checkpoint {
    fn new(path: &Path, metadata: HashMap<String, Value>, tensors: HashMap<String, Stored>) -> Self {
        Self { path: path.to_owned(), metadata, tensors, has_interleaved_rotary: false, quantize: Quantize::None }
    }

    /// Maps the model at `path`, a GGUF file or a folder as Hugging Face lays it out, and reads its head.
    ///
    /// # Errors
    /// When it cannot be read or is not sound.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_dir() {
            return folder::read(path);
        }
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let reason =
                "one safetensors file lacks configuration and tokenizer; name the folder that it lies in".to_owned();
            return Err(LoadError::Broken { path: path.to_owned(), reason });
        }
        Self::from_bytes(path, map::file(path)?)
    }

    /// Reads a GGUF file that is in memory; `path` is its name in errors.
    ///
    /// # Errors
    /// When it is not sound.
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self, LoadError> {
        gguf::read(path, &bytes)
    }

    /// The same, with matrices quantized as they are read.
    ///
    /// # Errors
    /// When they are quantized already.
    pub fn quantized(mut self, quantize: Quantize) -> Result<Self, LoadError> {
        let is_dense = |stored: &Stored| stored.dtype.block_size() == 1;
        let found =
            self.tensors.iter().find(|(name, stored)| quantize::is_matrix(name, &stored.dims) && !is_dense(stored));
        if let (Some((name, stored)), true) = (found, quantize != Quantize::None) {
            return Err(LoadError::Config(format!(
                "node.quantize is \"{}\", and {} is quantized already ('{name}' is {:?}): leave node.quantize out, or name a model \
                 in F32, F16 or BF16",
                quantize.name(),
                self.path.display(),
                stored.dtype
            )));
        }
        self.quantize = quantize;
        Ok(self)
    }

    /// What all weights take.
    pub fn sizes(&self) -> Sizes {
        let size = |dtype: GgmlDType, stored: &Stored| bytes_of(dtype, &stored.dims).unwrap_or_default();
        let stored = self.tensors.values().map(|stored| size(stored.dtype, stored)).sum();
        let target = |name: &str, stored: &Stored| self.quantize.target(name, stored.dtype, &stored.dims);
        Sizes { stored, loaded: self.tensors.iter().map(|(name, stored)| size(target(name, stored), stored)).sum() }
    }

    /// What the model's makers recommend to sample with.
    pub fn recommended(&self) -> Recommended {
        let real = |key: &str| self.real(&format!("general.sampling.{key}")).filter(|x| x.is_finite() && *x >= 0.0);
        let top_k = self.number("general.sampling.top_k").or(real("top_k").map(|k| k as usize));
        Recommended {
            temperature: real("temp").filter(|t| *t <= 2.0),
            top_p: real("top_p").filter(|p| *p <= 1.0),
            top_k,
            min_p: real("min_p").filter(|p| *p <= 1.0),
            repetition_penalty: real("penalty_repeat").filter(|x| (0.01..=100.0).contains(x)),
        }
    }

    /// A matrix, or a vector as one row.
    ///
    /// # Errors
    /// When it is missing, of a type that is not for weights, or has more than two dimensions.
    pub fn weight(&self, name: &str) -> Result<Weight, LoadError> {
        let stored = self.stored(name)?;
        match *stored.dims.as_slice() {
            [cols] => stored.matrix(1, cols, 0),
            [rows, cols] => self.prepared(name, stored, stored.matrix(rows, cols, 0)?),
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
        self.prepared(name, stored, stored.matrix(rows, cols, i)?)
    }

    fn prepared(&self, name: &str, stored: &Stored, weight: Weight) -> Result<Weight, LoadError> {
        quantize::quantized(weight, self.quantize.target(name, stored.dtype, &stored.dims))
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
