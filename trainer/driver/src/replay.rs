//! One recorded step of a run, done again alone: from the checkpoint of the step before and the rollouts that the step
//! recorded to the numbers of its update, which are compared with those of the run.
//!
//! ```text
//!   RUN/checkpoint of step N-1 -> policy, critic          RUN/rollouts/step-N.parquet -> tokens, rewards, log-probabilities
//!                                      \                      /
//!                      annotate (reference, values) -> score -> updates -> numbers == RUN/metrics.jsonl of step N ?
//! ```
//!
//! Nothing is generated, no reward is asked, nothing of the run is written. Invariant: a replay with as many ranks in the
//! same layout as the run gives the same bits. Deliberately absent: what a step's numbers do not depend on (validation,
//! publishing, checkpoints).

use crate::course::{Course, mean_of_updates};
use crate::error::{DriverError, Result};
use crate::rollout_file::{self, Learnt, Recorded};
use crate::scoring::score;
use crate::start::{self, StartOptions};
use crate::state::{DriverState, list};
use crate::team::Team;
use arrow::array::Float32Array;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tangelo_configs::{JobPlan, Role};
use tangelo_control::Agent;
use tangelo_core::batch::{per_sequence_i64, ragged_f32, ragged_u32};
use tangelo_core::{Batch, Column};
use tangelo_observe::records::read_lines;
use tangelo_observe::{NamedRecord, ProgressEvent, files};

/// The step to do again.
#[derive(Clone, Debug)]
pub struct Replay {
    /// The run's folder.
    pub run: PathBuf,
    /// Its checkpoints.
    pub checkpoints: PathBuf,
    /// The step.
    pub step: u64,
}

/// What a replay found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The step.
    pub step: u64,
    /// Completions it learnt from.
    pub completions: usize,
    /// The numbers of its update, by name.
    pub metrics: Vec<Compared>,
    /// Advantages of tokens that were computed again.
    pub advantages: usize,
    /// Those of them that differ.
    pub differing_advantages: usize,
}

/// A number of the run, and of the replay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// Its name.
    pub name: String,
    /// In metrics.jsonl of the run.
    pub recorded: Option<f64>,
    /// In the replay; of a number that is none, nothing is left.
    pub replayed: Option<f64>,
    /// Whether both have the same bits.
    pub equal: bool,
}

impl Comparison {
    /// Whether everything has the same bits.
    pub fn is_equal(&self) -> bool {
        self.differing_advantages == 0 && self.metrics.iter().all(|metric| metric.equal)
    }

    /// As a table, with the verdict in its last line.
    pub fn render(&self) -> String {
        let width = self.metrics.iter().map(|metric| metric.name.len()).max().unwrap_or(0);
        let mut text = format!("{:width$}  {:>24}  {:>24}\n", "metric", "recorded", "replayed");
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:?}"));
        for Compared { name, recorded, replayed, equal } in &self.metrics {
            let (recorded, replayed) = (number(*recorded), number(*replayed));
            let verdict = if *equal { "equal" } else { "DIFFERS" };
            let _ = writeln!(text, "{name:width$}  {recorded:>24}  {replayed:>24}  {verdict}");
        }
        let equal = self.metrics.iter().filter(|metric| metric.equal).count();
        let same = self.advantages - self.differing_advantages;
        let verdict = if self.is_equal() { "the step is the same, bit for bit" } else { "the step is NOT the same" };
        let _ = writeln!(
            text,
            "step {} with {} completions: {equal} of {} metrics and {same} of {} advantages are equal: {verdict}",
            self.step,
            self.completions,
            self.metrics.len(),
            self.advantages
        );
        text
    }
}

impl Replay {
    /// A step of the run that `job` was.
    pub fn new(run: &Path, job: &JobPlan, step: u64) -> Replay {
        let checkpoints = run.join(&job.policy.config.checkpoint.folder);
        Replay { run: run.to_owned(), checkpoints, step }
    }

    fn rollouts(&self) -> PathBuf {
        self.run.join("rollouts")
    }

