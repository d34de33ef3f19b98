//! REINFORCE++ (Hu et al., arXiv 2501.03262).
//!
//! A token's advantage is the discounted sum of the rewards from it on, whitened over the batch. In its baseline form
//! the reward of the completion less the mean of its prompt's, the same at every token, is whitened instead.

use crate::algorithm::{Algorithm, Estimate};
use crate::row::Row;
use crate::settings::Settings;
use crate::statistics::{Merged, Quantity, Statistics};
use crate::whiten::Whitening;
use crate::{AlgoError, gae, group};
use tangelo_configs::algorithm::ReinforcePlusPlus as Config;

/// REINFORCE++ with its settings.
#[derive(Clone, Debug)]
pub struct ReinforcePlusPlus {
    config: Config,
    settings: Settings,
}

impl ReinforcePlusPlus {
    /// From its configuration.
    pub fn new(config: &Config, settings: Settings) -> ReinforcePlusPlus {
        ReinforcePlusPlus { config: config.clone(), settings }
    }

    /// What is whitened, per policy token.
    fn returns(&self, row: &Row, merged: &Merged) -> Result<Vec<f64>, AlgoError> {
        let num_tokens = row.tokens.len();
        if self.config.baseline {
            return Ok(vec![group::centered(merged.group(row.sample.group)?, row.reward); num_tokens]);
        }
        // Without a critic and with lambda 1, generalised advantages are discounted sums.
        Ok(gae::advantages(&row.rewards, &vec![0.0; num_tokens], self.config.gamma, 1.0).0)
    }
}

impl Algorithm for ReinforcePlusPlus {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    /// With a baseline, groups' means come first.
    fn rounds(&self) -> usize {
        1 + usize::from(self.config.baseline)
    }

    fn observe(&self, row: &Row, merged: &Merged, found: &mut Statistics) -> Result<(), AlgoError> {
        if merged.rounds() + 1 < self.rounds() {
            found.add_to_group(row.sample.group, row.reward);
        } else if row.kept {
            self.returns(row, merged)?.into_iter().for_each(|g| found.add(Quantity::Unwhitened, g));
        }
        Ok(())
    }

    fn estimate(&self, row: &Row, merged: &Merged) -> Result<Estimate, AlgoError> {
        let returns = self.returns(row, merged)?;
        let whitening = Whitening::of(&merged.moments(self.rounds() - 1, Quantity::Unwhitened)?);
        Ok(Estimate { advantages: returns.iter().map(|&g| whitening.apply(g)).collect(), returns })
    }
}
