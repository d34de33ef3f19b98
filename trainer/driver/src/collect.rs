//! From prompts to rewarded rollouts.
//!
//! ```text
//!   PromptLoader -> prompts (tokens, group) -> rollout.generate -> rows that stay with the ranks
//!          -> their completions are fetched and decoded -> RewardPipeline -> reward column, put beside the rows
//! ```
//!
//! A row of a rollout is a prompt with one completion, less its last token; per-token columns speak of the target. Which
//! rollouts a step learns from is [`crate::gather`]'s.

use crate::clock::Clock;
use crate::columns;
use crate::error::{DriverError, Result};
use crate::judge::Judge;
use crate::prompts::{PromptLoader, TokenizedPrompt};
use crate::reward::{RewardPipeline, Sample, Scored, ScoredBatch};
use crate::state::DriverState;
use crate::team::Team;
use crate::told::Told;
use arrow::array::{Array, AsArray, Float32Array, RecordBatch};
use arrow::datatypes::{Float32Type, UInt32Type};
use std::collections::HashMap;
use std::sync::Arc;
use tangelo_algo::{Settings, filter_groups};
use tangelo_configs::SamplingParams;
use tangelo_configs::algorithm::FilterMetric;
use tangelo_configs::rlhf::ValidationSampling;
use tangelo_control::{RemoteBatch, Sampling};
use tangelo_core::batch::{per_sequence_i64, ragged_u32};
use tangelo_core::{Batch, Column};
use tangelo_formats::tokenizer::TokenizerAssets;
use tokio::sync::oneshot;

/// One completion, as the driver knows it.
#[derive(Clone, Debug)]
pub struct Rollout {
    /// What was asked.
    pub prompt: Arc<TokenizedPrompt>,
    /// Its group, the same for all completions of the prompt.
    pub group: i64,
    /// The completion's ids.
    pub completion: Vec<u32>,
    /// The completion as text, without special tokens.
    pub text: String,
    /// What it is worth.
    pub scored: Scored,
    /// Its number among all completions of the run.
    pub sample_index: i64,
    /// The version of the weights that drew its first token.
    pub policy_version: i64,
    /// Why it is not learnt from; `None`: it is.
    pub left_out: Option<LeftOut>,
}

/// Why a completion is not learnt from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// It has no reward, and `on_error` is `drop`.
    NoReward,
    /// The others of its group have none, and the algorithm compares with them.
    Alone,
    /// All of its group have the same reward (dynamic sampling).
    Flat,
    /// There were enough groups without its (dynamic sampling).
    Surplus,
}

impl LeftOut {
    /// Its name in metrics and in files of rollouts.
    pub const fn name(self) -> &'static str {
        match self {
            LeftOut::NoReward => "no_reward",
            LeftOut::Alone => "alone",
            LeftOut::Flat => "flat",
            LeftOut::Surplus => "surplus",
        }
    }
}

/// Rewarded rollouts: rows of `batch` and `rollouts` are the same.
#[derive(Clone, Debug, Default)]
pub struct Rollouts {
    /// Where the rows are.
    pub batch: RemoteBatch,
    /// What the driver knows of them.
    pub rollouts: Vec<Rollout>,
    /// What was generated beside and is not learnt from.
    pub left_out: Vec<Rollout>,
    /// Numbers of generation and rewards, and what looked wrong.
    pub told: Told,
}

/// Makes rollouts.
pub struct Collector {
    loader: PromptLoader,
    rewards: Arc<RewardPipeline>,
    tokenizer: TokenizerAssets,
    judge: Option<Judge>,
    sampling: Sampling,
    prompts_per_step: usize,
    settings: Settings,
}

/// What a collector is made of.
pub struct CollectorParts {
    /// The prompts.
    pub loader: PromptLoader,
    /// What answers are worth.
    pub rewards: RewardPipeline,
    /// The policy's.
    pub tokenizer: TokenizerAssets,
    /// Writes for the reward model, where the job has one.
    pub judge: Option<Judge>,
    /// How completions are drawn.
    pub sampling: SamplingParams,
    /// What all chance in generation is a function of.
    pub seed: u64,
    /// Prompts of a step.
    pub prompts_per_step: usize,
    /// The algorithm's.
    pub settings: Settings,
}

impl Collector {
    /// From its parts.
    pub fn new(parts: CollectorParts) -> Collector {
        let CollectorParts { loader, rewards, tokenizer, judge, sampling, seed, prompts_per_step, settings } = parts;
        let sampling = Sampling { params: sampling, seed };
        Collector { loader, rewards: Arc::new(rewards), tokenizer, judge, sampling, prompts_per_step, settings }
    }

    /// The prompts.
    pub fn loader(&self) -> &PromptLoader {
        &self.loader
    }

