//! The distance between the engine that sampled and the trainer that learns: measured, and corrected by truncated
//! importance sampling (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025;
//! IcePop: zero outside a band).

use crate::AlgoError;
use crate::row::{LogprobPair, Row};
use crate::settings::Settings;
use crate::statistics::{Merged, Quantity, Statistics};
use tangelo_configs::algorithm::{ImportanceLevel, RolloutCorrection};
use tangelo_core::Column;
use tangelo_core::loss::kl::{LOG_RATIO_BOUND, k3};

/// Means below this do not normalise, as in verl.
const LEAST_MEAN: f64 = 1e-8;

/// Whether weights are asked for.
pub fn corrects(settings: &Settings) -> bool {
    settings.rollout_correction.rollout_is != ImportanceLevel::None
}

/// Ratios of the trainer's to the engine's probability, one per policy token, before and after truncation.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// As they are, log-ratios kept within 20.
    pub raw: Vec<f64>,
    /// As they are applied, up to the mean over the batch.
    pub truncated: Vec<f64>,
}

/// The weights of a completion's tokens; a sequence's weight is the same at all of them.
pub fn weights(correction: &RolloutCorrection, logprobs: &LogprobPair) -> Weights {
    let ratios = log_ratios(logprobs);
    let raw: Vec<f64> = match correction.rollout_is {
        ImportanceLevel::None => vec![1.0; ratios.len()],
        ImportanceLevel::Token => ratios.into_iter().map(bounded_exp).collect(),
        ImportanceLevel::Sequence => vec![bounded_exp(ratios.iter().sum()); ratios.len()],
    };
    let (lower, upper) = (correction.rollout_is_threshold_lower, correction.rollout_is_threshold);
    let truncate = |&w: &f64| match lower > 0.0 {
        true if (lower..=upper).contains(&w) => w,
        true => 0.0,
        false => w.min(upper),
    };
    Weights { truncated: raw.iter().map(truncate).collect(), raw }
}

fn log_ratios(logprobs: &LogprobPair) -> Vec<f64> {
    logprobs.trainer.iter().zip(&logprobs.engine).map(|(trainer, engine)| trainer - engine).collect()
}

fn bounded_exp(log_ratio: f64) -> f64 {
    libm::exp(log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
}

/// What the weights of the batch are divided by.
pub fn normaliser(settings: &Settings, merged: &Merged) -> Result<f64, AlgoError> {
    let correction = &settings.rollout_correction;
    if !correction.rollout_is_batch_normalize {
        return Ok(1.0);
    }
    let quantity = match correction.rollout_is {
        ImportanceLevel::Sequence => Quantity::ImportanceWeightSequence,
        ImportanceLevel::Token | ImportanceLevel::None => Quantity::ImportanceWeight,
    };
    let mean = merged.moments(0, quantity)?.mean();
    Ok(if mean > LEAST_MEAN { mean } else { 1.0 })
}

/// Counts what a row tells about the distance, where it knows both log-probabilities.
pub fn observe(row: &Row, settings: &Settings, found: &mut Statistics) {
    let Some(logprobs) = row.logprobs.as_ref().filter(|pair| !pair.trainer.is_empty()) else { return };
    observe_tokens(logprobs, found);
    observe_sequence(logprobs, found);
    if corrects(settings) {
        observe_weights(&settings.rollout_correction, logprobs, found);
    }
}

fn observe_tokens(logprobs: &LogprobPair, found: &mut Statistics) {
    for (&trainer, &engine) in logprobs.trainer.iter().zip(&logprobs.engine) {
        let ratio = trainer - engine;
        let bounded = ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND);
        found.add(Quantity::RolloutKl, -ratio);
        found.add(Quantity::RolloutK3, k3(bounded));
        found.add(Quantity::RolloutSquaredRatio, libm::exp(2.0 * bounded));
        let (p, q) = (libm::exp(trainer), libm::exp(engine));
        found.add(Quantity::TrainerProbability, p);
        found.add(Quantity::RolloutProbability, q);
        found.add(Quantity::ProbabilityDifference, p - q);
        found.add(Quantity::ProbabilityDistance, (p - q).abs());
    }
}

fn observe_sequence(logprobs: &LogprobPair, found: &mut Statistics) {
    let n = logprobs.trainer.len() as f64;
    let total: f64 = log_ratios(logprobs).iter().sum();
    let bounded = total.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND);
    found.add(Quantity::RolloutSquaredRatioSequence, libm::exp(2.0 * bounded));
    let trainer = logprobs.trainer.iter().sum::<f64>() / n;
    let engine = logprobs.engine.iter().sum::<f64>() / n;
    found.add(Quantity::TrainingPerplexity, libm::exp(-trainer));
    found.add(Quantity::RolloutPerplexity, libm::exp(-engine));
    found.add(Quantity::LogPerplexityDifference, engine - trainer);
    found.add(Quantity::PerplexityRatio, libm::exp(engine - trainer));
}

fn observe_weights(correction: &RolloutCorrection, logprobs: &LogprobPair, found: &mut Statistics) {
    let Weights { raw, truncated } = weights(correction, logprobs);
    let (lower, upper) = (correction.rollout_is_threshold_lower, correction.rollout_is_threshold);
    let low = if lower > 0.0 { lower } else { 1.0 / upper };
    for (&raw, &truncated) in raw.iter().zip(&truncated) {
        found.add(Quantity::ImportanceWeight, truncated);
        found.add(Quantity::RawImportanceWeight, raw);
        found.add(Quantity::ImportanceOutOfBounds, f64::from(raw > upper || raw < lower));
    }
    // All tokens of a sequence share its weight, which counts once.
    let sequence = correction.rollout_is == ImportanceLevel::Sequence;
    for &raw in &raw[..if sequence { 1 } else { raw.len() }] {
        found.add(Quantity::ImportanceHigh, f64::from(raw > upper));
        found.add(Quantity::ImportanceLow, f64::from(raw < low));
    }
    if sequence {
        found.add(Quantity::ImportanceWeightSequence, truncated[0]);
    }
}

/// The weights that a row's tokens get in the loss.
pub(crate) fn applied(row: &Row, settings: &Settings, normaliser: f64) -> Result<Vec<f64>, AlgoError> {
    // Row::logprobs is there whenever `corrects`: its columns were required.
    let missing = || AlgoError::Batch(tangelo_core::BatchError::Missing(Column::RolloutLogprob));
    let logprobs = row.logprobs.as_ref().ok_or_else(missing)?;
    let mut weights = weights(&settings.rollout_correction, logprobs).truncated;
    weights.iter_mut().for_each(|w| *w /= normaliser);
    Ok(weights)
}
