//! From prompts to rewarded rollouts.
//!
//! ```text
//!   PromptLoader -> prompts (tokens, group) -> rollout.generate -> rows that stay with the ranks
//!          -> their completions are fetched and decoded -> RewardPipeline -> reward column, put beside the rows
//!          -> dynamic sampling: groups that teach nothing are left out, more prompts where too few are left
//! ```
//!
//! A row of a rollout is a prompt with one completion, less its last token; per-token columns speak of the target.

use crate::clock::Clock;
use crate::error::{DriverError, Result};
use crate::prompts::{PromptLoader, TokenizedPrompt};
use crate::reward::{RewardPipeline, Sample, Scored, ScoredBatch};
use crate::state::DriverState;
use crate::team::Team;
use arrow::array::{Array, AsArray, Float32Array, RecordBatch};
use arrow::datatypes::{Float32Type, UInt32Type};
use std::collections::HashMap;
use std::sync::Arc;
use tangelo_algo::filter_groups;
use tangelo_configs::SamplingParams;
use tangelo_configs::algorithm::FilterGroups;
use tangelo_control::{Metrics, RemoteBatch, Sampling};
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
}

/// Rewarded rollouts: rows of `batch` and `rollouts` are the same.
#[derive(Clone, Debug)]
pub struct Rollouts {
    /// Where the rows are.
    pub batch: RemoteBatch,
    /// What the driver knows of them.
    pub rollouts: Vec<Rollout>,
    /// Numbers of generation and rewards.
    pub metrics: Vec<(String, f64)>,
    /// What looked wrong.
    pub warnings: Vec<String>,
}

/// Makes rollouts.
pub struct Collector {
    loader: PromptLoader,
    rewards: Arc<RewardPipeline>,
    tokenizer: TokenizerAssets,
    sampling: Sampling,
    prompts_per_step: usize,
    filter: FilterGroups,
    least_groups: usize,
}

/// What a collector is made of.
pub struct CollectorParts {
    /// The prompts.
    pub loader: PromptLoader,
    /// What answers are worth.
    pub rewards: RewardPipeline,
    /// The policy's.
    pub tokenizer: TokenizerAssets,
    /// How completions are drawn.
    pub sampling: SamplingParams,
    /// What all chance in generation is a function of.
    pub seed: u64,
    /// Prompts of a step.
    pub prompts_per_step: usize,
    /// Dynamic sampling.
    pub filter: FilterGroups,
    /// Prompts without which some rank of a role would have nothing to do: groups are never split.
    pub least_groups: usize,
}

impl Collector {
    /// From its parts.
    pub fn new(parts: CollectorParts) -> Collector {
        let CollectorParts { loader, rewards, tokenizer, sampling, seed, prompts_per_step, filter, least_groups } =
            parts;
        let sampling = Sampling { params: sampling, seed };
        Collector { loader, rewards: Arc::new(rewards), tokenizer, sampling, prompts_per_step, filter, least_groups }
    }

    /// The prompts.
    pub fn loader(&self) -> &PromptLoader {
        &self.loader
    }

    /// The next step's rollouts: as many groups as a step has, of those worth training on.
    ///
    /// # Errors
    /// Whatever a rank reports; a reward whose `on_error` is `stop`; too many batches without a group worth training on; so
    /// few groups that some rank would have none.
    pub async fn next_batch(&self, team: &Team, state: &mut DriverState, clock: &mut Clock) -> Result<Rollouts> {
        let mut gathered: Vec<Rollouts> = Vec::new();
        loop {
            let prompts = self.loader.batch(state.position, self.prompts_per_step)?;
            let groups: Vec<i64> = (0..prompts.len() as u64).map(|i| (state.position + i) as i64).collect();
            state.position += prompts.len() as u64;
            gathered.push(self.roll(team, prompts, &groups, &self.sampling, clock).await?);
            let all = join(&gathered)?;
            let values: Vec<(i64, f64)> = all.rollouts.iter().map(|r| (r.group, r.scored.total)).collect();
            let selection = filter_groups::select(&self.filter, &values, self.prompts_per_step, gathered.len())?;
            if !selection.generate_more || !self.filter.enable {
                self.check_left(selection.kept.len())?;
                return all.of_groups(&selection.kept);
            }
        }
    }

