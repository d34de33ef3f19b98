//! What a completion is worth: a weighted sum of parts, built in, of the user's own programs, or of a reward model.
//!
//! ```text
//! score(samples) --+-- built-in parts: on the caller's thread
//!                  +-- command, python: a pool of processes each (`process/`), all samples at once
//!                  +-- model: values given by the role that ran it
//!                  -> value x weight, summed; errors by `on_error`; alarms
//! ```
//!
//! Invariants: every sample gets an answer in bounded time; a part that cannot score a sample is an error for that
//! sample and never a silent 0; values are finite. Deliberately absent: tensors, and any state that a checkpoint holds.

mod alarm;
mod algebra;
mod boxed;
mod builtin;
mod countdown;
mod format;
mod latex;
pub(crate) mod number;
mod pipeline;
mod process;
mod summary;
#[cfg(test)]
mod testing;

pub use alarm::{Alarm, AlarmKind};
pub use pipeline::{Pending, RewardOptions, RewardPipeline, Scored, ScoredBatch, needs_ground_truth};
pub use summary::PartSummary;

#[cfg(test)]
pub(crate) use countdown::{evaluate as countdown_evaluate, solvable as countdown_solvable};

use crate::prompts::Prompt;
use std::sync::Arc;

/// A completion to be scored.
#[derive(Clone, Debug)]
pub struct Sample {
    /// What was asked, with its ground truth.
    pub prompt: Arc<Prompt>,
    /// What the policy answered, as text without special tokens.
    pub completion: String,
    /// Length of the answer, tokens.
    pub completion_tokens: usize,
}
