//! A first look at every file: its size and content hash, whether text files are text, and whether `.json` files that
//! nobody named hold documents.
//!
//! The hash is what tells a restart that a source changed. Files whose size and modification time are as recorded
//! are taken as unchanged without reading them.

use super::{Compression, Content, FileKind, MAX_DOCUMENT_BYTES, OpenFile, SourceFile, open_decoded};
use crate::error::{DataError, IoContext, Result};
use crate::progress::{Progress, stoppable};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::UNIX_EPOCH;
use xxhash_rust::xxh3::Xxh3Default;

/// A file and what was found in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScannedFile {
    /// The file.
    #[serde(flatten)]
    pub file: SourceFile,
    /// Bytes on disk.
    pub size_bytes: u64,
    /// Modification time, nanoseconds since 1970; a hint that spares rehashing, no part of the fingerprint.
    pub modified_ns: u64,
    /// XXH3 of the bytes, hexadecimal.
    pub xxh3: String,
    /// Why it is left out, where it is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub skipped: Option<String>,
}

/// Scans files in parallel, keeping their order; `content` is what of their columns is a document. `known` are the
/// results of an earlier scan for the same content.
///
/// # Errors
/// A file that cannot be read, or one the user named that is not text; [`DataError::Interrupted`].
pub fn scan(
    files: Vec<SourceFile>,
    content: Content,
    known: &[ScannedFile],
    progress: &dyn Progress,
) -> Result<Vec<ScannedFile>> {
    let known: HashMap<&Path, &ScannedFile> = known.iter().map(|k| (k.file.path.as_path(), k)).collect();
    stoppable(progress, |stop| files.into_par_iter().map(|file| scan_file(file, content, &known, stop)).collect())
}

/// How many files were left out and why the first of them was, if any was.
pub fn describe_skipped(files: &[ScannedFile]) -> Option<String> {
    let mut skipped = files.iter().filter(|f| f.skipped.is_some());
    let first = skipped.next()?;
    let (name, reason) = (first.file.path.display(), first.skipped.as_deref().unwrap_or_default());
    let count = 1 + skipped.count();
    Some(format!("left out {count} of {} files that are not text, such as {name} ({reason})", files.len()))
}

fn scan_file(
    file: SourceFile,
    content: Content,
    known: &HashMap<&Path, &ScannedFile>,
    stop: &AtomicBool,
) -> Result<ScannedFile> {
    let path: PathBuf = file.path.clone();
    let metadata = path.metadata().at("look at", &path)?;
    let size_bytes = metadata.len();
    let modified = metadata.modified().ok().and_then(|m| m.duration_since(UNIX_EPOCH).ok());
    let modified_ns = modified.map_or(0, |d| d.as_nanos() as u64);
    if let Some(&before) = known.get(path.as_path())
        && (before.size_bytes, before.modified_ns) == (size_bytes, modified_ns)
        && before.file == file
    {
        return Ok(before.clone());
    }
    let (hash, mut text) = hash_and_check(&file, stop)?;
    if content == Content::Record && file.kind == FileKind::Text {
        text = Some("plain text holds no conversations, which are read from .jsonl, .parquet and .arrow files".into());
    } else if file.kind == FileKind::Text && file.compression != Compression::None {
        text = check_compressed(&file, stop)?;
    } else if file.may_be_other_json() {
        text = check_lines(&file, content)?;
    }
    if let (Some(reason), true) = (&text, file.explicit) {
        let hint = if content == Content::Record { "" } else { "; a text source must be UTF-8" };
        return Err(DataError::file(&path, format!("{reason}{hint}")));
    }
    Ok(ScannedFile { file, size_bytes, modified_ns, xxh3: crate::files::hex(hash), skipped: text })
}

/// The hash of the bytes, and why they are no text where they are not.
fn hash_and_check(file: &SourceFile, stop: &AtomicBool) -> Result<(u64, Option<String>)> {
    let mut input = File::open(&file.path).at("open", &file.path)?;
    let (mut hasher, mut check) = (Xxh3Default::new(), TextCheck::default());
    let is_text = file.kind == FileKind::Text && file.compression == Compression::None;
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        go_on(stop)?;
        let count = input.read(&mut buffer).at("read", &file.path)?;
        hasher.update(&buffer[..count]);
        if is_text {
            check.feed(&buffer[..count], count == 0);
        }
        if count == 0 {
            return Ok((hasher.digest(), check.problem));
        }
    }
}

fn go_on(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(DataError::Interrupted) } else { Ok(()) }
}

fn check_compressed(file: &SourceFile, stop: &AtomicBool) -> Result<Option<String>> {
    let mut input = open_decoded(&file.path, file.compression, &Arc::new(AtomicU64::new(0)))?;
    let (mut check, mut buffer) = (TextCheck::default(), vec![0u8; 1 << 18]);
    loop {
        go_on(stop)?;
        let count = input.read(&mut buffer).at("decompress", &file.path)?;
        check.feed(&buffer[..count], count == 0);
        if count == 0 || check.problem.is_some() {
            return Ok(check.problem);
        }
    }
}

/// Why the first line of a `.json` file is no document, where it is none.
fn check_lines(file: &SourceFile, content: Content) -> Result<Option<String>> {
    match OpenFile::open(file, content, MAX_DOCUMENT_BYTES)?.next_document() {
        Err(DataError::File { reason, .. }) => Ok(Some(format!("no JSON lines: {reason}"))),
        Err(DataError::Column { column, .. }) => Ok(Some(format!("no JSON lines with a `{column}`"))),
        Err(other) => Err(other),
        Ok(_) => Ok(None),
    }
}

/// Validates UTF-8 piece by piece; a NUL byte means a binary file.
#[derive(Default)]
struct TextCheck {
    /// The beginning of a character whose end is in the next piece.
    pending: Vec<u8>,
    position: u64,
    problem: Option<String>,
}

impl TextCheck {
    fn feed(&mut self, bytes: &[u8], last: bool) {
        if self.problem.is_some() {
            return;
        }
        let mut joined = std::mem::take(&mut self.pending);
        joined.extend_from_slice(bytes);
        if let Some(at) = joined.iter().position(|&b| b == 0) {
            self.problem = Some(format!("binary: a NUL byte at byte {}", self.position + at as u64));
            return;
        }
        if let Err(error) = std::str::from_utf8(&joined) {
            let valid = error.valid_up_to();
            if error.error_len().is_some() || last {
                self.problem = Some(format!("not UTF-8 at byte {}", self.position + valid as u64));
                return;
            }
            self.pending = joined.split_off(valid);
        }
        self.position += joined.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_told_from_binary_across_pieces() {
        let check = |pieces: &[&[u8]]| {
            let mut check = TextCheck::default();
            pieces.iter().for_each(|piece| check.feed(piece, false));
            check.feed(b"", true);
            check.problem
        };
        assert_eq!(check(&[b"caf\xC3", b"\xA9"]), None);
        assert_eq!(check(&[b"caf\xC3"]), Some("not UTF-8 at byte 3".into()));
        assert_eq!(check(&[b"abc", b"d\xFFe"]), Some("not UTF-8 at byte 4".into()));
        assert_eq!(check(&[b"abc", b"d\0e"]), Some("binary: a NUL byte at byte 4".into()));
    }
}
