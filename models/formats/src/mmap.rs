//! Read-only memory maps. Outside `kernels` this is the one file that may use `unsafe`.
//!
//! Invariant that callers owe: a mapped file is not changed or cut short while it is mapped. Model files, shards of
//! tokens and checkpoints are written under a temporary name, renamed into place and then left alone, so the program
//! itself keeps it. If another program truncates a mapped file, reading past the new end raises SIGBUS, as with any
//! memory map.
#![allow(unsafe_code)]

use crate::FormatError;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

/// A file mapped into memory, read-only. Dereferences to its bytes; sendable and shareable between threads.
#[derive(Debug)]
pub struct Map {
    map: memmap2::Mmap,
    path: PathBuf,
}

impl Map {
    /// Maps the whole of a regular file. An empty file maps to no bytes.
    pub fn open(path: &Path) -> Result<Map, FormatError> {
        let file = File::open(path).map_err(FormatError::io("open", path))?;
        let kind = file.metadata().map_err(FormatError::io("read the size of", path))?;
        if !kind.is_file() {
            return Err(FormatError::not_found(path, "is not a regular file"));
        }
        // SAFETY: the map is read-only and, by the invariant above, the file under it does not change, so the bytes
        // behind the `&[u8]` handed out are immutable for as long as the map lives.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(FormatError::io("map", path))?;
        Ok(Map { map, path: path.to_owned() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the system drop the pages of a range of bytes from this process's memory. Reading them again works and
    /// costs a page fault. It keeps the resident size of a program that streams through a large file small.
    pub fn release(&self, range: Range<usize>) {
        if range.start >= range.end || range.end > self.map.len() {
            return;
        }
        let length = range.end - range.start;
        // SAFETY: MADV_DONTNEED on a shared read-only file map only drops page-table entries; the next read brings the
        // same bytes back from the file, which does not change (invariant above). The range lies inside the map.
        let advised =
            unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, length) };
        // A system that declines the advice keeps the pages, which is merely less thrifty.
        drop(advised);
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_reads_again_after_release_and_refuses_folders() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Map::open(&path).unwrap();
        assert_eq!(map[..], bytes[..]);
        map.release(5..90_000);
        map.release(0..usize::MAX);
        assert_eq!(map[..], bytes[..]);

        std::fs::write(&path, b"").unwrap();
        assert!(Map::open(&folder.path().join("bytes")).unwrap().is_empty());
        assert!(Map::open(folder.path()).is_err());
        let missing = Map::open(&folder.path().join("absent")).unwrap_err().to_string();
        assert!(missing.contains("absent"), "{missing}");
    }
}
