//! What an algorithm is: how it scores a batch in three pure parts, the loss that reads the result.
//!
//! ```text
//! merged = []                                         the driver's
//! for round in 0..rounds:
//!     parts  = each shard: statistics(shard, state, merged)     where the data is; order does not matter
//!     merged.push(parts)                                        exact, commutative
//! each shard: apply(shard, state, merged) -> its columns, and a report
//! metrics(state, merged, reports); state = next_state(state, merged)
//! ```
//!
//! An algorithm's file implements the first methods of [`Algorithm`], on one [`Row`] at a time; the rest follows.
//! Invariants: columns of a row are a function of the row, the settings, the state and the merged statistics; those
//! are the same however rows were dealt to shards. So columns are the same bits in every layout.

use crate::row::{self, Row};
use crate::settings::Settings;
use crate::state::State;
use crate::statistics::{Merged, Quantity, Statistics};
use crate::{AlgoError, kl, metrics, rollout_correction};
use arrow::array::ArrayRef;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use tangelo_core::batch::ragged_f32;
use tangelo_core::{Batch, BatchError, Column, LossSpec};

/// A model that learns, as algorithms know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The model that generates and learns.
    Policy,
    /// The model that learns to predict returns, token by token.
    Critic,
}

/// What an algorithm makes of a row: a value per policy token.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// How much better than expected each token was.
    pub advantages: Vec<f64>,
    /// What a critic should have said; where there is none, what is reported as return.
    pub returns: Vec<f64>,
}

impl Estimate {
    /// The same advantage at every token, and as return, as verl reports it.
    pub fn same_for_all(row: &Row, advantage: f64) -> Estimate {
        let advantages = vec![advantage; row.tokens.len()];
        Estimate { returns: advantages.clone(), advantages }
    }
}

/// A scored shard.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The shard with the columns of [`Algorithm::writes`].
    pub batch: Batch,
    /// What was written, to be merged for [`Algorithm::metrics`].
    pub report: Statistics,
}

/// A reinforcement-learning algorithm.
pub trait Algorithm: fmt::Debug + Send + Sync {
    /// The settings it shares with others.
    fn settings(&self) -> &Settings;

    /// How often statistics are collected before [`Algorithm::apply`].
    fn rounds(&self) -> usize {
        1
    }

    /// Adds what it needs to know of a row, given the rounds before this one.
    fn observe(&self, row: &Row, merged: &Merged, found: &mut Statistics) -> Result<(), AlgoError>;

    /// The row's advantages and returns, given all rounds.
    fn estimate(&self, row: &Row, merged: &Merged) -> Result<Estimate, AlgoError>;

    /// The loss of a role; `None` where it does not learn.
    fn loss(&self, role: Role, _state: &State) -> Option<LossSpec> {
        (role == Role::Policy).then(|| self.settings().policy_loss())
    }

    // ---- what follows is the same for every algorithm --------------------------------------------------------------

    /// The state before the first batch.
    fn initial_state(&self) -> State {
        State::initial(self.settings())
    }

    /// Whether a critic learns beside the policy.
    fn has_critic(&self) -> bool {
        self.settings().has_critic
    }

    /// The columns that scoring needs. `old_logprob` and `rollout_logprob`, where both are there, are compared too.
    fn reads(&self) -> Vec<Column> {
        let mut columns = row::columns(self.settings());
        columns.extend(self.has_critic().then_some(Column::Value));
        columns.sort();
        columns.dedup();
        columns
    }

    /// The columns that scoring writes: advantages, token rewards, returns for a critic, importance weights, and the
    /// mask where completions are filtered.
    fn writes(&self) -> Vec<Column> {
        let settings = self.settings();
        let mut columns = vec![Column::Advantage, Column::TokenReward];
        columns.extend(self.has_critic().then_some(Column::Return));
        columns.extend(rollout_correction::corrects(settings).then_some(Column::ImportanceWeight));
        columns.extend(settings.reward.overlong_filter.then_some(Column::LossMask));
        columns
    }

    /// What a shard says in the round after those of `merged`.
    fn statistics(&self, shard: &Batch, state: &State, merged: &Merged) -> Result<Statistics, AlgoError> {
        let mut found = Statistics::default();
        for row in row::rows(shard, self.settings(), state, &self.reads())? {
            if merged.rounds() == 0 {
                observe_shared(&row, self.settings(), &mut found);
            }
            self.observe(&row, merged, &mut found)?;
        }
        Ok(found)
    }

