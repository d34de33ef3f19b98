//! What the user reads when ranks failed.

use super::culprit::{Cause, Failure};
use super::logs::{LogFolder, last_lines};
use super::supervise::Outcome;
use std::fmt::Write;

const LAST_LINES: usize = 12;

/// Who failed first, what it said, where its log is and how that ends.
pub fn report(failure: &Failure, outcome: &Outcome, logs: &LogFolder) -> String {
    let mut text = headline(failure);
    if let Some(message) = &failure.message {
        let _ = write!(text, "\n  {}", message.trim_end().replace('\n', "\n  "));
    }
    if let Some(behind) = &outcome.behind {
        text += &format!("\n  {behind}");
    }
    let log = logs.path(failure.rank);
    let _ = write!(text, "\n  log: {}", log.display());
    // A reported error is the last thing in the log; without one, the log's end is all there is.
    let reported = failure.cause == Cause::Error;
    for line in last_lines(&log, if reported { 0 } else { LAST_LINES }) {
        let _ = write!(text, "\n  | {line}");
    }
    match outcome.deaths.len().saturating_sub(1) {
        0 => {}
        1 => text += "\n  the other rank of this node ended with it",
        others => drop(write!(text, "\n  the other {others} ranks of this node ended with it")),
    }
    text
}

/// The failure in one line, for the list of events.
pub fn one_line(failure: &Failure) -> String {
    let said = failure.message.as_deref().and_then(|m| m.lines().next()).unwrap_or_default();
    if said.is_empty() { headline(failure) } else { format!("{}: {said}", headline(failure)) }
}

fn headline(failure: &Failure) -> String {
    let at = match (failure.step, &failure.cause) {
        (Some(0), _) | (None, _) => String::new(),
        (Some(step), Cause::Error) => format!(" at step {step}"),
        (Some(step), _) => format!(" after step {step}"),
    };
    let kind = failure.kind;
    let (rank, name, code) = (failure.rank, kind.name(), kind.exit_code());
    format!("rank {rank} failed first{at}: it {} ({name}, exit code {code})", failure.cause)
}
