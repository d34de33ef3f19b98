//! A loss as data: a sum of components, each naming the batch columns it reads.
//!
//! The trainer is blind to algorithms: whoever builds the batch writes per-token columns, whoever builds the plan
//! names them here. Each component is normalised by counts of the whole mini-batch, so that a step's gradient does not
//! depend on how the batch was cut into micro-batches or ranks. What a token costs under a loss is in [`objective`].

pub mod kl;
pub mod objective;

use crate::batch::Column;
use serde::{Deserialize, Serialize};

/// One term of the loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum LossComponent {
    /// Sum over tokens of weight * -log p(target) / global sum of weight.
    CrossEntropy {
        /// The per-token weight column (f32); 0 leaves a token out.
        weight: Column,
        /// Multiplies the term.
        coefficient: f64,
    },
    /// The clipped surrogate of PPO (arXiv 1707.06347) with separate bounds and the dual clip of arXiv 1912.09729.
    ///
    /// With r = exp(clamp(logprob - old_logprob, -20, 20)) and advantage A, a token's loss is
    /// `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, and where A < 0 and `clip_dual` = c at most `-A c`.
    PolicyGradient {
        /// Lower distance from 1 beyond which the ratio is clipped.
        clip_low: f64,
        /// Upper distance from 1 beyond which the ratio is clipped.
        clip_high: f64,
        /// c > 1 of the dual clip; `None`: none.
        clip_dual: Option<f64>,
        /// Multiplies each token's loss by its `importance_weight`.
        corrects_rollout: bool,
        /// How tokens add up.
        aggregation: Aggregation,
    },
    /// A penalty on the distance from the reference, estimated from the targets' log-probabilities.
    Kl {
        /// The estimator.
        estimator: KlEstimator,
        /// The estimator's value with the gradient of k2, which is unbiased (written `k3+` and so on in configurations).
        straight_through: bool,
        /// Multiplies the term.
        coefficient: f64,
        /// How tokens add up.
        aggregation: Aggregation,
    },
    /// A bonus for the entropy of the distribution over the vocabulary: minus coefficient * entropy. Of the distribution at
    /// the loss's temperature.
    Entropy {
        /// Multiplies the term.
        coefficient: f64,
        /// How tokens add up.
        aggregation: Aggregation,
    },
    /// Half the squared distance of the critic's value from `return`, the larger of the value's and of the value kept
    /// within `clip` of `value`.
    Value {
        /// Distance from the old value beyond which the new one is clipped; infinity: no clipping.
        clip: f64,
        /// Multiplies the term.
        coefficient: f64,
        /// How tokens add up.
        aggregation: Aggregation,
    },
}

/// How the losses of the tokens that `loss_mask` marks become one number over the global mini-batch.
///
/// Counts are of the whole mini-batch, so that the result depends neither on micro-batches nor on ranks nor on padding.
/// N_tok is the sum of the mask, N_seq the number of sequences with a marked token. A sequence is a document of a row: what
/// has one `seq_id`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// Sum over tokens / N_tok.
    #[default]
    TokenMean,
    /// Sum over tokens.
    TokenSum,
    /// Sum over sequences of (sum over tokens) / N_seq.
    SeqMeanTokenSum,
    /// Sum over sequences of (mean over its marked tokens) / N_seq. (verl adds 1e-8 to the number of tokens; here nothing.)
    SeqMeanTokenMean,
    /// [`Aggregation::SeqMeanTokenSum`] / the constant (Dr. GRPO's: the longest response, tokens).
    SeqMeanTokenSumNorm(f64),
}

/// An estimator of KL(policy || reference) from one sample; d = logprob - ref_logprob. (John Schulman,
/// "Approximating KL divergence", 2020.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// d.
    #[default]
    K1,
    /// |d|.
    Abs,
    /// d^2 / 2.
    K2,
    /// exp(-d) - 1 + d with -d kept within 20 and the result within 10, as verl does.
    K3,
}

impl LossComponent {
    /// The batch columns this component reads beside the tokens.
    pub fn columns(&self) -> Vec<Column> {
        match self {
            LossComponent::CrossEntropy { weight, .. } => vec![Column::Targets, *weight],
            LossComponent::PolicyGradient { corrects_rollout, .. } => {
                let mut columns = vec![Column::Targets, Column::LossMask, Column::Advantage, Column::OldLogprob];
                columns.extend(corrects_rollout.then_some(Column::ImportanceWeight));
                columns
            }
            LossComponent::Kl { .. } => vec![Column::Targets, Column::LossMask, Column::RefLogprob],
            LossComponent::Entropy { .. } => vec![Column::Targets, Column::LossMask],
            LossComponent::Value { .. } => vec![Column::LossMask, Column::Value, Column::Return],
        }
    }
}

/// The sum of components that a job minimises.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossSpec {
    /// The terms.
    pub components: Vec<LossComponent>,
    /// Log-probabilities and entropies are those of logits / temperature: what tokens were sampled at.
    #[serde(default = "one")]
    pub temperature: f64,
}

fn one() -> f64 {
    1.0
}

