//! A loss as data: a sum of components, each naming the batch columns it reads.
//!
//! The trainer is blind to algorithms: whoever builds the batch writes per-token columns, whoever builds the plan
//! names them here. Each component is normalised by the global sum of its weight column, so that a step's gradient
//! does not depend on how the batch was cut into micro-batches or ranks.

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
    /// A bonus for the entropy of the distribution over the vocabulary: minus coefficient * entropy.
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
/// N_tok is the sum of the mask, N_seq the number of sequences with a marked token.
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
    /// Sum over sequences of (mean over its tokens) / N_seq.
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
            LossComponent::Entropy { .. } => vec![Column::LossMask],
            LossComponent::Value { .. } => vec![Column::LossMask, Column::Value, Column::Return],
        }
    }
}

/// The sum of components that a job minimises.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossSpec {
    /// The terms.
    pub components: Vec<LossComponent>,
}

impl LossSpec {
    /// Next-token cross-entropy over the tokens that `ce_weight` marks: pre-training and SFT.
    pub fn next_token() -> LossSpec {
        LossSpec { components: vec![LossComponent::CrossEntropy { weight: Column::CeWeight, coefficient: 1.0 }] }
    }

    /// Every column a batch must carry for this loss.
    pub fn columns(&self) -> Vec<Column> {
        let mut all: Vec<Column> = self.components.iter().flat_map(LossComponent::columns).collect();
        all.sort();
        all.dedup();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_token_reads_targets_and_their_weight() {
        assert_eq!(LossSpec::next_token().columns(), [Column::Targets, Column::CeWeight]);
    }
}
