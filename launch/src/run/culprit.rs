//! Who failed first, from how each rank ended and what it said last. Pure.
//!
//! When one rank dies, the others see a broken connection, say so (a `peer` error) and die too, often within a
//! millisecond. So a `peer` error is a consequence and never the cause while there is another candidate, and ranks
//! that the launcher itself ended are no candidates. Among the rest the earliest counts: an error by the time the rank
//! wrote it, a death without a word by the time the launcher saw it.

use crate::driver::{is_rank, process_name};
use std::fmt;
use tangelo_observe::{ErrorRecord, FailureKind};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this code.
    Exit(i32),
    /// By this signal.
    Signal(i32),
}

/// The end of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Global rank.
    pub rank: usize,
    /// How.
    pub ending: Ending,
    /// When the launcher saw it, milliseconds since 1970.
    pub time_ms: u64,
    /// Signals that the launcher had sent it before.
    pub sent: Vec<i32>,
    /// What it left in its error file.
    pub record: Option<ErrorRecord>,
}

impl Death {
    /// Whether it ended well.
    pub fn is_success(&self) -> bool {
        self.ending == Ending::Exit(0)
    }

    /// Whether it ended because the launcher said so: by a signal that it sent, or with the code by which a rank says
    /// that it ended at once for a second one.
    fn is_ours(&self) -> bool {
        match self.ending {
            Ending::Signal(signal) => self.sent.contains(&signal),
            Ending::Exit(code) => self.sent.iter().any(|signal| code == 128 + signal),
        }
    }

    fn kind(&self) -> FailureKind {
        match (&self.record, self.ending) {
            (Some(record), _) => record.kind,
            (None, Ending::Exit(code)) => FailureKind::from_exit_code(code),
            (None, Ending::Signal(_)) => FailureKind::Internal,
        }
    }

    fn failed_at_ms(&self) -> u64 {
        self.record.as_ref().map_or(self.time_ms, |r| r.unix_time_ms)
    }
}

/// In what way a rank failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It reported an error.
    Error,
    /// It ended with this exit code, without a word.
    Exit(i32),
    /// A signal ended it.
    Signal(i32),
    /// It did not react to SIGTERM while others waited for it.
    Hang,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Error => f.write_str("reported an error"),
            Cause::Exit(code) => write!(f, "exited with code {code} without reporting an error"),
            Cause::Signal(signal) => write!(f, "was ended by {}", signal_name(*signal)),
            Cause::Hang => f.write_str("hung: it did not react to SIGTERM and was killed"),
        }
    }
}

/// The failure that ended an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The rank that failed first.
    pub rank: usize,
    /// What kind of failure.
    pub kind: FailureKind,
    /// At which step, if known.
    pub step: Option<u64>,
    /// In what way.
    pub cause: Cause,
    /// What the rank said.
    pub message: Option<String>,
}

/// The first failure among `deaths`, or `None` where every rank ended well. `last_step` is the last step that the job
/// is known to have finished: a rank that died without a word died after it.
pub fn first_failure(deaths: &[Death], last_step: Option<u64>) -> Option<Failure> {
    if let Some(failure) = own_failure(deaths, last_step) {
        return Some(failure);
    }
    let killed = |d: &&Death| d.ending == Ending::Signal(9) && d.is_ours();
    // An agent knows of the driver, its ranks only of the agent.
    let peer = failed(deaths).min_by_key(|death| (is_rank(death.rank), earliest(death)));
    match (peer, deaths.iter().filter(killed).min_by_key(|d| d.rank)) {
        // Others gave up waiting for somebody, and this one had to be killed: it is whom they waited for.
        (Some(peer), Some(hung)) => {
            let waiting = failure(peer, last_step);
            let message = waiting.message.map(|m| format!("{} said: {m}", process_name(peer.rank)));
            let kind = FailureKind::Peer;
            Some(Failure { rank: hung.rank, kind, step: waiting.step, cause: Cause::Hang, message })
        }
        (Some(peer), None) => Some(failure(peer, last_step)),
        (None, _) => deaths.iter().find(|d| !d.is_success()).map(|d| failure(d, last_step)),
    }
}

/// As [`first_failure`], where a signal has asked the run to end: ranks that the launcher ended and ranks that missed
/// those are no failures then.
pub fn failure_while_ending(deaths: &[Death], last_step: Option<u64>) -> Option<Failure> {
    let rest = || if deaths.iter().any(Death::is_ours) { None } else { first_failure(deaths, last_step) };
    own_failure(deaths, last_step).or_else(rest)
}

/// The first failure that neither the launcher nor the loss of another rank brought about.
fn own_failure(deaths: &[Death], last_step: Option<u64>) -> Option<Failure> {
    let own = failed(deaths).filter(|d| d.kind() != FailureKind::Peer).min_by_key(earliest);
    own.map(|death| failure(death, last_step))
}

fn failed(deaths: &[Death]) -> impl Iterator<Item = &Death> {
    deaths.iter().filter(|d| !d.is_success() && !d.is_ours())
}

fn earliest(death: &&Death) -> (u64, usize) {
    (death.failed_at_ms(), death.rank)
}

