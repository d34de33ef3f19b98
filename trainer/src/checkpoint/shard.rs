//! One rank's safetensors file: written and hashed in one pass, read back by position.
//!
//! The data section is the snapshot's arena as it lies in memory, so nothing is copied a second time. Keys carry the
//! box, `param/model.norm.weight[0:576]`, so that a file explains itself to any safetensors reader.

use super::CheckpointError;
use super::StateKind;
use super::manifest::{FileRecord, Ranges, RankEntry};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

const _: () = assert!(cfg!(target_endian = "little"), "safetensors are little-endian, and so is the arena");

/// Bytes written or hashed at a time: in between, a save can be given up.
const CHUNK_BYTES: usize = 4 << 20;
/// Longest header that safetensors' readers accept.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A rank's file name.
pub(super) fn file_name(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// A tensor's key in the file.
pub(super) fn key(kind: StateKind, name: &str, ranges: &Ranges) -> String {
    let ranges: Vec<String> = ranges.iter().map(|[start, end]| format!("{start}:{end}")).collect();
    format!("{kind}/{name}[{}]", ranges.join(","))
}

/// xxh3-128 in hexadecimal.
pub(super) fn checksum(bytes: &[u8]) -> String {
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(bytes))
}

/// The length and the JSON of the header, padded so that the data start at a multiple of 8.
fn header(step: u64, rank: usize, entries: &[RankEntry]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let mut offset = 0;
    let tensors = entries.iter().map(|entry| {
        let shape: Vec<usize> = entry.ranges.iter().map(|[start, end]| end - start).collect();
        let end = offset + shape.iter().product::<usize>() * size_of::<f32>();
        let info = TensorInfo { dtype: Dtype::F32, shape, data_offsets: (offset, end) };
        offset = end;
        (key(entry.kind, &entry.name, &entry.ranges), info)
    });
    let about =
        [("format", super::manifest::FORMAT.to_owned()), ("step", step.to_string()), ("rank", rank.to_string())];
    let about: HashMap<String, String> = about.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    let tensors: Vec<(String, TensorInfo)> = tensors.collect();
    let mut json = sorted(serde_json::to_value(Metadata::new(Some(about), tensors)?)?)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

/// JSON with the free-form metadata in order of its keys, so that equal state gives equal files.
fn sorted(mut header: serde_json::Value) -> Result<Vec<u8>, serde_json::Error> {
    if let Some(about) = header.get_mut("__metadata__") {
        let ordered: std::collections::BTreeMap<String, String> = serde_json::from_value(about.take())?;
        *about = serde_json::to_value(ordered)?;
    }
    serde_json::to_vec(&header)
}

/// Writes a rank's file at `path`, fsynced. `proceed(bytes written so far)` is asked before each chunk; its error ends
/// the writing.
pub(super) fn write(
    path: &Path,
    (step, rank): (u64, usize),
    entries: &[RankEntry],
    data: &[f32],
    mut proceed: impl FnMut(u64) -> Result<(), CheckpointError>,
) -> Result<FileRecord, CheckpointError> {
    let header = header(step, rank, entries).map_err(|error| CheckpointError::Io {
        action: "describe",
        path: path.to_path_buf(),
        source: std::io::Error::other(error),
    })?;
    let data: &[u8] = bytemuck::cast_slice(data);
    let size_bytes = (header.len() + data.len()) as u64;
    let mut file = File::create_new(path).map_err(|error| CheckpointError::write(path, size_bytes, 0, error))?;
    let (mut hash, mut written) = (Xxh3::new(), 0u64);
    for chunk in std::iter::once(header.as_slice()).chain(data.chunks(CHUNK_BYTES)) {
        proceed(written)?;
        hash.update(chunk);
        file.write_all(chunk).map_err(|error| CheckpointError::write(path, size_bytes, written, error))?;
        written += chunk.len() as u64;
    }
    file.sync_all().map_err(|error| CheckpointError::write(path, size_bytes, written, error))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(FileRecord { name, size_bytes, xxh3_128: format!("{:032x}", hash.digest128()) })
}

/// The size of the file at `path`, which the checkpoint says is `expected`.
pub(super) fn check_size(path: &Path, expected: u64) -> Result<(), CheckpointError> {
    match std::fs::metadata(path) {
        Ok(about) if about.len() == expected => Ok(()),
        Ok(about) => Err(CheckpointError::damaged(path, format!("{expected} bytes"), format!("{} bytes", about.len()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(CheckpointError::damaged(path, format!("a file of {expected} bytes"), "no file"))
        }
        Err(error) => Err(CheckpointError::io("look at", path)(error)),
    }
}

/// Reads the whole file at `path` and compares its checksum with `record`'s.
pub(super) fn check_bytes(path: &Path, record: &FileRecord) -> Result<(), CheckpointError> {
    let fail = |error| CheckpointError::io("read", path)(error);
    let mut file = File::open(path).map_err(fail)?;
    let mut buffer = vec![0u8; 1 << 20];
    let mut hash = Xxh3::new();
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => hash.update(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(fail(error)),
        }
    }
    let found = format!("{:032x}", hash.digest128());
    if found != record.xxh3_128 {
        return Err(CheckpointError::damaged(path, format!("xxh3-128 {}", record.xxh3_128), found));
    }
    Ok(())
}

/// Where each key's data lie in the file at `path`: the first byte, and the shape.
pub(super) fn read_header(path: &Path, file: &File) -> Result<HashMap<String, (u64, Vec<usize>)>, CheckpointError> {
    use std::os::unix::fs::FileExt;
    let damaged = |found: String| CheckpointError::damaged(path, "a safetensors file", found);
    let mut length = [0u8; 8];
    file.read_exact_at(&mut length, 0).map_err(|error| damaged(error.to_string()))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(damaged(format!("a header of {length} bytes")));
    }
    let mut json = vec![0u8; length as usize];
    file.read_exact_at(&mut json, 8).map_err(|error| damaged(error.to_string()))?;
    let about: Metadata = serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
    let mut places = HashMap::new();
    for (key, info) in about.tensors() {
        if info.dtype != Dtype::F32 {
            return Err(damaged(format!("{key} of type {:?}, not F32", info.dtype)));
        }
        places.insert(key, (8 + length + info.data_offsets.0 as u64, info.shape.clone()));
    }
    Ok(places)
}
