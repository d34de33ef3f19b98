//! A part of scoring as data: what the driver asks of a worker, who runs it on its shard.

use crate::{AlgoError, Algorithm, Merged, State, Statistics};
use serde::{Deserialize, Serialize};
use tangelo_core::Batch;

/// A part of scoring. (Not tagged from within: statistics of groups have numbers for keys, which that form cannot read.)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// What the shard says in the round after those of `merged`.
    Statistics {
        /// The algorithm's memory.
        state: State,
        /// Earlier rounds.
        merged: Merged,
    },
    /// The shard's columns.
    Apply {
        /// The algorithm's memory.
        state: State,
        /// Every round.
        merged: Merged,
    },
}

impl Call {
    /// Runs it on a shard: the shard with its columns, where it was to apply, and statistics to be merged.
    ///
    /// # Errors
    /// As [`Algorithm::statistics`] and [`Algorithm::apply`].
    pub fn serve(&self, algorithm: &dyn Algorithm, shard: &Batch) -> Result<(Option<Batch>, Statistics), AlgoError> {
        match self {
            Call::Statistics { state, merged } => Ok((None, algorithm.statistics(shard, state, merged)?)),
            Call::Apply { state, merged } => {
                let scored = algorithm.apply(shard, state, merged)?;
                Ok((Some(scored.batch), scored.report))
            }
        }
    }
}
