//! What the user reads when ranks failed.

use super::culprit::{Cause, Failure};
use super::logs::{LogFolder, last_lines};
use super::standing::last_moment;
use super::supervise::Outcome;
use crate::driver::{is_rank, process_name};
use std::fmt::Write;
use tangelo_observe::FailureKind;

const LAST_LINES: usize = 12;

/// Who failed first, what it said, where its log is and how that ends. `roles` are the rank's, where it has any.
pub fn report(failure: &Failure, roles: Option<&str>, outcome: &Outcome, logs: &LogFolder) -> String {
    let mut text = headline(failure, roles, logs);
    if let Some(message) = &failure.message {
        let _ = write!(text, "\n  {}", message.trim_end().replace('\n', "\n  "));
    }
    if let Some(behind) = &outcome.behind {
        text += &format!("\n  {behind}");
    } else if let Some((rank, message)) = noticed(failure, outcome) {
        text += &format!("\n  {} noticed: {message}", process_name(rank));
    }
    let log = logs.path(failure.rank);
    let _ = write!(text, "\n  log: {}", log.display());
    // A reported error is the last thing in the log; without one, the log's end is all there is.
    let reported = failure.cause == Cause::Error;
    for line in last_lines(&log, if reported { 0 } else { LAST_LINES }) {
        let _ = write!(text, "\n  | {line}");
    }
    let others = outcome.deaths.iter().filter(|d| d.rank != failure.rank && is_rank(d.rank)).count();
    let _ = match (others, failure.rank) {
        (0, _) => Ok(()),
        (_, failed) if !is_rank(failed) => {
            write!(text, "\n  its {others} rank{} ended with it", if others == 1 { "" } else { "s" })
        }
        (1, _) => write!(text, "\n  the other rank of this node ended with it"),
        _ => write!(text, "\n  the other {others} ranks of this node ended with it"),
    };
    text
}

/// The failure in one line, for the list of events.
pub fn one_line(failure: &Failure, roles: Option<&str>, logs: &LogFolder) -> String {
    let said = failure.message.as_deref().and_then(|m| m.lines().next()).unwrap_or_default();
    let headline = headline(failure, roles, logs);
    if said.is_empty() { headline } else { format!("{headline}: {said}") }
}

/// What the first of the others said that lost this rank, where the rank itself could say nothing.
fn noticed<'a>(failure: &Failure, outcome: &'a Outcome) -> Option<(usize, &'a str)> {
    let records = outcome.deaths.iter().filter(|d| d.rank != failure.rank).filter_map(|d| d.record.as_ref());
    let first = records.filter(|r| r.kind == FailureKind::Peer).min_by_key(|r| r.unix_time_ms)?;
    failure.message.is_none().then_some((first.rank, first.message.trim_end()))
}

fn headline(failure: &Failure, roles: Option<&str>, logs: &LogFolder) -> String {
    let at = match (last_moment(failure.rank, logs), failure.step, &failure.cause) {
        (Some(moment), ..) => format!(" {moment}"),
        (None, Some(0) | None, _) => String::new(),
        (None, Some(step), Cause::Error) => format!(" at step {step}"),
        (None, Some(step), _) => format!(" after step {step}"),
    };
    let kind = failure.kind;
    let (rank, name, code) = (failure.rank, kind.name(), kind.exit_code());
    let roles = roles.map(|roles| format!(" ({roles})")).unwrap_or_default();
    let who = format!("{}{roles}", process_name(rank));
    format!("{who} failed first{at}: it {} ({name}, exit code {code})", failure.cause)
}