    /// Completions of the next prompts, as many as a step has, with their rewards.
    ///
    /// # Errors
    /// Whatever a rank reports; a reward whose `on_error` is `stop`.
    pub async fn next_round(&self, team: &Team, state: &mut DriverState, clock: &Clock) -> Result<Rollouts> {
        let prompts = self.loader.batch(state.position, self.prompts_per_step)?;
        let groups: Vec<i64> = (0..prompts.len() as u64).map(|i| (state.position + i) as i64).collect();
        state.position += prompts.len() as u64;
        self.roll(team, prompts, &groups, &self.sampling, clock).await
    }

    /// Each row's group, and what dynamic sampling judges it by. Where that is the reward less the distance from the
    /// reference, the log-probabilities are computed here, for all rows, and stay in the batch.
    ///
    /// # Errors
    /// Whatever a rank reports; a reward that is no number.
    pub async fn judged(
        &self,
        team: &Team,
        round: &mut Rollouts,
        state: &tangelo_algo::State,
        clock: &Clock,
    ) -> Result<Vec<(i64, f64)>> {
        let filter = &self.settings.filter_groups;
        if !filter.enable || filter.metric == FilterMetric::SeqReward || round.rollouts.is_empty() {
            return Ok(round.rollouts.iter().map(|r| (r.group, r.scored.total)).collect());
        }
        if self.settings.reward.use_kl_in_reward {
            round.batch = team.annotate(round.batch.clone(), clock).await?;
        }
        let columns = filter_groups::columns(&self.settings);
        let records = clock.time("adv", team.cluster.fetch(&round.batch, &columns)).await?;
        Ok(filter_groups::values(&Batch::new(records)?, &self.settings, state)?)
    }

    /// Completions of the validation prompts, with their rewards.
    ///
    /// # Errors
    /// As [`Collector::next_round`].
    pub async fn validation(&self, team: &Team, asked: &ValidationSampling, clock: &Clock) -> Result<Option<Rollouts>> {
        let prompts = self.loader.validation()?;
        if prompts.is_empty() {
            return Ok(None);
        }
        // Groups below 0 draw other numbers than any group of training.
        let groups: Vec<i64> = (0..prompts.len() as i64).map(|i| -1 - i).collect();
        let sampling = Sampling { params: asked.over(&self.sampling.params), seed: self.sampling.seed };
        self.roll(team, prompts, &groups, &sampling, clock).await.map(Some)
    }

    async fn roll(
        &self,
        team: &Team,
        prompts: Vec<TokenizedPrompt>,
        groups: &[i64],
        sampling: &Sampling,
        clock: &Clock,
    ) -> Result<Rollouts> {
        let asked = team.cluster.put(&prompt_batch(&prompts, groups)?)?;
        let generated = clock.time("gen", team.rollout.generate(&asked, sampling)).await?;
        let batch = generated.batch.ok_or_else(|| DriverError::Internal("generation made no rows".into()))?;
        let known: HashMap<i64, Arc<TokenizedPrompt>> =
            groups.iter().copied().zip(prompts.into_iter().map(Arc::new)).collect();
        let columns = [Column::Targets, Column::LossMask, Column::GroupId, Column::SampleIndex, Column::PolicyVersion];
        let records = clock.time("reward", team.cluster.fetch(&batch, &columns)).await?;
        let answers = answers(&records, &known, &self.tokenizer)?;
        let scored = clock.time("reward", self.reward(team, &answers)).await?;
        let told = Told::of(&generated.metrics, &scored);
        let rollouts: Vec<Rollout> =
            answers.into_iter().zip(scored.samples).map(|(r, scored)| Rollout { scored, ..r }).collect();
        Rollouts { batch, rollouts, left_out: Vec::new(), told }.with_rewards(team)
    }

    /// Runs the parts of the reward on a thread of their own, and the reward model meanwhile.
    async fn reward(&self, team: &Team, answers: &[Rollout]) -> Result<ScoredBatch> {
        let samples: Vec<Sample> = answers.iter().map(sample).collect();
        let models: Vec<String> = self.rewards.model_parts().map(|(part, _)| part.to_owned()).collect();
        let (said, hears) = oneshot::channel::<Vec<f64>>();
        let judged = async move {
            if let (Some(model), Some(judge)) = (&team.reward_model, &self.judge) {
                let read = team.cluster.put(&judge.batch(answers)?)?;
                // Where the rewards failed, nobody listens any more.
                let _ = said.send(last_values(team, &model.forward(&read, &[Column::Value]).await?).await?);
            }
            Ok::<(), DriverError>(())
        };
        let rewards = self.rewards.clone();
        let computed = tokio::task::spawn_blocking(move || -> Result<ScoredBatch> {
            let mut pending = rewards.evaluate(&samples)?;
            if let Ok(values) = hears.blocking_recv() {
                models.iter().try_for_each(|part| pending.set_model(part, &values))?;
            }
            pending.finish()
        });
        let (judged, computed) = tokio::join!(judged, computed);
        judged?;
        computed.map_err(|e| DriverError::Internal(format!("a reward panicked: {e}")))?
    }
}

