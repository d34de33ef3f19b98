//! What `tangelo` asks of `tangelo-worker`, as data.
//!
//! The user's binary has no libtorch. Verbs that need tensors are parsed by it and handed over as
//! `tangelo-worker VERB JSON`, one of these structs, so that the two agree by type.

use crate::job::{ComputeType, DeviceChoice, ExportType};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where a model is: a Hugging Face folder, a GGUF file, a run folder (its newest checkpoint) or a checkpoint folder.
pub type ModelPath = PathBuf;

/// What every verb that runs a model needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelRequest {
    /// The model.
    pub model: ModelPath,
    /// Where to run.
    pub device: DeviceChoice,
    /// Type of weights and activations.
    pub dtype: ComputeType,
    /// CPU threads; 0: all cores.
    pub num_threads: usize,
}

/// `tangelo-worker generate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// The model.
    #[serde(flatten)]
    pub model: ModelRequest,
    /// Text to continue; exclusive with `prompt_ids`.
    pub prompt: Option<String>,
    /// `prompt` is what the user says, or a JSON list of messages: the chat template renders it.
    pub chat: bool,
    /// Token ids to continue.
    pub prompt_ids: Option<Vec<u32>>,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// 0: greedy.
    pub temperature: f64,
    /// Keep the k most likely tokens; 0: all.
    pub top_k: usize,
    /// Keep the most likely tokens whose probabilities add up to this; 1: all.
    pub top_p: f64,
    /// Seeds sampling: token `i` is a pure function of (seed, i, logits).
    pub seed: u64,
    /// Generate past an end-of-text token.
    pub ignore_eos: bool,
    /// One JSON object at the end (`{"prompt_ids", "ids", "logprobs", "text", "finish_reason"}`), no streamed text.
    pub json: bool,
    /// Recompute the whole sequence for every token instead of keeping keys and values: for checking.
    pub no_cache: bool,
}

/// `tangelo-worker score`: JSON lines on stdin, one answer line for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreRequest {
    /// The model.
    #[serde(flatten)]
    pub model: ModelRequest,
}

/// `tangelo-worker eval`: perplexity on files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRequest {
    /// The model.
    #[serde(flatten)]
    pub model: ModelRequest,
    /// Globs, as in `data.sources.paths`.
    pub paths: Vec<String>,
    /// The column with the text.
    pub text_column: Option<String>,
    /// Tokens per sequence; 0: the model's longest, at most 2048.
    pub seq_len: usize,
    /// One JSON object instead of a table.
    pub json: bool,
}

/// `tangelo-worker export`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportRequest {
    /// A run folder or a checkpoint folder.
    pub run: PathBuf,
    /// The step to export; the newest usable checkpoint where absent.
    pub step: Option<u64>,
    /// The folder to write; `export` in the run folder where absent.
    pub output: Option<PathBuf>,
    /// Element type.
    pub dtype: ExportType,
}
