//! Files written so that a reader never sees half of one: temporary name, fsync, rename, fsync of the folder.

use crate::error::{IoContext, Result};
use serde::Serialize;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3Default;

/// Writes `bytes` to `path` whole or not at all, durably.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    let mut file = File::create(&partial).at("create", &partial)?;
    file.write_all(bytes).at("write", &partial)?;
    file.sync_all().at("sync", &partial)?;
    publish(&partial, path)
}

/// Renames a finished, synced file into place and syncs the folder.
pub(crate) fn publish(partial: &Path, path: &Path) -> Result<()> {
    fs::rename(partial, path).at("rename", partial)?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).at("sync", folder)
}

/// Writes a value as indented JSON, atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| crate::DataError::prepared(path, format!("cannot encode: {e}")))?;
    text.push(b'\n');
    write_atomically(path, &text)
}

/// XXH3 of a file's bytes, read in pieces.
pub(crate) fn checksum(path: &Path) -> Result<u64> {
    let mut file = File::open(path).at("open", path)?;
    let (mut hasher, mut buffer) = (Xxh3Default::new(), vec![0u8; 1 << 20]);
    loop {
        let count = file.read(&mut buffer).at("read", path)?;
        if count == 0 {
            return Ok(hasher.digest());
        }
        hasher.update(&buffer[..count]);
    }
}

/// A checksum as it stands in manifests.
pub(crate) fn hex(value: u64) -> String {
    format!("{value:016x}")
}
