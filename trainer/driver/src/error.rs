//! What can go wrong in the driver, by what the user does about it.

use std::path::PathBuf;
use tangelo_configs::ConfigError;
use tangelo_data::DataError;
use thiserror::Error;

/// Everything that fails in this crate. The message says where, what was found and what to do.
#[derive(Debug, Error)]
pub enum DriverError {
    /// The job file asks for what cannot be.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// Files of prompts cannot be found or read.
    #[error("{0}")]
    Data(#[from] DataError),
    /// A row of a file is no prompt.
    #[error("{}: row {row}: {reason}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The row in it, from 1.
        row: u64,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The prompts as a whole cannot be used.
    #[error("{0}")]
    Prompts(String),
    /// A part of the reward cannot be used, or failed where `on_error` is `stop`.
    #[error("reward `{part}`: {reason}")]
    Reward {
        /// The part's name.
        part: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A call failed, or the job's processes did not meet.
    #[error("{0}")]
    Control(#[from] tangelo_control::ControlError),
    /// An algorithm refused a batch.
    #[error("{0}")]
    Algorithm(#[from] tangelo_algo::AlgoError),
    /// A batch of the driver's own is not sound.
    #[error("{0}")]
    Batch(#[from] tangelo_core::BatchError),
    /// A checkpoint cannot be used.
    #[error("{0}")]
    Checkpoint(String),
    /// A file cannot be written.
    #[error("cannot write {}: {source}; make room or mend the folder", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A bug of ours.
    #[error("{0}")]
    Internal(String),
}

/// Short for a result with [`DriverError`].
pub type Result<T> = std::result::Result<T, DriverError>;
