//! Where the ranks of this node stood when one of them failed: who is behind, in which collective, called where.
//!
//! Every rank writes the calls of its communicators into a file of its own ([`tangelo_core::position`]). They are read the
//! moment a failure is seen, before the others are told to end: a rank that is stopped or hangs still says where it is.

use super::logs::LogFolder;
use tangelo_core::Moment;
use tangelo_core::position::{Behind, Report, behind, decode_all, decode_moment};

/// A rank of this node and its process, `None` once that has ended by itself.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Global rank.
    pub rank: usize,
    /// Its process.
    pub process: Option<u32>,
    /// Whether a signal ended it.
    pub killed: bool,
}

/// The rank that keeps the others waiting; `None` where the records do not tell.
pub fn who_is_behind(ranks: &[Standing], logs: &LogFolder) -> Option<Behind> {
    let report = |standing: &Standing| {
        let file = std::fs::read(logs.position_path(standing.rank)).unwrap_or_default();
        let is_running = !standing.killed && !standing.process.is_some_and(is_stopped);
        Report { rank: standing.rank, positions: decode_all(&file), moment: decode_moment(&file), is_running }
    };
    let reports: Vec<Report> = ranks.iter().map(report).collect();
    behind(&reports)
}

/// Where a rank of this node was in its steps when it last said so.
pub fn last_moment(rank: usize, logs: &LogFolder) -> Option<Moment> {
    decode_moment(&std::fs::read(logs.position_path(rank)).ok()?)
}

/// Whether a process is stopped by a signal or a debugger.
fn is_stopped(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The state follows the name, which is in parentheses and may hold any character.
    let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next());
    matches!(state, Some("T" | "t"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_not_stopped() {
        assert!(!is_stopped(std::process::id()));
    }
}