/// What a model's head must give for a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// Log-probabilities and entropies, from a head over the vocabulary.
    Distribution,
    /// Values, from a scalar head.
    Value,
}

impl LossSpec {
    /// A sum of components at temperature 1.
    pub fn new(components: Vec<LossComponent>) -> LossSpec {
        LossSpec { components, temperature: 1.0 }
    }

    /// Next-token cross-entropy over the tokens that `ce_weight` marks: pre-training and SFT.
    pub fn next_token() -> LossSpec {
        LossSpec::new(vec![LossComponent::CrossEntropy { weight: Column::CeWeight, coefficient: 1.0 }])
    }

    /// Every column a batch must carry for this loss.
    pub fn columns(&self) -> Vec<Column> {
        let mut all: Vec<Column> = self.components.iter().flat_map(LossComponent::columns).collect();
        all.sort();
        all.dedup();
        all
    }

    /// What the components read of the model. A loss that wants values and distributions fits no model.
    ///
    /// # Errors
    /// Says which number makes no sense.
    pub fn check(&self) -> Result<Reads, String> {
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(format!("the loss has temperature {}; it must be above 0", self.temperature));
        }
        let values = self.components.iter().filter(|c| matches!(c, LossComponent::Value { .. })).count();
        self.components.iter().try_for_each(LossComponent::check)?;
        match self.components.len() {
            0 => Err("the loss has no components; name at least one".into()),
            n if values == n => Ok(Reads::Value),
            _ if values == 0 => Ok(Reads::Distribution),
            _ => {
                Err("the loss mixes `value`, which reads a critic, with components that read a policy; give each its \
                      own loss"
                    .into())
            }
        }
    }
}

impl LossComponent {
    fn check(&self) -> Result<(), String> {
        let at_least_0 = |name: &str, value: f64| {
            if value >= 0.0 { Ok(()) } else { Err(format!("{name} is {value}; it must be at least 0")) }
        };
        match *self {
            LossComponent::PolicyGradient { clip_low, clip_high, clip_dual, aggregation, .. } => {
                at_least_0("clip_low", clip_low)?;
                at_least_0("clip_high", clip_high)?;
                match clip_dual {
                    Some(c) if c.is_nan() || c <= 1.0 => {
                        Err(format!("clip_dual is {c}; it must be above 1, or absent"))
                    }
                    _ => aggregation.check(),
                }
            }
            LossComponent::Value { clip, aggregation, .. } => {
                at_least_0("the value's clip", clip)?;
                aggregation.check()
            }
            LossComponent::Kl { aggregation, .. } | LossComponent::Entropy { aggregation, .. } => aggregation.check(),
            LossComponent::CrossEntropy { .. } => Ok(()),
        }
    }
}

impl Aggregation {
    fn check(self) -> Result<(), String> {
        match self {
            Aggregation::SeqMeanTokenSumNorm(norm) if norm.is_nan() || norm <= 0.0 => {
                Err(format!("seq-mean-token-sum-norm divides by {norm}; it must be above 0"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[test]
    fn next_token_reads_targets_and_their_weight() {
        assert_eq!(LossSpec::next_token().columns(), [Column::Targets, Column::CeWeight]);
    }

    #[test]
    fn a_loss_without_a_temperature_is_at_one() {
        let read: LossSpec = toml_like(r#"{"components": []}"#);
        assert_eq!(read, LossSpec::new(Vec::new()));
    }

    fn toml_like(text: &str) -> LossSpec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn numbers_that_make_no_sense_are_named() {
        let aggregation = Aggregation::TokenMean;
        let value = LossComponent::Value { clip: 0.5, coefficient: 1.0, aggregation };
        let entropy = LossComponent::Entropy { coefficient: 0.1, aggregation };
        let clipped = |clip_low, clip_dual| LossComponent::PolicyGradient {
            clip_low,
            clip_high: 0.2,
            clip_dual,
            corrects_rollout: false,
            aggregation: Aggregation::SeqMeanTokenSumNorm(0.0),
        };
        let check = |components: Vec<LossComponent>, temperature, expected: Expect| {
            let found = LossSpec { components, temperature }.check();
            expected.assert_eq(&found.map_or_else(|e| e, |reads| format!("{reads:?}")));
        };
        check(vec![value.clone()], 1.0, expect!["Value"]);
        check(vec![entropy.clone()], 0.7, expect!["Distribution"]);
        check(vec![entropy.clone()], 0.0, expect!["the loss has temperature 0; it must be above 0"]);
        check(vec![], 1.0, expect!["the loss has no components; name at least one"]);
        check(
            vec![value, entropy],
            1.0,
            expect![
                "the loss mixes `value`, which reads a critic, with components that read a policy; give each its own loss"
            ],
        );
        check(vec![clipped(-0.1, None)], 1.0, expect!["clip_low is -0.1; it must be at least 0"]);
        check(vec![clipped(0.1, Some(1.0))], 1.0, expect!["clip_dual is 1; it must be above 1, or absent"]);
        check(vec![clipped(0.1, None)], 1.0, expect!["seq-mean-token-sum-norm divides by 0; it must be above 0"]);
    }
}
