//! What each token costs under a [`LossSpec`], and how the cost changes with what the model says: arithmetic in float64.
//!
//! ```text
//!   rows of a rank -> Objective -> counts -> summed over ranks -> Scales
//!   a token's Prediction -> its share of the loss (into Sums) and Slopes, whence the head makes gradients
//! ```
//!
//! Formulas are those of verl's `core_algos.py` where it has them (clipping: arXiv 1707.06347, dual clip: 1912.09729).
//!
//! Invariants: a token's cost depends on its own streams, on its sequence's number of marked tokens and on counts of the
//! whole mini-batch, never on its neighbours in a micro-batch. A token outside the mask adds nothing, whatever the model
//! says there. A ratio of equal log-probabilities is exactly 1. Deliberately absent: tensors, communication.

use super::kl::LOG_RATIO_BOUND;
use super::{Aggregation, LossComponent, LossSpec};
use crate::batch::{Batch, BatchError, Column};
use std::collections::BTreeMap;

/// What the model says at a token. A head gives either the first two or the last; the others are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// The target's log-probability.
    pub logprob: f64,
    /// Entropy of the distribution, nats.
    pub entropy: f64,
    /// The critic's value.
    pub value: f64,
}

/// Derivatives of the whole loss by a token's prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slopes {
    /// By the target's log-probability.
    pub logprob: f64,
    /// By the entropy.
    pub entropy: f64,
    /// By the value.
    pub value: f64,
}

/// A loss over the rows that one rank reads.
#[derive(Clone, Debug)]
pub struct Objective {
    components: Vec<LossComponent>,
    temperature: f64,
    /// Per token, rows end to end.
    streams: BTreeMap<Column, Vec<f32>>,
    /// Per token: the mask over the sum of its sequence's mask; empty where no component reads a mask.
    shares: Vec<f64>,
    /// Sequences with a marked token.
    num_sequences: usize,
}

/// What sums over tokens are divided by, from counts of the whole mini-batch; by component.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scales {
    /// Of each component: the factor of its tokens, and whether that multiplies shares of sequences instead of marks.
    factors: Vec<(f64, bool)>,
    /// 1 / N_tok.
    per_token: f64,
}

/// Sums over tokens: the loss, then [`Objective::metrics`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums(pub Vec<f64>);

impl Sums {
    /// The loss.
    pub fn loss(&self) -> f64 {
        self.0.first().copied().unwrap_or(0.0)
    }
}

impl Objective {
    /// The loss over the rows of `batch`.
    ///
    /// # Errors
    /// A column that a component reads is absent.
    pub fn new(loss: &LossSpec, batch: &Batch) -> Result<Objective, BatchError> {
        let is_f32 = |c: &Column| !matches!(c, Column::Targets);
        let read = |c: Column| Ok((c, batch.f32_values(c)?));
        let streams: BTreeMap<Column, Vec<f32>> =
            loss.columns().into_iter().filter(is_f32).map(read).collect::<Result<_, BatchError>>()?;
        let (mut shares, mut num_sequences) = (Vec::new(), 0);
        if let Some(mask) = streams.get(&Column::LossMask) {
            let ids = batch.u32_values(Column::SeqId)?;
            (shares, num_sequences) = shares_of(mask, &ids, &batch.row_lengths()?);
        }
        let (components, temperature) = (loss.components.clone(), loss.temperature);
        Ok(Objective { components, temperature, streams, shares, num_sequences })
    }

    /// Log-probabilities are of logits / this.
    pub fn temperature(&self) -> f64 {
        self.temperature
    }

    /// What must be summed over all ranks that read rows: N_tok, N_seq, and the weight of each cross-entropy.
    pub fn counts(&self) -> Vec<f64> {
        let mut counts = vec![self.total(Column::LossMask), self.num_sequences as f64];
        counts.extend(self.weights().map(|weight| self.total(weight)));
        counts
    }

    fn weights(&self) -> impl Iterator<Item = Column> {
        self.components.iter().filter_map(|c| match c {
            LossComponent::CrossEntropy { weight, .. } => Some(*weight),
            _ => None,
        })
    }

    fn total(&self, column: Column) -> f64 {
        self.streams.get(&column).map_or(0.0, |values| values.iter().map(|&v| f64::from(v)).sum())
    }

