//! The TOML file of a job, section by section.
//!
//! Section and key names are torchtitan v0.2's where the meaning is the same; a key of our own says so. Every struct
//! denies unknown keys and has a default for every key, so that the resolved file shows them all.

mod data;
mod parallelism;

pub use data::{DEFAULT_TEXT_COLUMN, Data, DataFormat, DataSource, Overlong, Packing};
pub use parallelism::{Parallelism, PipelineSchedule, ReshardAfterForward, RotateMethod};

use crate::model::{Family, HeadSpec, RopeScaling};
use crate::places::Places;
use crate::rlhf::{PlacementConfig, Rlhf, Roles, Rollout};
use crate::{Algorithm, Prompts, Reward};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// A whole job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct JobConfig {
    /// Other TOML files, relative to this one, read first; later keys win.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<PathBuf>,
    /// What to do and where to put it.
    pub job: Job,
    /// The architecture and where its assets are.
    pub model: Model,
    /// What to read.
    pub data: Data,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The learning rate over time.
    pub lr_scheduler: LrScheduler,
    /// The loop.
    pub training: Training,
    /// How ranks share the work.
    pub parallelism: Parallelism,
    /// What is recomputed in backward.
    pub activation_checkpoint: ActivationCheckpoint,
    /// Saving and resuming.
    pub checkpoint: Checkpoint,
    /// Evaluation during training.
    pub validation: Validation,
    /// What is recorded.
    pub metrics: Metrics,
    /// Communication.
    pub comm: Comm,
    /// Reproducibility.
    pub debug: Debug,
    /// The loop of an `rlhf` job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rlhf: Option<Rlhf>,
    /// How rewards become advantages, and the loss that reads them, of an `rlhf` job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Algorithm>,
    /// Generation in an `rlhf` job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// What is asked in an `rlhf` job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<Prompts>,
    /// What answers are worth in an `rlhf` job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward: Option<Reward>,
    /// Models beside the policy of an `rlhf` job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roles: Option<Roles>,
    /// Which ranks the roles of an `rlhf` job live on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementConfig>,
    /// Where the values come from, for errors; empty in a resolved job.
    #[serde(skip)]
    pub(crate) places: Places,
}

/// `[job]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Job {
    /// What kind of job this is (our own key).
    #[serde(rename = "type")]
    pub kind: JobType,
    /// The run folder: logs, metrics, checkpoints, samples and exports go here.
    pub dump_folder: PathBuf,
    /// Free text for the report.
    pub description: String,
    /// Print the resolved config at the start.
    pub print_config: bool,
}

/// What a job does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobType {
    /// Next-token prediction on packed text.
    #[default]
    Pretrain,
    /// Supervised fine-tuning: next-token prediction on packed conversations, of what the assistant says.
    Sft,
    /// Reinforcement learning: prompts are answered, answers rewarded, and the policy learns from that.
    Rlhf,
}

/// `[model]`: a flavor, or the folder whose config.json says it, or every key by hand; keys given here win.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// The family.
    pub name: Option<Family>,
    /// A shape by name, as listed by `tangelo schema --flavors`, such as `smollm2-135m`.
    pub flavor: Option<String>,
    /// A folder in Hugging Face's format (config.json, tokenizer.json, weights) or a GGUF file.
    pub hf_assets_path: Option<PathBuf>,
    /// V. Defaults to the tokenizer's size rounded up to a multiple of 64 where neither flavor nor assets say it.
    pub vocab_size: Option<usize>,
    /// D.
    pub hidden_size: Option<usize>,
    /// Width of the feed-forward's hidden layer.
    pub intermediate_size: Option<usize>,
    /// L.
    pub num_hidden_layers: Option<usize>,
    /// H.
    pub num_attention_heads: Option<usize>,
    /// K.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; D / H where absent.
    pub head_dim: Option<usize>,
    /// Longest sequence, tokens.
    pub max_position_embeddings: Option<usize>,
    /// Base of RoPE's wavelengths.
    pub rope_theta: Option<f64>,
    /// Stretching of RoPE.
    pub rope_scaling: Option<RopeScaling>,
    /// Epsilon of RMS norms.
    pub rms_norm_eps: Option<f64>,
    /// Attention window, tokens, of every layer (of those that have one in `hf_assets_path`, where some do); 0: none.
    pub sliding_window: Option<usize>,
    /// Biases on q, k, v and the output projection (llama, qwen3; qwen2 always has them on q, k and v).
    pub attention_bias: Option<bool>,
    /// Biases on the feed-forward's projections (llama).
    pub mlp_bias: Option<bool>,
    /// Head shares the embedding's weight.
    pub tie_word_embeddings: Option<bool>,
    /// What the head gives: `{ type = "scalar" }` makes a critic or a reward model; absent: logits, or what the assets have.
    pub head: Option<HeadSpec>,
    /// Standard deviation of initial weights.
    pub initializer_range: Option<f64>,
}

