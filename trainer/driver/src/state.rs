//! Where the loop stands: everything that decides what comes next and is in no role's part of a checkpoint.

use crate::error::{DriverError, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use tangelo_algo::State as AlgorithmState;

/// The driver's part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriverState {
    /// The last step done.
    pub step: u64,
    /// The next prompt's place in the order of all epochs.
    pub position: u64,
    /// How often the policy's weights were given to the rollout role.
    pub policy_version: u64,
    /// The algorithm's memory: adaptive KL and counters.
    pub algorithm: AlgorithmState,
    /// What the prompts were made from: another set would silently be another order.
    pub prompts_fingerprint: String,
}

/// Folder of a role's checkpoints in the run's checkpoint folder.
pub fn role_folder(checkpoints: &Path, role: &str) -> PathBuf {
    checkpoints.join(role)
}

/// The file of a step's state.
pub fn path(checkpoints: &Path, step: u64) -> PathBuf {
    checkpoints.join(format!("driver-{step:08}.json"))
}

impl DriverState {
    /// Writes the state, whole or not at all. It is written last: a step without it has no checkpoint.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, checkpoints: &Path) -> Result<()> {
        let path = path(checkpoints, self.step);
        let partial = path.with_extension("json.partial");
        let text = serde_json::to_vec_pretty(self).map_err(|e| DriverError::Internal(e.to_string()))?;
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(checkpoints)?;
            let mut file = fs::File::create(&partial)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&partial, &path)
        };
        write().map_err(|source| DriverError::Write { path, source })
    }

    /// The states that are there, newest first.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn steps(checkpoints: &Path) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(checkpoints) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(DriverError::Read { path: checkpoints.to_owned(), source }),
        };
        let step = |name: &str| name.strip_prefix("driver-")?.strip_suffix(".json")?.parse::<u64>().ok();
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut steps: Vec<u64> = names.filter_map(|name| step(&name)).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// Reads the state of a step.
    ///
    /// # Errors
    /// The file cannot be read or is no state.
    pub fn read(checkpoints: &Path, step: u64) -> Result<DriverState> {
        let path = path(checkpoints, step);
        let text = fs::read(&path).map_err(|source| DriverError::Read { path: path.clone(), source })?;
        serde_json::from_slice(&text).map_err(|e| {
            DriverError::Checkpoint(format!(
                "{} is damaged ({e}); delete it to go on from the checkpoint before",
                path.display()
            ))
        })
    }

    /// Deletes states of steps that are kept no longer; the newest `keep` stay.
    ///
    /// # Errors
    /// A file cannot be deleted.
    pub fn prune(checkpoints: &Path, keep: usize) -> Result<()> {
        for step in DriverState::steps(checkpoints)?.into_iter().skip(keep.max(1)) {
            let path = path(checkpoints, step);
            fs::remove_file(&path).map_err(|source| DriverError::Write { path, source })?;
        }
        Ok(())
    }
}
