//! What goes wrong between processes, and one table of what it means: exit code, RPC status, what to do.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;
use tangelo_core::FailureKind;
use thiserror::Error;
use tonic::Code;

/// Why a rank did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Its handler returned an error.
    Handler,
    /// Its handler panicked.
    Panic,
    /// Its process ended, or the connection to it broke.
    Lost,
    /// It did not answer in time.
    Deadline,
    /// Nobody waited any more, because the call failed elsewhere.
    Cancelled,
    /// An admin call told it to stop.
    Aborted,
    /// It was asked for a batch that is not there (any more).
    UnknownHandle,
    /// Its store of batches is full.
    StoreFull,
    /// The secret was wrong.
    Refused,
    /// It was asked for something it does not understand.
    Protocol,
}

impl Cause {
    /// Every cause.
    pub const ALL: [Cause; 10] = [
        Cause::Handler,
        Cause::Panic,
        Cause::Lost,
        Cause::Deadline,
        Cause::Cancelled,
        Cause::Aborted,
        Cause::UnknownHandle,
        Cause::StoreFull,
        Cause::Refused,
        Cause::Protocol,
    ];

    /// The one table: kind (hence exit code), RPC status, what to do. A handler's error has a kind of its own.
    const fn row(self) -> (FailureKind, Code, &'static str) {
        use FailureKind as K;
        match self {
            Cause::Handler => (K::Internal, Code::Unknown, "the rank's log has the details"),
            Cause::Panic => (K::Internal, Code::Internal, "this is a bug; the rank's log has the backtrace"),
            Cause::Lost => {
                (K::Peer, Code::Unavailable, "its log says why, or the system's where it was killed (out of memory?)")
            }
            Cause::Deadline => {
                (K::Peer, Code::DeadlineExceeded, "it hangs, is stopped, or needs a longer deadline for this verb")
            }
            Cause::Cancelled => (K::Peer, Code::Cancelled, "the call failed on another rank first"),
            Cause::Aborted => (K::Internal, Code::Aborted, "it was told to stop by an admin call"),
            Cause::UnknownHandle => {
                (K::Internal, Code::NotFound, "a batch lives until it is dropped or its step ends; fetch it before")
            }
            Cause::StoreFull => {
                (K::Config, Code::ResourceExhausted, "ask fewer prompts or answers a step, or let answers be shorter")
            }
            Cause::Refused => {
                (K::Config, Code::Unauthenticated, "give every process of the job the same TANGELO_JOB_SECRET_FILE")
            }
            Cause::Protocol => (K::Internal, Code::InvalidArgument, "run the same release of every binary"),
        }
    }

    /// The kind behind the exit code of a process that ends for this.
    pub const fn kind(self) -> FailureKind {
        self.row().0
    }

    /// The status of an RPC that fails for this.
    pub const fn code(self) -> Code {
        self.row().1
    }

    /// What to do about it.
    pub const fn advice(self) -> &'static str {
        self.row().2
    }

    /// The cause behind a status that a peer of this crate sent; anything else means that the peer is gone.
    pub fn of(code: Code) -> Cause {
        Cause::ALL.into_iter().find(|cause| cause.code() == code).unwrap_or(Cause::Lost)
    }
}

/// What one rank reports instead of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankFailure {
    /// Why.
    pub cause: Cause,
    /// What kind of failure, for the exit code.
    pub kind: FailureKind,
    /// What happened.
    pub message: String,
}

impl RankFailure {
    /// A failure of the cause's own kind.
    pub fn new(cause: Cause, message: impl Into<String>) -> RankFailure {
        RankFailure { cause, kind: cause.kind(), message: message.into() }
    }

    /// As the status of an RPC.
    pub(crate) fn status(&self) -> tonic::Status {
        tonic::Status::new(self.cause.code(), self.message.clone())
    }
}

impl From<tonic::Status> for RankFailure {
    fn from(status: tonic::Status) -> RankFailure {
        // What a peer says has no source; a connection that breaks has, and its code tells nothing.
        match std::error::Error::source(&status) {
            Some(_) => RankFailure::new(Cause::Lost, status.message()),
            None => RankFailure::new(Cause::of(status.code()), status.message()),
        }
    }
}

