//! Where the loop stands: everything that decides what comes next and is in no role's part of a checkpoint.

use crate::error::{DriverError, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use tangelo_algo::State as AlgorithmState;
use tangelo_configs::rlhf::role_folder;

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
    /// Updates skipped so far because loss or gradient was not finite.
    #[serde(default)]
    pub skipped: u64,
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

    /// The state of `asked`, or the newest one that is complete: with a checkpoint of the same step of every role in
    /// `roles`. What makes newer ones unusable is said to `warn`. `None` where there is none at all.
    ///
    /// # Errors
    /// A step was asked for and is not usable, or none of those that are there is.
    pub fn find(
        checkpoints: &Path,
        roles: &[&str],
        asked: Option<u64>,
        warn: &mut dyn FnMut(String),
    ) -> Result<Option<DriverState>> {
        let steps = DriverState::steps(checkpoints)?;
        if let Some(step) = asked.filter(|step| !steps.contains(step)) {
            let known = list(&steps);
            return Err(DriverError::Checkpoint(format!(
                "`checkpoint.load_step` = {step}: {} has no checkpoint of that step; there are {known}",
                checkpoints.display()
            )));
        }
        let mut last = None;
        for step in steps.into_iter().filter(|&step| asked.is_none_or(|asked| asked == step)) {
            match DriverState::complete(checkpoints, roles, step) {
                Ok(state) => return Ok(Some(state)),
                Err(e) => {
                    warn(format!("the checkpoint of step {step} is not used: {e}"));
                    last = Some(e);
                }
            }
        }
        last.map_or(Ok(None), Err)
    }

    /// The state of a step that every role has a checkpoint of.
    ///
    /// # Errors
    /// The state cannot be read, or a role's checkpoint is not there.
    pub fn complete(checkpoints: &Path, roles: &[&str], step: u64) -> Result<DriverState> {
        let state = DriverState::read(checkpoints, step)?;
        let manifest =
            |role: &str| role_folder(checkpoints, role).join(format!("step-{step:08}")).join("manifest.json");
        match roles.iter().map(|role| manifest(role)).find(|manifest| !manifest.is_file()) {
            Some(missing) => Err(DriverError::Checkpoint(format!("{} is not there", missing.display()))),
            None => Ok(state),
        }
    }

    /// Deletes states of steps that are kept no longer: all but the newest `keep` (0: none), and those of steps that
    /// `keep_every` divides.
    ///
    /// # Errors
    /// A file cannot be deleted.
    pub fn prune(checkpoints: &Path, keep: usize, keep_every: u64) -> Result<()> {
        let milestone = |step: u64| keep_every > 0 && step.is_multiple_of(keep_every);
        let older = if keep == 0 { usize::MAX } else { keep };
        let doomed = DriverState::steps(checkpoints)?.into_iter().skip(older).filter(|&step| !milestone(step));
        doomed.into_iter().try_for_each(|step| remove(checkpoints, step))
    }

    /// Deletes states of steps after `step`: they belong to a course of training that is not gone on with.
    ///
    /// # Errors
    /// A file cannot be deleted.
    pub fn forget_after(checkpoints: &Path, step: u64) -> Result<()> {
        let later = DriverState::steps(checkpoints)?.into_iter().filter(|&later| later > step);
        later.into_iter().try_for_each(|step| remove(checkpoints, step))
    }
}

fn remove(checkpoints: &Path, step: u64) -> Result<()> {
    let path = path(checkpoints, step);
    fs::remove_file(&path).map_err(|source| DriverError::Write { path, source })
}

/// `2, 4, 6`, or `none`.
pub fn list(steps: &[u64]) -> String {
    let mut steps = steps.to_vec();
    steps.sort_unstable();
    let words: Vec<String> = steps.iter().map(u64::to_string).collect();
    if words.is_empty() { "none".into() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(step: u64) -> DriverState {
        let algorithm = AlgorithmState { batches: step, sequences: 8 * step, kl_coef: 0.1 };
        DriverState {
            step,
            position: 3 * step,
            policy_version: step,
            algorithm,
            prompts_fingerprint: "x".into(),
            skipped: 0,
        }
    }

    fn saved(steps: &[u64]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for &step in steps {
            for role in ["policy", "critic"] {
                let path = role_folder(folder.path(), role).join(format!("step-{step:08}"));
                fs::create_dir_all(&path).unwrap();
                fs::write(path.join("manifest.json"), "{}").unwrap();
            }
            state(step).write(folder.path()).unwrap();
        }
        folder
    }

    #[test]
    fn only_a_checkpoint_that_every_role_has_is_gone_on_from() {
        let folder = saved(&[2, 4, 6]);
        let path = folder.path();
        let find = |asked| {
            let mut warnings = Vec::new();
            let found = DriverState::find(path, &["policy", "critic"], asked, &mut |w| warnings.push(w));
            (found.map(|state| state.map(|s| s.step)).map_err(|e| e.to_string()), warnings)
        };
        assert_eq!(find(None), (Ok(Some(6)), vec![]));
        assert_eq!(find(Some(2)), (Ok(Some(2)), vec![]));
        assert!(find(Some(3)).0.unwrap_err().contains("there are 2, 4, 6"));
        fs::remove_dir_all(role_folder(path, "critic").join("step-00000006")).unwrap();
        let (found, warnings) = find(None);
        assert!(found == Ok(Some(4)) && warnings[0].contains("step 6 is not used"), "{warnings:?}");
        fs::write(super::path(path, 4), "{").unwrap();
        assert_eq!(find(None).0, Ok(Some(2)));
        fs::remove_file(role_folder(path, "policy").join("step-00000002/manifest.json")).unwrap();
        assert!(find(None).0.unwrap_err().contains("policy"), "no silent start from the beginning");
        assert_eq!(DriverState::find(&path.join("none"), &[], None, &mut |_| ()).unwrap(), None);
    }

    #[test]
    fn milestones_and_the_newest_stay() {
        let folder = saved(&[2, 4, 6, 8, 10]);
        let left = || DriverState::steps(folder.path()).unwrap();
        DriverState::prune(folder.path(), 0, 0).unwrap();
        assert_eq!(left(), [10, 8, 6, 4, 2]);
        DriverState::prune(folder.path(), 2, 4).unwrap();
        assert_eq!(left(), [10, 8, 4]);
        DriverState::forget_after(folder.path(), 8).unwrap();
        assert_eq!(left(), [8, 4]);
    }
}
