//! What can be wrong with a batch or its statistics.

use std::fmt;
use tangelo_core::{BatchError, Column};
use thiserror::Error;

/// Which sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The global sample index of its prompt.
    pub index: i64,
    /// The group of completions of that prompt.
    pub group: i64,
    /// The row in its shard.
    pub row: usize,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sample {} (group {}, row {} of its shard)", self.index, self.group, self.row)
    }
}

/// Why a batch cannot be scored.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum AlgoError {
    /// The batch lacks a column or is malformed.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A number that is none.
    #[error("{sample}: `{column}`{} is {value}; it must be finite: look at {}", at(*token), culprit(*column))]
    NotFinite {
        /// Whose.
        sample: Sample,
        /// The column.
        column: Column,
        /// The token in the row; `None` for a value per sequence.
        token: Option<usize>,
        /// What was found.
        value: f32,
    },
    /// A mask that is neither 0 nor 1.
    #[error("{sample}: `loss_mask`{} is {value}; it must be 0 or 1", at(Some(*token)))]
    Mask {
        /// Whose.
        sample: Sample,
        /// The token in the row.
        token: usize,
        /// What was found.
        value: f32,
    },
    /// A result that f32 cannot hold.
    #[error("{sample}: `{column}` becomes {value:e}, which 32-bit floats cannot hold; scale the reward down")]
    Overflow {
        /// Whose.
        sample: Sample,
        /// The column that was to be written.
        column: Column,
        /// The result.
        value: f64,
    },
    /// Statistics of too few or too many rounds.
    #[error("statistics of {found} rounds where {expected} are needed; collect and merge every round in order")]
    Rounds {
        /// Rounds merged.
        found: usize,
        /// Rounds needed.
        expected: usize,
    },
    /// Statistics of other sequences than these.
    #[error("the merged statistics know nothing of group {group}; merge those of every shard before applying them")]
    MissingGroup {
        /// The group.
        group: i64,
    },
    /// Settings that make no sense.
    #[error("{}", .0.join("\n"))]
    Settings(Vec<String>),
    /// Dynamic sampling found too few groups whose rewards differ.
    #[error(
        "{kept} of {wanted} groups differ in their rewards after {batches} generated batches, the bound of \
         `algorithm.filter_groups.max_num_gen_batches`; the prompts are too easy or too hard for this policy"
    )]
    TooFewGroups {
        /// Groups kept.
        kept: usize,
        /// Groups wanted.
        wanted: usize,
        /// Batches generated.
        batches: usize,
    },
}

fn at(token: Option<usize>) -> String {
    token.map_or(String::new(), |t| format!(" at token {t}"))
}

fn culprit(column: Column) -> &'static str {
    match column {
        Column::Reward => "the reward function's answer for it",
        Column::Value => "the critic",
        Column::RefLogprob => "the reference's weights",
        _ => "the policy's weights",
    }
}