/// The prompts as a batch: their tokens and groups.
fn prompt_batch(prompts: &[TokenizedPrompt], groups: &[i64]) -> Result<Batch> {
    let tokens: Vec<Vec<u32>> = prompts.iter().map(|p| p.tokens.clone()).collect();
    Ok(Batch::from_columns(vec![
        (Column::Tokens, ragged_u32(&tokens)),
        (Column::GroupId, per_sequence_i64(groups.to_vec())),
    ])?)
}

fn sample(rollout: &Rollout) -> Sample {
    Sample {
        prompt: rollout.prompt.prompt.clone(),
        completion: rollout.text.clone(),
        completion_tokens: rollout.completion.len(),
    }
}

/// Completions from the columns that say what the policy wrote.
fn answers(
    records: &RecordBatch,
    prompts: &HashMap<i64, Arc<TokenizedPrompt>>,
    tokenizer: &TokenizerAssets,
) -> Result<Vec<Rollout>> {
    let (targets, mask) = (columns::list(records, Column::Targets)?, columns::list(records, Column::LossMask)?);
    let number = |column: Column| columns::int64(records, column);
    let (groups, samples) = (number(Column::GroupId)?, number(Column::SampleIndex)?);
    let versions = number(Column::PolicyVersion)?;
    let one = |row: usize| -> Result<Rollout> {
        let (targets, mask) = (targets.value(row), mask.value(row));
        let both =
            targets.as_primitive::<UInt32Type>().values().iter().zip(mask.as_primitive::<Float32Type>().values());
        let completion: Vec<u32> = both.filter(|(_, m)| **m != 0.0).map(|(id, _)| *id).collect();
        let text = tokenizer.tokenizer.decode(&completion, true);
        let text = text.map_err(|e| DriverError::Internal(format!("a completion cannot be decoded: {e}")))?;
        let (group, sample_index) = (groups.value(row), samples.value(row));
        let prompt = prompts.get(&group).ok_or_else(|| DriverError::Internal(format!("nobody asked group {group}")))?;
        let (prompt, scored, policy_version) = (prompt.clone(), Scored::default(), versions.value(row));
        Ok(Rollout { prompt, group, completion, text, scored, sample_index, policy_version, left_out: None })
    };
    (0..targets.len()).map(one).collect()
}

/// What a reward model says of each row: its value at the last token.
async fn last_values(team: &Team, batch: &RemoteBatch) -> Result<Vec<f64>> {
    let records = team.cluster.fetch(batch, &[Column::Value]).await?;
    let values = columns::list(&records, Column::Value)?;
    let last = |row: usize| {
        let row = values.value(row);
        row.as_primitive::<Float32Type>().values().last().map_or(0.0, |&v| f64::from(v))
    };
    Ok((0..values.len()).map(last).collect())
}

impl Rollouts {
    /// The rewards beside the rows; rows that are dropped are left out.
    fn with_rewards(mut self, team: &Team) -> Result<Rollouts> {
        let dropped: Vec<bool> = self.rollouts.iter().map(|r| r.scored.dropped).collect();
        self.leave_out_rows(LeftOut::NoReward, &dropped)?;
        if self.rollouts.is_empty() {
            return Ok(self);
        }
        let rewards: Vec<f32> = self.rollouts.iter().map(|r| r.scored.total as f32).collect();
        let none: Vec<Vec<u32>> = vec![Vec::new(); rewards.len()];
        let column = Batch::from_columns(vec![
            (Column::Tokens, ragged_u32(&none)),
            (Column::GroupId, per_sequence_i64(self.rollouts.iter().map(|r| r.group).collect())),
            (Column::Reward, Arc::new(Float32Array::from(rewards))),
        ])?;
        let column = team.cluster.put(&column)?.narrow(&[Column::Reward], &[])?;
        self.batch = self.batch.join(&column)?;
        Ok(self)
    }

    /// Moves the marked rows to what is not learnt from.
    pub(crate) fn leave_out_rows(&mut self, why: LeftOut, marked: &[bool]) -> Result<()> {
        let kept: Vec<usize> = (0..marked.len()).filter(|&row| !marked[row]).collect();
        self.batch = self.batch.select(&kept)?;
        for (rollout, &is_marked) in std::mem::take(&mut self.rollouts).into_iter().zip(marked) {
            match is_marked {
                true => self.left_out.push(Rollout { left_out: Some(why), ..rollout }),
                false => self.rollouts.push(rollout),
            }
        }
        Ok(())
    }
}