/// `[optimizer]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Which.
    pub name: OptimizerName,
    /// Peak learning rate; 2e-5 where an `sft` job does not say it, 1e-6 where an `rlhf` job does not.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment; 0.999 where an `rlhf` job does not say it.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on matrices only; 0.01 where an `rlhf` job does not say it.
    pub weight_decay: f64,
    /// Decay of Muon's momentum (our own key, like the three below; with the meanings of `torch.optim.Muon`).
    pub muon_momentum: f64,
    /// Whether Muon's update looks ahead: the gradient moved `muon_momentum` of the way to the momentum.
    pub muon_nesterov: bool,
    /// Newton-Schulz iterations that make Muon's updates orthogonal.
    pub muon_ns_steps: usize,
    /// How Muon's learning rate follows the shape of a matrix.
    pub muon_adjust_lr: MuonAdjustLr,
}

/// Which optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OptimizerName {
    /// Loshchilov and Hutter, arXiv 1711.05101.
    #[default]
    AdamW,
    /// Jordan et al. 2024: momentum made orthogonal, for the matrices of the blocks; AdamW, with the same learning rate,
    /// for embedding, head, norms and biases.
    Muon,
}

impl fmt::Display for OptimizerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OptimizerName::AdamW => "AdamW",
            OptimizerName::Muon => "Muon",
        })
    }
}

/// How Muon's learning rate follows the shape `[r, c]` of a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MuonAdjustLr {
    /// Times 0.2 sqrt(max(r, c)): updates as large as AdamW's, whose learning rate and weight decay can be kept.
    #[default]
    #[serde(rename = "match_rms_adamw")]
    MatchRmsAdamW,
    /// Times sqrt(max(1, r / c)).
    #[serde(rename = "original")]
    Original,
}

/// `[lr_scheduler]`: warm-up, plateau, decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LrScheduler {
    /// Steps from 0 to the peak, linearly; 0 where an `rlhf` job does not say it.
    pub warmup_steps: usize,
    /// Length of the whole schedule; `training.steps` where absent.
    pub total_steps: Option<usize>,
    /// Part of the schedule spent decaying, at its end (WSD); 0 is constant, absent: all of it after the warm-up, of an
    /// `rlhf` job 0.
    pub decay_ratio: Option<f64>,
    /// Shape of the decay.
    pub decay_type: DecayType,
    /// The last learning rate over the peak.
    pub min_lr_factor: f64,
}

/// Shape of the decay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DecayType {
    /// A straight line.
    #[default]
    Linear,
    /// 1 - sqrt of progress.
    Sqrt,
    /// Half a cosine.
    Cosine,
}

