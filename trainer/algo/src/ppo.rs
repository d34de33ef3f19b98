//! Proximal policy optimisation (Schulman et al., arXiv 1707.06347) with a critic.
//!
//! Advantages are generalised advantage estimates over the policy's tokens, whitened over the batch; returns are the
//! estimates before whitening plus the critic's values.

use crate::AlgoError;
use crate::algorithm::{Algorithm, Estimate, Role};
use crate::row::Row;
use crate::settings::Settings;
use crate::state::State;
use crate::statistics::{Merged, Quantity, Statistics};
use crate::{gae, whiten::Whitening};
use tangelo_configs::algorithm::Ppo as Config;
use tangelo_core::{BatchError, Column, LossComponent, LossSpec};

/// PPO with its settings.
#[derive(Clone, Debug)]
pub struct Ppo {
    config: Config,
    settings: Settings,
}

impl Ppo {
    /// From its configuration.
    pub fn new(config: &Config, settings: Settings) -> Ppo {
        Ppo { config: config.clone(), settings }
    }

    fn advantages(&self, row: &Row) -> Result<(Vec<f64>, Vec<f64>), AlgoError> {
        let values = row.values.as_ref().ok_or(BatchError::Missing(Column::Value))?;
        Ok(gae::advantages(&row.rewards, values, self.config.gamma, self.config.lam))
    }
}

impl Algorithm for Ppo {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn observe(&self, row: &Row, _merged: &Merged, found: &mut Statistics) -> Result<(), AlgoError> {
        let (advantages, _) = self.advantages(row)?;
        // Whitening is over what counts in the loss.
        advantages.iter().filter(|_| row.kept).for_each(|&a| found.add(Quantity::Unwhitened, a));
        Ok(())
    }

    fn estimate(&self, row: &Row, merged: &Merged) -> Result<Estimate, AlgoError> {
        let (advantages, returns) = self.advantages(row)?;
        let whitening = Whitening::of(&merged.moments(0, Quantity::Unwhitened)?);
        Ok(Estimate { advantages: advantages.into_iter().map(|a| whitening.apply(a)).collect(), returns })
    }

    fn loss(&self, role: Role, _state: &State) -> Option<LossSpec> {
        let critic = &self.config.critic;
        match role {
            Role::Policy => Some(self.settings.policy_loss()),
            Role::Critic => Some(LossSpec::new(vec![LossComponent::Value {
                // f64::MAX clips nothing and, unlike infinity, survives every format a loss may travel in.
                clip: if critic.cliprange_value > 0.0 { critic.cliprange_value } else { f64::MAX },
                coefficient: 1.0,
                aggregation: self.settings.aggregation(critic.loss_agg_mode, critic.loss_scale_factor),
            }])),
        }
    }
}
