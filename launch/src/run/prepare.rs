//! Preparing data before ranks start.

use super::Terminal;
use crate::error::LaunchError;
use tangelo_configs::Plan;

/// Tokenises what the job reads, or finds it done.
pub fn prepare(plan: &Plan, terminal: &Terminal, cancelled: &dyn Fn() -> bool) -> Result<(), LaunchError> {
    let _ = (plan, terminal, cancelled);
    Ok(())
}