    /// Whether everything is there that the step needs.
    ///
    /// # Errors
    /// What is missing, and the steps that can be replayed.
    pub fn check(&self, job: &JobPlan) -> Result<()> {
        let roles = learning_roles(job);
        // The first step began from the weights that the job begins with.
        let begins = |step: u64| step == 1 || DriverState::complete(&self.checkpoints, &roles, step - 1).is_ok();
        let recorded = rollout_file::steps(&self.rollouts());
        let possible: Vec<u64> = recorded.iter().copied().filter(|&step| begins(step)).collect();
        if possible.contains(&self.step) {
            return Ok(());
        }
        let step = self.step;
        let missing = match recorded.contains(&step) {
            false => format!("{} has no rollouts of it (`rlhf.save_rollouts`)", self.rollouts().display()),
            true => format!("{} has no checkpoint of step {}, where it began", self.checkpoints.display(), step - 1),
        };
        let known = list(&possible);
        Err(DriverError::Checkpoint(format!(
            "step {step} cannot be replayed: {missing}. Steps that can be: {known} (`checkpoint.interval` decides)"
        )))
    }

    /// What metrics.jsonl says of the step.
    fn recorded_metrics(&self) -> Result<BTreeMap<String, f64>> {
        let path = self.run.join(files::METRICS);
        let records = read_lines(&path, NamedRecord::from_json).map_err(|source| DriverError::Read { path, source })?;
        Ok(records.into_iter().filter(|record| record.step == self.step).flat_map(|record| record.values).collect())
    }
}

/// The roles that have a part in checkpoints.
fn learning_roles(job: &JobPlan) -> Vec<&'static str> {
    [Role::Policy, Role::Critic].into_iter().filter(|&role| job.has(role)).map(Role::name).collect()
}

/// Does a step again and compares it with what is recorded.
///
/// # Errors
/// What the step needs is not there, and the first failure of anybody.
pub async fn run(job: &JobPlan, mut options: StartOptions, replay: &Replay) -> Result<Comparison> {
    replay.check(job)?;
    let rows = rollout_file::read(&replay.rollouts(), replay.step)?;
    let recorded = replay.recorded_metrics()?;
    let course = Course::new(job, tangelo_algo::algorithm(job.algorithm(), job.limits())?);
    let driver = start::listen(job, &mut options).await?;
    let agent = Agent::start(&driver.member(0)).await?;
    let agent = tokio::spawn(agent.run());
    options.progress.send(&ProgressEvent::Phase { name: "waiting for the ranks to build their models".into() });
    let patience = Duration::from_secs(job.policy.config.comm.init_timeout_seconds);
    let cluster = driver.assemble(start::placement(job), patience).await?;
    let team = start::team(job, &cluster)?;
    let state = begin(&team, &course, replay).await?;
    options.current_step.store(replay.step, Ordering::Relaxed);
    options.progress.send(&ProgressEvent::Phase { name: format!("replaying step {}", replay.step) });
    let (replayed, learnt) = again(&team, &course, &state, &rows).await?;
    drop(team);
    start::meeting(job).close(true);
    cluster.shutdown().await?;
    agent.abort();
    Ok(compare(replay.step, &rows, &recorded, replayed, &learnt))
}

/// The roles as they were when the step began; the state in which it is done.
async fn begin(team: &Team, course: &Course, replay: &Replay) -> Result<DriverState> {
    let before = replay.step - 1;
    let found = if before == 0 {
        let algorithm = course.algorithm.initial_state();
        DriverState { step: 0, position: 0, policy_version: 0, algorithm, prompts_fingerprint: String::new() }
    } else {
        let roles: Vec<&str> = team.learners().map(|group| group.role()).collect();
        let found = DriverState::complete(&replay.checkpoints, &roles, before)?;
        team.cluster.begin_step(before);
        team.restore(&replay.checkpoints).await?;
        found
    };
    team.cluster.begin_step(replay.step);
    Ok(DriverState { step: replay.step, ..found })
}

