//! The last error of a rank, left in a file for the launcher, and the exit codes of every process.

use serde::{Deserialize, Serialize};
use std::path::Path;

/// What kind of failure ended a process; one exit code each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// A bug, or anything without a kind of its own. Exit code 1.
    Internal,
    /// The configuration or the command line. Exit code 2.
    Config,
    /// The data, a model's files or a checkpoint. Exit code 3.
    Data,
    /// The device: none, out of memory, broken. Exit code 4.
    Device,
    /// Another rank died or did not answer in time. Exit code 5.
    Peer,
}

impl FailureKind {
    /// Every kind.
    pub const ALL: [FailureKind; 5] =
        [FailureKind::Internal, FailureKind::Config, FailureKind::Data, FailureKind::Device, FailureKind::Peer];

    /// The exit code of a process that ends this way.
    pub const fn exit_code(self) -> u8 {
        match self {
            FailureKind::Internal => 1,
            FailureKind::Config => 2,
            FailureKind::Data => 3,
            FailureKind::Device => 4,
            FailureKind::Peer => 5,
        }
    }

    /// The kind behind an exit code; every code without a meaning of its own is internal.
    pub fn from_exit_code(code: i32) -> FailureKind {
        FailureKind::ALL.into_iter().find(|k| i32::from(k.exit_code()) == code).unwrap_or(FailureKind::Internal)
    }

    /// The word used in messages and files.
    pub const fn name(self) -> &'static str {
        match self {
            FailureKind::Internal => "internal",
            FailureKind::Config => "config",
            FailureKind::Data => "data",
            FailureKind::Device => "device",
            FailureKind::Peer => "peer",
        }
    }
}

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
    fn exit_codes_are_the_documented_ones_and_round_trip() {
        assert_eq!(FailureKind::ALL.map(FailureKind::exit_code), [1, 2, 3, 4, 5]);
        for kind in FailureKind::ALL {
            assert_eq!(FailureKind::from_exit_code(kind.exit_code().into()), kind);
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
        assert_eq!(FailureKind::from_exit_code(101), FailureKind::Internal);
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
