//! Everything that the loop holds, and what it does between steps.

use crate::clock::Clock;
use crate::collect::{Collector, Rollouts};
use crate::error::{DriverError, Result};
use crate::recipe::Outcome;
use crate::state::DriverState;
use crate::team::{Lesson, Team};
use crate::tracker::Tracker;
use crate::validation;
use arrow::array::{Array, AsArray};
use arrow::datatypes::Float32Type;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use tangelo_algo::{Algorithm, Role};
use tangelo_configs::rlhf::Rlhf;
use tangelo_control::{Metrics, RemoteBatch};
use tangelo_core::{Column, LossSpec, LrSchedule};

/// Whether somebody asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop(pub Arc<AtomicBool>);

impl Stop {
    /// Whether somebody did.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A run under way.
pub struct Session {
    /// The roles.
    pub team: Team,
    /// The algorithm.
    pub algorithm: Box<dyn Algorithm>,
    /// Makes rollouts.
    pub collector: Collector,
    /// Writes.
    pub tracker: Tracker,
    /// Where the run stands.
    pub state: DriverState,
    /// The last step.
    pub steps: u64,
    /// Whether somebody asked to stop.
    pub stop: Stop,
    /// Where the step's time goes.
    pub clock: Clock,
    /// `[rlhf]`
    pub settings: Rlhf,
    /// Prompts without which some rank of a role would have nothing to do.
    pub least_groups: usize,
    /// Divides the logits in sampling, so in the loss too.
    pub temperature: f64,
    /// Learning rate of the policy.
    pub schedule: LrSchedule,
    /// Learning rate of the critic.
    pub critic_schedule: LrSchedule,
    /// Where checkpoints go, every how many steps (0: at the end alone), and how many stay; `None`: nowhere.
    pub checkpoints: Option<Checkpoints>,
    /// Where others see how far the run is.
    pub current_step: Arc<AtomicU64>,
}

/// Groups by `size`; what is left in the end, where it is fewer than `least`, goes with those before it.
fn mini_batches<T>(groups: &[T], size: usize, least: usize) -> impl Iterator<Item = &[T]> {
    let size = size.max(1);
    let (whole, rest) = (groups.len() / size, groups.len() % size);
    let joins = rest > 0 && rest < least && whole > 0;
    let count = if joins { whole } else { groups.len().div_ceil(size) };
    let end = move |index: usize| if index + 1 == count { groups.len() } else { (index + 1) * size };
    (0..count).map(move |index| &groups[index * size..end(index)])
}

/// Saving.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    /// The folder.
    pub folder: PathBuf,
    /// Steps between saves.
    pub interval: u64,
    /// Newest ones kept; 0: all.
    pub keep: usize,
}

impl Session {
    /// The next step begins.
    pub fn begin_step(&mut self) {
        self.state.step += 1;
        self.current_step.store(self.state.step, Ordering::Relaxed);
        self.clock.restart();
        self.team.cluster.begin_step(self.state.step);
    }

    /// A step's mini-batches: whole groups in their order, once per epoch.
    ///
    /// # Errors
    /// None that a user could cause.
    pub fn minibatches(&self, batch: &RemoteBatch) -> Result<Vec<RemoteBatch>> {
        let mut rows_of: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
        batch.rows().iter().enumerate().for_each(|(row, of)| rows_of.entry(of.group).or_default().push(row));
        let groups: Vec<Vec<usize>> = rows_of.into_values().collect();
        let size = match self.settings.ppo_mini_batch_size {
            0 => groups.len(),
            size => size,
        };
        let one_epoch: Vec<RemoteBatch> = mini_batches(&groups, size, self.least_groups)
            .map(|groups| batch.select(&groups.concat()))
            .collect::<std::result::Result<_, _>>()?;
        Ok((0..self.settings.ppo_epochs).flat_map(|_| one_epoch.clone()).collect())
    }

    /// What policy and critic are told for a mini-batch of this step.
    pub fn lessons(&self) -> (Option<Lesson>, Option<Lesson>) {
        let loss = |role| self.algorithm.loss(role, &self.state.algorithm);
        let at_temperature = |loss: LossSpec| LossSpec { temperature: self.temperature, ..loss };
        let step = self.state.step as usize;
        let warm = step > self.settings.critic_warmup;
        let policy = loss(Role::Policy).filter(|_| warm).map(at_temperature);
        let critic = loss(Role::Critic);
        (
            policy.map(|loss| Lesson { loss, lr: self.schedule.lr(step) }),
            critic.map(|loss| Lesson { loss, lr: self.critic_schedule.lr(step) }),
        )
    }

    /// Writes the step's numbers and rollouts.
    ///
    /// # Errors
    /// The advantages cannot be fetched.
    pub async fn record(
        &mut self,
        rollouts: &Rollouts,
        batch: &RemoteBatch,
        scored: BTreeMap<String, f64>,
        moved: Metrics,
    ) -> Result<()> {
        let advantages = match self.settings.save_rollouts {
            true => self.advantages(batch).await?,
            false => vec![Vec::new(); rollouts.rollouts.len()],
        };
        let mut values: BTreeMap<String, f64> = scored;
        values.extend(rollouts.metrics.iter().cloned());
        values.extend(self.tracker.take_learnt());
        values.extend(moved.0.iter().map(|(name, reading)| (name.clone(), reading.value())));
        values.extend(self.clock.metrics());
        let tokens = batch.num_tokens() as f64;
        let step = self.state.step;
        values.extend([
            ("training/global_step".to_owned(), step as f64),
            ("training/epoch".to_owned(), self.collector.loader().epoch(self.state.position) as f64),
            ("actor/lr".to_owned(), self.schedule.lr(step as usize)),
            ("perf/total_num_tokens".to_owned(), tokens),
            ("perf/throughput".to_owned(), tokens / self.clock.elapsed() / self.team.cluster.world_size() as f64),
        ]);
        let values: Vec<(String, f64)> = values.into_iter().collect();
        self.tracker.step(step, &values, rollouts, &advantages);
        Ok(())
    }

