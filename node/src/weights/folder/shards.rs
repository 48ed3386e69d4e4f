//! Safetensors files (<https://github.com/huggingface/safetensors>): one, or several with an index that says which tensor is where.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
};

use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorInfo},
};
use serde::Deserialize;

use super::files::Folder;
use crate::weights::{LoadError, bytes_of};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Bytes before a file's header: its length.
const LENGTH_BYTES: usize = 8;

/// All tensors of a folder, under their own names.
pub(super) struct Shards {
    pub(super) tensors: HashMap<String, Found>,
}

/// A tensor where it lies.
pub(super) struct Found {
    pub(super) dtype: GgmlDType,
    pub(super) dims: Vec<usize>,
    pub(super) bytes: Bytes,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Shards {
    pub(super) fn open(folder: &Folder) -> Result<Self, LoadError> {
        let mut shards = Self { tensors: HashMap::new() };
        if folder.find(SINGLE)?.is_some() {
            shards.read(folder, SINGLE)?;
            return Ok(shards);
        }
        let Some(text) = folder.text(INDEX)? else { return Err(nothing(folder)) };
        let index: Index =
            serde_json::from_str(&text).map_err(|e| folder.broken(format!("'{INDEX}' is no index of tensors: {e}")))?;
        for file in index.weight_map.values().collect::<BTreeSet<_>>() {
            shards.read(folder, file)?;
        }
        match index.weight_map.iter().find(|(name, _)| !shards.tensors.contains_key(*name)) {
            Some((name, file)) => {
                Err(folder.broken(format!("'{INDEX}' places tensor '{name}' in '{file}', which lacks it")))
            }
            None => Ok(shards),
        }
    }

    fn read(&mut self, folder: &Folder, file: &str) -> Result<(), LoadError> {
        let bytes = folder.map(file)?;
        for (name, tensor) in tensors(&bytes).map_err(|reason| folder.broken(format!("'{file}': {reason}")))? {
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(folder.broken(format!("tensor '{name}' stands in two files, one of them '{file}'")));
            }
        }
        Ok(())
    }
}

fn nothing(folder: &Folder) -> LoadError {
    let has_pickles = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
        .iter()
        .any(|name| folder.find(name).is_ok_and(|found| found.is_some()));
    let more = if has_pickles { "; PyTorch's .bin files can run code and are never read" } else { "" };
    folder.broken(format!("it holds neither {SINGLE} nor {INDEX}{more}"))
}

/// The tensors of one file; those of types that are no weights are left out, so that only a model that needs one is refused.
fn tensors(bytes: &Bytes) -> Result<Vec<(String, Found)>, String> {
    // its arithmetic on the header's numbers may overflow
    let read = std::panic::catch_unwind(|| SafeTensors::read_metadata(bytes));
    let (header, metadata) = match read {
        Ok(Ok(read)) => read,
        Ok(Err(e)) => return Err(format!("{e}; is it cut off?")),
        Err(_) => return Err("its header cannot be read".to_owned()),
    };
    let place = |info: &TensorInfo, dtype: GgmlDType| -> Option<Bytes> {
        let start = (LENGTH_BYTES + header).checked_add(info.data_offsets.0)?;
        let range: Range<usize> = start..start.checked_add(bytes_of(dtype, &info.shape)?)?;
        (range.end <= bytes.len()).then(|| bytes.slice(range))
    };
    let weights = metadata.tensors().into_iter().filter_map(|(name, info)| Some((name, info, dtype(info.dtype)?)));
    let found = weights.map(|(name, info, dtype)| match place(info, dtype) {
        Some(bytes) => Ok((name, Found { dtype, dims: info.shape.clone(), bytes })),
        None => Err(format!("tensor '{name}' has an impossible shape or place")),
    });
    found.collect()
}

fn dtype(dtype: Dtype) -> Option<GgmlDType> {
    match dtype {
        Dtype::F32 => Some(GgmlDType::F32),
        Dtype::F16 => Some(GgmlDType::F16),
        Dtype::BF16 => Some(GgmlDType::BF16),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: usize) -> Bytes {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 1);
        Bytes::from(bytes)
    }

    fn message(bytes: &Bytes) -> String {
        tensors(bytes).err().unwrap_or_else(|| "passed".to_owned())
    }

    #[test]
    fn heads_that_lie_are_refused() {
        let good = r#"{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}"#;
        assert_eq!(tensors(&file(good, 12)).unwrap()[0].1.bytes.len(), 12);
        assert!(message(&file(good, 11)).contains("cut off"));
        assert!(message(&Bytes::from_static(b"\xff\xff\xff\xff\xff\xff\xff\x7fxx")).contains("cut off"));
        let most = usize::MAX;
        for header in [
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,12]}}"#.to_owned(),
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[4,16]}}"#.to_owned(),
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[12,0]}}"#.to_owned(),
            format!(r#"{{"a":{{"dtype":"U8","shape":[{most}],"data_offsets":[0,{most}]}}}}"#),
            "[".repeat(100_000),
        ] {
            assert_ne!(message(&file(&header, 12)), "passed", "{header:.100}");
        }
    }

    proptest! {
        #[test]
        fn cut_and_spoilt_files_never_panic(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte: u8) {
            let whole = file(r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F16","shape":[4],"data_offsets":[24,32]}}"#, 32);
            prop_assert!(tensors(&whole).is_ok());
            prop_assert!(tensors(&whole.slice(..cut.index(whole.len()))).is_err());
            let mut spoilt = whole.to_vec();
            let at = at.index(spoilt.len());
            spoilt[at] = byte;
            let _ = tensors(&Bytes::from(spoilt));
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), length in 0u64..200) {
            let random = [length.to_le_bytes().to_vec(), bytes].concat();
            let _ = tensors(&Bytes::from(random));
        }
    }
}