    fn check_left(&self, groups: usize) -> Result<()> {
        let (least, asked) = (self.least_groups, self.prompts_per_step);
        if groups >= least {
            return Ok(());
        }
        Err(DriverError::Prompts(format!(
            "{groups} of this step's {asked} prompts are left to learn from, for the others have no answer that could be \
             scored, but {least} data-parallel ranks want one each; mend the reward, or raise `rlhf.train_batch_size`"
        )))
    }

    /// Completions of the validation prompts, with their rewards.
    ///
    /// # Errors
    /// As [`Collector::next_batch`].
    pub async fn validation(
        &self,
        team: &Team,
        params: &SamplingParams,
        clock: &mut Clock,
    ) -> Result<Option<Rollouts>> {
        let prompts = self.loader.validation()?;
        if prompts.is_empty() {
            return Ok(None);
        }
        // Groups below 0 draw other numbers than any group of training.
        let groups: Vec<i64> = (0..prompts.len() as i64).map(|i| -1 - i).collect();
        let sampling = Sampling { params: params.clone(), seed: self.sampling.seed };
        self.roll(team, prompts, &groups, &sampling, clock).await.map(Some)
    }

    async fn roll(
        &self,
        team: &Team,
        prompts: Vec<TokenizedPrompt>,
        groups: &[i64],
        sampling: &Sampling,
        clock: &mut Clock,
    ) -> Result<Rollouts> {
        let asked = team.cluster.put(&prompt_batch(&prompts, groups)?)?;
        let generated = clock.time("gen", team.rollout.generate(&asked, sampling)).await?;
        let batch = generated.batch.ok_or_else(|| DriverError::Internal("generation made no rows".into()))?;
        let known: HashMap<i64, Arc<TokenizedPrompt>> =
            groups.iter().copied().zip(prompts.into_iter().map(Arc::new)).collect();
        let columns = [Column::Targets, Column::LossMask, Column::GroupId];
        let records = clock.time("reward", team.cluster.fetch(&batch, &columns)).await?;
        let answers = answers(&records, &known, &self.tokenizer)?;
        let scored = clock.time("reward", self.reward(team, &batch, &answers)).await?;
        let metrics = numbers(&generated.metrics, &scored);
        let warnings = scored.alarms.iter().map(ToString::to_string).collect();
        let rollouts: Vec<Rollout> =
            answers.into_iter().zip(scored.samples).map(|(r, scored)| Rollout { scored, ..r }).collect();
        Rollouts { batch, rollouts, metrics, warnings }.with_rewards(team)
    }