/// A failed call: who, what, when, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallFailure {
    /// Global rank; `None` where a whole node is concerned.
    pub rank: Option<usize>,
    /// Index of its node.
    pub node: usize,
    /// The role.
    pub role: String,
    /// The verb.
    pub verb: &'static str,
    /// The training step.
    pub step: u64,
    /// The call's name in every log.
    pub trace: String,
    /// Why.
    pub failure: RankFailure,
}

impl fmt::Display for CallFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CallFailure { node, role, verb, step, trace, failure, .. } = self;
        match self.rank {
            Some(rank) => write!(f, "rank {rank} (node {node})")?,
            None => write!(f, "node {node}")?,
        }
        write!(f, " failed in {role}.{verb} of step {step}: {}", failure.message)?;
        write!(f, "; {} [trace {trace}]", failure.cause.advice())
    }
}

/// What can go wrong in this crate.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Roles, pools and ranks do not fit.
    #[error("{0}")]
    Placement(String),
    /// A call failed on a rank.
    #[error("{0}")]
    Call(Box<CallFailure>),
    /// A batch is not where, or not what, its handle says, or does not fit a call.
    #[error("{0}")]
    Batch(String),
    /// A peer said no, or could not be reached, outside of a call.
    #[error("{action}: {}; {}", .failure.message, .failure.cause.advice())]
    Peer {
        /// What was tried.
        action: String,
        /// What came of it.
        failure: RankFailure,
    },
    /// Not everybody came.
    #[error("waited {waited:?} for the processes of the job; {missing}. See their logs; they need {needs}")]
    Absent {
        /// How long.
        waited: Duration,
        /// Who is missing.
        missing: String,
        /// The environment variables they need.
        needs: &'static str,
    },
    /// The environment, or a file that it names, is not as it should be.
    #[error("{0}")]
    Environment(String),
    /// A socket or a file cannot be used.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl ControlError {
    /// What kind of failure, for the exit code.
    pub fn kind(&self) -> FailureKind {
        match self {
            ControlError::Placement(_) | ControlError::Environment(_) => FailureKind::Config,
            ControlError::Call(failure) => failure.failure.kind,
            ControlError::Peer { failure, .. } => failure.kind,
            ControlError::Absent { .. } => FailureKind::Peer,
            ControlError::Batch(_) | ControlError::Io { .. } => FailureKind::Internal,
        }
    }

    /// The failed call, where one failed.
    pub fn call(&self) -> Option<&CallFailure> {
        match self {
            ControlError::Call(failure) => Some(failure),
            _ => None,
        }
    }

    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> ControlError {
        let action = action.into();
        move |source| ControlError::Io { action, source }
    }
}

/// A line on stderr, which is this process's log. Nobody reading it must not end the process.
pub(crate) fn log(line: impl fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "control: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn each_cause_has_a_status_of_its_own_that_leads_back() {
        for cause in Cause::ALL {
            assert_eq!(Cause::of(cause.code()), cause);
            assert_eq!(RankFailure::from(RankFailure::new(cause, "x").status()), RankFailure::new(cause, "x"));
        }
        assert_eq!(Cause::of(Code::DataLoss), Cause::Lost);
    }

    #[test]
    fn a_failed_call_says_who_what_when_and_what_to_do() {
        let mut failure = CallFailure {
            rank: Some(5),
            node: 1,
            role: "policy".into(),
            verb: "forward_backward",
            step: 12,
            trace: "9f-3".into(),
            failure: RankFailure::new(Cause::Lost, "its process ended"),
        };
        expect![
            "rank 5 (node 1) failed in policy.forward_backward of step 12: its process ended; its log says why, or the system's where it was killed (out of memory?) [trace 9f-3]"
        ]
        .assert_eq(&failure.to_string());
        failure.rank = None;
        let error = ControlError::Call(Box::new(failure));
        assert!(error.to_string().starts_with("node 1 failed in"));
        assert_eq!(error.kind().exit_code(), 5);
    }
}