/// The step from its rollouts on: its numbers, and what it learnt from each completion.
async fn again(
    team: &Team,
    course: &Course,
    state: &DriverState,
    rows: &[Recorded],
) -> Result<(BTreeMap<String, f64>, Vec<Learnt>)> {
    let batch = team.cluster.put(&batch_of(rows)?)?;
    let batch = team.annotate(batch).await?;
    let (batch, mut numbers, _) = score(team, course.algorithm.as_ref(), &batch, &state.algorithm).await?;
    let mut updates = Vec::new();
    for minibatch in course.minibatches(&batch)? {
        let (policy, critic) = course.lessons(state);
        updates.push(team.update(&minibatch, policy.as_ref(), critic.as_ref()).await?);
    }
    numbers.extend(mean_of_updates(&updates));
    numbers.insert("actor/lr".into(), course.schedule.lr(state.step as usize));
    let learnt = rollout_file::learnt(&team.cluster, &batch).await?;
    Ok((numbers, learnt))
}

/// Recorded completions as generation makes rows of them, with the policy's log-probabilities and the rewards.
fn batch_of(rows: &[Recorded]) -> Result<Batch> {
    let whole = |row: &Recorded| [row.prompt_ids.as_slice(), &row.completion_ids].concat();
    let length = |row: &Recorded| row.prompt_ids.len() + row.completion_ids.len() - 1;
    // The first drawn token is the target of the prompt's last.
    let aligned = |row: &Recorded, drawn: &[f32]| [&vec![0.0; row.prompt_ids.len() - 1][..], drawn].concat();
    let ids = |of: &dyn Fn(&Recorded) -> Vec<u32>| ragged_u32(&rows.iter().map(of).collect::<Vec<_>>());
    let floats = |of: &dyn Fn(&Recorded) -> Vec<f32>| ragged_f32(&rows.iter().map(of).collect::<Vec<_>>());
    let numbers = |of: &dyn Fn(&Recorded) -> i64| per_sequence_i64(rows.iter().map(of).collect());
    let rewards: Vec<f32> = rows.iter().map(|row| row.reward as f32).collect();
    Ok(Batch::from_columns(vec![
        (Column::Tokens, ids(&|row| whole(row)[..length(row)].to_vec())),
        (Column::Targets, ids(&|row| whole(row)[1..].to_vec())),
        (Column::Positions, ids(&|row| (0..length(row) as u32).collect())),
        (Column::SeqId, ids(&|row| vec![0; length(row)])),
        (Column::LossMask, floats(&|row| aligned(row, &vec![1.0; row.completion_ids.len()]))),
        (Column::RolloutLogprob, floats(&|row| aligned(row, &row.learnt.rollout_logprobs))),
        (Column::OldLogprob, floats(&|row| aligned(row, &row.learnt.old_logprobs))),
        (Column::GroupId, numbers(&|row| row.group)),
        (Column::SampleIndex, numbers(&|row| row.learnt.sample_index)),
        (Column::PolicyVersion, numbers(&|row| row.learnt.policy_version)),
        (Column::Reward, Arc::new(Float32Array::from(rewards))),
    ])?)
}

fn compare(
    step: u64,
    rows: &[Recorded],
    recorded: &BTreeMap<String, f64>,
    replayed: BTreeMap<String, f64>,
    learnt: &[Learnt],
) -> Comparison {
    let one = |(name, value): (String, f64)| {
        let before = recorded.get(&name).copied();
        let equal = before.is_some_and(|before| before.to_bits() == value.to_bits());
        Compared { name, recorded: before, replayed: Some(value), equal }
    };
    let advantages = |all: &mut dyn Iterator<Item = &Learnt>| -> Vec<u32> {
        all.flat_map(|learnt| learnt.advantages.iter().map(|a| a.to_bits())).collect()
    };
    let before = advantages(&mut rows.iter().map(|row| &row.learnt));
    let after = advantages(&mut learnt.iter());
    let differing = before.iter().zip(&after).filter(|(a, b)| a != b).count() + before.len().abs_diff(after.len());
    Comparison {
        step,
        completions: rows.len(),
        metrics: replayed.into_iter().map(one).collect(),
        advantages: before.len().max(after.len()),
        differing_advantages: differing,
    }
}
