//! What a shard tells about itself, and what the driver makes of it.
//!
//! Invariant: merging is exact and commutative, so statistics of a batch are the same numbers however its rows were
//! dealt to shards, ordered or padded.

use crate::AlgoError;
use crate::exact::ExactSum;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What is counted. One value per policy token or per sequence, as each says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Reward as given, per sequence that has policy tokens.
    Score,
    /// Reward with overlong penalty and KL, per sequence that has policy tokens.
    Reward,
    /// Tokens from the first to the last policy token, per sequence.
    ResponseLength,
    /// The same of sequences that have policy tokens.
    ResponseLengthNonAborted,
    /// 1 where the completion reached the longest allowed, per sequence.
    ResponseClipped,
    /// The same of sequences that have policy tokens.
    ResponseClippedNonAborted,
    /// 1 where there is no policy token, per sequence.
    Aborted,
    /// Tokens before the first policy token, per sequence that has any.
    PromptLength,
    /// Mean over its policy tokens of the KL that the reward pays for, per sequence that has any.
    RewardKl,
    /// Engine's minus trainer's log-probability, per token.
    RolloutKl,
    /// The k3 estimate of the same, per token.
    RolloutK3,
    /// Squared ratio of trainer's to engine's probability, per token.
    RolloutSquaredRatio,
    /// The same of whole completions, per sequence.
    RolloutSquaredRatioSequence,
    /// Perplexity of a completion under the trainer's policy, per sequence.
    TrainingPerplexity,
    /// Perplexity of a completion under the engine's policy, per sequence.
    RolloutPerplexity,
    /// Engine's minus trainer's mean log-probability, per sequence.
    LogPerplexityDifference,
    /// Ratio of the perplexities, per sequence.
    PerplexityRatio,
    /// Probability as the engine saw it, per token.
    RolloutProbability,
    /// Probability as the trainer saw it, per token.
    TrainerProbability,
    /// Difference of the two, per token.
    ProbabilityDifference,
    /// Size of that difference, per token.
    ProbabilityDistance,
    /// Importance weight after truncation, per token.
    ImportanceWeight,
    /// The same, one per sequence that has policy tokens.
    ImportanceWeightSequence,
    /// Importance weight before truncation, per token.
    RawImportanceWeight,
    /// 1 where that is above the threshold, per token or sequence, whichever has the weight.
    ImportanceHigh,
    /// 1 where it is below the lower bound (IcePop's, or the threshold's inverse), per token or sequence.
    ImportanceLow,
    /// 1 where IcePop zeroes, per token.
    ImportanceOutOfBounds,
    /// What an algorithm is going to whiten, per token that counts in the loss.
    Unwhitened,
    /// Advantage, per token that counts in the loss.
    Advantage,
    /// Return, per token that counts in the loss.
    Return,
    /// Critic's value, per token that counts in the loss.
    Value,
    /// Return minus value, per token that counts in the loss.
    ValueError,
}

/// Count, exact sums of values and of their squares, least and greatest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    count: u64,
    sum: ExactSum,
    squares: ExactSum,
    range: Option<(f64, f64)>,
}

impl Moments {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        self.count += 1;
        self.sum.add(value);
        self.squares.add_product(value, value);
        self.widen((value, value));
    }

    /// Adds another's values.
    pub fn merge(&mut self, other: &Moments) {
        self.count += other.count;
        self.sum.merge(&other.sum);
        self.squares.merge(&other.squares);
        if let Some(range) = other.range {
            self.widen(range);
        }
    }

    fn widen(&mut self, (low, high): (f64, f64)) {
        // + 0.0 makes one zero of the two, which compare equal but print and serialise differently.
        let (low, high) = (low + 0.0, high + 0.0);
        self.range = Some(self.range.map_or((low, high), |(l, h)| (l.min(low), h.max(high))));
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The sum, rounded once.
    pub fn sum(&self) -> f64 {
        self.sum.value()
    }

    /// The mean; 0 of no values.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum() / self.count as f64 }
    }

    /// The mean of squares; 0 of no values.
    pub fn mean_square(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.squares.value() / self.count as f64 }
    }

    /// The least and the greatest value.
    pub fn range(&self) -> Option<(f64, f64)> {
        self.range
    }

    /// Sum of squared distances from the mean, times the count: rounded once, so that nothing cancels.
    fn spread(&self) -> f64 {
        self.squares.times(self.count as f64).minus(&self.sum.squared()).value()
    }

    /// The variance with n - 1 below; 0 of fewer than two values.
    pub fn variance(&self) -> f64 {
        let n = self.count as f64;
        if self.count < 2 { 0.0 } else { self.spread() / (n * (n - 1.0)) }
    }

    /// The variance with n below; 0 of no values.
    pub fn population_variance(&self) -> f64 {
        let n = self.count as f64;
        if self.count == 0 { 0.0 } else { self.spread() / (n * n) }
    }

    /// The mean, to subtract from values.
    pub fn center(&self) -> Center {
        if self.count == 0 {
            return Center { high: 0.0, low: 0.0 };
        }
        let n = self.count as f64;
        let high = self.sum.value() / n;
        let mut rest = self.sum.clone();
        rest.add_product(-high, n);
        Center { high, low: rest.value() / n }
    }
}

