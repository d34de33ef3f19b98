//! What a driver may ask of a rank, and what it answers: the one list.
//!
//! Requests and answers are plain data, sent as JSON; batches in them are handles ([`RemoteBatch`]), whose columns the
//! rank pulls before its handler sees the call. Verbs are run in order, one at a time per rank; admin calls overtake.
//! Deliberately absent: code, and anything that depends on a model or an algorithm.

use crate::remote::{RemoteBatch, Row, ShardId};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tangelo_configs::SamplingParams;
use tangelo_core::{Column, LossSpec};

/// Names of meshes that ranks register for a role.
pub mod mesh {
    /// How batches for training, scoring and evaluation are split.
    pub const TRAIN: &str = "train";
    /// How prompts are split for generation.
    pub const GENERATE: &str = "generate";
}

/// A verb with its arguments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// Loss and gradients of a mini-batch, added to what is there.
    ForwardBackward {
        /// The rank's rows, with the columns that the loss reads.
        batch: RemoteBatch,
        /// The loss.
        loss: LossSpec,
    },
    /// Reduces gradients, clips, updates.
    OptimStep {
        /// Learning rate.
        lr: f64,
    },
    /// Computes columns without gradients.
    Forward {
        /// The rank's rows.
        batch: RemoteBatch,
        /// The columns to make.
        outputs: Vec<Column>,
    },
    /// Runs part of an algorithm where the data is. What `spec` means is between driver and worker.
    Score {
        /// The rank's rows.
        batch: RemoteBatch,
        /// Which algorithm, which part of it, merged statistics.
        spec: Value,
    },
    /// Makes the current weights available to those who [`Request::Pull`].
    Publish {
        /// The policy's version that they are.
        version: u64,
    },
    /// Takes published weights over.
    Pull {
        /// What the publisher answered.
        published: Published,
    },
    /// Completes prompts.
    Generate {
        /// The rank's prompts.
        batch: RemoteBatch,
        /// How.
        sampling: Sampling,
    },
    /// Writes the role's part of a checkpoint.
    Save {
        /// The checkpoint's folder.
        folder: PathBuf,
    },
    /// Reads it back.
    Restore {
        /// The checkpoint's folder.
        folder: PathBuf,
    },
}

impl Request {
    /// The verb.
    pub const fn name(&self) -> &'static str {
        match self {
            Request::ForwardBackward { .. } => "forward_backward",
            Request::OptimStep { .. } => "optim_step",
            Request::Forward { .. } => "forward",
            Request::Score { .. } => "score",
            Request::Publish { .. } => "publish",
            Request::Pull { .. } => "pull",
            Request::Generate { .. } => "generate",
            Request::Save { .. } => "save",
            Request::Restore { .. } => "restore",
        }
    }

    /// The batch whose rows the rank must have before it starts.
    pub const fn batch(&self) -> Option<&RemoteBatch> {
        match self {
            Request::ForwardBackward { batch, .. }
            | Request::Forward { batch, .. }
            | Request::Score { batch, .. }
            | Request::Generate { batch, .. } => Some(batch),
            _ => None,
        }
    }
}

/// How to draw completions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// The distribution, its bounds, and `n` completions per prompt; their rows follow one another.
    pub params: SamplingParams,
    /// Seed of the random numbers; with a prompt's group, a completion's index and a position it decides the token.
    pub seed: u64,
}

/// Weights that were made available.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// The policy's version.
    pub version: u64,
    /// What each answering rank says about how to get them, in order of index.
    pub details: Vec<Value>,
}

/// A number of a shard, which knows how to become the number of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// Parts add up.
    Sum(f64),
    /// The mean of `sum / weight` over everything.
    Mean {
        /// Sum over what was weighed.
        sum: f64,
        /// Its weight, such as a number of tokens.
        weight: f64,
    },
    /// The largest counts.
    Max(f64),
    /// The smallest counts.
    Min(f64),
}

impl Reading {
    /// Its value; a mean of nothing is 0.
    pub fn value(self) -> f64 {
        match self {
            Reading::Sum(value) | Reading::Max(value) | Reading::Min(value) => value,
            Reading::Mean { weight: 0.0, .. } => 0.0,
            Reading::Mean { sum, weight } => sum / weight,
        }
    }

    /// Of both parts together; parts that differ in kind keep the first.
    fn merge(self, other: Reading) -> Reading {
        match (self, other) {
            (Reading::Sum(a), Reading::Sum(b)) => Reading::Sum(a + b),
            (Reading::Mean { sum: a, weight: v }, Reading::Mean { sum: b, weight: w }) => {
                Reading::Mean { sum: a + b, weight: v + w }
            }
            (Reading::Max(a), Reading::Max(b)) => Reading::Max(a.max(b)),
            (Reading::Min(a), Reading::Min(b)) => Reading::Min(a.min(b)),
            (kept, _) => kept,
        }
    }
}

