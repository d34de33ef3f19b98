//! What a job resolves to: the only form of a configuration that the rest of the program sees.

use crate::{JobConfig, ModelSpec};
use serde::{Deserialize, Serialize};
use tangelo_core::DeviceMesh;

/// A resolved job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The configuration with every default filled in: no `-1`, `auto` or absent key is left that could mean
    /// something else on another day. Paths are absolute.
    pub config: JobConfig,
    /// The architecture.
    pub model: ModelSpec,
    /// The ranks and their axes.
    pub mesh: DeviceMesh,
    /// Ranks that read different data.
    pub data_parallel_size: usize,
    /// Sequences per optimizer step over all ranks.
    pub global_batch_size: usize,
    /// Micro-batches per rank and step.
    pub gradient_accumulation_steps: usize,
    /// Ranks over which optimizer states are sharded (inner part of `dp_shard`).
    pub zero_optimizer_degree: usize,
}
