//! The safetensors container: a length, a JSON header, then the bytes of the tensors.
//!
//! The header is read here rather than by the `safetensors` crate so that a complaint names the tensor, its numbers
//! and the file, so that one tensor of a type this program lacks does not hide the others, and so that a writer can
//! stream: all offsets are known before the first value. The crate checks this module in tests. Format:
//! <https://huggingface.co/docs/safetensors>.

use crate::encoding::Encoding;
use crate::error::{FormatError, Result};
use crate::mmap::Map;
use crate::weights::Stored;
use serde::Deserialize;
use serde_json::{Map as JsonMap, Value, json};
use std::collections::HashMap;
use tangelo_core::{DType, ParamMeta};

/// Bytes of the length in front of the header.
const LENGTH_BYTES: usize = 8;
/// The longest header that the reference implementation reads.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// What a header says of one tensor.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The tensors of a mapped file, which is number `file` of its model.
pub(crate) fn tensors(map: &Map, file: usize) -> Result<HashMap<String, Stored>> {
    let (header, data_start) = header(map)?;
    let data_bytes = map.len() - data_start;
    let mut found = HashMap::new();
    let mut end_of_data = 0;
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let entry = Entry::deserialize(value)
            .map_err(|e| FormatError::damaged(map.path(), format!("the header's entry of tensor {name}: {e}")))?;
        let (start, end) = entry.data_offsets;
        if start > end || end > data_bytes {
            return Err(FormatError::damaged(
                map.path(),
                format!("tensor {name} lies at bytes {start}..{end} of the data, which has {data_bytes} bytes{HINT}"),
            ));
        }
        end_of_data = end_of_data.max(end);
        let stored = Stored {
            file,
            bytes: data_start + start..data_start + end,
            encoding: encoding(&entry.dtype),
            type_name: entry.dtype,
            shape: entry.shape,
            interleaved: None,
        };
        check_length(map, &name, &stored)?;
        found.insert(name, stored);
    }
    if end_of_data != data_bytes {
        let extra = data_bytes - end_of_data;
        return Err(FormatError::damaged(map.path(), format!("{extra} bytes follow the last tensor")));
    }
    Ok(found)
}

const HINT: &str = "; the file was probably cut short: copy or download it again";

/// The header and where the data starts.
fn header(map: &Map) -> Result<(JsonMap<String, Value>, usize)> {
    let damaged = |detail: String| FormatError::damaged(map.path(), detail);
    let length = map
        .first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| damaged(format!("{} bytes is too short for a safetensors file{HINT}", map.len())))?;
    let length = u64::from_le_bytes(*length);
    let length = usize::try_from(length).ok().filter(|&n| n <= MAX_HEADER_BYTES).ok_or_else(|| {
        damaged(format!("its first 8 bytes give a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed"))
    })?;
    let data_start = LENGTH_BYTES + length;
    let text = map.get(LENGTH_BYTES..data_start).ok_or_else(|| {
        damaged(format!("its header should have {length} bytes, the file has {} in all{HINT}", map.len()))
    })?;
    let header = serde_json::from_slice(text).map_err(|e| damaged(format!("its header is not JSON: {e}")))?;
    Ok((header, data_start))
}

fn check_length(map: &Map, name: &str, stored: &Stored) -> Result<()> {
    let Some(encoding) = stored.encoding else { return Ok(()) };
    let values = stored.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    if values.and_then(|n| encoding.bytes_of(n)) == Some(stored.bytes.len()) {
        return Ok(());
    }
    let (bytes, shape) = (stored.bytes.len(), &stored.shape);
    Err(FormatError::damaged(
        map.path(),
        format!("tensor {name} of shape {shape:?} and type {encoding:?} has {bytes} bytes"),
    ))
}

fn encoding(dtype: &str) -> Option<Encoding> {
    [Encoding::F64, Encoding::F32, Encoding::F16, Encoding::BF16].into_iter().find(|e| e.dtype().to_string() == dtype)
}

/// The length and header in front of `tensors` stored one after the other, all of type `dtype`; the length is a
/// multiple of 64 so that values are aligned. With it, where each tensor starts in the file, and the file's length.
pub(crate) fn layout(tensors: &[ParamMeta], dtype: DType) -> (Vec<u8>, Vec<u64>, u64) {
    let mut header = JsonMap::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let (mut starts, mut end) = (Vec::new(), 0);
    for tensor in tensors {
        let start = end;
        end += tensor.num_elements() * dtype.size_bytes();
        starts.push(start as u64);
        header.insert(
            tensor.name.clone(),
            json!({"dtype": dtype.to_string(), "shape": tensor.shape, "data_offsets": [start, end]}),
        );
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize((text.len() + LENGTH_BYTES).next_multiple_of(64) - LENGTH_BYTES, b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    let data_start = bytes.len() as u64;
    for start in &mut starts {
        *start += data_start;
    }
    (bytes, starts, data_start + end as u64)
}