/// `[training]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Training {
    /// Sequences a rank puts through the model at once.
    pub local_batch_size: usize,
    /// Sequences per optimizer step over all ranks; -1: `local_batch_size` times the data-parallel size.
    pub global_batch_size: i64,
    /// Tokens per sequence (S).
    pub seq_len: usize,
    /// Gradients are scaled down to this global norm; 0 switches clipping off.
    pub max_norm: f64,
    /// Optimizer steps.
    pub steps: usize,
    /// Type of parameters and activations: `float32`, or `bfloat16` with fp32 master weights. Absent (`auto`):
    /// bfloat16 on a GPU, float32 on a CPU.
    pub mixed_precision_param: ComputeType,
    /// Type of gradients and reductions: always `float32`.
    pub mixed_precision_reduce: ReduceType,
    /// Where to train (our own key): `auto`, `cpu`, `cuda`.
    pub device: DeviceChoice,
    /// Threads per rank on a CPU (our own key); 0: cores divided by the ranks of the node.
    pub num_threads: usize,
    /// Steps with a non-finite loss or gradient that are skipped before training stops (our own key).
    pub max_skipped: usize,
}

/// Type of parameters and activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ComputeType {
    /// bfloat16 on a GPU, float32 on a CPU.
    #[default]
    Auto,
    /// IEEE binary32.
    Float32,
    /// bfloat16 with fp32 master weights.
    Bfloat16,
}

/// Type of gradients and reductions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReduceType {
    /// IEEE binary32.
    #[default]
    Float32,
}

/// Where to train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    /// CUDA where there is a GPU, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with the rank's local index.
    Cuda,
}

/// `[activation_checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ActivationCheckpoint {
    /// What is recomputed.
    pub mode: RecomputeMode,
    /// With `selective`: `"2"` recomputes every second block (any number), `"attention"` the attention half of every
    /// block, `"feed_forward"` the other half.
    pub selective_ac_option: String,
    /// What is recomputed in some layers, over what the keys above say (our own key).
    pub layers: Vec<LayerRecompute>,
}

/// What is recomputed in some layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerRecompute {
    /// The first layer, from 0.
    pub first: usize,
    /// The last layer.
    pub last: usize,
    /// What of them.
    pub recompute: Recompute,
}

/// What of a block is run again in backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// From the block's input to the sum with attention's output.
    Attention,
    /// From there to the block's output.
    FeedForward,
    /// The whole block, from its input.
    Full,
}

/// What is recomputed in backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RecomputeMode {
    /// Nothing: every block's activations are kept.
    #[default]
    None,
    /// Every `selective_ac_option`-th block.
    Selective,
    /// Every block.
    Full,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Save, and resume from what the run folder holds.
    pub enable: bool,
    /// Folder inside the run folder.
    pub folder: PathBuf,
    /// Steps between saves.
    pub interval: usize,
    /// Start from the checkpoint or Hugging Face folder here when the run folder has none.
    pub initial_load_path: Option<PathBuf>,
    /// Load weights only, not optimizer, step and data position.
    pub initial_load_model_only: bool,
    /// `initial_load_path` (or, without it, `model.hf_assets_path`) is a Hugging Face folder or GGUF file.
    pub initial_load_in_hf: bool,
    /// The last save keeps weights only.
    pub last_save_model_only: bool,
    /// The last step also exports a Hugging Face folder, `export` in the run folder.
    pub last_save_in_hf: bool,
    /// Element type of exports.
    pub export_dtype: ExportType,
    /// Whether training goes on while files are written.
    pub async_mode: AsyncMode,
    /// Newest checkpoints kept; 0 keeps all.
    pub keep_latest_k: usize,
    /// Checkpoints at multiples of this many steps are kept for good (our own key); 0: none.
    pub keep_every: usize,
    /// The step to resume from; -1: the newest usable one.
    pub load_step: i64,
}

/// Element type of exports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportType {
    /// IEEE binary32.
    #[default]
    Float32,
    /// IEEE binary16.
    Float16,
    /// bfloat16.
    Bfloat16,
}

/// Whether training goes on while a checkpoint is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AsyncMode {
    /// Training waits for the disk.
    Disabled,
    /// Training waits only for the copy out of the model.
    #[default]
    Async,
}