    /// Runs the parts of the reward on a thread of their own, and the reward model meanwhile.
    async fn reward(&self, team: &Team, batch: &RemoteBatch, answers: &[Rollout]) -> Result<ScoredBatch> {
        let samples: Vec<Sample> = answers.iter().map(sample).collect();
        let models: Vec<String> = self.rewards.model_parts().map(|(part, _)| part.to_owned()).collect();
        let (said, hears) = oneshot::channel::<Vec<f64>>();
        let model = team.reward_model.as_ref().filter(|_| !models.is_empty());
        let judged = async move {
            if let Some(model) = model {
                // Where the rewards failed, nobody listens any more.
                let _ = said.send(last_values(team, &model.forward(batch, &[Column::Value]).await?).await?);
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
    let missing = |column: Column| DriverError::Internal(format!("generation made no column {column}"));
    let list = |column: Column| {
        records
            .column_by_name(column.name())
            .and_then(|a| a.as_list_opt::<i64>().cloned())
            .ok_or_else(|| missing(column))
    };
    let (targets, mask) = (list(Column::Targets)?, list(Column::LossMask)?);
    let groups = records.column_by_name(Column::GroupId.name()).ok_or_else(|| missing(Column::GroupId))?;
    let groups = groups.as_primitive::<arrow::datatypes::Int64Type>();
    let one = |row: usize| -> Result<Rollout> {
        let (targets, mask) = (targets.value(row), mask.value(row));
        let both =
            targets.as_primitive::<UInt32Type>().values().iter().zip(mask.as_primitive::<Float32Type>().values());
        let completion: Vec<u32> = both.filter(|(_, m)| **m != 0.0).map(|(id, _)| *id).collect();
        let text = tokenizer.tokenizer.decode(&completion, true);
        let text = text.map_err(|e| DriverError::Internal(format!("a completion cannot be decoded: {e}")))?;
        let group = groups.value(row);
        let prompt = prompts.get(&group).ok_or_else(|| DriverError::Internal(format!("nobody asked group {group}")))?;
        Ok(Rollout { prompt: prompt.clone(), group, completion, text, scored: Scored::default() })
    };
    (0..targets.len()).map(one).collect()
}

/// What a reward model says of each row: its value at the last token.
async fn last_values(team: &Team, batch: &RemoteBatch) -> Result<Vec<f64>> {
    let records = team.cluster.fetch(batch, &[Column::Value]).await?;
    let values = records.column_by_name(Column::Value.name()).and_then(|a| a.as_list_opt::<i64>().cloned());
    let values = values.ok_or_else(|| DriverError::Internal("the reward model gave no values".into()))?;
    let last = |row: usize| {
        let row = values.value(row);
        row.as_primitive::<Float32Type>().values().last().map_or(0.0, |&v| f64::from(v))
    };
    Ok((0..values.len()).map(last).collect())
}

fn numbers(generation: &Metrics, scored: &ScoredBatch) -> Vec<(String, f64)> {
    let generated = generation.0.iter().map(|(name, reading)| (name.clone(), reading.value()));
    generated.chain(scored.parts.iter().flat_map(|part| part.metrics())).collect()
}

impl Rollouts {
    /// The rows that are not dropped, with their rewards beside them.
    fn with_rewards(self, team: &Team) -> Result<Rollouts> {
        let kept: Vec<usize> = (0..self.rollouts.len()).filter(|&row| !self.rollouts[row].scored.dropped).collect();
        if kept.is_empty() {
            return Err(none_left(&self.rollouts));
        }
        let mut kept = self.rows(&kept)?;
        let rewards: Vec<f32> = kept.rollouts.iter().map(|r| r.scored.total as f32).collect();
        let none: Vec<Vec<u32>> = vec![Vec::new(); rewards.len()];
        let column = Batch::from_columns(vec![
            (Column::Tokens, ragged_u32(&none)),
            (Column::GroupId, per_sequence_i64(kept.rollouts.iter().map(|r| r.group).collect())),
            (Column::Reward, Arc::new(Float32Array::from(rewards))),
        ])?;
        let column = team.cluster.put(&column)?.narrow(&[Column::Reward], &[])?;
        kept.batch = kept.batch.join(&column)?;
        Ok(kept)
    }

    fn rows(self, rows: &[usize]) -> Result<Rollouts> {
        let rollouts = rows.iter().map(|&row| self.rollouts[row].clone()).collect();
        Ok(Rollouts { batch: self.batch.select(rows)?, rollouts, ..self })
    }

    /// The rows of these groups.
    fn of_groups(self, groups: &[i64]) -> Result<Rollouts> {
        let kept: std::collections::HashSet<i64> = groups.iter().copied().collect();
        let rows: Vec<usize> =
            (0..self.rollouts.len()).filter(|&row| kept.contains(&self.rollouts[row].group)).collect();
        self.rows(&rows)
    }
}

/// Every answer was dropped.
fn none_left(rollouts: &[Rollout]) -> DriverError {
    let first = rollouts.iter().find_map(|rollout| rollout.scored.error.clone()).unwrap_or_default();
    let (part, reason) = first.split_once(": ").unwrap_or(("*", &first));
    DriverError::Reward {
        part: part.to_owned(),
        reason: format!(
            "none of {} answers could be scored, and `on_error` = \"drop\" leaves nothing to learn from; the first: {reason}",
            rollouts.len()
        ),
    }
}

/// All of them; numbers of the last.
fn join(gathered: &[Rollouts]) -> Result<Rollouts> {
    let batches: Vec<RemoteBatch> = gathered.iter().map(|r| r.batch.clone()).collect();
    let last = gathered.last().ok_or_else(|| DriverError::Internal("nothing was generated".into()))?;
    Ok(Rollouts {
        batch: RemoteBatch::concat(&batches)?,
        rollouts: gathered.iter().flat_map(|r| r.rollouts.clone()).collect(),
        metrics: last.metrics.clone(),
        warnings: gathered.iter().flat_map(|r| r.warnings.clone()).collect(),
    })
}
