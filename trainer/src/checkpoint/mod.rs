//! Checkpoints: sharded safetensors, and a manifest that is written last.
//!
//! ```text
//! step ends --copy--> Snapshot --channel of one--> saver thread ------------------------------> files
//!  (device thread)    (host memory)               rank-NNNNN.safetensors, rank-NNNNN.json
//!                                                 rank 0 only: waits for every rank's json, checks that boxes
//!                                                 cover the tensors, manifest.json, fsync, rename, prune
//! ```
//!
//! | who | consumes | waits for | unblocked by | bounded by |
//! |---|---|---|---|---|
//! | the training step | - | the copy into a [`Snapshot`]; the earlier save | saver thread | one save in flight |
//! | the update, after [`Saver::save_lazily`] | - | that copy, made by the saver thread | saver thread | memory |
//! | saver thread | one snapshot | the disk; on rank 0 the other ranks' records | files appearing | `rank_deadline` |
//!
//! Invariants (tests cite them by number):
//! 1. A folder named `step-NNNNNNNN` is complete: all its files were fsynced before it got that name.
//! 2. Files of two attempts never meet: an unfinished folder carries the attempt's id in its name.
//! 3. No save, whole or failed, changes the files of an older checkpoint; one goes only after a newer is complete.
//! 4. Any change of any byte of any file is noticed when the checkpoint is opened, and the file is named.
//! 5. The distinct boxes of each tensor are disjoint and cover it, so any layout can be read from any other's files.
//!
//! Ranks meet in the file system only. Deliberately absent: tensors (callers copy into and out of `&mut [f32]`),
//! communicators (the caller broadcasts the attempt's id and the chosen step), element types other than fp32 (what is
//! saved are master weights and moments), and memory maps (a file that shrinks under a map kills the process; a
//! positional read of it is an error that names the file). The format is described in docs/checkpoints.md.

mod commit;
mod error;
mod folder;
mod manifest;
mod reader;
mod saver;
mod shard;
mod snapshot;
#[cfg(test)]
mod tests;

pub use commit::{SaveEvent, SaveObserver, SaveStage};
pub use error::CheckpointError;
pub use folder::{Retention, complete_steps, step_folder_name};
pub use manifest::{FileRecord, Manifest, SavedBox, StateKind, TensorRecord, TrainState};
pub use reader::{Checkpoint, Found, Verify, Warning, find_usable};
pub use saver::{SaveReport, Saver, SaverOptions};
pub use snapshot::{Snapshot, plan_writes};
