//! The generation engine: continuous batching over paged keys and values; schedule, run, sample.
//!
//! ```text
//! add(Request) -> waiting -> running -> Completion
//!                    ^          |
//!                    +----------+  preempted: its blocks are given back, its tokens computed again later
//! ```
//! One [`Engine::step`] is a plan ([`Scheduler`]: which sequences compute which tokens), one packed forward pass over all of
//! them, and one draw for every sequence that is up to date. The caller handles whatever else it has to between steps.
//!
//! | queue | bounded by | waits for | unblocked by |
//! |---|---|---|---|
//! | waiting | its user, who adds requests | a free slot, and blocks for all its tokens | a sequence that finishes |
//! | running | `max_num_seqs` | tokens of the step's budget; a block every 64 tokens | the next step; preempting the newest |
//!
//! Invariants, each with its tests: a sequence's tokens and log-probabilities are a function of (weights, prompt, sampling
//! parameters, seed, sample) alone, never of what else is generated, in which order, in which pieces, or how often it was
//! preempted; on a CPU the log-probabilities have the bits of the training forward pass. Tokens carry the version of the
//! weights that drew them. The weights are the caller's: the engine borrows them for a step and owns the keys' and values'
//! memory alone, which it gives back on demand.
//!
//! Where several ranks hold a model together, each has an engine of its own over its part ([`Engine::parallel`]) and is asked
//! the same; they take the same steps and draw the same tokens.
//!
//! Deliberately absent: text (a [`TextStream`] brings it where stop texts need it), chat templates, a cache of prompts
//! across requests, and where weights come from.

mod blocks;
mod engine;
mod error;
mod group;
mod request;
mod scheduler;
mod sequence;
mod stop;

pub use blocks::{BlockCopy, BlockManager, OutOfBlocks};
pub use engine::{Engine, EngineStats, StepReport};
pub use error::RolloutError;
pub use request::{Completion, FinishReason, Request};
pub use scheduler::{Limits, Scheduler, SequenceId, StepPlan, StoppedBy, Work};
pub use stop::{TextSource, TextStream};
