//! A loss as data: a sum of components, each naming the batch columns it reads.
//!
//! The trainer is blind to algorithms: whoever builds the batch writes per-token columns, whoever builds the plan
//! names them here. Each component is normalised by the global sum of its weight column, so that a step's gradient
//! does not depend on how the batch was cut into micro-batches or ranks.

use crate::batch::Column;
use serde::{Deserialize, Serialize};

/// One term of the loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum LossComponent {
    /// Sum over tokens of weight * -log p(target) / global sum of weight.
    CrossEntropy {
        /// The per-token weight column (f32); 0 leaves a token out.
        weight: Column,
        /// Multiplies the term.
        coefficient: f64,
    },
}

impl LossComponent {
    /// The batch columns this component reads beside the tokens.
    pub fn columns(&self) -> Vec<Column> {
        match self {
            LossComponent::CrossEntropy { weight, .. } => vec![Column::Targets, *weight],
        }
    }
}

/// The sum of components that a job minimises.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossSpec {
    /// The terms.
    pub components: Vec<LossComponent>,
}

impl LossSpec {
    /// Next-token cross-entropy over the tokens that `ce_weight` marks: pre-training and SFT.
    pub fn next_token() -> LossSpec {
        LossSpec { components: vec![LossComponent::CrossEntropy { weight: Column::CeWeight, coefficient: 1.0 }] }
    }

    /// Every column a batch must carry for this loss.
    pub fn columns(&self) -> Vec<Column> {
        let mut all: Vec<Column> = self.components.iter().flat_map(LossComponent::columns).collect();
        all.sort();
        all.dedup();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_token_reads_targets_and_their_weight() {
        assert_eq!(LossSpec::next_token().columns(), [Column::Targets, Column::CeWeight]);
    }
}