/// `[validation]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Validation {
    /// Evaluate on the held-out documents.
    pub enable: bool,
    /// Evaluate on these instead (our own key), with keys as in `data.sources`; then `data.validation_fraction` is 0.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<DataSource>,
    /// Steps between evaluations.
    pub freq: usize,
    /// Global batches per evaluation; -1: all of the held-out data.
    pub steps: i64,
    /// Sample this many tokens from each of `prompts` after an evaluation (our own key); 0: none.
    pub sample_tokens: usize,
    /// What samples continue; in an `sft` job each is a message of the user, or messages as a JSON list, rendered by the
    /// chat template (our own key).
    pub prompts: Vec<String>,
}

/// `[metrics]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Steps between records.
    pub log_freq: usize,
    /// Write TensorBoard event files too.
    pub enable_tensorboard: bool,
    /// Folder of the event files inside the run folder.
    pub save_tb_folder: PathBuf,
}

/// `[comm]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Comm {
    /// How long ranks wait for each other at the start, and in the first step, seconds.
    pub init_timeout_seconds: u64,
    /// How long a rank waits inside a collective later, seconds.
    pub train_timeout_seconds: u64,
}

/// `[debug]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Debug {
    /// Seeds initialisation and data order.
    pub seed: u64,
    /// Deterministic kernels on a GPU; a CPU always is.
    pub deterministic: bool,
}

impl Default for Job {
    fn default() -> Job {
        Job {
            kind: JobType::Pretrain,
            dump_folder: "runs/default".into(),
            description: String::new(),
            print_config: false,
        }
    }
}

impl Default for Optimizer {
    fn default() -> Optimizer {
        Optimizer {
            name: OptimizerName::AdamW,
            lr: 8e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            muon_momentum: 0.95,
            muon_nesterov: true,
            muon_ns_steps: 5,
            muon_adjust_lr: MuonAdjustLr::MatchRmsAdamW,
        }
    }
}

impl Default for LrScheduler {
    fn default() -> LrScheduler {
        LrScheduler {
            warmup_steps: 200,
            total_steps: None,
            decay_ratio: None,
            decay_type: DecayType::Linear,
            min_lr_factor: 0.0,
        }
    }
}

impl Default for Training {
    fn default() -> Training {
        Training {
            local_batch_size: 8,
            global_batch_size: -1,
            seq_len: 2048,
            max_norm: 1.0,
            steps: 10_000,
            mixed_precision_param: ComputeType::Auto,
            mixed_precision_reduce: ReduceType::Float32,
            device: DeviceChoice::Auto,
            num_threads: 0,
            max_skipped: 10,
        }
    }
}

impl Default for ActivationCheckpoint {
    fn default() -> ActivationCheckpoint {
        ActivationCheckpoint { mode: RecomputeMode::None, selective_ac_option: "2".into(), layers: Vec::new() }
    }
}

impl Default for Checkpoint {
    fn default() -> Checkpoint {
        Checkpoint {
            enable: true,
            folder: "checkpoint".into(),
            interval: 500,
            initial_load_path: None,
            initial_load_model_only: true,
            initial_load_in_hf: false,
            last_save_model_only: false,
            last_save_in_hf: false,
            export_dtype: ExportType::Float32,
            async_mode: AsyncMode::Async,
            keep_latest_k: 10,
            keep_every: 0,
            load_step: -1,
        }
    }
}

impl Default for Validation {
    fn default() -> Validation {
        Validation { enable: false, sources: Vec::new(), freq: 100, steps: 10, sample_tokens: 0, prompts: Vec::new() }
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics { log_freq: 10, enable_tensorboard: true, save_tb_folder: "tb".into() }
    }
}

impl Default for Comm {
    fn default() -> Comm {
        Comm { init_timeout_seconds: 300, train_timeout_seconds: 100 }
    }
}

impl Default for Debug {
    fn default() -> Debug {
        Debug { seed: 42, deterministic: true }
    }
}
