//! GGUF files (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>). candle reads the head, within bounds that the file's size
//! sets; where tensors lie is checked here.

use std::{collections::HashMap, io::Cursor, path::Path};

use bytes::Bytes;
use candle_core::quantized::gguf_file::{Content, TensorInfo};

use super::{Checkpoint, LoadError, Stored, bytes_of};

/// Reads the head of a file.
pub(super) fn read(path: &Path, bytes: &Bytes) -> Result<Checkpoint, LoadError> {
    let broken = |reason: String| LoadError::Broken { path: path.to_owned(), reason };
    // candle divides by the file's own alignment, which may be zero
    let read = std::panic::catch_unwind(|| Content::read(&mut Cursor::new(&bytes[..])));
    let content = read.map_err(|_| broken("its head cannot be read".to_owned()))?;
    let content = content.map_err(|e| broken(format!("as GGUF: {}", first_line(&e.to_string()))))?;
    let mut tensors = HashMap::with_capacity(content.tensor_infos.len());
    for (name, info) in content.tensor_infos {
        let stored = tensor(&info, content.tensor_data_offset, bytes);
        let stored = stored.map_err(|reason| broken(format!("tensor '{name}' {reason}")))?;
        tensors.insert(name, stored);
    }
    let mut checkpoint = Checkpoint::new(path, content.metadata, tensors);
    checkpoint.has_interleaved_rotary = checkpoint.text("general.architecture") == Some("llama");
    Ok(checkpoint)
}

fn tensor(info: &TensorInfo, data_offset: u64, bytes: &Bytes) -> Result<Stored, &'static str> {
    let dims = info.shape.dims().to_vec();
    let size = bytes_of(info.ggml_dtype, &dims).ok_or("has rows that do not divide into blocks of its type")?;
    let start = data_offset.checked_add(info.offset).and_then(|start| usize::try_from(start).ok());
    let range = start.and_then(|start| Some(start..start.checked_add(size)?)).filter(|range| range.end <= bytes.len());
    let range = range.ok_or("reaches past the end of the file; is it cut off?")?;
    Ok(Stored { dtype: info.ggml_dtype, dims, pieces: vec![bytes.slice(range)] })
}

/// candle appends a backtrace to its messages.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, gguf_file::Value};
    use proptest::prelude::*;

    use super::*;
    use crate::model::tiny;

    #[test]
    fn a_foreign_file_is_an_error_that_names_it() {
        let path = Path::new("m.gguf");
        for bytes in [
            &b""[..],
            b"GGUF",
            b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"PK\x03\x04 not a model",
        ] {
            let error = read(path, &Bytes::copy_from_slice(bytes)).unwrap_err().to_string();
            assert!(error.contains("m.gguf"), "{error}");
        }
    }

    proptest! {
        /// Whatever a cut or spoilt file does, it is an error or a sound checkpoint, and every tensor in it can be read.
        #[test]
        fn cut_and_spoilt_files_never_panic(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), byte: u8) {
            let mut bytes = tiny::file(1, GgmlDType::Q4_1, &[("general.alignment", Value::U32(32))]);
            let path = Path::new("m.gguf");
            let whole = read(path, &Bytes::from(bytes.clone())).unwrap();
            prop_assert!(whole.weight("blk.1.ffn_down.weight").is_ok());
            prop_assert!(read(path, &Bytes::copy_from_slice(&bytes[..cut.index(bytes.len() - 32)])).is_err());
            // the head is where a flipped byte does harm
            let at = at.index(3000);
            bytes[at] = byte;
            if let Ok(spoilt) = read(path, &Bytes::from(bytes)) {
                for name in spoilt.tensors.keys() {
                    let _ = (spoilt.weight(name), spoilt.expert(name, 0, 2));
                }
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut head = b"GGUF\x03\0\0\0".to_vec();
            head.extend(bytes);
            let _ = read(Path::new("m.gguf"), &Bytes::from(head));
        }
    }
}
