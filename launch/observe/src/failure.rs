//! The last error of a rank, left in a file for the launcher.

use serde::{Deserialize, Serialize};
use std::path::Path;
pub use tangelo_core::FailureKind;

/// What a rank writes to `TANGELO_ERROR_FILE` before it exits with an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorRecord {
    /// Global rank.
    pub rank: usize,
    /// The step it was in, if it had begun one.
    pub step: Option<u64>,
    /// What kind of failure.
    pub kind: FailureKind,
    /// The error, causes included.
    pub message: String,
    /// When, milliseconds since 1970.
    pub unix_time_ms: u64,
}

impl ErrorRecord {
    /// Writes the record as one JSON object. Rename makes it whole or absent.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let partial = path.with_extension("partial");
        std::fs::write(&partial, serde_json::to_vec(self)?)?;
        std::fs::rename(&partial, path)
    }

    /// Reads a record; `None` where the file is absent or not whole.
    pub fn read(path: &Path) -> Option<ErrorRecord> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_written_by_name() {
        for kind in FailureKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }

    #[test]
    fn a_record_round_trips_and_a_torn_one_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("error.json");
        let record = ErrorRecord {
            rank: 3,
            step: Some(12),
            kind: FailureKind::Data,
            message: "shard 4: \"x\" torn\nat 7".into(),
            unix_time_ms: 9,
        };
        record.write(&path).unwrap();
        assert_eq!(ErrorRecord::read(&path), Some(record));
        std::fs::write(&path, b"{\"rank\":3").unwrap();
        assert_eq!(ErrorRecord::read(&path), None);
    }
}
