//! What kind of failure ended a process or a call: the one list behind exit codes and RPC status.

use serde::{Deserialize, Serialize};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones_and_round_trip() {
        assert_eq!(FailureKind::ALL.map(FailureKind::exit_code), [1, 2, 3, 4, 5]);
        for kind in FailureKind::ALL {
            assert_eq!(FailureKind::from_exit_code(kind.exit_code().into()), kind);
        }
        assert_eq!(FailureKind::from_exit_code(101), FailureKind::Internal);
    }
}