    /// The shard with its columns, given every round.
    fn apply(&self, shard: &Batch, state: &State, merged: &Merged) -> Result<Scored, AlgoError> {
        if merged.rounds() != self.rounds() {
            return Err(AlgoError::Rounds { found: merged.rounds(), expected: self.rounds() });
        }
        let rows = row::rows(shard, self.settings(), state, &self.reads())?;
        let normaliser = rollout_correction::normaliser(self.settings(), merged)?;
        let mut written: BTreeMap<Column, Vec<Vec<f32>>> = self.writes().into_iter().map(|c| (c, vec![])).collect();
        let mut report = Statistics::default();
        for row in &rows {
            let estimate = self.estimate(row, merged)?;
            if row.kept {
                observe_estimate(row, &estimate, &mut report);
            }
            for (&column, to) in &mut written {
                to.push(write(row, &estimate, column, self.settings(), normaliser)?);
            }
        }
        let written = written.iter().map(|(&column, rows)| (column, ragged_f32(rows))).collect();
        Ok(Scored { batch: with_columns(shard, written)?, report })
    }

    /// The state after a batch of these statistics.
    fn next_state(&self, state: &State, merged: &Merged) -> Result<State, AlgoError> {
        let first = merged.round(0)?;
        let controller = &self.settings().reward.kl_ctrl;
        let kl_coef = first
            .get(Quantity::RewardKl)
            .map_or(state.kl_coef, |kl| kl::next_coefficient(controller, state.kl_coef, kl.mean(), first.sequences()));
        Ok(State { batches: state.batches + 1, sequences: state.sequences + first.sequences(), kl_coef })
    }

    /// Named values of a batch, under verl's names: of the statistics, and of the merged reports. Means and ratios of
    /// nothing are absent.
    fn metrics(&self, state: &State, merged: &Merged, report: &Statistics) -> Result<BTreeMap<String, f64>, AlgoError> {
        metrics::metrics(self.settings(), self.has_critic(), state, merged.round(0)?, report)
    }
}

/// What every algorithm's batch tells.
fn observe_shared(row: &Row, settings: &Settings, found: &mut Statistics) {
    found.add_sequence();
    found.add(Quantity::Aborted, f64::from(row.aborted()));
    found.add(Quantity::ResponseLength, row.response_tokens as f64);
    found.add(Quantity::ResponseClipped, f64::from(row.clipped));
    if !row.aborted() {
        found.add(Quantity::PromptLength, row.prompt_tokens as f64);
        found.add(Quantity::ResponseLengthNonAborted, row.response_tokens as f64);
        found.add(Quantity::ResponseClippedNonAborted, f64::from(row.clipped));
        found.add(Quantity::Score, row.score);
        found.add(Quantity::Reward, row.reward);
    }
    if let Some(kl) = row.mean_kl {
        found.add(Quantity::RewardKl, kl);
    }
    rollout_correction::observe(row, settings, found);
}

/// What was written, before rounding.
fn observe_estimate(row: &Row, estimate: &Estimate, report: &mut Statistics) {
    estimate.advantages.iter().for_each(|&a| report.add(Quantity::Advantage, a));
    estimate.returns.iter().for_each(|&r| report.add(Quantity::Return, r));
    for (&value, &returned) in row.values.iter().flatten().zip(&estimate.returns) {
        report.add(Quantity::Value, value);
        report.add(Quantity::ValueError, returned - value);
    }
}

/// A row of a column that scoring writes.
fn write(
    row: &Row,
    estimate: &Estimate,
    column: Column,
    settings: &Settings,
    normaliser: f64,
) -> Result<Vec<f32>, AlgoError> {
    if !row.kept && column != Column::TokenReward {
        return Ok(vec![0.0; row.length]);
    }
    let stream = match column {
        Column::Advantage => &estimate.advantages,
        Column::Return => &estimate.returns,
        Column::TokenReward => &row.rewards,
        Column::ImportanceWeight => &rollout_correction::applied(row, settings, normaliser)?,
        _ => &vec![1.0; row.tokens.len()],
    };
    row.scatter(stream, column)
}

/// The shard with these columns in place of those of the same name.
fn with_columns(shard: &Batch, mut new: BTreeMap<Column, ArrayRef>) -> Result<Batch, BatchError> {
    let records = shard.records();
    let mut columns = Vec::new();
    for column in Column::ALL {
        let old = records.column_by_name(column.name()).cloned();
        columns.extend(new.remove(&column).or(old).map(|array| (column, array)));
    }
    Batch::from_columns(columns)
}
