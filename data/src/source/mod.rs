//! Text in files: which files a source names, what kind each is, and its documents one after the other.
//!
//! Invariants: the order of files is the order the user wrote them in, globs and folders sorted by path; the order
//! of documents is the order in the file; a reader holds at most one document (of JSON lines: one line, of bounded length) and one block of its file. A document
//! longer than [`MAX_DOCUMENT_BYTES`] becomes several, cut at line borders, so that memory stays bounded.
//! Deliberately absent: remote file systems, and cleaning of text.

mod columnar;
mod discover;
mod lines;
mod record;
mod scan;
mod text;

pub use discover::{Compression, FileKind, SourceFile, discover};
pub use scan::{ScannedFile, describe_skipped, scan};

use crate::error::{DataError, IoContext, Result};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A document longer than this is cut at line borders (or, without one, at a character) into several.
pub const MAX_DOCUMENT_BYTES: usize = 16 << 20;

/// What a document of a file with columns or keys is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// The text of one column.
    Column(&'a str),
    /// The whole row, as one JSON object.
    Record,
}

/// The documents of one file, in order.
pub trait Documents: Send {
    /// The next document, or nothing at the end. Empty documents are handed out too: the caller counts and skips them.
    fn next_document(&mut self) -> Result<Option<String>>;

    /// The line or row of the last document, from 1; 0 in files without any.
    fn place(&self) -> u64 {
        0
    }
}

/// A file being read, and how far.
pub struct OpenFile {
    documents: Box<dyn Documents>,
    /// Pieces of a cut document that were not handed out yet.
    pieces: VecDeque<String>,
    progress: Arc<AtomicU64>,
    max_document_bytes: usize,
}

impl OpenFile {
    /// Opens `file`; `content` says what of its columns is a document. A [`Content::Record`] is never cut.
    ///
    /// # Errors
    /// A file that cannot be read as what its name says, or that has no rows where rows are asked for.
    pub fn open(file: &SourceFile, content: Content, max_document_bytes: usize) -> Result<OpenFile> {
        let max_document_bytes = if content == Content::Record { usize::MAX } else { max_document_bytes };
        let progress = Arc::new(AtomicU64::new(0));
        let documents: Box<dyn Documents> = match file.kind {
            FileKind::Text if content == Content::Record => {
                let reason = "is plain text; conversations are read from .jsonl(.gz|.zst), .parquet and .arrow files";
                return Err(DataError::file(&file.path, reason));
            }
            FileKind::Text => {
                let input = open_decoded(&file.path, file.compression, &progress)?;
                Box::new(text::TextDocuments::new(&file.path, input, max_document_bytes))
            }
            FileKind::JsonLines => {
                let input = open_decoded(&file.path, file.compression, &progress)?;
                Box::new(lines::JsonLines::new(&file.path, input, content))
            }
            FileKind::Parquet => Box::new(columnar::parquet(&file.path, content, &progress)?),
            FileKind::Arrow => Box::new(columnar::arrow(&file.path, content, &progress)?),
        };
        Ok(OpenFile { documents, pieces: VecDeque::new(), progress, max_document_bytes })
    }

    /// The next document, never longer than the limit.
    pub fn next_document(&mut self) -> Result<Option<String>> {
        if let Some(piece) = self.pieces.pop_front() {
            return Ok(Some(piece));
        }
        let Some(document) = self.documents.next_document()? else { return Ok(None) };
        if document.len() <= self.max_document_bytes {
            return Ok(Some(document));
        }
        self.pieces.extend(text::cut(&document, self.max_document_bytes).map(str::to_string));
        Ok(self.pieces.pop_front())
    }

    /// The line or row of the last document, from 1; 0 in files of plain text.
    pub fn place(&self) -> u64 {
        self.documents.place()
    }

    /// Bytes of the file (as it lies on disk) that were read so far.
    pub fn bytes_read(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }
}

/// Opens a file for reading through its decompressor; `progress` follows the position on disk.
fn open_decoded(path: &Path, compression: Compression, progress: &Arc<AtomicU64>) -> Result<Box<dyn Read + Send>> {
    let file = Counted { inner: File::open(path).at("open", path)?, count: progress.clone() };
    Ok(match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(1 << 18, file))),
        Compression::Zstd => Box::new(zstd::Decoder::new(file).at("decompress", path)?),
    })
}

/// Counts the bytes that pass.
struct Counted<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
