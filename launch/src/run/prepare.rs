//! Preparing data before ranks start. Any number of nodes and runs may do so at once: the data room lets one work and
//! the others wait, and what is done is found done. Of the ranks of a node that another launcher started, one does.

use super::{Terminal, short_count};
use crate::error::LaunchError;
use crate::progress::DataProgress;
use std::time::{Duration, Instant};
use tangelo_configs::Plan;
use tangelo_data::{prepare_job, wait_for_job};

/// Tokenises what the job reads, or finds it done.
pub fn prepare(plan: &Plan, terminal: &Terminal, cancelled: &dyn Fn() -> bool) -> Result<(), LaunchError> {
    let begun = Instant::now();
    let prepared = prepare_job(&plan.config, &DataProgress::new(terminal, cancelled));
    terminal.clear();
    let prepared = prepared?;
    let (tokens, seconds) = (short_count(prepared.tokens() as f64), begun.elapsed().as_secs_f64());
    let sources = prepared.sources.len();
    let trained = prepared.trained_tokens().map(|count| format!(", {} of them trained", short_count(count as f64)));
    let trained = trained.unwrap_or_default();
    terminal.say(&format!("data: {tokens} tokens of {sources} source(s){trained}, ready after {seconds:.1} s"));
    Ok(())
}

/// Waits until the first rank of this node has prepared what the job reads.
pub fn wait(plan: &Plan, terminal: &Terminal) -> Result<(), LaunchError> {
    // Nobody at work for as long as ranks wait for each other at the start: the first rank is gone.
    let patience = Duration::from_secs(plan.config.comm.init_timeout_seconds);
    Ok(wait_for_job(&plan.config, patience, &DataProgress::new(terminal, &|| false))?)
}
