//! Finding `tangelo-worker`, and becoming it for the verbs that need tensors.

use crate::error::LaunchError;
use serde::Serialize;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The worker beside this executable, or the one that was named.
pub fn find(named: Option<&Path>) -> Result<PathBuf, LaunchError> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .map_err(LaunchError::io("find", "the executable of tangelo"))?
            .with_file_name("tangelo-worker"),
    };
    if path.is_file() { Ok(path) } else { Err(LaunchError::NoWorker(path)) }
}

/// Replaces this process by `tangelo-worker VERB REQUEST`. Returns only where that fails.
pub fn become_worker(named: Option<&Path>, verb: &str, request: &impl Serialize) -> Result<(), LaunchError> {
    let worker = find(named)?;
    let request = serde_json::to_string(request).map_err(|e| LaunchError::Internal(e.to_string()))?;
    let error = Command::new(&worker).arg(verb).arg(request).exec();
    Err(LaunchError::io("start", worker)(error))
}
