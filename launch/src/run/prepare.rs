//! Preparing data before ranks start. Any number of ranks, nodes and runs may do so at once: the data room lets one
//! work and the others wait, and what is done is found done.

use super::{Terminal, short_count};
use crate::error::LaunchError;
use crate::progress::DataProgress;
use std::time::Instant;
use tangelo_configs::Plan;
use tangelo_data::prepare_job;

/// Tokenises what the job reads, or finds it done.
pub fn prepare(plan: &Plan, terminal: &Terminal, cancelled: &dyn Fn() -> bool) -> Result<(), LaunchError> {
    let begun = Instant::now();
    let prepared = prepare_job(&plan.config, &DataProgress::new(terminal, cancelled));
    terminal.clear();
    let prepared = prepared?;
    let (tokens, seconds) = (short_count(prepared.tokens() as f64), begun.elapsed().as_secs_f64());
    let sources = prepared.sources.len();
    terminal.say(&format!("data: {tokens} tokens of {sources} source(s), ready after {seconds:.1} s"));
    Ok(())
}