/// A mean to twice f64's precision, so that a value that all values are equal to is at distance 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Center {
    high: f64,
    low: f64,
}

impl Center {
    /// A value's distance from the mean.
    pub fn deviation(self, value: f64) -> f64 {
        (value - self.high) - self.low
    }
}

/// What one round found out about a shard, or about several once merged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    sequences: u64,
    quantities: BTreeMap<Quantity, Moments>,
    groups: BTreeMap<i64, Moments>,
}

impl Statistics {
    /// Counts a sequence.
    pub fn add_sequence(&mut self) {
        self.sequences += 1;
    }

    /// Adds a value.
    pub fn add(&mut self, quantity: Quantity, value: f64) {
        self.quantities.entry(quantity).or_default().add(value);
    }

    /// Adds a completion's value to its group.
    pub fn add_to_group(&mut self, group: i64, value: f64) {
        self.groups.entry(group).or_default().add(value);
    }

    /// Adds another shard's.
    pub fn merge(&mut self, other: &Statistics) {
        self.sequences += other.sequences;
        for (&quantity, moments) in &other.quantities {
            self.quantities.entry(quantity).or_default().merge(moments);
        }
        for (&group, moments) in &other.groups {
            self.groups.entry(group).or_default().merge(moments);
        }
    }

    /// All shards' in one.
    pub fn merged<'a>(shards: impl IntoIterator<Item = &'a Statistics>) -> Statistics {
        let mut all = Statistics::default();
        shards.into_iter().for_each(|shard| all.merge(shard));
        all
    }

    /// Number of sequences.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// What is known of a quantity, if it had any values.
    pub fn get(&self, quantity: Quantity) -> Option<&Moments> {
        self.quantities.get(&quantity)
    }

    /// The groups and what is known of each.
    pub fn groups(&self) -> &BTreeMap<i64, Moments> {
        &self.groups
    }
}

/// The merged statistics of the rounds so far, in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Merged {
    rounds: Vec<Statistics>,
}

impl Merged {
    /// Appends a round from what its shards found, in any order.
    pub fn push<'a>(&mut self, shards: impl IntoIterator<Item = &'a Statistics>) {
        self.rounds.push(Statistics::merged(shards));
    }

    /// Number of rounds.
    pub fn rounds(&self) -> usize {
        self.rounds.len()
    }

    /// A round that must be there.
    pub fn round(&self, round: usize) -> Result<&Statistics, AlgoError> {
        self.rounds.get(round).ok_or(AlgoError::Rounds { found: self.rounds.len(), expected: round + 1 })
    }

    /// A quantity of a round; nothing where it had no values.
    pub(crate) fn moments(&self, round: usize, quantity: Quantity) -> Result<Moments, AlgoError> {
        Ok(self.round(round)?.get(quantity).cloned().unwrap_or_default())
    }

    /// A group's rewards.
    pub(crate) fn group(&self, group: i64) -> Result<&Moments, AlgoError> {
        self.round(0)?.groups().get(&group).ok_or(AlgoError::MissingGroup { group })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_values_have_no_spread() {
        // 0.1 and a third are not exact in binary; 7 does not divide exactly.
        for value in [0.1, 1.0 / 3.0, 1e10 + 0.1, -7e-12] {
            let mut moments = Moments::default();
            (0..7).for_each(|_| moments.add(value));
            assert_eq!(moments.variance(), 0.0);
            assert_eq!(moments.center().deviation(value), 0.0);
        }
    }

    #[test]
    fn a_small_spread_on_a_large_mean_survives() {
        let mut moments = Moments::default();
        [1e9, 1e9 + 1.0, 1e9 + 2.0].into_iter().for_each(|x| moments.add(x));
        assert_eq!((moments.mean(), moments.variance(), moments.range()), (1e9 + 1.0, 1.0, Some((1e9, 1e9 + 2.0))));
    }

    proptest! {
        /// Against the two-pass formula. Each of its n additions errs by at most 2^-53 of the largest partial sum, so
        /// for at most 40 values 1e-13 of the largest square bounds the distance.
        #[test]
        fn moments_agree_with_two_passes(values in prop::collection::vec(-1e3f64..1e3, 2..40)) {
            let mut moments = Moments::default();
            values.iter().for_each(|&x| moments.add(x));
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
            prop_assert!((moments.mean() - mean).abs() < 1e-13 * 1e3);
            prop_assert!((moments.variance() - variance).abs() < 1e-13 * 1e6);
            prop_assert!((moments.population_variance() * n / (n - 1.0) - variance).abs() < 1e-13 * 1e6);
        }
    }
}
