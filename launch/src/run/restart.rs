//! Whether a failed job starts again: a pure function of what happened, the options and the time, with its reason.
//!
//! A configuration or the data will not get better by trying again. A failure that repeats at the same step is in the
//! job, not in the machine; a killed process is not counted as such a repetition, for whoever killed it (another
//! user, the kernel short of memory, a scheduler) may choose the same moment twice.

use super::culprit::{Cause, Failure};
use tangelo_observe::FailureKind;

/// What the user allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartOptions {
    /// Restarts at most.
    pub max_restarts: u32,
    /// Wait before the first one; doubles with each further one that brought no new step.
    pub backoff_ms: u64,
    /// Longest wait.
    pub max_backoff_ms: u64,
}

/// What happened so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RestartState {
    /// Restarts so far.
    pub restarts: u32,
    /// One failure per attempt, the newest last.
    pub failures: Vec<Failure>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Start all ranks again at this time, milliseconds since 1970.
    Restart {
        /// When.
        at_ms: u64,
    },
    /// Give up.
    Stop,
}

/// Decides after the newest failure in `state`.
pub fn decide(state: &RestartState, options: &RestartOptions, now_ms: u64) -> (Decision, String) {
    let Some(failure) = state.failures.last() else { return (Decision::Stop, "nothing failed".into()) };
    if matches!(failure.kind, FailureKind::Config | FailureKind::Data) {
        let reason = format!("a {} error does not go away by trying again", failure.kind.name());
        return (Decision::Stop, reason);
    }
    if options.max_restarts == 0 {
        return (Decision::Stop, "restarts are off (--max-restarts 0)".into());
    }
    if state.restarts >= options.max_restarts {
        return (Decision::Stop, format!("all {} restarts are used up", options.max_restarts));
    }
    let earlier = state.failures[..state.failures.len() - 1].iter();
    if let Some(step) = failure.step
        && earlier.clone().any(|e| repeats(e, failure))
    {
        return (Decision::Stop, format!("the same failure came again at step {step}: it is in the job"));
    }
    let doublings = attempts_without_progress(&state.failures).min(20);
    let wait_ms = options.backoff_ms.saturating_mul(1 << doublings).min(options.max_backoff_ms);
    let reason = format!("restart {} of {} in {:.1} s", state.restarts + 1, options.max_restarts, wait_ms as f64 / 1e3);
    (Decision::Restart { at_ms: now_ms + wait_ms }, reason)
}

/// How many of the newest failures came no further than an earlier one.
fn attempts_without_progress(failures: &[Failure]) -> u32 {
    let mut furthest = None;
    let mut count = 0;
    for (i, failure) in failures.iter().enumerate() {
        count = if i > 0 && failure.step <= furthest { count + 1 } else { 0 };
        furthest = furthest.max(failure.step);
    }
    count
}

/// Whether the same rank failed in the same way at the same step.
fn repeats(earlier: &Failure, now: &Failure) -> bool {
    const SENT_FROM_OUTSIDE: [i32; 4] = [1, 2, 9, 15]; // HUP, INT, KILL, TERM
    let from_outside = matches!(now.cause, Cause::Signal(signal) if SENT_FROM_OUTSIDE.contains(&signal));
    !from_outside
        && (earlier.rank, earlier.step, earlier.kind, &earlier.cause) == (now.rank, now.step, now.kind, &now.cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: RestartOptions = RestartOptions { max_restarts: 3, backoff_ms: 1000, max_backoff_ms: 3000 };

    fn failure(kind: FailureKind, rank: usize, step: impl Into<Option<u64>>, cause: Cause) -> Failure {
        Failure { rank, kind, step: step.into(), cause, message: None }
    }

    fn check(failures: Vec<Failure>, options: RestartOptions, expected: Decision, reason: &str) {
        let state = RestartState { restarts: failures.len() as u32 - 1, failures };
        let (decision, said) = decide(&state, &options, 50_000);
        assert_eq!(decision, expected, "{state:?}: {said}");
        assert!(said.contains(reason), "{state:?}: {said}");
    }

    #[test]
    fn the_table() {
        use Decision::*;
        use FailureKind::*;
        let error = |step: u64| failure(Internal, 0, step, Cause::Error);
        let killed = |step: u64| failure(Internal, 0, step, Cause::Signal(9));
        let never = RestartOptions { max_restarts: 0, ..OPTIONS };

        // What is never tried again.
        check(vec![failure(Config, 0, None, Cause::Error)], OPTIONS, Stop, "config error");
        check(vec![failure(Data, 1, 5, Cause::Exit(3))], OPTIONS, Stop, "data error");
        check(vec![error(5)], never, Stop, "--max-restarts 0");
        check(vec![error(1), error(2), error(3), error(4)], OPTIONS, Stop, "all 3 restarts");

        // What is, and how long it waits: doubling up to the longest, from the start again after progress.
        check(vec![error(5)], OPTIONS, Restart { at_ms: 51_000 }, "restart 1 of 3 in 1.0 s");
        check(vec![error(5), error(4)], OPTIONS, Restart { at_ms: 52_000 }, "restart 2 of 3");
        check(vec![error(5), error(4), error(3)], OPTIONS, Restart { at_ms: 53_000 }, "restart 3 of 3 in 3.0 s");
        check(vec![error(5), error(4), error(6)], OPTIONS, Restart { at_ms: 51_000 }, "restart 3 of 3");
        check(vec![failure(Device, 0, 5, Cause::Error)], OPTIONS, Restart { at_ms: 51_000 }, "restart 1");
        check(vec![failure(Peer, 0, 5, Cause::Error)], OPTIONS, Restart { at_ms: 51_000 }, "restart 1");

        // Repetition at the same step, not necessarily in a row.
        check(vec![error(5), error(5)], OPTIONS, Stop, "again at step 5");
        check(vec![error(5), error(6), error(5)], OPTIONS, Stop, "again at step 5");
        let crash = |step: u64| failure(Internal, 0, step, Cause::Signal(11));
        check(vec![crash(5), crash(5)], OPTIONS, Stop, "again at step 5");

        // No repetition: another rank, another way, an unknown step, a kill from outside.
        let other = failure(Internal, 1, 5, Cause::Error);
        check(vec![other, error(5)], OPTIONS, Restart { at_ms: 52_000 }, "restart 2");
        check(vec![crash(5), error(5)], OPTIONS, Restart { at_ms: 52_000 }, "restart 2");
        let early = failure(Internal, 0, None, Cause::Exit(1));
        check(vec![early.clone(), early], OPTIONS, Restart { at_ms: 52_000 }, "restart 2");
        check(vec![killed(5), killed(5)], OPTIONS, Restart { at_ms: 52_000 }, "restart 2");
    }

    #[test]
    fn a_long_row_of_restarts_does_not_overflow() {
        let failures: Vec<_> = (0..100).map(|i| failure(FailureKind::Internal, 0, 200 - i, Cause::Error)).collect();
        let state = RestartState { restarts: 99, failures };
        let options = RestartOptions { max_restarts: 1000, backoff_ms: u64::MAX / 2, max_backoff_ms: 30_000 };
        assert_eq!(decide(&state, &options, 1).0, Decision::Restart { at_ms: 30_001 });
    }
}
