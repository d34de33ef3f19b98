//! REINFORCE leave-one-out (Ahmadian et al., arXiv 2402.14740).
//!
//! A completion's advantage at every token is its reward minus the mean reward of the prompt's other completions.

use crate::algorithm::{Algorithm, Estimate};
use crate::row::Row;
use crate::settings::Settings;
use crate::statistics::{Merged, Statistics};
use crate::{AlgoError, group};

/// RLOO with its settings.
#[derive(Clone, Debug)]
pub struct Rloo {
    settings: Settings,
}

impl Rloo {
    /// From the shared settings; it has none of its own.
    pub fn new(settings: Settings) -> Rloo {
        Rloo { settings }
    }
}

impl Algorithm for Rloo {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn observe(&self, row: &Row, _merged: &Merged, found: &mut Statistics) -> Result<(), AlgoError> {
        found.add_to_group(row.sample.group, row.reward);
        Ok(())
    }

    fn estimate(&self, row: &Row, merged: &Merged) -> Result<Estimate, AlgoError> {
        let of_prompt = merged.group(row.sample.group)?;
        Ok(Estimate::same_for_all(row, group::leave_one_out(of_prompt, row.reward)))
    }
}
