//! Named values of a batch. Names are those that verl logs, so that dashboards carry over; those of our own say so.

use crate::AlgoError;
use crate::group::is_flat;
use crate::settings::Settings;
use crate::state::State;
use crate::statistics::{Moments, Quantity, Statistics};
use std::collections::BTreeMap;
use tangelo_configs::algorithm::ImportanceLevel;

/// Quantities of the statistics reported as `name/mean`, `name/max` and `name/min`.
const SUMMARIES: [(Quantity, &str); 5] = [
    (Quantity::Score, "critic/score"),
    (Quantity::Reward, "critic/rewards"),
    (Quantity::PromptLength, "prompt_length"),
    (Quantity::ResponseLength, "response_length"),
    (Quantity::ResponseLengthNonAborted, "response_length_non_aborted"),
];

/// The same of what was written.
const REPORTED: [(Quantity, &str); 2] =
    [(Quantity::Advantage, "critic/advantages"), (Quantity::Return, "critic/returns")];

/// Quantities of which the mean is reported, and what is added to it.
const MEANS: [(Quantity, &str, f64); 13] = [
    (Quantity::ResponseClipped, "response_length/clip_ratio", 0.0),
    (Quantity::ResponseClippedNonAborted, "response_length_non_aborted/clip_ratio", 0.0),
    (Quantity::Aborted, "response/aborted_ratio", 0.0),
    (Quantity::RewardKl, "actor/reward_kl_penalty", 0.0),
    (Quantity::RolloutKl, "rollout_corr/kl", 0.0),
    (Quantity::RolloutK3, "rollout_corr/k3_kl", 0.0),
    (Quantity::TrainingPerplexity, "rollout_corr/training_ppl", 0.0),
    (Quantity::RolloutPerplexity, "rollout_corr/rollout_ppl", 0.0),
    (Quantity::PerplexityRatio, "rollout_corr/ppl_ratio", 0.0),
    (Quantity::LogPerplexityDifference, "rollout_corr/log_ppl_diff", 0.0),
    (Quantity::RolloutSquaredRatio, "rollout_corr/chi2_token", -1.0),
    (Quantity::RolloutSquaredRatioSequence, "rollout_corr/chi2_seq", -1.0),
    (Quantity::ProbabilityDistance, "training/rollout_probs_diff_mean", 0.0),
];

/// The metrics of a batch from its first round and the merged reports.
pub(crate) fn metrics(
    settings: &Settings,
    has_critic: bool,
    state: &State,
    first: &Statistics,
    report: &Statistics,
) -> Result<BTreeMap<String, f64>, AlgoError> {
    let mut all = Named::default();
    for (quantity, name) in SUMMARIES {
        all.summary(name, first.get(quantity));
    }
    for (quantity, name) in REPORTED {
        all.summary(name, report.get(quantity));
    }
    for (quantity, name, plus) in MEANS {
        all.extend(first.get(quantity).map(|moments| (name, moments.mean() + plus)));
    }
    if settings.reward.use_kl_in_reward {
        all.put("actor/reward_kl_penalty_coeff", state.kl_coef);
    }
    let flat = first.groups().values().filter(|group| is_flat(group)).count();
    if !first.groups().is_empty() {
        all.put("critic/groups/flat_ratio", flat as f64 / first.groups().len() as f64);
    }
    if has_critic {
        critic(&mut all, report);
    }
    probabilities(&mut all, first);
    weights(&mut all, settings, first);
    Ok(all.values)
}

fn critic(all: &mut Named, report: &Statistics) {
    all.summary("critic/values", report.get(Quantity::Value));
    if let (Some(returns), Some(errors)) = (report.get(Quantity::Return), report.get(Quantity::ValueError)) {
        all.put("critic/vf_explained_var", 1.0 - errors.variance() / (returns.variance() + 1e-5));
    }
}

/// How the probabilities that engine and trainer give the same tokens differ.
fn probabilities(all: &mut Named, first: &Statistics) {
    let [Some(distance), Some(difference), Some(trainer), Some(engine)] = [
        Quantity::ProbabilityDistance,
        Quantity::ProbabilityDifference,
        Quantity::TrainerProbability,
        Quantity::RolloutProbability,
    ]
    .map(|quantity| first.get(quantity)) else {
        return;
    };
    all.put("training/rollout_probs_diff_max", distance.range().map_or(0.0, |(_, high)| high));
    all.put("training/rollout_probs_diff_std", distance.variance().sqrt());
    // var(p - q) = var p + var q - 2 cov(p, q).
    let (p, q) = (trainer.variance(), engine.variance());
    if p > 0.0 && q > 0.0 {
        let covariance = (p + q - difference.variance()) / 2.0;
        all.put("training/rollout_actor_probs_pearson_corr", covariance / (p * q).sqrt());
    }
}

fn weights(all: &mut Named, settings: &Settings, first: &Statistics) {
    let correction = &settings.rollout_correction;
    let [Some(applied), Some(raw), Some(high), Some(low), Some(outside)] = [
        Quantity::ImportanceWeight,
        Quantity::RawImportanceWeight,
        Quantity::ImportanceHigh,
        Quantity::ImportanceLow,
        Quantity::ImportanceOutOfBounds,
    ]
    .map(|quantity| first.get(quantity)) else {
        return;
    };
    let name = |what: &str| format!("rollout_corr/rollout_is_{what}");
    all.put(name("mean"), applied.mean());
    // A sequence's extremes are those before truncation, as in verl.
    let extremes = if correction.rollout_is == ImportanceLevel::Sequence { raw } else { applied };
    if let Some((least, greatest)) = extremes.range() {
        all.put(name("min"), least);
        all.put(name("max"), greatest);
    }
    all.put(name("std"), applied.population_variance().sqrt());
    let normalised = applied.mean_square() / (applied.mean() + 1e-8).powi(2);
    if normalised > 0.0 {
        all.put(name("eff_sample_size"), 1.0 / normalised);
    }
    all.put(name("ratio_fraction_high"), high.mean());
    all.put(name("ratio_fraction_low"), low.mean());
    if correction.rollout_is_threshold_lower > 0.0 {
        all.put(name("oob_ratio"), outside.mean());
    }
}

#[derive(Default)]
struct Named {
    values: BTreeMap<String, f64>,
}

impl Named {
    fn put(&mut self, name: impl Into<String>, value: f64) {
        self.values.insert(name.into(), value);
    }

    fn extend(&mut self, value: Option<(&str, f64)>) {
        if let Some((name, value)) = value {
            self.put(name, value);
        }
    }

    fn summary(&mut self, name: &str, moments: Option<&Moments>) {
        let Some((moments, (low, high))) = moments.and_then(|m| Some((m, m.range()?))) else { return };
        self.put(format!("{name}/mean"), moments.mean());
        self.put(format!("{name}/max"), high);
        self.put(format!("{name}/min"), low);
    }
}
