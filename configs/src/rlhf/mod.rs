//! The sections of an `rlhf` job that are about its loop, its roles and where they live.
//!
//! What rewards become is [`crate::Algorithm`]'s, what is asked [`crate::prompts::Prompts`]', what an answer is worth
//! [`crate::reward::Reward`]'s; the policy is trained by the sections of every job (`[model]`, `[optimizer]`,
//! `[parallelism]`, ...). Names and batch semantics are verl's where the meaning is the same: batches count prompts, each
//! of which has `rollout.sampling.n` completions.

mod check;
mod plan;

use plan::limits;
pub(crate) use plan::resolve_sections;
pub use plan::{JobPlan, role_folder};

use crate::job::{ComputeType, Parallelism};
use crate::{EngineConfig, SamplingParams};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// `[rlhf]`: the loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rlhf {
    /// Prompts per step (verl: data.train_batch_size).
    pub train_batch_size: usize,
    /// Prompts per update of the policy; a step makes train_batch_size / ppo_mini_batch_size of them per epoch. 0: all.
    pub ppo_mini_batch_size: usize,
    /// How often a step's batch is learnt from.
    pub ppo_epochs: usize,
    /// Tokens that a rank computes with at once in training and scoring (verl: ppo_max_token_len_per_gpu). A longer sequence
    /// is computed alone. Each answer counts with its prompt, shared or not.
    pub ppo_max_token_len_per_rank: usize,
    /// In training and scoring compute a prompt once for all its answers that are computed at once. On a CPU
    /// log-probabilities are the same to the bit; gradients differ by rounding. Under ring attention, and where it would save
    /// less than a sixteenth of the tokens, every answer is computed whole.
    pub share_prompts: bool,
    /// Steps at the start in which only the critic learns.
    pub critic_warmup: usize,
    /// Steps by which a rollout may be older than the policy that learns from it. Only 0 is offered: the policy waits.
    pub max_staleness: usize,
    /// Where the log-probabilities before the update come from.
    pub old_logprobs: OldLogprobs,
    /// Validate before the first step.
    pub val_before_train: bool,
    /// Steps between validations; 0: only before the first step and after the last.
    pub test_freq: usize,
    /// How answers of the validation are drawn (verl: val_kwargs): greedy, one each, else as `[rollout.sampling]` says.
    pub validation: ValidationSampling,
    /// The longest that a call to the ranks (generating a batch, learning from one) may take, seconds.
    pub verb_timeout_seconds: u64,
    /// Write every rollout to `rollouts/` in the run folder.
    pub save_rollouts: bool,
    /// Sample completions of a step that the report shows.
    pub report_samples: usize,
    /// A validation answer passes (pass@n) from this reward on.
    pub val_pass_reward: f64,
}

impl Default for Rlhf {
    fn default() -> Rlhf {
        Rlhf {
            train_batch_size: 1024,
            ppo_mini_batch_size: 256,
            ppo_epochs: 1,
            ppo_max_token_len_per_rank: 16_384,
            share_prompts: true,
            critic_warmup: 0,
            max_staleness: 0,
            old_logprobs: OldLogprobs::default(),
            val_before_train: true,
            test_freq: 0,
            validation: ValidationSampling::default(),
            verb_timeout_seconds: 3600,
            save_rollouts: true,
            report_samples: 4,
            val_pass_reward: 1.0,
        }
    }
}

/// `[rlhf.validation]`: where answers of the validation are drawn otherwise than those that are learnt from. What ends an
/// answer is what ends it in training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationSampling {
    /// Answers per prompt.
    pub n: usize,
    /// As `rollout.sampling.temperature`; 0: greedy.
    pub temperature: f64,
    /// As `rollout.sampling.top_k`; 0: all.
    pub top_k: usize,
    /// As `rollout.sampling.top_p`; 1: all.
    pub top_p: f64,
    /// As `rollout.sampling.min_p`; 0: all.
    pub min_p: f64,
    /// The longest answer, tokens. Default: `rollout.sampling.max_tokens`.
    pub max_tokens: Option<usize>,
}

impl Default for ValidationSampling {
    fn default() -> ValidationSampling {
        ValidationSampling { n: 1, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, max_tokens: None }
    }
}

impl ValidationSampling {
    /// What is asked of the engine in a validation, where `sampling` is asked in training.
    pub fn over(&self, sampling: &SamplingParams) -> SamplingParams {
        let &ValidationSampling { n, temperature, top_k, top_p, min_p, max_tokens } = self;
        let max_tokens = max_tokens.unwrap_or(sampling.max_tokens);
        SamplingParams { n, temperature, top_k, top_p, min_p, max_tokens, ..sampling.clone() }
    }
}

