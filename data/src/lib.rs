//! Arrow data pipeline: source, tokenise, pack, mix, load.
//!
//! ```text
//! files -> source (documents) -> prepare (token shards + manifest, on disk) -> pack (index) -> mix -> Loader (Batch)
//!                                   \_ chat: conversations become tokens, and which of them are trained
//! ```
//!
//! Invariants: what a shard folder holds is a function of (sources, tokenizer, options), not of the number of
//! threads or of interruptions; sample `i` of a [`Loader`] is a function of (manifests, options, seed, `i`), not of
//! ranks or of what was read before; no document's text or token is dropped unseen.
//! Deliberately absent: shuffle buffers, worker processes, and any state that a checkpoint would have to hold beyond
//! a sample index.

pub mod chat;
pub mod encode;
pub mod error;
mod files;
pub mod inspect;
pub mod job;
pub mod loader;
mod lock;
pub mod manifest;
pub mod order;
mod pack;
pub mod prepare;
pub mod progress;
mod shard;
pub mod source;
mod split;
mod store;
pub mod tokenizer;

pub use chat::{ChatEncoder, ChatOptions, Preview, preview};
pub use encode::TextTokenizer;
pub use error::{DataError, Result};
pub use inspect::{Inspection, inspect};
pub use job::{
    PreparedJob, PreparedSource, loader_options, loader_sources, open_validation, prepare_job, wait_for_job,
};
pub use loader::{Loader, LoaderOptions, LoaderSource, Prefetcher, SamplePiece};
pub use manifest::Manifest;
pub use prepare::{PrepareOptions, prepare};
pub use progress::{PrepareProgress, Progress};
pub use shard::{ChatCounts, Cursor, ShardRecord, TokenType};
pub use split::Split;