/// Numbers by name. Merged over ranks in order of index, so that sums have the same bits in every run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Metrics(pub BTreeMap<String, Reading>);

impl Metrics {
    /// One more, or one more part of it.
    pub fn add(&mut self, name: &str, reading: Reading) {
        match self.0.get_mut(name) {
            Some(kept) => *kept = kept.merge(reading),
            None => {
                self.0.insert(name.to_owned(), reading);
            }
        }
    }

    /// The value of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(|reading| reading.value())
    }

    /// All of them with those of another part.
    pub fn merge(&mut self, other: &Metrics) {
        other.0.iter().for_each(|(name, &reading)| self.add(name, reading));
    }
}

/// What a rank answers to a verb.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Numbers of its part.
    pub metrics: Metrics,
    /// Columns it made, which stay with it.
    pub made: Option<Made>,
    /// Anything else, by agreement between driver and worker: local statistics, where published weights are.
    pub detail: Value,
}

/// Columns that a rank made and holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// Their name in the rank's store.
    pub shard: ShardId,
    /// Where the rank can be reached.
    pub address: String,
    /// Which.
    pub columns: Vec<Column>,
    /// Tokens and group of each row.
    pub rows: Vec<Row>,
    /// For each row, the row of the argument that it came from.
    pub origins: Vec<u32>,
}

/// What an admin call asks. They overtake verbs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "admin", rename_all = "snake_case")]
pub enum Admin {
    /// Is it alive, and what is it doing?
    Health,
    /// Its counters.
    Statistics,
    /// Drops these shards.
    Drop {
        /// Those of the rank; others are ignored.
        shards: Vec<ShardId>,
    },
    /// Drops every shard made in this step or before.
    EndStep {
        /// The step.
        step: u64,
    },
    /// From now on, tokens are of this policy version.
    SetVersion {
        /// The version.
        version: u64,
    },
    /// Tells the verb that runs now to stop between two of its steps.
    Abort,
    /// The job is over: the end of the connection, which follows, is no loss. What runs then is finished.
    Shutdown,
}

impl Admin {
    /// Its name.
    pub const fn name(&self) -> &'static str {
        match self {
            Admin::Health => "health",
            Admin::Statistics => "statistics",
            Admin::Drop { .. } => "drop",
            Admin::EndStep { .. } => "end_step",
            Admin::SetVersion { .. } => "set_version",
            Admin::Abort => "abort",
            Admin::Shutdown => "shutdown",
        }
    }
}

/// What a rank answers to [`Admin::Health`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The verb that runs now, as `role.verb`.
    pub running: Option<String>,
    /// For how long.
    pub running_ms: u64,
    /// Its trace id.
    pub trace: String,
    /// Verbs that wait.
    pub waiting: usize,
    /// The panic after which the rank refuses to work.
    pub poisoned: Option<String>,
    /// The policy version it was told last.
    pub version: u64,
}

/// What a rank answers to [`Admin::Statistics`]: name -> number.
pub type Statistics = BTreeMap<String, f64>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_of_parts_become_those_of_the_whole() {
        let part = |sum, weight, most| {
            let mut metrics = Metrics::default();
            metrics.add("loss", Reading::Mean { sum, weight });
            metrics.add("longest", Reading::Max(most));
            metrics.add("tokens", Reading::Sum(weight));
            metrics
        };
        let mut whole = part(6.0, 3.0, 5.0);
        whole.merge(&part(4.0, 1.0, 7.0));
        assert_eq!(
            ["loss", "longest", "tokens", "none"].map(|n| whole.get(n)),
            [Some(2.5), Some(7.0), Some(4.0), None]
        );
        assert_eq!(Reading::Mean { sum: 0.0, weight: 0.0 }.value(), 0.0);
    }

    #[test]
    fn requests_survive_json() {
        let requests = [
            Request::OptimStep { lr: 1e-6 },
            Request::Generate { batch: RemoteBatch::default(), sampling: Sampling::default() },
            Request::Pull { published: Published { version: 3, details: vec![Value::Null] } },
            Request::Save { folder: "/run/step-4".into() },
        ];
        for request in requests {
            let json = serde_json::to_value(&request).unwrap();
            assert_eq!(json["verb"], request.name());
            assert_eq!(serde_json::from_value::<Request>(json).unwrap(), request);
        }
    }
}
