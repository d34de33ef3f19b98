//! What is asked of the engine, and what comes back.

use serde::{Deserialize, Serialize};
use tangelo_configs::SamplingParams;

/// One prompt to be continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The caller's name for it; two requests under way have different ones.
    pub id: u64,
    /// Token ids.
    pub prompt: Vec<u32>,
    /// How its samples are drawn.
    pub sampling: SamplingParams,
    /// What all chance in it is a function of, together with sample and position.
    pub seed: u64,
}

/// Why a sample is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-text token, a stop token or a stop text.
    Stop,
    /// As many tokens as were asked for, or the model's longest sequence.
    Length,
    /// The caller ended it.
    Abort,
}

/// One finished sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The request.
    pub request: u64,
    /// Which of its samples, from 0.
    pub index: usize,
    /// The tokens that were drawn, with the one that ended it.
    pub ids: Vec<u32>,
    /// Log-probability of each under the model, at temperature 1.
    pub logprobs: Vec<f32>,
    /// Log-probability of each under the distribution it was drawn from (temperature, filters); 0 where greedy.
    pub sampling_logprobs: Vec<f32>,
    /// The version of the weights that drew each.
    pub versions: Vec<u64>,
    /// Why it is over.
    pub finish_reason: FinishReason,
}
