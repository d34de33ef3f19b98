//! What an algorithm remembers between batches. It is small, serialisable and belongs into the checkpoint.

use crate::settings::Settings;
use serde::{Deserialize, Serialize};

/// An algorithm's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Batches scored.
    pub batches: u64,
    /// Sequences scored.
    pub sequences: u64,
    /// Multiplies the KL in the reward.
    pub kl_coef: f64,
}

impl State {
    /// Before the first batch.
    pub fn initial(settings: &Settings) -> State {
        State { batches: 0, sequences: 0, kl_coef: settings.reward.kl_ctrl.kl_coef() }
    }
}
