//! `[parallelism]` of a job file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[parallelism]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Parallelism {
    /// Data parallel, weights replicated.
    pub data_parallel_replicate_degree: usize,
    /// Data parallel over which ZeRO scopes shard; -1: what the world size leaves.
    pub data_parallel_shard_degree: i64,
    /// Ranks over which parameters are sharded (our own key; ZeRO-3 scope). 1: replicated, -1: all of
    /// `data_parallel_shard_degree` x `context_parallel_degree`, as for the two below.
    pub zero_parameter_degree: i64,
    /// Ranks over which gradients are sharded (our own key; ZeRO-2 scope), a multiple of the one above. 1: as far as that.
    pub zero_gradient_degree: i64,
    /// Ranks over which optimizer states are sharded (our own key; ZeRO-1 scope), a multiple of the one above. 1:
    /// replicated.
    pub zero_optimizer_degree: i64,
    /// Whether gathered weights are given back between forward and backward, where `zero_parameter_degree` is above 1.
    pub fsdp_reshard_after_forward: ReshardAfterForward,
    /// MiB of fp32 gradients after which they leave together for the ranks that own their states, while backward goes on
    /// (our own key).
    pub gradient_bucket_mb: f64,
    /// Tensor parallel, with the sequence split between matrices.
    pub tensor_parallel_degree: usize,
    /// Pipeline stages.
    pub pipeline_parallel_degree: usize,
    /// In which order a stage takes its micro-batches.
    pub pipeline_parallel_schedule: PipelineSchedule,
    /// Layers of each stage, first to last (our own key). Empty: as even as they divide.
    pub pipeline_parallel_stage_layers: Vec<usize>,
    /// Context parallel: the sequence is split.
    pub context_parallel_degree: usize,
    /// Inner part of `context_parallel_degree` over which heads are exchanged for tokens, Ulysses (our own key). 1: none;
    /// the whole degree: nothing else.
    pub context_parallel_head_degree: usize,
    /// How keys and values reach the queries of the other part of `context_parallel_degree`.
    pub context_parallel_rotate_method: RotateMethod,
}

/// Whether gathered weights are given back between forward and backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReshardAfterForward {
    /// `always` without pipeline stages, `never` with them.
    #[default]
    Default,
    /// Given back after each block's forward, gathered again for its backward.
    Always,
    /// Kept until the step ends: one gather per step, the memory of whole weights.
    Never,
}

/// In which order a stage takes its micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PipelineSchedule {
    /// One forward, one backward, once the pipeline is full.
    #[default]
    #[serde(rename = "1F1B")]
    OneFOneB,
    /// All forward, then all backward.
    GPipe,
}

/// How keys and values reach the queries of other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RotateMethod {
    /// All at once: fewest calls, the memory of all keys and values.
    #[default]
    Allgather,
    /// Round the ring, a rank's share at a time.
    #[serde(alias = "alltoall")]
    Ring,
}

impl Default for Parallelism {
    fn default() -> Parallelism {
        Parallelism {
            data_parallel_replicate_degree: 1,
            data_parallel_shard_degree: -1,
            zero_parameter_degree: 1,
            zero_gradient_degree: 1,
            zero_optimizer_degree: -1,
            fsdp_reshard_after_forward: ReshardAfterForward::Default,
            gradient_bucket_mb: 25.0,
            tensor_parallel_degree: 1,
            pipeline_parallel_degree: 1,
            pipeline_parallel_schedule: PipelineSchedule::OneFOneB,
            pipeline_parallel_stage_layers: Vec::new(),
            context_parallel_degree: 1,
            context_parallel_head_degree: 1,
            context_parallel_rotate_method: RotateMethod::Allgather,
        }
    }
}