    /// The advantages of each row's policy tokens.
    async fn advantages(&self, batch: &RemoteBatch) -> Result<Vec<Vec<f32>>> {
        let columns = [Column::Advantage, Column::LossMask];
        let records = self.team.cluster.fetch(batch, &columns).await?;
        let list = |column: Column| {
            let found = records.column_by_name(column.name()).and_then(|a| a.as_list_opt::<i64>().cloned());
            found.ok_or_else(|| DriverError::Internal(format!("scoring made no column {column}")))
        };
        let (advantages, mask) = (list(Column::Advantage)?, list(Column::LossMask)?);
        let of_row = |row: usize| {
            let (values, mask) = (advantages.value(row), mask.value(row));
            let both =
                values.as_primitive::<Float32Type>().values().iter().zip(mask.as_primitive::<Float32Type>().values());
            both.filter(|(_, m)| **m != 0.0).map(|(a, _)| *a).collect()
        };
        Ok((0..advantages.len()).map(of_row).collect())
    }

    /// Validates where the run begins, if asked to.
    ///
    /// # Errors
    /// Whatever a rank or a reward reports.
    pub async fn validate_before_training(&mut self) -> Result<()> {
        match self.state.step == 0 && self.settings.val_before_train {
            true => {
                self.tracker.phase("validating");
                self.validate().await
            }
            false => Ok(()),
        }
    }

    /// Validates after the steps that are due, and after the last.
    ///
    /// # Errors
    /// Whatever a rank or a reward reports.
    pub async fn validate_if_due(&mut self) -> Result<()> {
        let (step, every) = (self.state.step, self.settings.test_freq as u64);
        match step == self.steps || (every > 0 && step.is_multiple_of(every)) {
            true => self.validate().await,
            false => Ok(()),
        }
    }

    /// Answers the validation prompts and records what the answers are worth.
    ///
    /// # Errors
    /// Whatever a rank or a reward reports.
    async fn validate(&mut self) -> Result<()> {
        let start = Instant::now();
        let mut clock = Clock::default();
        let asked = self.collector.validation(&self.team, &self.settings.validation, &mut clock);
        let Some(rollouts) = asked.await? else { return Ok(()) };
        let mut values = validation::metrics(&rollouts, self.settings.val_pass_reward);
        values.push(("timing_s/testing".into(), start.elapsed().as_secs_f64()));
        self.tracker.validated(self.state.step, &values, &rollouts);
        Ok(())
    }

    /// Saves after the steps that are due, after the last, and when asked to stop.
    ///
    /// # Errors
    /// Whatever a rank reports, and a folder that cannot be written.
    pub async fn save_if_due(&mut self) -> Result<()> {
        let Some(checkpoints) = self.checkpoints.clone() else { return Ok(()) };
        let step = self.state.step;
        let at_interval = checkpoints.interval > 0 && step.is_multiple_of(checkpoints.interval);
        if !(at_interval || step == self.steps || self.stop.is_set()) {
            return Ok(());
        }
        let start = Instant::now();
        self.team.save(&checkpoints.folder).await?;
        self.state.write(&checkpoints.folder)?;
        if checkpoints.keep > 0 {
            DriverState::prune(&checkpoints.folder, checkpoints.keep)?;
        }
        self.tracker.saved(step, start.elapsed().as_secs_f64());
        Ok(())
    }

    /// The step is over: batches are dropped everywhere.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn end_step(&mut self) -> Result<()> {
        let traffic = self.team.cluster.end_step().await?;
        let values: Vec<(String, f64)> = traffic.0.iter().map(|(name, r)| (name.clone(), r.value())).collect();
        self.tracker.traffic(self.state.step, &values);
        Ok(())
    }

    /// The run is over.
    ///
    /// # Errors
    /// None that a user could cause.
    pub async fn finish(&mut self) -> Result<Outcome> {
        let (step, stopped) = (self.state.step, self.state.step < self.steps);
        self.tracker.done(step);
        Ok(Outcome { step, stopped })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(groups: usize, size: usize, least: usize) -> Vec<usize> {
        mini_batches(&vec![(); groups], size, least).map(<[()]>::len).collect()
    }

    #[test]
    fn what_is_left_of_a_step_with_dropped_groups_is_enough_for_every_rank() {
        assert_eq!(sizes(8, 4, 2), [4, 4]);
        assert_eq!(sizes(7, 4, 2), [4, 3]);
        assert_eq!(sizes(5, 4, 2), [5]);
        assert_eq!(sizes(5, 4, 1), [4, 1]);
        assert_eq!(sizes(3, 4, 2), [3]);
        assert_eq!(sizes(9, 4, 2), [4, 5]);
    }
}
