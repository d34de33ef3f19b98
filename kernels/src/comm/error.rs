//! What can go wrong between ranks.

use std::fmt;
use std::panic::Location;
use std::time::Duration;
use tangelo_core::Phase;

/// The calls of a [`Communicator`](super::Communicator), as errors and messages name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// Meeting of the ranks, before the first call.
    Connect = 0,
    /// Sum of a tensor over the ranks, everywhere.
    AllReduce = 1,
    /// Concatenation of the ranks' tensors, everywhere.
    AllGather = 2,
    /// Sum of a tensor over the ranks, each keeping its part.
    ReduceScatter = 3,
    /// A part for each rank from each rank.
    AllToAll = 4,
    /// One rank's tensor, everywhere.
    Broadcast = 5,
    /// A tensor to one peer.
    Send = 6,
    /// A tensor from one peer.
    Receive = 7,
    /// Nobody leaves before everybody entered.
    Barrier = 8,
    /// Byte strings of all ranks, everywhere.
    AllGatherBytes = 9,
    /// A new group of some of the ranks.
    Split = 10,
    /// A tensor to one peer and one from another, at the same time.
    Shift = 11,
}

impl Operation {
    /// Every operation, in the order of their codes.
    pub const ALL: [Operation; 12] = [
        Operation::Connect,
        Operation::AllReduce,
        Operation::AllGather,
        Operation::ReduceScatter,
        Operation::AllToAll,
        Operation::Broadcast,
        Operation::Send,
        Operation::Receive,
        Operation::Barrier,
        Operation::AllGatherBytes,
        Operation::Split,
        Operation::Shift,
    ];

    /// The name of the method.
    pub const fn name(self) -> &'static str {
        match self {
            Operation::Connect => "connect",
            Operation::AllReduce => "all_reduce",
            Operation::AllGather => "all_gather",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::AllToAll => "all_to_all",
            Operation::Broadcast => "broadcast",
            Operation::Send => "send",
            Operation::Receive => "recv",
            Operation::Barrier => "barrier",
            Operation::AllGatherBytes => "all_gather_bytes",
            Operation::Split => "split",
            Operation::Shift => "shift",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a call failed. Ranks in here are global ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommErrorKind {
    /// A peer did not answer before the deadline.
    Timeout {
        /// How long this rank waited.
        waited: Duration,
        /// The peer it waited for, where that is known.
        rank: Option<usize>,
    },
    /// A peer is gone: its process died, its thread panicked, or it gave up.
    PeerLost {
        /// The peer, where it is known.
        rank: Option<usize>,
        /// What the back end saw.
        detail: String,
    },
    /// Ranks made different calls, or the same call with different sizes or types.
    Mismatch(String),
    /// Somebody used the [`AbortHandle`](super::AbortHandle) of this rank.
    Aborted(String),
    /// The arguments of this rank's call do not fit together; nothing was sent.
    Invalid(String),
    /// The library underneath failed.
    Backend(String),
}

impl fmt::Display for CommErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommErrorKind::Timeout { waited, rank: Some(rank) } => {
                write!(f, "timed out after {:.1} s waiting for rank {rank}", waited.as_secs_f64())
            }
            CommErrorKind::Timeout { waited, rank: None } => write!(f, "timed out after {:.1} s", waited.as_secs_f64()),
            CommErrorKind::PeerLost { rank: Some(rank), detail } => write!(f, "lost rank {rank}: {detail}"),
            CommErrorKind::PeerLost { rank: None, detail } => write!(f, "lost a peer: {detail}"),
            CommErrorKind::Mismatch(detail) => write!(f, "ranks disagree: {detail}"),
            CommErrorKind::Aborted(reason) => write!(f, "aborted: {reason}"),
            CommErrorKind::Invalid(detail) => write!(f, "{detail}"),
            CommErrorKind::Backend(detail) => write!(f, "{detail}"),
        }
    }
}

/// A failed call of a [`Communicator`](super::Communicator).
#[derive(Clone, Debug, thiserror::Error)]
#[error("rank {rank}{}, group {group}: {operation} #{sequence} at {call_site}: {kind}{}", phase_text(.phase), hint_text(.hint))]
pub struct CommError {
    /// Global rank of this process.
    pub rank: usize,
    /// The phase of the step in which the call was made, where the rank said so.
    pub phase: Option<Phase>,
    /// Name of the group.
    pub group: String,
    /// The call that failed.
    pub operation: Operation,
    /// How many calls the communicator made before, with this peer where it is a call to one.
    pub sequence: u64,
    /// Where the call was made.
    pub call_site: &'static Location<'static>,
    /// What happened.
    pub kind: CommErrorKind,
    /// What to do about it.
    pub hint: Option<String>,
}

fn phase_text(phase: &Option<Phase>) -> String {
    phase.map(|phase| format!(" in phase {phase}")).unwrap_or_default()
}

fn hint_text(hint: &Option<String>) -> String {
    hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default()
}

impl CommError {
    /// Whether the cause lies with another rank (exit code 5), not with this one.
    pub fn is_peer_failure(&self) -> bool {
        matches!(self.kind, CommErrorKind::Timeout { .. } | CommErrorKind::PeerLost { .. } | CommErrorKind::Aborted(_))
    }

    /// The rank held responsible, where it is known.
    pub fn culprit(&self) -> Option<usize> {
        match self.kind {
            CommErrorKind::Timeout { rank, .. } | CommErrorKind::PeerLost { rank, .. } => rank,
            _ => None,
        }
    }
}
