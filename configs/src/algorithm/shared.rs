//! The tables that every algorithm has.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tangelo_core::{Aggregation, KlEstimator};

/// `[algorithm.policy]`: the clipped surrogate and what is added to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyLoss {
    /// The ratio of probabilities is clipped below 1 minus this.
    pub clip_ratio_low: f64,
    /// The ratio is clipped above 1 plus this; DAPO's clip-higher sets it above `clip_ratio_low`.
    pub clip_ratio_high: f64,
    /// Dual clip: where the advantage is negative, a token's loss is at most this times its size (above 1); 0: no
    /// bound.
    pub clip_ratio_c: f64,
    /// How the losses of tokens add up.
    pub loss_agg_mode: AggregationMode,
    /// The constant of `seq-mean-token-sum-norm`; the longest completion allowed, in tokens, where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale_factor: Option<f64>,
    /// Multiplies the entropy bonus; 0: none.
    pub entropy_coeff: f64,
    /// Adds a penalty on the distance from the reference to the loss.
    pub use_kl_loss: bool,
    /// Multiplies that penalty.
    pub kl_loss_coef: f64,
    /// Its estimator.
    pub kl_loss_type: KlType,
}

impl Default for PolicyLoss {
    fn default() -> PolicyLoss {
        PolicyLoss {
            clip_ratio_low: 0.2,
            clip_ratio_high: 0.2,
            clip_ratio_c: 3.0,
            loss_agg_mode: AggregationMode::default(),
            loss_scale_factor: None,
            entropy_coeff: 0.0,
            use_kl_loss: false,
            kl_loss_coef: 0.001,
            kl_loss_type: KlType::K3,
        }
    }
}

/// `[algorithm.critic]`: half the squared distance from the returns, clipped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CriticLoss {
    /// A value further than this from the old value counts as if it were there, where that is worse; 0: no clipping.
    pub cliprange_value: f64,
    /// How the losses of tokens add up.
    pub loss_agg_mode: AggregationMode,
    /// The constant of `seq-mean-token-sum-norm`; the longest completion allowed, in tokens, where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale_factor: Option<f64>,
}

impl Default for CriticLoss {
    fn default() -> CriticLoss {
        CriticLoss { cliprange_value: 0.5, loss_agg_mode: AggregationMode::default(), loss_scale_factor: None }
    }
}

/// How the losses of the tokens of a global mini-batch add up; counts are over all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AggregationMode {
    /// Mean over tokens.
    #[default]
    TokenMean,
    /// Sum over tokens.
    TokenSum,
    /// Mean over completions of their sums.
    SeqMeanTokenSum,
    /// Mean over completions of their means.
    SeqMeanTokenMean,
    /// Mean over completions of their sums, divided by `loss_scale_factor`.
    SeqMeanTokenSumNorm,
}

impl AggregationMode {
    /// The aggregation as the loss takes it; `scale` or else `max_response_tokens` is the constant.
    pub fn resolve(self, scale: Option<f64>, max_response_tokens: usize) -> Aggregation {
        match self {
            AggregationMode::TokenMean => Aggregation::TokenMean,
            AggregationMode::TokenSum => Aggregation::TokenSum,
            AggregationMode::SeqMeanTokenSum => Aggregation::SeqMeanTokenSum,
            AggregationMode::SeqMeanTokenMean => Aggregation::SeqMeanTokenMean,
            AggregationMode::SeqMeanTokenSumNorm => {
                Aggregation::SeqMeanTokenSumNorm(scale.unwrap_or(max_response_tokens as f64))
            }
        }
    }
}

/// An estimator of the distance from the reference; `+`: its value with the gradient of k2. verl's `kl`, `mse` and
/// `low_var_kl` are other names of `k1`, `k2` and `k3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KlType {
    /// Difference of log-probabilities.
    #[serde(rename = "k1", alias = "kl")]
    K1,
    /// The value of `k1`, the gradient of `k2`.
    #[serde(rename = "k1+", alias = "kl+")]
    K1Plus,
    /// Size of the difference.
    #[serde(rename = "abs")]
    Abs,
    /// The value of `abs`, the gradient of `k2`.
    #[serde(rename = "abs+")]
    AbsPlus,
    /// Half the squared difference.
    #[serde(rename = "k2", alias = "mse")]
    K2,
    /// As `k2`.
    #[serde(rename = "k2+", alias = "mse+")]
    K2Plus,
    /// Ratio minus 1 minus its logarithm.
    #[serde(rename = "k3", alias = "low_var_kl")]
    K3,
    /// The value of `k3`, the gradient of `k2`.
    #[serde(rename = "k3+", alias = "low_var_kl+")]
    K3Plus,
}

impl KlType {
    /// The estimator of the value.
    pub fn estimator(self) -> KlEstimator {
        match self {
            KlType::K1 | KlType::K1Plus => KlEstimator::K1,
            KlType::Abs | KlType::AbsPlus => KlEstimator::Abs,
            KlType::K2 | KlType::K2Plus => KlEstimator::K2,
            KlType::K3 | KlType::K3Plus => KlEstimator::K3,
        }
    }

