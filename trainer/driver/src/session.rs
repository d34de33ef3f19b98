//! Everything that the loop holds, and what it does between steps.

use crate::clock::Clock;
use crate::collect::{Collector, Rollouts};
use crate::course::Course;
use crate::error::Result;
use crate::recipe::Outcome;
use crate::rollout_file;
use crate::state::DriverState;
use crate::team::Team;
use crate::tracker::Tracker;
use crate::validation;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use tangelo_configs::rlhf::Rlhf;
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
        let learnt = match self.settings.save_rollouts {
            true => rollout_file::learnt(&self.team.cluster, batch).await?,
            false => Vec::new(),
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
            ("actor/lr".to_owned(), self.course.schedule.lr(step as usize)),
            ("perf/total_num_tokens".to_owned(), tokens),
            ("perf/throughput".to_owned(), tokens / self.clock.elapsed() / self.team.cluster.world_size() as f64),
        ]);
        let values: Vec<(String, f64)> = values.into_iter().collect();
        self.tracker.step(step, &values, rollouts, &learnt);
        Ok(())
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
        DriverState::prune(&checkpoints.folder, checkpoints.keep, checkpoints.keep_every)?;
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