    /// What to divide by, from counts summed over ranks. A count of 0 makes its terms 0.
    pub fn scales(&self, counts: &[f64]) -> Scales {
        let one_over = |n: f64| if n > 0.0 { 1.0 / n } else { 0.0 };
        let (per_token, per_sequence) = (one_over(counts[0]), one_over(counts[1]));
        let mut weights = counts[2..].iter();
        let factor = |component: &LossComponent| match component.aggregation() {
            None => (one_over(weights.next().copied().unwrap_or(0.0)), false),
            Some(Aggregation::TokenMean) => (per_token, false),
            Some(Aggregation::TokenSum) => (1.0, false),
            Some(Aggregation::SeqMeanTokenSum) => (per_sequence, false),
            Some(Aggregation::SeqMeanTokenMean) => (per_sequence, true),
            Some(Aggregation::SeqMeanTokenSumNorm(norm)) => (per_sequence / norm, false),
        };
        Scales { factors: self.components.iter().map(factor).collect(), per_token }
    }

    /// Whether any component reads what the model says at a token.
    pub fn counts_token(&self, at: usize) -> bool {
        let marked = |column| self.streams.get(&column).is_some_and(|v| v[at] != 0.0);
        marked(Column::LossMask) || self.weights().any(marked)
    }

    /// Names of the sums after the loss, as verl logs them.
    pub fn metrics(&self) -> Vec<&'static str> {
        self.components.iter().flat_map(LossComponent::metrics).copied().collect()
    }

    /// Sums of nothing yet.
    pub fn no_sums(&self) -> Sums {
        Sums(vec![0.0; 1 + self.metrics().len()])
    }

    /// Adds what token `at` (rows end to end) costs where the model says `found`, and gives the loss's slopes there.
    pub fn add(&self, at: usize, found: Prediction, scales: &Scales, sums: &mut Sums) -> Slopes {
        let mut slopes = Slopes::default();
        let mut metric = 1;
        for (component, &(factor, by_sequence)) in self.components.iter().zip(&scales.factors) {
            let column = component.mask();
            let mark = f64::from(self.streams[&column][at]);
            let names = component.metrics().len();
            if mark != 0.0 {
                let weight = if by_sequence { factor * self.shares[at] } else { factor * mark };
                let token = Token { at, found, weight, even: scales.per_token * mark };
                sums.0[0] += self.component(component, token, &mut slopes, &mut sums.0[metric..metric + names]);
            }
            metric += names;
        }
        slopes
    }

    fn stream(&self, column: Column, at: usize) -> f64 {
        f64::from(self.streams[&column][at])
    }

    /// A component's part of the loss; adds its slopes, and its metrics in the order of [`LossComponent::metrics`].
    fn component(&self, component: &LossComponent, t: Token, slopes: &mut Slopes, metrics: &mut [f64]) -> f64 {
        let read = |column| self.stream(column, t.at);
        match *component {
            LossComponent::CrossEntropy { coefficient, .. } => {
                slopes.logprob -= coefficient * t.weight;
                metrics[0] -= t.weight * t.found.logprob;
                -coefficient * t.weight * t.found.logprob
            }
            LossComponent::PolicyGradient { clip_low, clip_high, clip_dual, corrects_rollout, .. } => {
                let (advantage, old) = (read(Column::Advantage), read(Column::OldLogprob));
                let correction = if corrects_rollout { read(Column::ImportanceWeight) } else { 1.0 };
                let s = Surrogate::new(t.found.logprob, old, advantage, [clip_low, clip_high], clip_dual);
                slopes.logprob += t.weight * correction * s.slope;
                let loss = t.weight * correction * s.loss;
                let even = [-s.log_ratio, s.is_clipped.into(), s.is_clipped_below.into()].map(|v: f64| v * t.even);
                add(metrics, [loss, even[0], even[1], even[2]]);
                loss
            }
            LossComponent::Kl { estimator, straight_through, coefficient, .. } => {
                let (kl, slope) = estimator.estimate(t.found.logprob - read(Column::RefLogprob));
                let slope = if straight_through { t.found.logprob - read(Column::RefLogprob) } else { slope };
                slopes.logprob += coefficient * t.weight * slope;
                metrics[0] += t.weight * kl;
                coefficient * t.weight * kl
            }
            LossComponent::Entropy { coefficient, .. } => {
                slopes.entropy -= coefficient * t.weight;
                metrics[0] += t.weight * t.found.entropy;
                -coefficient * t.weight * t.found.entropy
            }
            LossComponent::Value { clip, coefficient, .. } => {
                let (old, target) = (read(Column::Value), read(Column::Return));
                let v = ValueLoss::new(t.found.value, old, target, clip);
                slopes.value += coefficient * t.weight * v.slope;
                add(metrics, [t.weight * v.loss, t.even * f64::from(u8::from(v.is_clipped)), t.even * t.found.value]);
                coefficient * t.weight * v.loss
            }
        }
    }
}

