//! What ends a command, and with which exit code.

use std::path::PathBuf;
use tangelo_configs::ConfigError;
use tangelo_data::DataError;
use tangelo_observe::FailureKind;
use thiserror::Error;

/// Why a command failed.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The command line, or the environment beside it, makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Data could not be prepared or read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A model, run or prepared folder is not what it should be.
    #[error("{0}")]
    Input(String),
    /// A file or folder of ours cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `tangelo-worker` is not where it should be.
    #[error(
        "cannot find tangelo-worker, which does everything that needs tensors; looked at {}. \
         It is built beside tangelo by `cargo build --release` in the repository (`cargo xtask quickstart` on a fresh \
         machine); keep the two binaries in one folder",
        .0.display()
    )]
    NoWorker(PathBuf),
    /// A process could not be started.
    #[error("cannot {action} rank {rank}: {source}")]
    Start {
        /// Which rank.
        rank: usize,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Ranks failed; the message names the first.
    #[error("{message}")]
    Ranks {
        /// What kind of failure the first was.
        kind: FailureKind,
        /// The report.
        message: String,
    },
    /// The driver of a reinforcement-learning job failed.
    #[error(transparent)]
    Driver(#[from] tangelo_driver::DriverError),
    /// A signal ended the run before its last step.
    #[error("{message}")]
    Interrupted {
        /// Which.
        signal: i32,
        /// Where it stopped.
        message: String,
    },
    /// Anything else: a bug, or a machine that lacks something basic.
    #[error("{0}")]
    Internal(String),
}

impl LaunchError {
    /// The exit code of `tangelo`: 1 internal, 2 configuration, 3 data, 4 device, 5 peer; 128 plus the signal for a run
    /// that a signal ended early, as shells do.
    pub fn exit_code(&self) -> u8 {
        match self {
            LaunchError::Interrupted { signal, .. } => 128 + *signal as u8,
            other => other.kind().exit_code(),
        }
    }

    /// Who has to act.
    pub fn kind(&self) -> FailureKind {
        match self {
            LaunchError::Config(_) | LaunchError::Usage(_) => FailureKind::Config,
            LaunchError::Data(_) | LaunchError::Input(_) => FailureKind::Data,
            LaunchError::Ranks { kind, .. } => *kind,
            LaunchError::Driver(error) => error.kind(),
            _ => FailureKind::Internal,
        }
    }

    /// A failure with a file.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> LaunchError {
        let path = path.into();
        move |source| LaunchError::Io { action, path, source }
    }
}
