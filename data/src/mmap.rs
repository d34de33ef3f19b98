//! The one place of this crate that maps files into memory.
//!
//! Invariant: what is mapped here are finished token shards, which this program only ever replaces by rename or
//! deletes; neither changes the bytes of a file that is still mapped.
#![allow(unsafe_code)]

use crate::error::{IoContext, Result};
use bytes::Bytes;
use memmap2::Mmap;
use std::fs::File;
use std::path::Path;

/// The whole file as shared bytes, read from disk as they are touched.
pub(crate) fn map(path: &Path) -> Result<Bytes> {
    let file = File::open(path).at("open", path)?;
    // SAFETY: the mapping is undefined behaviour only if another process changes or truncates the file meanwhile.
    // Finished shards are never written in place (see the module's invariant); truncating one by hand while it is
    // in use ends the process with SIGBUS, as it does for every program that maps files.
    let mapped = unsafe { Mmap::map(&file) }.at("map", path)?;
    Ok(Bytes::from_owner(mapped))
}
