//! Group relative policy optimisation (Shao et al., DeepSeekMath, arXiv 2402.03300).
//!
//! A completion's advantage at every token is its reward relative to those of the same prompt: minus their mean,
//! divided by their standard deviation. Dr. GRPO (arXiv 2503.20783) does not divide; DAPO (arXiv 2503.14476) adds
//! settings of the shared tables.

use crate::algorithm::{Algorithm, Estimate};
use crate::row::Row;
use crate::settings::Settings;
use crate::statistics::{Merged, Statistics};
use crate::{AlgoError, group};
use tangelo_configs::algorithm::Grpo as Config;

/// GRPO with its settings.
#[derive(Clone, Debug)]
pub struct Grpo {
    config: Config,
    settings: Settings,
}

impl Grpo {
    /// From its configuration.
    pub fn new(config: &Config, settings: Settings) -> Grpo {
        Grpo { config: config.clone(), settings }
    }
}

impl Algorithm for Grpo {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn observe(&self, row: &Row, _merged: &Merged, found: &mut Statistics) -> Result<(), AlgoError> {
        found.add_to_group(row.sample.group, row.reward);
        Ok(())
    }

    fn estimate(&self, row: &Row, merged: &Merged) -> Result<Estimate, AlgoError> {
        let of_prompt = merged.group(row.sample.group)?;
        let relative = if self.config.norm_adv_by_std { group::standardised } else { group::centered };
        Ok(Estimate::same_for_all(row, relative(of_prompt, row.reward)))
    }
}
