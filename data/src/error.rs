//! What can go wrong with data, by what the user does about it.

use crate::source::{FileKind, SourceFile};
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Everything that fails in this crate. The message names the file, what was found and what to do.
#[derive(Debug, Error)]
pub enum DataError {
    /// Reading or writing failed.
    #[error("could not {action} {}: {error}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The disk is full. What was finished before is kept and used by the next run.
    #[error(
        "no space left for token shards in {}: about {needed_bytes} more bytes are needed. Finished shards are kept: \
         free some space (or set data.prepared_folder to another disk) and run the same command again",
        folder.display()
    )]
    DiskFull {
        /// The prepared folder.
        folder: PathBuf,
        /// Estimate of what the rest takes.
        needed_bytes: u64,
    },
    /// A path or glob of a source names nothing.
    #[error("source `{pattern}`: {reason}")]
    Source {
        /// What the user wrote.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file has no column of that name.
    #[error("{}: no text column `{column}`; columns there are: {found}. Set text_column to one of them", path.display())]
    Column {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        column: String,
        /// What there is.
        found: String,
    },
    /// A source file cannot be read as what it is.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer cannot be loaded, or lacks what is needed, or failed.
    #[error("tokenizer {}: {reason}", path.display())]
    Tokenizer {
        /// Where it lies.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A prepared folder was made from something else.
    #[error(
        "{} was prepared with another {what}: {detail}. Use another folder, or delete this one (or prepare with \
         overwrite) to make it again",
        folder.display()
    )]
    Mismatch {
        /// The prepared folder.
        folder: PathBuf,
        /// `sources`, `tokenizer` or `options`.
        what: &'static str,
        /// What differs.
        detail: String,
    },
    /// A prepared folder is incomplete or damaged.
    #[error("{}: {reason}", path.display())]
    Prepared {
        /// The folder or the file in it.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// [`Progress::cancelled`](crate::Progress::cancelled) said so.
    #[error(
        "the preparation of data was interrupted; finished shards are kept, and the same command goes on from there"
    )]
    Interrupted,
    /// The options contradict each other or the data.
    #[error("{0}")]
    Options(String),
    /// A worker thread ended without an answer: a bug of ours.
    #[error("{0}")]
    Internal(String),
}

/// Short for a result with [`DataError`].
pub type Result<T> = std::result::Result<T, DataError>;

/// Names the action and the file that an I/O error belongs to.
pub(crate) trait IoContext<T> {
    /// Turns the error into [`DataError::Io`].
    fn at(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|error| DataError::Io { action, path: path.to_path_buf(), error })
    }
}

impl DataError {
    /// A source file that cannot be read as what it is.
    pub(crate) fn file(path: &Path, reason: impl std::fmt::Display) -> DataError {
        DataError::File { path: path.to_path_buf(), reason: reason.to_string() }
    }

    /// A line or row of a source file that cannot be used.
    pub(crate) fn row(file: &SourceFile, place: u64, reason: impl std::fmt::Display) -> DataError {
        let unit = if file.kind == FileKind::JsonLines { "line" } else { "row" };
        DataError::file(&file.path, format!("{unit} {place}: {reason}"))
    }

    /// A damaged prepared folder.
    pub(crate) fn prepared(path: &Path, reason: impl std::fmt::Display) -> DataError {
        DataError::Prepared { path: path.to_path_buf(), reason: reason.to_string() }
    }

    /// Whether the disk was full.
    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self, DataError::Io { error, .. } if error.kind() == io::ErrorKind::StorageFull)
    }
}
