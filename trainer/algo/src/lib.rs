//! Reinforcement-learning algorithms: which columns they write, from which, and the loss that reads them.
//!
//! One file per algorithm (`grpo`, `ppo`, `rloo`, `reinforce_plus_plus`), on top of shared mathematics: exact sums, statistics of
//! shards that merge in any order, baselines of groups, generalised advantages, whitening, KL, overlong punishment,
//! correction for the engine. [`mod@algorithm`] tells how they are run.
//!
//! Invariants: pure functions of batches; no IO, no clock, no tensors, no randomness. Advantages, weights and masks
//! are bitwise the same whatever the sharding, order and padding of the batch. Everything is computed in f64 and
//! rounded once to f32; `exp` is libm's in Rust, so its bits do not depend on the machine's C library.
//! Deliberately absent: the losses themselves, which the trainer computes from the [`LossSpec`](tangelo_core::LossSpec).

pub mod algorithm;
mod call;
mod error;
pub mod exact;
pub mod filter_groups;
pub mod gae;
pub mod group;
pub mod grpo;
pub mod kl;
mod metrics;
pub mod overlong;
pub mod ppo;
pub mod reinforce_plus_plus;
pub mod rloo;
pub mod rollout_correction;
pub mod row;
pub mod settings;
pub mod state;
pub mod statistics;
pub mod whiten;

pub use algorithm::{Algorithm, Estimate, Role, Scored};
pub use call::Call;
pub use error::{AlgoError, Sample};
pub use exact::ExactSum;
pub use filter_groups::Selection;
pub use settings::Settings;
pub use state::State;
pub use statistics::{Merged, Statistics};
pub use tangelo_configs::algorithm::Limits;

use tangelo_configs::Algorithm as Config;

/// The algorithm that a configuration asks for. Fails with everything that is wrong with it.
pub fn algorithm(config: &Config, limits: Limits) -> Result<Box<dyn Algorithm>, AlgoError> {
    let wrong = config.check(limits);
    if !wrong.is_empty() {
        return Err(AlgoError::Settings(wrong));
    }
    let settings = Settings::of(config, limits);
    Ok(match config {
        Config::Grpo(grpo) => Box::new(grpo::Grpo::new(grpo, settings)),
        Config::Ppo(ppo) => Box::new(ppo::Ppo::new(ppo, settings)),
        Config::Rloo(_) => Box::new(rloo::Rloo::new(settings)),
        Config::ReinforcePlusPlus(plus) => Box::new(reinforce_plus_plus::ReinforcePlusPlus::new(plus, settings)),
    })
}
