//! Batches from rows, and the driver's part of scoring them.

use std::collections::BTreeMap;
use tangelo_algo::{AlgoError, Algorithm, Limits, Merged, Scored, State, Statistics};
use tangelo_configs::Algorithm as Config;
use tangelo_core::batch::{per_sequence_i64, ragged_f32, ragged_u32};
use tangelo_core::{Batch, Column};

/// A sequence; streams have one value per token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequence {
    pub index: i64,
    pub group: i64,
    pub reward: f32,
    pub mask: Vec<f32>,
    pub old: Vec<f32>,
    pub rollout: Vec<f32>,
    pub reference: Vec<f32>,
    pub value: Vec<f32>,
}

impl Sequence {
    /// Only what every algorithm needs; `1` in `mask` is a policy token.
    pub fn plain(group: i64, reward: f32, mask: &str) -> Sequence {
        let mask: Vec<f32> = mask.chars().map(|c| f32::from(u8::from(c == '1'))).collect();
        let zeros = vec![0.0; mask.len()];
        Sequence {
            index: 100 + group,
            group,
            reward,
            old: zeros.clone(),
            rollout: zeros.clone(),
            reference: zeros.clone(),
            value: zeros,
            mask,
        }
    }

    /// With `tokens` more that mean nothing at the end, full of values that must not be read.
    pub fn padded(mut self, tokens: usize) -> Sequence {
        self.mask.extend(vec![0.0; tokens]);
        for stream in [&mut self.old, &mut self.rollout, &mut self.reference, &mut self.value] {
            stream.extend(vec![f32::NAN; tokens]);
        }
        self
    }

    /// Positions of policy tokens.
    pub fn tokens(&self) -> Vec<usize> {
        (0..self.mask.len()).filter(|&t| self.mask[t] == 1.0).collect()
    }
}

/// A batch with every column that any algorithm reads.
pub fn batch(rows: &[Sequence]) -> Batch {
    let stream = |of: fn(&Sequence) -> &Vec<f32>| ragged_f32(&rows.iter().map(|r| of(r).clone()).collect::<Vec<_>>());
    let tokens: Vec<Vec<u32>> = rows.iter().map(|r| vec![1; r.mask.len()]).collect();
    Batch::from_columns(vec![
        (Column::Tokens, ragged_u32(&tokens)),
        (Column::LossMask, stream(|r| &r.mask)),
        (Column::OldLogprob, stream(|r| &r.old)),
        (Column::RolloutLogprob, stream(|r| &r.rollout)),
        (Column::RefLogprob, stream(|r| &r.reference)),
        (Column::Value, stream(|r| &r.value)),
        (
            Column::Reward,
            std::sync::Arc::new(arrow::array::Float32Array::from_iter_values(rows.iter().map(|r| r.reward))),
        ),
        (Column::SampleIndex, per_sequence_i64(rows.iter().map(|r| r.index).collect())),
        (Column::GroupId, per_sequence_i64(rows.iter().map(|r| r.group).collect())),
    ])
    .unwrap()
}

/// The algorithm of a TOML text, with room for 64 tokens and 4 completions per prompt.
pub fn algorithm(toml: &str) -> Box<dyn Algorithm> {
    let limits = Limits { max_response_tokens: 64, samples_per_prompt: 4 };
    tangelo_algo::algorithm(&toml::from_str::<Config>(toml).unwrap(), limits).unwrap()
}

/// What a driver gets from scoring.
pub struct Outcome {
    pub shards: Vec<Scored>,
    pub metrics: BTreeMap<String, f64>,
    pub next: State,
}

/// Collects every round from every shard, merges, applies. Statistics travel as JSON, as they do between processes.
pub fn score(algorithm: &dyn Algorithm, state: &State, shards: &[Batch]) -> Result<Outcome, AlgoError> {
    let mut merged = Merged::default();
    for _ in 0..algorithm.rounds() {
        let local = |shard| algorithm.statistics(shard, state, &merged).map(|found| travel(&found));
        let parts: Vec<Statistics> = shards.iter().map(local).collect::<Result<_, _>>()?;
        merged.push(&parts);
    }
    let merged: Merged = serde_json::from_str(&serde_json::to_string(&merged).unwrap()).unwrap();
    let apply = |shard| algorithm.apply(shard, state, &merged);
    let shards: Vec<Scored> = shards.iter().map(apply).collect::<Result<_, _>>()?;
    let report = Statistics::merged(shards.iter().map(|s| &s.report));
    let metrics = algorithm.metrics(state, &merged, &report)?;
    Ok(Outcome { shards, metrics, next: algorithm.next_state(state, &merged)? })
}

fn travel(statistics: &Statistics) -> Statistics {
    serde_json::from_str(&serde_json::to_string(statistics).unwrap()).unwrap()
}

/// A written column of a batch scored in one piece, row by row.
pub fn column(outcome: &Outcome, column: Column) -> Vec<Vec<f32>> {
    let mut rows = Vec::new();
    for shard in &outcome.shards {
        let values = shard.batch.f32_values(column).unwrap();
        let mut start = 0;
        for length in shard.batch.row_lengths().unwrap() {
            rows.push(values[start..start + length].to_vec());
            start += length;
        }
    }
    rows
}