fn failure(death: &Death, last_step: Option<u64>) -> Failure {
    let cause = match (&death.record, death.ending) {
        (_, Ending::Signal(signal)) => Cause::Signal(signal),
        (Some(_), Ending::Exit(_)) => Cause::Error,
        (None, Ending::Exit(code)) => Cause::Exit(code),
    };
    let step = death.record.as_ref().map_or(last_step, |r| r.step);
    let message = death.record.as_ref().map(|r| r.message.clone());
    Failure { rank: death.rank, kind: death.kind(), step, cause, message }
}

/// `SIGKILL (9)`.
pub fn signal_name(signal: i32) -> String {
    match nix::sys::signal::Signal::try_from(signal) {
        Ok(name) => format!("{name} ({signal})"),
        Err(_) => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn death(rank: usize, ending: Ending, time_ms: u64) -> Death {
        Death { rank, ending, time_ms, sent: Vec::new(), record: None }
    }

    fn with_record(rank: usize, kind: FailureKind, said_at_ms: u64, died_at_ms: u64) -> Death {
        let record = ErrorRecord {
            rank,
            step: Some(7),
            kind,
            message: format!("{} of {rank}", kind.name()),
            unix_time_ms: said_at_ms,
        };
        Death { record: Some(record), ..death(rank, Ending::Exit(kind.exit_code().into()), died_at_ms) }
    }

    fn sent(mut death: Death, signals: &[i32]) -> Death {
        death.sent = signals.to_vec();
        death
    }

    fn check(deaths: &[Death], rank: usize, kind: FailureKind, cause: Cause) {
        let failure = first_failure(deaths, Some(3)).unwrap();
        assert_eq!((failure.rank, failure.kind, &failure.cause), (rank, kind, &cause), "{deaths:?}");
    }

    #[test]
    fn the_table() {
        use Ending::*;
        use FailureKind::*;
        assert_eq!(first_failure(&[death(0, Exit(0), 1), death(1, Exit(0), 2)], None), None);
        // A peer that died and was seen first is not the cause.
        check(&[with_record(0, Peer, 10, 11), with_record(1, Data, 12, 13)], 1, Data, Cause::Error);
        check(&[with_record(0, Peer, 10, 11), death(1, Signal(9), 12)], 1, Internal, Cause::Signal(9));
        check(&[death(0, Exit(5), 10), death(1, Signal(11), 10)], 1, Internal, Cause::Signal(11));
        // The earlier word counts, though its process died later.
        check(&[with_record(0, Internal, 10, 99), with_record(1, Internal, 11, 12)], 0, Internal, Cause::Error);
        // A silent death before another's error.
        check(&[with_record(0, Internal, 10, 12), death(1, Signal(9), 9)], 1, Internal, Cause::Signal(9));
        // Ended by us: no candidate; ended by something else although we had sent a signal: one.
        check(&[sent(death(0, Signal(15), 5), &[15]), death(1, Exit(101), 6)], 1, Internal, Cause::Exit(101));
        check(&[sent(death(0, Signal(9), 7), &[15]), with_record(1, Peer, 5, 6)], 0, Internal, Cause::Signal(9));
        // Only peers: the earliest; and whoever had to be killed is whom they waited for.
        check(&[with_record(0, Peer, 11, 12), with_record(1, Peer, 10, 13)], 1, Peer, Cause::Error);
        check(&[with_record(0, Peer, 11, 12), sent(death(1, Signal(9), 20), &[15, 9])], 1, Peer, Cause::Hang);
        // Killed by us after a second signal of the user's: said as it is.
        check(&[sent(death(0, Signal(9), 7), &[2, 9])], 0, Internal, Cause::Signal(9));
    }

    #[test]
    fn what_a_signal_brings_about_is_no_failure_of_its_own() {
        use Ending::*;
        let own = |deaths: &[Death]| failure_while_ending(deaths, None).map(|f| f.rank);
        let killed = sent(death(0, Signal(9), 7), &[2, 9]);
        let twice = sent(death(2, Exit(143), 3), &[2, 15]);
        let lost = with_record(1, FailureKind::Peer, 5, 6);
        assert_eq!(own(&[death(0, Exit(0), 1), killed.clone(), lost.clone(), twice.clone()]), None);
        assert_eq!(own(&[death(0, Exit(0), 1), lost.clone()]), Some(1), "another node is lost");
        let broken = sent(with_record(3, FailureKind::Data, 8, 9), &[15]);
        assert_eq!(own(&[killed, lost, twice, broken]), Some(3));
        assert_eq!(own(&[sent(death(0, Signal(11), 1), &[15])]), Some(0), "a crash while it was to end");
    }

    #[test]
    fn steps_come_from_the_record_or_else_from_progress() {
        let failure = |d: Death| first_failure(&[d], Some(3)).unwrap();
        assert_eq!(failure(with_record(0, FailureKind::Device, 1, 2)).step, Some(7));
        assert_eq!(failure(death(0, Ending::Exit(1), 2)).step, Some(3));
        assert_eq!(Cause::Signal(11).to_string(), "was ended by SIGSEGV (11)");
    }
}