/// A token under one component.
#[derive(Clone, Copy)]
struct Token {
    at: usize,
    found: Prediction,
    /// Of its loss in the component's sum.
    weight: f64,
    /// Of its part in a mean over all marked tokens.
    even: f64,
}

fn add<const N: usize>(sums: &mut [f64], values: [f64; N]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

impl LossComponent {
    /// How its tokens add up; `None`: by their weights over the sum of weights.
    fn aggregation(&self) -> Option<Aggregation> {
        match *self {
            LossComponent::CrossEntropy { .. } => None,
            LossComponent::PolicyGradient { aggregation, .. }
            | LossComponent::Kl { aggregation, .. }
            | LossComponent::Entropy { aggregation, .. }
            | LossComponent::Value { aggregation, .. } => Some(aggregation),
        }
    }

    /// The column that marks its tokens.
    fn mask(&self) -> Column {
        match *self {
            LossComponent::CrossEntropy { weight, .. } => weight,
            _ => Column::LossMask,
        }
    }

    /// What it tells beside the loss, by verl's names. Losses are before their coefficients, fractions and means over all
    /// marked tokens.
    fn metrics(&self) -> &'static [&'static str] {
        match self {
            LossComponent::CrossEntropy { .. } => &["actor/ce_loss"],
            LossComponent::PolicyGradient { .. } => {
                &["actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower"]
            }
            LossComponent::Kl { .. } => &["actor/kl_loss"],
            LossComponent::Entropy { .. } => &["actor/entropy"],
            LossComponent::Value { .. } => &["critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean"],
        }
    }
}

/// The clipped surrogate of one token.
struct Surrogate {
    log_ratio: f64,
    loss: f64,
    /// By the log-probability.
    slope: f64,
    is_clipped: bool,
    is_clipped_below: bool,
}

impl Surrogate {
    fn new(logprob: f64, old: f64, advantage: f64, [low, high]: [f64; 2], dual: Option<f64>) -> Surrogate {
        let (log_ratio, passes) = clamp(logprob - old, -LOG_RATIO_BOUND, LOG_RATIO_BOUND);
        let ratio = log_ratio.exp();
        let free = -advantage * ratio;
        let (kept, inside) = clamp(ratio, 1.0 - low, 1.0 + high);
        let bounded = -advantage * kept;
        // The larger of both; where they are equal the ratio is inside, or the advantage is 0.
        let is_clipped = bounded > free;
        let (mut loss, mut slope) = if is_clipped { (bounded, bounded * inside) } else { (free, free) };
        let is_clipped_below = match dual {
            Some(c) if advantage < 0.0 && loss > -advantage * c => {
                (loss, slope) = (-advantage * c, 0.0);
                true
            }
            _ => false,
        };
        Surrogate { log_ratio, loss, slope: slope * passes, is_clipped, is_clipped_below }
    }
}

/// The value kept within bounds, and the slope of that. NaN stays NaN.
fn clamp(value: f64, low: f64, high: f64) -> (f64, f64) {
    if value < low {
        (low, 0.0)
    } else if value > high {
        (high, 0.0)
    } else {
        (value, 1.0)
    }
}

/// The clipped squared error of one value.
struct ValueLoss {
    loss: f64,
    slope: f64,
    is_clipped: bool,
}

impl ValueLoss {
    fn new(value: f64, old: f64, target: f64, clip: f64) -> ValueLoss {
        let (kept, inside) = clamp(value, old - clip, old + clip);
        let (free, bounded) = (value - target, kept - target);
        let is_clipped = bounded * bounded > free * free;
        let (error, slope) = if is_clipped { (bounded, bounded * inside) } else { (free, free) };
        ValueLoss { loss: 0.5 * error * error, slope, is_clipped }
    }
}

/// Each token's mark over the sum of its sequence's marks, and how many sequences have a mark. A sequence ends with its row
/// or where `seq_id` changes.
fn shares_of(mask: &[f32], seq_id: &[u32], row_lengths: &[usize]) -> (Vec<f64>, usize) {
    let (mut shares, mut marked) = (Vec::with_capacity(mask.len()), 0);
    let mut start = 0;
    for &length in row_lengths {
        let row = start..start + length;
        for ids in seq_id[row].chunk_by(|a, b| a == b) {
            let own = &mask[start..start + ids.len()];
            let total: f64 = own.iter().map(|&m| f64::from(m)).sum();
            marked += usize::from(total > 0.0);
            shares.extend(own.iter().map(|&m| if total > 0.0 { f64::from(m) / total } else { 0.0 }));
            start += ids.len();
        }
    }
    (shares, marked)
}

#[cfg(test)]
mod tests;
