//! A model as Hugging Face lays it out: a folder with `config.json`, one or several `.safetensors` files, and the tokenizer's files.
//! Here it takes GGUF's names, so that architectures and tokenizers know one vocabulary.

mod config;
mod files;
mod names;
mod shards;
mod tokens;

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use bytes::Bytes;
use candle_core::quantized::GgmlDType;

use self::{
    config::{Config, Family, Translated},
    files::Folder,
    names::Place,
    shards::{Found, Shards},
};
use super::{Checkpoint, LoadError, Stored};

/// Experts of one tensor, by number.
type Experts = BTreeMap<String, BTreeMap<usize, Found>>;

/// Reads the folder at `path`.
pub(super) fn read(path: &Path) -> Result<Checkpoint, LoadError> {
    let folder = Folder::open(path)?;
    let Some(json) = folder.json("config.json")? else {
        return Err(folder.broken("it holds no config.json, so it is no model folder as Hugging Face lays it out"));
    };
    let config = Config::new(folder.path().join("config.json"), &json)?;
    let mut translated = config.translate()?;
    translated.metadata.extend(tokens::metadata(&folder, &json)?);
    let tensors = tensors(&folder, &translated)?;
    Ok(Checkpoint::new(path, translated.metadata, tensors))
}

fn tensors(folder: &Folder, translated: &Translated) -> Result<HashMap<String, Stored>, LoadError> {
    let shards = Shards::open(folder)?;
    let (mut tensors, mut experts) = (HashMap::new(), Experts::new());
    for (name, found) in shards.tensors {
        match names::place(translated.family, &name) {
            Place::Ignored => {}
            Place::Head if translated.is_tied == Some(true) => {}
            Place::Head => drop(tensors.insert("output.weight".to_owned(), stored(folder, &name, translated, found)?)),
            Place::Whole(place) => drop(tensors.insert(place, stored(folder, &name, translated, found)?)),
            Place::Layer(layer, _) | Place::Expert(layer, ..) if layer >= translated.layers => {
                let text = format!("tensor '{name}' stands beside {} layers of config.json", translated.layers);
                return Err(folder.broken(text));
            }
            Place::Layer(layer, part) => {
                drop(tensors.insert(format!("blk.{layer}.{part}"), stored(folder, &name, translated, found)?));
            }
            Place::Expert(layer, expert, part) => {
                experts.entry(format!("blk.{layer}.{part}")).or_default().insert(expert, found);
            }
            Place::Unknown => {
                let text = format!(
                    "{}: tensor '{name}' is none of the architecture '{}'",
                    folder.path().display(),
                    translated.family.architecture()
                );
                return Err(LoadError::Unsupported(text));
            }
        }
    }
    if translated.is_tied == Some(false) && !tensors.contains_key("output.weight") {
        return Err(folder.broken("tensor 'lm_head.weight' is missing, and config.json says it is not the embedding"));
    }
    tensors.extend(translated.tensors.iter().map(|(name, values)| (name.clone(), vector(values))));
    for (place, parts) in experts {
        let stored = stacked(parts).map_err(|reason| folder.broken(format!("the experts of '{place}' {reason}")))?;
        tensors.insert(place, stored);
    }
    Ok(tensors)
}

fn stored(folder: &Folder, name: &str, translated: &Translated, found: Found) -> Result<Stored, LoadError> {
    if found.dims.is_empty() || found.dims.len() > 2 {
        return Err(folder.broken(format!("tensor '{name}' has {} dimensions", found.dims.len())));
    }
    let stored = Stored { dtype: found.dtype, dims: found.dims, pieces: vec![found.bytes] };
    // Gemma's norms multiply by one plus what is stored; GGUF files store the sum
    let is_offset = translated.family == Family::Gemma3 && name.ends_with("norm.weight");
    if !is_offset || stored.dims.len() != 1 {
        return Ok(stored);
    }
    let gains = stored.matrix(1, stored.dims[0], 0)?.dequantize();
    Ok(vector(&gains.iter().map(|gain| gain + 1.0).collect::<Vec<_>>()))
}

fn vector(values: &[f32]) -> Stored {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Stored { dtype: GgmlDType::F32, dims: vec![values.len()], pieces: vec![Bytes::from(bytes)] }
}

/// Matrices of equal type and shape as one tensor `[experts, rows, cols]`.
fn stacked(parts: BTreeMap<usize, Found>) -> Result<Stored, &'static str> {
    let first = parts.values().next().ok_or("are missing")?;
    let (dtype, dims) = (first.dtype, first.dims.clone());
    if dims.len() != 2 {
        return Err("are no matrices");
    }
    if parts.keys().copied().ne(0..parts.len()) {
        return Err("are not numbered from 0 without a gap");
    }
    if parts.values().any(|part| part.dtype != dtype || part.dims != dims) {
        return Err("differ in type or shape");
    }
    let dims = [vec![parts.len()], dims].concat();
    Ok(Stored { dtype, dims, pieces: parts.into_values().map(|part| part.bytes).collect() })
}

#[cfg(test)]
mod tests;
