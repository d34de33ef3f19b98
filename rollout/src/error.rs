//! What can go wrong, by what the caller does about it.

use tangelo_configs::ConfigError;
use tangelo_kernels::comm::CommError;

/// Why the engine refuses.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// Sampling parameters or options that make no sense.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// A request that cannot be served, whatever else is running; the others are not touched.
    #[error("request {request}: {detail}")]
    Request {
        /// Its id.
        request: u64,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// The engine cannot hold what it needs.
    #[error("generation memory: {0}")]
    Memory(String),
    /// The model's numbers are not finite any more.
    #[error(
        "request {request}, sample {sample}: the logits of token {position} are not finite (weights version {version}); \
         the model has diverged"
    )]
    NotFinite {
        /// The request.
        request: u64,
        /// Which of its samples.
        sample: usize,
        /// Position in the sequence.
        position: usize,
        /// The weights.
        version: u64,
    },
    /// The model, or what the ranks of a group hold of it, is not one that the engine can run.
    #[error("the engine cannot run this model: {0}")]
    Model(String),
    /// A rank that holds another part of the model failed.
    #[error("generation: {0}")]
    Peer(#[from] CommError),
    /// The tokenizer failed.
    #[error("stop texts: {0}")]
    Text(String),
}
