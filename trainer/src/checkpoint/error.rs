//! What can go wrong with checkpoints, by what the caller does about it.

use super::StateKind;
use std::io;
use std::path::{Path, PathBuf};
use tangelo_configs::job::OptimizerName;
use thiserror::Error;

/// An error of saving or loading a checkpoint. Everything here is the fault of files, disks or peers: a failed save
/// leaves older checkpoints as they were, so a caller may go on training.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The disk, a quota or a file size limit is full.
    #[error(
        "no space to write {path}: {written} of {needed} bytes fit ({source}); free space, lower \
         checkpoint.keep_latest_k or move job.dump_folder, older checkpoints are untouched"
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes that the whole file needs.
        needed: u64,
        /// Bytes that were written.
        written: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Another failure of the file system.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of a checkpoint is not what was written.
    #[error("{file} is damaged: expected {expected}, found {found}")]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What the manifest says.
        expected: String,
        /// What lies there.
        found: String,
    },
    /// A checkpoint of a later version of the format.
    #[error("{file} has format version {found}; this program reads up to {supported}: use a newer tangelo")]
    Version {
        /// The manifest.
        file: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version known here.
        supported: u32,
    },
    /// The step that was asked for was never saved, or pruned.
    #[error(
        "{folder} holds no checkpoint of step {step}; it holds {present:?}: \
             set checkpoint.load_step to one of these or to -1"
    )]
    NoSuchStep {
        /// The checkpoint folder.
        folder: PathBuf,
        /// What was asked for.
        step: u64,
        /// The steps there are.
        present: Vec<u64>,
    },
    /// There are checkpoints, and every one is damaged.
    #[error(
        "no checkpoint in {folder} is usable: {problems}; \
             restore a file from a backup, or move the folder away to start anew"
    )]
    NoneUsable {
        /// The checkpoint folder.
        folder: PathBuf,
        /// What is wrong with each, newest first.
        problems: String,
    },
    /// A rank's record did not appear in time.
    #[error("step {step}: rank {rank} had not written {path} after {waited_seconds} s; see its log")]
    MissingRank {
        /// The step being saved.
        step: u64,
        /// The first such rank.
        rank: usize,
        /// What was waited for.
        path: PathBuf,
        /// How long.
        waited_seconds: u64,
    },
    /// Another rank said that it could not write its part.
    #[error("step {step}: rank {rank} could not write its part: {message}")]
    PeerFailed {
        /// The step being saved.
        step: u64,
        /// The rank.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// The process is ending, so the save was given up.
    #[error("the save of step {step} was given up because the process is ending")]
    Abandoned {
        /// The step being saved.
        step: u64,
    },
    /// What ranks wrote does not make up whole tensors.
    #[error("step {step}: the boxes saved of {kind} {name:?} do not make up the tensor: {reason}")]
    Cover {
        /// The step being saved.
        step: u64,
        /// Which state.
        kind: StateKind,
        /// The parameter.
        name: String,
        /// Which elements are missing or doubled.
        reason: String,
    },
    /// A tensor is not in the checkpoint.
    #[error("{checkpoint} holds no {kind} of {name:?}")]
    NoSuchTensor {
        /// The checkpoint's folder.
        checkpoint: PathBuf,
        /// Which state.
        kind: StateKind,
        /// The parameter.
        name: String,
    },
    /// Optimizer state is wanted from a checkpoint that has none.
    #[error(
        "{checkpoint} holds weights only (it was written with checkpoint.last_save_model_only), so there is no {kind} \
             to resume from; set checkpoint.initial_load_model_only = true to start from its weights"
    )]
    ModelOnly {
        /// The checkpoint's folder.
        checkpoint: PathBuf,
        /// What was wanted.
        kind: StateKind,
    },
    /// The checkpoint was written with another optimizer.
    #[error(
        "{checkpoint} was written with optimizer.name = \"{found}\", this job has \"{expected}\", which has other \
             states; set optimizer.name = \"{found}\" to go on with them, or start a new run from the weights: another \
             job.dump_folder, checkpoint.initial_load_path = {checkpoint:?} and checkpoint.initial_load_model_only = true"
    )]
    OtherOptimizer {
        /// The checkpoint's folder.
        checkpoint: PathBuf,
        /// What it was written with.
        found: OptimizerName,
        /// The job's.
        expected: OptimizerName,
    },
    /// The checkpoint is of another model.
    #[error("{checkpoint} does not fit this model: {difference}")]
    OtherModel {
        /// The checkpoint's folder.
        checkpoint: PathBuf,
        /// The first difference.
        difference: String,
    },
    /// The saver thread ended by a panic.
    #[error("the checkpoint thread ended unexpectedly; its panic message is in this rank's log")]
    ThreadDied,
}

impl CheckpointError {
    /// An [`CheckpointError::Io`], for `map_err`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
        let path = path.to_path_buf();
        move |source| CheckpointError::Io { action, path, source }
    }

    /// A failed write: [`CheckpointError::NoSpace`] where that is the reason.
    pub(super) fn write(path: &Path, needed: u64, written: u64, source: io::Error) -> CheckpointError {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let path = path.to_path_buf();
        match source.kind() {
            StorageFull | QuotaExceeded | FileTooLarge => CheckpointError::NoSpace { path, needed, written, source },
            _ => CheckpointError::Io { action: "write", path, source },
        }
    }

    /// A [`CheckpointError::Damaged`].
    pub(super) fn damaged(file: &Path, expected: impl Into<String>, found: impl Into<String>) -> CheckpointError {
        CheckpointError::Damaged { file: file.to_path_buf(), expected: expected.into(), found: found.into() }
    }
}