    /// Whether the gradient is k2's whatever the value.
    pub fn straight_through(self) -> bool {
        matches!(self, KlType::K1Plus | KlType::AbsPlus | KlType::K2Plus | KlType::K3Plus)
    }
}

/// `[algorithm.reward]`: what is added to the reward before advantages are computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RewardShaping {
    /// Subtracts the distance from the reference, token by token.
    pub use_kl_in_reward: bool,
    /// Its estimator (one without `+`: a reward has no gradient).
    pub kl_penalty: KlType,
    /// What multiplies it.
    pub kl_ctrl: KlController,
    /// A penalty that grows as a completion nears the longest allowed (DAPO).
    pub overlong_buffer: OverlongBuffer,
    /// Leaves completions that reached the longest allowed out of the loss (DAPO); they still count in baselines.
    pub overlong_filter: bool,
}

impl Default for RewardShaping {
    fn default() -> RewardShaping {
        RewardShaping {
            use_kl_in_reward: false,
            kl_penalty: KlType::K1,
            kl_ctrl: KlController::default(),
            overlong_buffer: OverlongBuffer::default(),
            overlong_filter: false,
        }
    }
}

/// `[algorithm.reward.kl_ctrl]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum KlController {
    /// A constant.
    Fixed(FixedKl),
    /// A coefficient that follows the distance (arXiv 1909.08593).
    Adaptive(AdaptiveKl),
}

impl Default for KlController {
    fn default() -> KlController {
        KlController::Fixed(FixedKl::default())
    }
}

impl KlController {
    /// The coefficient at the start.
    pub fn kl_coef(&self) -> f64 {
        match self {
            KlController::Fixed(fixed) => fixed.kl_coef,
            KlController::Adaptive(adaptive) => adaptive.kl_coef,
        }
    }
}

/// A constant coefficient.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FixedKl {
    /// The coefficient.
    pub kl_coef: f64,
}

impl Default for FixedKl {
    fn default() -> FixedKl {
        FixedKl { kl_coef: 0.001 }
    }
}

/// A coefficient that grows while the distance is above its target and shrinks while it is below.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdaptiveKl {
    /// The coefficient at the start.
    pub kl_coef: f64,
    /// The distance aimed at, nats per token.
    pub target_kl: f64,
    /// After how many completions the coefficient may have changed by a fifth.
    pub horizon: f64,
}

impl Default for AdaptiveKl {
    fn default() -> AdaptiveKl {
        AdaptiveKl { kl_coef: 0.001, target_kl: 0.1, horizon: 10_000.0 }
    }
}

/// `[algorithm.reward.overlong_buffer]`: soft punishment of long completions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OverlongBuffer {
    /// Whether there is one.
    pub enable: bool,
    /// How many tokens before the longest allowed the penalty starts.
    pub len: usize,
    /// The penalty at the longest allowed.
    pub penalty_factor: f64,
}

impl Default for OverlongBuffer {
    fn default() -> OverlongBuffer {
        OverlongBuffer { enable: false, len: 0, penalty_factor: 1.0 }
    }
}

/// `[algorithm.rollout_correction]`: truncated importance sampling for engines that do not agree with the trainer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutCorrection {
    /// What has one weight.
    pub rollout_is: ImportanceLevel,
    /// Weights above this become this; with a lower bound, 0.
    pub rollout_is_threshold: f64,
    /// IcePop: weights below this, and those above the threshold, become 0; 0: no lower bound.
    pub rollout_is_threshold_lower: f64,
    /// Divides the weights by their mean over the batch.
    pub rollout_is_batch_normalize: bool,
}

impl Default for RolloutCorrection {
    fn default() -> RolloutCorrection {
        RolloutCorrection {
            rollout_is: ImportanceLevel::None,
            rollout_is_threshold: 2.0,
            rollout_is_threshold_lower: 0.0,
            rollout_is_batch_normalize: false,
        }
    }
}

/// What has one importance weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceLevel {
    /// Nothing: no correction.
    #[default]
    None,
    /// Each token (biased, low variance).
    Token,
    /// Each completion (unbiased before truncation, high variance).
    Sequence,
}

/// `[algorithm.filter_groups]`: dynamic sampling. Groups whose completions all have the same reward teach nothing;
/// they are dropped and others generated in their place (DAPO).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FilterGroups {
    /// Whether to.
    pub enable: bool,
    /// What must differ within a group.
    pub metric: FilterMetric,
    /// Generated batches after which too few groups are an error; 0: never (then a policy that solves all of the prompts,
    /// or none, generates until it is stopped).
    pub max_num_gen_batches: usize,
}

impl Default for FilterGroups {
    fn default() -> FilterGroups {
        FilterGroups { enable: false, metric: FilterMetric::default(), max_num_gen_batches: 10 }
    }
}

/// What must differ within a group for it to be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FilterMetric {
    /// The reward as it was given.
    #[default]
    SeqReward,
    /// The reward with the overlong penalty and the distance from the reference.
    SeqFinalReward,
}
