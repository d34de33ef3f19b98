//! Everything that the loop holds, and what it does between steps.

use crate::clock::Clock;
use crate::collect::{Collector, Rollouts};
use crate::course::Course;
use crate::error::{DriverError, Result};
use crate::recipe::Outcome;
use crate::rollout_file;
use crate::state::DriverState;
use crate::team::Team;
use crate::tracker::Tracker;
use crate::validation;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use tangelo_configs::rlhf::Rlhf;
use tangelo_control::verbs::mesh;
use tangelo_control::{Metrics, RemoteBatch};

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
    /// What is learnt from a batch.
    pub course: Course,
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
    /// Updates that may be skipped because loss or gradient is not finite.
    pub max_skipped: u64,
    /// Prompts without which some rank of a role would have nothing to do.
    pub least_groups: usize,
    /// Where checkpoints go, every how many steps (0: at the end alone), and how many stay; `None`: nowhere.
    pub checkpoints: Option<Checkpoints>,
    /// Where others see how far the run is.
    pub current_step: Arc<AtomicU64>,
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
    /// Those of steps that this divides are kept beside them; 0: none.
    pub keep_every: u64,
}

impl Session {
    /// The next step begins.
    pub fn begin_step(&mut self) {
        self.state.step += 1;
        self.current_step.store(self.state.step, Ordering::Relaxed);
        self.tracker.step_begins(self.state.step);
        self.clock.restart();
        self.team.cluster.begin_step(self.state.step);
    }

    /// Takes an update's numbers.
    ///
    /// # Errors
    /// More updates were skipped than `training.max_skipped`.
    pub fn learnt(&mut self, update: Metrics) -> Result<()> {
        let skipped = ["actor/skipped", "critic/skipped"].map(|name| update.get(name).unwrap_or(0.0) > 0.0);
        self.tracker.learnt(update);
        if skipped.contains(&true) {
            let (step, allowed) = (self.state.step, self.max_skipped);
            self.state.skipped += 1;
            self.tracker.skipped(step, "loss or gradient is not finite");
            if self.state.skipped > allowed {
                return Err(DriverError::Diverged { step, skipped: self.state.skipped, allowed });
            }
        }
        Ok(())
    }

    /// Writes the step's numbers and rollouts.
    ///
    /// # Errors
    /// What was learnt from cannot be fetched.
    pub async fn record(
        &mut self,
        rollouts: &Rollouts,
        batch: &RemoteBatch,
        scored: BTreeMap<String, f64>,
        moved: Metrics,
    ) -> Result<()> {
        let completion_tokens: Vec<usize> = rollouts.rollouts.iter().map(|r| r.completion.len()).collect();
        let learnt = match self.settings.save_rollouts {
            true => rollout_file::learnt(&self.team.cluster, batch, &completion_tokens).await?,
            false => Vec::new(),
        };
        let readings = |metrics: &Metrics| metrics.0.clone().into_iter().map(|(name, reading)| (name, reading.value()));
        let mut values: BTreeMap<String, f64> = scored;
        values.extend(readings(&rollouts.told.metrics));
        values.extend(self.tracker.take_learnt());
        values.extend(readings(&moved));
        values.extend(self.course.rates(&self.state));
        values.extend(self.clock.metrics());
        values.extend(self.standing(batch)?.into_iter().map(|(name, value)| (name.to_owned(), value)));
        let values: Vec<(String, f64)> = values.into_iter().collect();
        self.tracker.step(self.state.step, &values, rollouts, learnt);
        Ok(())
    }

    /// Where the run stands, how fast it is, and how even the step's batch is.
    fn standing(&self, batch: &RemoteBatch) -> Result<Vec<(&'static str, f64)>> {
        let (step, seconds, tokens) = (self.state.step, self.clock.elapsed(), batch.num_tokens() as f64);
        let last_prompt = self.state.position.saturating_sub(1);
        let mut values = vec![
            ("training/global_step", step as f64),
            ("training/epoch", self.collector.loader().epoch(last_prompt) as f64),
            ("perf/total_num_tokens", tokens),
            ("perf/time_per_step", seconds),
            ("perf/throughput", tokens / seconds / self.team.cluster.world_size() as f64),
        ];
        let parts = self.team.policy.mesh(mesh::TRAIN)?.size();
        let rows: Vec<u64> = batch.rows().iter().map(|row| u64::from(row.tokens)).collect();
        values.extend(seqlen(&rows, parts));
        Ok(values)
    }

