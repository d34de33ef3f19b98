//! The checkpoint folder: names, what is complete, what is stale, what is kept.
//!
//! | name | meaning |
//! |---|---|
//! | `step-00000100` | complete (invariant 1) |
//! | `step-00000100.ATTEMPT.partial` | being written by that attempt, or left by it when it was killed |
//! | `step-00000100.ATTEMPT.deleting` | pruned or replaced; renamed first, so that a kill leaves no torn checkpoint |
//! | `step-00000100.superseded-ATTEMPT` | newer than the step an attempt resumed from; kept for the user, never read |

use super::CheckpointError;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// What is kept when a newer checkpoint is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest this many are kept; 0 keeps all.
    pub keep_latest_k: usize,
    /// Multiples of this many steps are kept for good; 0: none.
    pub keep_every: u64,
}

impl Retention {
    /// Which of the complete `steps` may go, now that the newest of them is complete.
    pub fn prunable(self, steps: &[u64]) -> Vec<u64> {
        let ordered: BTreeSet<u64> = steps.iter().copied().collect();
        let milestone = |step: u64| self.keep_every > 0 && step.is_multiple_of(self.keep_every);
        let older = ordered.len().saturating_sub(self.keep_latest_k);
        let count = if self.keep_latest_k == 0 { 0 } else { older };
        ordered.into_iter().take(count).filter(|&step| !milestone(step)).collect()
    }
}

/// The name of the folder of a complete checkpoint.
pub fn step_folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a complete checkpoint's folder, `None` for any other name.
fn parse_step(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    let step = digits.parse().ok()?;
    (step_folder_name(step) == name).then_some(step)
}

/// The steps of the complete checkpoints in `folder`, ascending; none where there is no such folder.
pub fn complete_steps(folder: &Path) -> Result<Vec<u64>, CheckpointError> {
    let mut steps: Vec<u64> = names(folder)?.iter().filter_map(|name| parse_step(name)).collect();
    steps.sort_unstable();
    Ok(steps)
}

fn names(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let fail = |error| CheckpointError::io("list", folder)(error);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fail(error)),
    };
    entries.map(|entry| Ok(entry.map_err(fail)?.file_name().to_string_lossy().into_owned())).collect()
}

/// The folder that `attempt` writes the checkpoint of `step` into.
pub(super) fn partial(folder: &Path, step: u64, attempt: &str) -> PathBuf {
    folder.join(format!("{}.{attempt}.partial", step_folder_name(step)))
}

/// Deletes what earlier attempts left unfinished: every partial folder but `attempt`'s, every half-deleted one.
pub(super) fn remove_stale(folder: &Path, attempt: &str) -> Result<(), CheckpointError> {
    let own = format!(".{attempt}.partial");
    let stale = |name: &&String| {
        name.starts_with("step-")
            && (name.ends_with(".deleting") || name.ends_with(".partial") && !name.ends_with(&own))
    };
    names(folder)?.iter().filter(stale).try_for_each(|name| remove(&folder.join(name)))
}

/// Deletes `attempt`'s partial folders of steps before `step`, left by saves that failed. No rank still writes
/// into them that anybody waits for.
pub(super) fn remove_failed(folder: &Path, attempt: &str, step: u64) -> Result<(), CheckpointError> {
    let own = format!(".{attempt}.partial");
    let failed = |name: &&String| name.strip_suffix(&own).and_then(parse_step).is_some_and(|earlier| earlier < step);
    names(folder)?.iter().filter(failed).try_for_each(|name| remove(&folder.join(name)))
}

/// Sets aside the checkpoints after `resumed_from` (all, where that is `None`): they belong to a course of training
/// that this attempt does not continue, and must not be taken for its newest.
pub(super) fn supersede(
    folder: &Path,
    attempt: &str,
    resumed_from: Option<u64>,
) -> Result<Vec<PathBuf>, CheckpointError> {
    let later = complete_steps(folder)?.into_iter().filter(|&step| resumed_from.is_none_or(|from| step > from));
    let moved: Result<Vec<PathBuf>, CheckpointError> = later
        .map(|step| {
            let from = folder.join(step_folder_name(step));
            let to = folder.join(format!("{}.superseded-{attempt}", step_folder_name(step)));
            fs::rename(&from, &to).map_err(CheckpointError::io("set aside", &from))?;
            Ok(to)
        })
        .collect();
    sync(folder)?;
    moved
}

/// Gives the finished folder `partial` its name; one of the same step makes room first.
pub(super) fn publish(folder: &Path, partial: &Path, step: u64, attempt: &str) -> Result<PathBuf, CheckpointError> {
    let target = folder.join(step_folder_name(step));
    let replaced = match target.exists() {
        true => Some(set_deleting(folder, step, attempt)?),
        false => None,
    };
    fs::rename(partial, &target).map_err(CheckpointError::io("complete", partial))?;
    sync(folder)?;
    replaced.map_or(Ok(()), |replaced| remove(&replaced))?;
    Ok(target)
}

/// Renames a complete checkpoint so that nobody reads it any more; the answer is what to [`remove`].
pub(super) fn set_deleting(folder: &Path, step: u64, attempt: &str) -> Result<PathBuf, CheckpointError> {
    let from = folder.join(step_folder_name(step));
    let to = folder.join(format!("{}.{attempt}.deleting", step_folder_name(step)));
    fs::rename(&from, &to).map_err(CheckpointError::io("delete", &from))?;
    sync(folder)?;
    Ok(to)
}

/// Deletes a folder with all that is in it; that it is gone already is no error.
pub(super) fn remove(path: &Path) -> Result<(), CheckpointError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(CheckpointError::io("delete", path)(error)),
        _ => Ok(()),
    }
}

/// Makes the names in `folder` durable.
pub(super) fn sync(folder: &Path) -> Result<(), CheckpointError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(CheckpointError::io("fsync", folder))
}
