//! One preparing process per folder.
//!
//! The lock is the system's lock on `prepare.lock`, which ends with the process that holds it, so that a killed one
//! leaves nothing stale. The file holds the owner's process id, for the message while others wait.

use crate::error::{DataError, IoContext, Result};
use crate::progress::Progress;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

const LOCK_NAME: &str = "prepare.lock";
/// Between two looks at what another process does.
pub(crate) const POLL: Duration = Duration::from_millis(200);

/// Held until dropped.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Whether a process prepares `folder` now.
    pub(crate) fn is_held(folder: &Path) -> bool {
        let file = File::open(folder.join(LOCK_NAME));
        file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Waits until no other process prepares `folder`.
    pub(crate) fn acquire(folder: &Path, progress: &dyn Progress) -> Result<FolderLock> {
        std::fs::create_dir_all(folder).at("create", folder)?;
        let path = folder.join(LOCK_NAME);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(&path).at("open", &path)?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error).at("lock", &path),
            }
            if !told {
                let mut owner = String::new();
                let _ = file.rewind().and_then(|()| file.read_to_string(&mut owner));
                // Empty where the owner is about to write it.
                told = !owner.trim().is_empty();
                if told {
                    let folder = folder.display();
                    progress.phase(&format!("waiting for process {}, which prepares {folder}", owner.trim()));
                }
            }
            if progress.cancelled() {
                return Err(DataError::Interrupted);
            }
            std::thread::sleep(POLL);
        }
        file.set_len(0).and_then(|()| file.rewind()).at("write", &path)?;
        writeln!(file, "{}", std::process::id()).at("write", &path)?;
        Ok(FolderLock { _file: file })
    }
}