    /// Validates where the run begins, if asked to; where it goes on, if the validation that was due there was not done any
    /// more.
    ///
    /// # Errors
    /// Whatever a rank or a reward reports.
    pub async fn validate_before_training(&mut self) -> Result<()> {
        let due = match self.state.step {
            0 => self.settings.val_before_train,
            step => self.is_validation_due(step) && !self.tracker.went_on_validated,
        };
        match due {
            true => self.validate().await,
            false => Ok(()),
        }
    }

    /// Validates after the steps that are due, and after the last.
    ///
    /// # Errors
    /// Whatever a rank or a reward reports.
    pub async fn validate_if_due(&mut self) -> Result<()> {
        match self.is_validation_due(self.state.step) {
            true => self.validate().await,
            false => Ok(()),
        }
    }

    fn is_validation_due(&self, step: u64) -> bool {
        let every = self.settings.test_freq as u64;
        step == self.steps || (every > 0 && step.is_multiple_of(every))
    }

    /// Answers the validation prompts and records what the answers are worth.
    ///
    /// # Errors
    /// Whatever a rank or a reward reports.
    async fn validate(&mut self) -> Result<()> {
        self.tracker.phase("validating");
        let start = Instant::now();
        let clock = Clock::default();
        let asked = self.collector.validation(&self.team, &self.settings.validation, &clock);
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
        match at_interval || step == self.steps || self.stop.is_set() {
            true => self.save(&checkpoints).await,
            false => Ok(()),
        }
    }

    async fn save(&mut self, checkpoints: &Checkpoints) -> Result<()> {
        let start = Instant::now();
        self.team.save(&checkpoints.folder).await?;
        self.state.write(&checkpoints.folder)?;
        DriverState::prune(&checkpoints.folder, checkpoints.keep, checkpoints.keep_every)?;
        let (step, seconds) = (self.state.step, start.elapsed().as_secs_f64());
        self.tracker.numbers(step, &[("timing_s/save_checkpoint".into(), seconds)]);
        self.tracker.saved(step, seconds);
        Ok(())
    }

    /// A signal came before the step had something to learn from: the run stands where the step before left it, and that
    /// is saved.
    ///
    /// # Errors
    /// As [`Session::save_if_due`].
    pub async fn abandon_step(&mut self) -> Result<Outcome> {
        self.state.step -= 1;
        let step = self.state.step;
        self.current_step.store(step, Ordering::Relaxed);
        self.team.cluster.begin_step(step);
        self.finish().await
    }

    /// The step is over: batches are dropped everywhere.
    ///
    /// # Errors
    /// A rank that does not answer.
    pub async fn end_step(&mut self) -> Result<()> {
        let traffic = self.team.cluster.end_step().await?;
        let values: Vec<(String, f64)> = traffic.0.iter().map(|(name, r)| (name.clone(), r.value())).collect();
        self.tracker.numbers(self.state.step, &values);
        Ok(())
    }

    /// The run is over. A signal may have come after the last step was due to be saved: then it is saved now.
    ///
    /// # Errors
    /// As [`Session::save_if_due`].
    pub async fn finish(&mut self) -> Result<Outcome> {
        let (step, stopped) = (self.state.step, self.state.step < self.steps);
        if let Some(checkpoints) = self.checkpoints.clone() {
            let saved = DriverState::steps(&checkpoints.folder)?.contains(&step);
            if step > 0 && !saved {
                self.save(&checkpoints).await?;
            }
        }
        self.tracker.done(step);
        Ok(Outcome { step, stopped })
    }
}

/// Tokens of a batch whose rows, in their order, are dealt to `parts` ranks, as verl tells them.
fn seqlen(rows: &[u64], parts: usize) -> [(&'static str, f64); 4] {
    let sum = |range: Range<usize>| rows[range].iter().sum::<u64>() as f64;
    let sums: Vec<f64> = (0..parts).map(|p| sum(p * rows.len() / parts..(p + 1) * rows.len() / parts)).collect();
    let (low, high) = sums.iter().fold((f64::INFINITY, 0f64), |(low, high), &s| (low.min(s), high.max(s)));
    [
        ("global_seqlen/min", low),
        ("global_seqlen/max", high),
        ("global_seqlen/minmax_diff", high - low),
        ("global_seqlen/mean", sums.iter().sum::<f64>() / parts as f64),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_per_rank() {
        let found = seqlen(&[5, 7, 1, 2, 30], 2);
        assert_eq!(found.map(|(_, value)| value), [12.0, 33.0, 21.0, 22.5]);
    }
}
