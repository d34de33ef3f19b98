//! Rules on the values of `[algorithm]`. Every message names the key, shows the numbers and says what to do.

use super::{
    AggregationMode, FilterGroups, KlController, Limits, PolicyLoss, Ppo, ReinforcePlusPlus, RewardShaping,
    RolloutCorrection, Shared,
};
use crate::check::Found;

pub(super) fn shared(tables: Shared<'_>, limits: Limits) -> Vec<String> {
    let mut found = Found::default();
    policy(&mut found, tables.policy);
    reward(&mut found, tables.reward, limits);
    correction(&mut found, tables.rollout_correction);
    groups(&mut found, tables.filter_groups, limits);
    found.into_messages()
}

/// For algorithms whose baseline is the rest of the group.
pub(super) fn has_group(name: &str, limits: Limits) -> Vec<String> {
    let mut found = Found::default();
    let n = limits.samples_per_prompt;
    found.require(n >= 2, || {
        format!(
            "`algorithm.type` = \"{name}\" compares the completions of one prompt, but there is {n} per prompt; \
             generate at least 2"
        )
    });
    found.into_messages()
}

pub(super) fn ppo(ppo: &Ppo) -> Vec<String> {
    let mut found = Found::default();
    found.unit("algorithm.gamma", ppo.gamma);
    found.unit("algorithm.lam", ppo.lam);
    found.not_negative("algorithm.critic.cliprange_value", ppo.critic.cliprange_value);
    scale(&mut found, "algorithm.critic", ppo.critic.loss_agg_mode, ppo.critic.loss_scale_factor);
    found.into_messages()
}

pub(super) fn reinforce_plus_plus(plus: &ReinforcePlusPlus, limits: Limits) -> Vec<String> {
    let mut found = Found::default();
    found.unit("algorithm.gamma", plus.gamma);
    found.require(!plus.baseline || plus.gamma == 1.0, || {
        format!(
            "`algorithm.gamma` = {} has no effect with `algorithm.baseline`, whose advantage is the same at every token; \
             remove one of them",
            plus.gamma
        )
    });
    let mut found = found.into_messages();
    if plus.baseline {
        found.extend(has_group("reinforce_plus_plus", limits));
    }
    found
}

fn policy(found: &mut Found, p: &PolicyLoss) {
    found.require((0.0..1.0).contains(&p.clip_ratio_low), || {
        format!(
            "`algorithm.policy.clip_ratio_low` = {}; it must be in [0, 1), for a ratio is never below 0",
            p.clip_ratio_low
        )
    });
    found.not_negative("algorithm.policy.clip_ratio_high", p.clip_ratio_high);
    found.require(p.clip_ratio_c == 0.0 || (p.clip_ratio_c.is_finite() && p.clip_ratio_c > 1.0), || {
        format!(
            "`algorithm.policy.clip_ratio_c` = {}; the dual clip's bound must be above 1, or 0 for none",
            p.clip_ratio_c
        )
    });
    scale(found, "algorithm.policy", p.loss_agg_mode, p.loss_scale_factor);
    found.not_negative("algorithm.policy.entropy_coeff", p.entropy_coeff);
    found.not_negative("algorithm.policy.kl_loss_coef", p.kl_loss_coef);
}

fn scale(found: &mut Found, table: &str, mode: AggregationMode, factor: Option<f64>) {
    let Some(factor) = factor else { return };
    found.positive(&format!("{table}.loss_scale_factor"), factor);
    found.require(mode == AggregationMode::SeqMeanTokenSumNorm, || {
        format!(
            "`{table}.loss_scale_factor` = {factor} has no effect on this `{table}.loss_agg_mode`; remove it, or set \
             the mode to \"seq-mean-token-sum-norm\""
        )
    });
}

fn reward(found: &mut Found, r: &RewardShaping, limits: Limits) {
    found.require(!r.kl_penalty.straight_through(), || {
        "`algorithm.reward.kl_penalty` ends in `+`, which names a gradient; a reward has none: remove the `+`".into()
    });
    found.not_negative("algorithm.reward.kl_ctrl.kl_coef", r.kl_ctrl.kl_coef());
    if let KlController::Adaptive(adaptive) = &r.kl_ctrl {
        found.positive("algorithm.reward.kl_ctrl.target_kl", adaptive.target_kl);
        found.positive("algorithm.reward.kl_ctrl.horizon", adaptive.horizon);
    }
    let buffer = &r.overlong_buffer;
    found.not_negative("algorithm.reward.overlong_buffer.penalty_factor", buffer.penalty_factor);
    let longest = limits.max_response_tokens;
    found.require(!buffer.enable || (1..=longest).contains(&buffer.len), || {
        format!(
            "`algorithm.reward.overlong_buffer.len` = {}; it must be from 1 to the longest completion allowed, \
             {longest} tokens",
            buffer.len
        )
    });
}

fn correction(found: &mut Found, c: &RolloutCorrection) {
    found.positive("algorithm.rollout_correction.rollout_is_threshold", c.rollout_is_threshold);
    let (lower, upper) = (c.rollout_is_threshold_lower, c.rollout_is_threshold);
    found.require((0.0..=upper).contains(&lower), || {
        format!(
            "`algorithm.rollout_correction.rollout_is_threshold_lower` = {lower}; it must be from 0 to \
             `rollout_is_threshold` = {upper}"
        )
    });
}

fn groups(found: &mut Found, filter: &FilterGroups, limits: Limits) {
    let n = limits.samples_per_prompt;
    found.require(!filter.enable || n >= 2, || {
        format!(
            "`algorithm.filter_groups.enable` drops groups without differences, but there is {n} completion per \
             prompt; generate at least 2, or switch it off"
        )
    });
}
