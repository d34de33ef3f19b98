//! `[algorithm]`: how rewards become advantages, and the loss that reads them.
//!
//! `type` picks the algorithm; what several share are tables of their own (`policy`, `reward`, `rollout_correction`,
//! `filter_groups`), the same in each. Names and defaults are verl's where the meaning is the same; an algorithm as
//! its authors published it is a preset under `presets/algorithm/`.
//! Deliberately absent: batch sizes, epochs and learning rates, which belong to the roles that train.

mod check;
mod shared;

pub use shared::{
    AdaptiveKl, AggregationMode, CriticLoss, FilterGroups, FilterMetric, FixedKl, ImportanceLevel, KlController,
    KlType, OverlongBuffer, PolicyLoss, RewardShaping, RolloutCorrection,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[algorithm]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Algorithm {
    /// Advantage = reward relative to the group of completions of one prompt (arXiv 2402.03300); with other settings
    /// Dr. GRPO (arXiv 2503.20783) and DAPO (arXiv 2503.14476).
    Grpo(Grpo),
    /// Generalised advantage estimation with a critic (arXiv 1506.02438, 1707.06347).
    Ppo(Ppo),
    /// Advantage = reward minus the mean of the group's other completions (arXiv 2402.14740).
    Rloo(Rloo),
    /// Advantage = discounted rewards, whitened over the batch, without a critic (arXiv 2501.03262).
    ReinforcePlusPlus(ReinforcePlusPlus),
}

impl Default for Algorithm {
    fn default() -> Algorithm {
        Algorithm::Grpo(Grpo::default())
    }
}

/// Group relative policy optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Grpo {
    /// Divide by the standard deviation of the group's rewards (verl: `norm_adv_by_std_in_grpo`); Dr. GRPO does not.
    pub norm_adv_by_std: bool,
    /// The policy's loss.
    pub policy: PolicyLoss,
    /// What is added to the reward.
    pub reward: RewardShaping,
    /// Correction for the engine's distance from the trainer.
    pub rollout_correction: RolloutCorrection,
    /// Dynamic sampling.
    pub filter_groups: FilterGroups,
}

impl Default for Grpo {
    fn default() -> Grpo {
        Grpo {
            norm_adv_by_std: true,
            policy: PolicyLoss::default(),
            reward: RewardShaping::default(),
            rollout_correction: RolloutCorrection::default(),
            filter_groups: FilterGroups::default(),
        }
    }
}

/// Proximal policy optimisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ppo {
    /// Discount per policy token.
    pub gamma: f64,
    /// Bias against variance of the advantage: 0 trusts the critic, 1 the rewards.
    pub lam: f64,
    /// The critic's loss.
    pub critic: CriticLoss,
    /// The policy's loss.
    pub policy: PolicyLoss,
    /// What is added to the reward.
    pub reward: RewardShaping,
    /// Correction for the engine's distance from the trainer.
    pub rollout_correction: RolloutCorrection,
    /// Dynamic sampling.
    pub filter_groups: FilterGroups,
}

impl Default for Ppo {
    fn default() -> Ppo {
        Ppo {
            gamma: 1.0,
            lam: 1.0,
            critic: CriticLoss::default(),
            policy: PolicyLoss::default(),
            reward: RewardShaping::default(),
            rollout_correction: RolloutCorrection::default(),
            filter_groups: FilterGroups::default(),
        }
    }
}

/// REINFORCE with a leave-one-out baseline.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rloo {
    /// The policy's loss.
    pub policy: PolicyLoss,
    /// What is added to the reward.
    pub reward: RewardShaping,
    /// Correction for the engine's distance from the trainer.
    pub rollout_correction: RolloutCorrection,
    /// Dynamic sampling.
    pub filter_groups: FilterGroups,
}

/// REINFORCE++.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReinforcePlusPlus {
    /// Discount per policy token.
    pub gamma: f64,
    /// Whiten the reward less the group's mean instead of discounted rewards (verl: `reinforce_plus_plus_baseline`).
    pub baseline: bool,
    /// The policy's loss.
    pub policy: PolicyLoss,
    /// What is added to the reward.
    pub reward: RewardShaping,
    /// Correction for the engine's distance from the trainer.
    pub rollout_correction: RolloutCorrection,
    /// Dynamic sampling.
    pub filter_groups: FilterGroups,
}

impl Default for ReinforcePlusPlus {
    fn default() -> ReinforcePlusPlus {
        ReinforcePlusPlus {
            gamma: 1.0,
            baseline: false,
            policy: PolicyLoss::default(),
            reward: RewardShaping::default(),
            rollout_correction: RolloutCorrection::default(),
            filter_groups: FilterGroups::default(),
        }
    }
}

/// The tables that every algorithm has.
#[derive(Clone, Copy, Debug)]
pub struct Shared<'a> {
    /// `[algorithm.policy]`
    pub policy: &'a PolicyLoss,
    /// `[algorithm.reward]`
    pub reward: &'a RewardShaping,
    /// `[algorithm.rollout_correction]`
    pub rollout_correction: &'a RolloutCorrection,
    /// `[algorithm.filter_groups]`
    pub filter_groups: &'a FilterGroups,
}

/// What an algorithm must know of the job around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The longest completion, tokens.
    pub max_response_tokens: usize,
    /// Completions per prompt.
    pub samples_per_prompt: usize,
}

/// The fields that [`Shared`] lends, of a variant's struct.
macro_rules! shared {
    ($of:expr) => {
        Shared {
            policy: &$of.policy,
            reward: &$of.reward,
            rollout_correction: &$of.rollout_correction,
            filter_groups: &$of.filter_groups,
        }
    };
}

impl Algorithm {
    /// The tables that every algorithm has.
    pub fn shared(&self) -> Shared<'_> {
        match self {
            Algorithm::Grpo(grpo) => shared!(grpo),
            Algorithm::Ppo(ppo) => shared!(ppo),
            Algorithm::Rloo(rloo) => shared!(rloo),
            Algorithm::ReinforcePlusPlus(plus) => shared!(plus),
        }
    }

    /// Whether a critic learns beside the policy.
    pub fn needs_critic(&self) -> bool {
        match self {
            Algorithm::Ppo(_) => true,
            Algorithm::Grpo(_) | Algorithm::Rloo(_) | Algorithm::ReinforcePlusPlus(_) => false,
        }
    }

    /// Whether anything measures the distance from a frozen model.
    pub fn needs_reference(&self) -> bool {
        let shared = self.shared();
        shared.policy.use_kl_loss || shared.reward.use_kl_in_reward
    }

    /// Whether an advantage is relative to the other completions of the prompt, so that a completion without others says
    /// nothing.
    pub fn compares_group(&self) -> bool {
        match self {
            Algorithm::Grpo(_) | Algorithm::Rloo(_) => true,
            Algorithm::Ppo(_) => false,
            Algorithm::ReinforcePlusPlus(plus) => plus.baseline,
        }
    }

    /// Everything that is wrong with the values, alone or together, in words that name the key; empty: nothing.
    pub fn check(&self, limits: Limits) -> Vec<String> {
        let mut found = check::shared(self.shared(), limits);
        match self {
            Algorithm::Grpo(_) => found.extend(check::has_group("grpo", limits)),
            Algorithm::Ppo(ppo) => found.extend(check::ppo(ppo)),
            Algorithm::Rloo(_) => found.extend(check::has_group("rloo", limits)),
            Algorithm::ReinforcePlusPlus(plus) => found.extend(check::reinforce_plus_plus(plus, limits)),
        }
        found
    }
}
