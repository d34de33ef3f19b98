//! What can go wrong in the driver, by what the user does about it.

use std::path::PathBuf;
use tangelo_configs::ConfigError;
use tangelo_core::FailureKind;
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
    /// Rewards left nothing to learn from.
    #[error("{0}")]
    Rewards(String),
    /// A call failed, or the job's processes did not meet.
    #[error("{0}")]
    Control(#[from] tangelo_control::ControlError),
    /// An algorithm refused a batch.
    #[error("{0}")]
    Algorithm(#[from] tangelo_algo::AlgoError),
    /// A batch of the driver's own is not sound.
    #[error("{0}")]
    Batch(#[from] tangelo_core::BatchError),
    /// Too many updates were skipped.
    #[error(
        "step {step}: loss or gradient is not finite, the {skipped}th update skipped (training.max_skipped = {allowed}). \
         Lower optimizer.lr, or start from an earlier checkpoint with checkpoint.load_step"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// Updates skipped so far.
        skipped: u64,
        /// How many may be.
        allowed: u64,
    },
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

impl DriverError {
    /// Who has to act.
    pub fn kind(&self) -> FailureKind {
        match self {
            // What helps is another configuration; the same one would fail again.
            DriverError::Config(_) | DriverError::Diverged { .. } => FailureKind::Config,
            DriverError::Data(_) | DriverError::Row { .. } | DriverError::Prompts(_) => FailureKind::Data,
            DriverError::Reward { .. }
            | DriverError::Rewards(_)
            | DriverError::Algorithm(_)
            | DriverError::Checkpoint(_) => FailureKind::Data,
            DriverError::Control(error) => error.kind(),
            DriverError::Write { .. } | DriverError::Read { .. } => FailureKind::Device,
            DriverError::Batch(_) | DriverError::Internal(_) => FailureKind::Internal,
        }
    }
}

/// Short for a result with [`DriverError`].
pub type Result<T> = std::result::Result<T, DriverError>;
