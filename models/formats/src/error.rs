//! What can go wrong with a file, by what the caller does about it.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

/// A failure to read or write a model or a tokenizer. Each names the file, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "write", ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No model or tokenizer is there.
    #[error("{}: {detail}", path.display())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
        /// What was looked for.
        detail: String,
    },
    /// The file does not follow its format: cut short, overwritten, or not of the format at all.
    #[error("{} is damaged or not what its name says: {detail}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        detail: String,
    },
    /// The file is sound but holds something this program cannot use.
    #[error("{}: {detail}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What was found, what is supported and what to do.
        detail: String,
    },
    /// The tensors of a model are not those its configuration asks for.
    #[error("{}: tensors do not match the model's configuration:\n  {}", path.display(), problems.join("\n  "))]
    Mismatch {
        /// The model.
        path: PathBuf,
        /// One line per tensor.
        problems: Vec<String>,
    },
    /// A caller asked for a tensor or rows that a model does not have, or brought the wrong amount of values.
    #[error("tensor {name}: {detail}")]
    Request {
        /// The tensor asked for.
        name: String,
        /// What was asked for and what there is.
        detail: String,
    },
    /// The place to write to is taken.
    #[error("{} already exists and {detail}; choose another path or remove it", path.display())]
    Occupied {
        /// The place.
        path: PathBuf,
        /// What is in the way.
        detail: String,
    },
    /// A chat template cannot be compiled, is not there, or refuses a conversation.
    #[error("{0}")]
    Template(String),
    /// Whoever supplies values to a writer failed.
    #[error("tensor {name}: {source}")]
    Supplier {
        /// The tensor being written.
        name: String,
        /// The supplier's reason.
        source: BoxError,
    },
}

/// The error of a callback.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

pub(crate) type Result<T> = std::result::Result<T, FormatError>;

impl FormatError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FormatError {
        let path = path.to_owned();
        move |source| FormatError::Io { action, path, source }
    }

    pub(crate) fn not_found(path: &Path, detail: impl Display) -> FormatError {
        FormatError::NotFound { path: path.to_owned(), detail: detail.to_string() }
    }

    pub(crate) fn damaged(path: &Path, detail: impl Display) -> FormatError {
        FormatError::Damaged { path: path.to_owned(), detail: detail.to_string() }
    }

    pub(crate) fn unsupported(path: &Path, detail: impl Display) -> FormatError {
        FormatError::Unsupported { path: path.to_owned(), detail: detail.to_string() }
    }

    pub(crate) fn request(name: &str, detail: impl Display) -> FormatError {
        FormatError::Request { name: name.to_owned(), detail: detail.to_string() }
    }
}
