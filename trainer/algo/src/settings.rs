//! What every algorithm is told: the shared tables of its configuration, and the limits of the job.

use tangelo_configs::algorithm::{
    AggregationMode, Algorithm, FilterGroups, Limits, PolicyLoss, RewardShaping, RolloutCorrection,
};
use tangelo_core::{Aggregation, LossComponent, LossSpec};

/// The shared tables of an algorithm's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The policy's loss.
    pub policy: PolicyLoss,
    /// What is added to the reward.
    pub reward: RewardShaping,
    /// Correction for the engine's distance from the trainer.
    pub rollout_correction: RolloutCorrection,
    /// Dynamic sampling.
    pub filter_groups: FilterGroups,
    /// Whether a critic learns beside the policy.
    pub has_critic: bool,
    /// What the job allows.
    pub limits: Limits,
}

impl Settings {
    /// The shared tables of a configuration.
    pub fn of(config: &Algorithm, limits: Limits) -> Settings {
        let shared = config.shared();
        Settings {
            policy: shared.policy.clone(),
            reward: shared.reward.clone(),
            rollout_correction: shared.rollout_correction.clone(),
            filter_groups: shared.filter_groups.clone(),
            has_critic: config.needs_critic(),
            limits,
        }
    }

    /// The constant of `seq-mean-token-sum-norm` falls back to the longest completion, never to a padded width.
    pub(crate) fn aggregation(&self, mode: AggregationMode, scale: Option<f64>) -> Aggregation {
        mode.resolve(scale, self.limits.max_response_tokens)
    }

    /// The policy's loss: the clipped surrogate, minus the entropy bonus, plus the distance from the reference. The entropy
    /// is measured in any case; with a coefficient of 0 it changes no bit of loss or gradient.
    pub fn policy_loss(&self) -> LossSpec {
        let policy = &self.policy;
        let aggregation = self.aggregation(policy.loss_agg_mode, policy.loss_scale_factor);
        let mut components = vec![LossComponent::PolicyGradient {
            clip_low: policy.clip_ratio_low,
            clip_high: policy.clip_ratio_high,
            clip_dual: (policy.clip_ratio_c > 0.0).then_some(policy.clip_ratio_c),
            corrects_rollout: crate::rollout_correction::corrects(self),
            aggregation,
        }];
        components.push(LossComponent::Entropy { coefficient: policy.entropy_coeff, aggregation });
        if policy.use_kl_loss {
            components.push(LossComponent::Kl {
                estimator: policy.kl_loss_type.estimator(),
                straight_through: policy.kl_loss_type.straight_through(),
                coefficient: policy.kl_loss_coef,
                aggregation,
            });
        }
        LossSpec::new(components)
    }
}
