//! What a job resolves to: the only form of a configuration that the rest of the program sees.

use crate::job::{ComputeType, DecayType, OptimizerName, Recompute, RecomputeMode, ReshardAfterForward};
use crate::{ConfigError, JobConfig, ModelSpec, Sharding};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tangelo_core::schedule::{DecayShape, LrSchedule};
use tangelo_core::{DType, Topology};

/// A resolved job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The configuration with every default filled in: no `-1`, `auto` or absent key is left that could mean
    /// something else on another day. Paths are absolute.
    pub config: JobConfig,
    /// The architecture.
    pub model: ModelSpec,
    /// The ranks, their axes and groups.
    pub topology: Topology,
    /// The layers of each pipeline stage.
    pub stage_layers: Vec<Range<usize>>,
    /// Ranks that read different data.
    pub data_parallel_size: usize,
    /// Sequences per optimizer step over all ranks.
    pub global_batch_size: usize,
    /// Micro-batches per rank and step.
    pub gradient_accumulation_steps: usize,
}

impl Plan {
    /// The resolved configuration as a file: loading and resolving it gives this plan again.
    ///
    /// # Errors
    /// [`ConfigError::Values`] where a value has no form in TOML, such as a path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string_pretty(&self.config)
            .map_err(|e| ConfigError::Values(vec![format!("the resolved configuration cannot be written: {e}")]))
    }

    /// The learning rate over time.
    pub fn schedule(&self) -> LrSchedule {
        LrSchedule::from(self)
    }

    /// Element type of parameters and activations.
    pub fn compute_dtype(&self) -> DType {
        match self.config.training.mixed_precision_param {
            ComputeType::Bfloat16 => DType::BF16,
            ComputeType::Float32 | ComputeType::Auto => DType::F32,
        }
    }

    /// Tokens per optimizer step over all ranks.
    pub fn tokens_per_step(&self) -> usize {
        self.global_batch_size * self.config.training.seq_len
    }

    /// What of block `layer` is run again in backward. With `selective` and a number k, every k-th block, the k-th first.
    pub fn recompute(&self, layer: usize) -> Recompute {
        let config = &self.config.activation_checkpoint;
        if let Some(own) = config.layers.iter().rev().find(|l| (l.first..=l.last).contains(&layer)) {
            return own.recompute;
        }
        match (config.mode, config.selective_ac_option.as_str()) {
            (RecomputeMode::None, _) => Recompute::None,
            (RecomputeMode::Full, _) => Recompute::Full,
            (RecomputeMode::Selective, "attention") => Recompute::Attention,
            (RecomputeMode::Selective, "feed_forward") => Recompute::FeedForward,
            (RecomputeMode::Selective, every) => {
                let every = every.parse::<usize>().unwrap_or(1).max(1);
                if (layer + 1).is_multiple_of(every) { Recompute::Full } else { Recompute::None }
            }
        }
    }

    /// Whether gathered weights are given back between forward and backward.
    pub fn reshards_after_forward(&self) -> bool {
        match self.config.parallelism.fsdp_reshard_after_forward {
            ReshardAfterForward::Default => self.topology.num_stages() == 1,
            ReshardAfterForward::Always => true,
            ReshardAfterForward::Never => false,
        }
    }

    /// Which box of each tensor each rank holds.
    pub fn sharding(&self) -> Sharding {
        let sharding = Sharding::new(&self.model, self.topology.clone(), self.stage_layers.clone());
        match self.config.optimizer.name {
            OptimizerName::AdamW => sharding,
            OptimizerName::Muon => sharding.with_whole_matrices(&self.model),
        }
    }
}

impl From<&Plan> for LrSchedule {
    fn from(plan: &Plan) -> LrSchedule {
        let s = &plan.config.lr_scheduler;
        let total_steps = s.total_steps.unwrap_or(plan.config.training.steps);
        let ratio = s.decay_ratio.unwrap_or(0.0);
        LrSchedule {
            peak: plan.config.optimizer.lr,
            warmup_steps: s.warmup_steps,
            total_steps,
            decay_steps: (total_steps as f64 * ratio).round() as usize,
            decay_type: match s.decay_type {
                DecayType::Linear => DecayShape::Linear,
                DecayType::Sqrt => DecayShape::Sqrt,
                DecayType::Cosine => DecayShape::Cosine,
            },
            min_factor: s.min_lr_factor,
        }
    }
}