/// Where the log-probabilities before the update come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OldLogprobs {
    /// The engine's where they are the trainer's to the bit (equal types, equal tensor parallelism, no context
    /// parallelism, on a CPU), else the trainer's.
    #[default]
    Auto,
    /// The engine's, whatever the distance (verl: bypass_mode).
    Rollout,
    /// The trainer's, from a pass of their own.
    Recompute,
}

/// `[rollout]`: generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rollout {
    /// Ranks that share a model in generation.
    pub tensor_parallel_degree: usize,
    /// Type of weights and activations in generation; `auto`: as in training.
    pub dtype: ComputeType,
    /// MiB of weights that travel at once from training to generation.
    pub update_weights_bucket_mb: usize,
    /// How completions are drawn.
    pub sampling: SamplingParams,
    /// Memory and batch of the engine.
    pub engine: EngineConfig,
}

impl Default for Rollout {
    fn default() -> Rollout {
        Rollout {
            tensor_parallel_degree: 1,
            dtype: ComputeType::Auto,
            update_weights_bucket_mb: 256,
            sampling: SamplingParams { n: 8, ..SamplingParams::default() },
            engine: EngineConfig::default(),
        }
    }
}

/// A model that plays a part in the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Learns.
    Policy,
    /// Generates with the policy's weights.
    Rollout,
    /// The policy as it was at the start; never learns.
    Reference,
    /// Learns to predict returns.
    Critic,
    /// A reward model; never learns.
    Reward,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 5] = [Role::Policy, Role::Rollout, Role::Reference, Role::Critic, Role::Reward];

    /// Its name in configurations, errors and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Policy => "policy",
            Role::Rollout => "rollout",
            Role::Reference => "reference",
            Role::Critic => "critic",
            Role::Reward => "reward",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the model of a role other than the policy is; what is absent is the policy's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RoleModel {
    /// A Hugging Face folder or GGUF file with its weights. Default: the policy's own start.
    pub hf_assets_path: Option<PathBuf>,
    /// How its ranks share the work. Default: as the policy's, where it lives in the policy's pool; else data parallel.
    pub parallelism: Option<Parallelism>,
    /// Learning rate, of a critic. Default: 1e-5 (verl's).
    pub lr: Option<f64>,
}

/// `[roles]`: models other than the policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Roles {
    /// The reference, where the algorithm needs one.
    pub reference: RoleModel,
    /// The critic, where the algorithm needs one.
    pub critic: RoleModel,
    /// The reward model, where `reward.parts` has one.
    pub reward: RoleModel,
}

/// `[placement]`: which ranks each role lives on. Roles of one pool take turns on its ranks; pools run at the same time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PlacementConfig {
    /// Pools, in the order of their ranks, with how many each has. Empty: one pool, `all`, of every rank.
    pub pools: Vec<Pool>,
    /// The pool of each role. Default: the first.
    pub roles: RolePools,
}

/// The pool of each role.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RolePools {
    /// Of the model that learns.
    pub policy: Option<String>,
    /// Of generation.
    pub rollout: Option<String>,
    /// Of the reference.
    pub reference: Option<String>,
    /// Of the critic.
    pub critic: Option<String>,
    /// Of the reward model.
    pub reward: Option<String>,
}

impl RolePools {
    /// The pool that is named for a role.
    pub fn get(&self, role: Role) -> Option<&String> {
        match role {
            Role::Policy => self.policy.as_ref(),
            Role::Rollout => self.rollout.as_ref(),
            Role::Reference => self.reference.as_ref(),
            Role::Critic => self.critic.as_ref(),
            Role::Reward => self.reward.as_ref(),
        }
    }
}

/// Some ranks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// How many ranks it has.
    pub ranks: usize,
}

impl PlacementConfig {
    /// The pool of a role and its ranks, in a job of `world_size`.
    pub fn ranks_of(&self, role: Role, world_size: usize) -> (String, std::ops::Range<usize>) {
        let Some(first) = self.pools.first() else { return ("all".into(), 0..world_size) };
        let name = self.roles.get(role).unwrap_or(&first.name);
        let mut start = 0;
        for pool in &self.pools {
            if pool.name == *name {
                return (name.clone(), start..start + pool.ranks);
            }
            start += pool.ranks;
        }
        (name.clone(), 0..0)
    }
}
