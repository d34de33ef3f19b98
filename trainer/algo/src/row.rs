//! A batch's sequences as algorithms see them: policy tokens only, in f64, with the reward of each.
//!
//! Streams are compacted to the tokens that `loss_mask` marks, so holes (tool output) and padding are not there to be
//! mishandled: what follows a policy token is the next policy token. Results are scattered back with 0 elsewhere.
//!
//! Invariant: a row is a function of its own columns, the settings and the state, never of its neighbours.

use crate::error::{AlgoError, Sample};
use crate::settings::Settings;
use crate::state::State;
use crate::{kl, overlong, rollout_correction};
use tangelo_core::{Batch, Column};

/// One sequence: prompt and completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Who it is.
    pub sample: Sample,
    /// Tokens of the row, padding included.
    pub length: usize,
    /// Positions in the row of the policy's tokens, ascending. Streams below have one value for each.
    pub tokens: Vec<usize>,
    /// Tokens before the first policy token; all of them where there is none.
    pub prompt_tokens: usize,
    /// Tokens from the first to the last policy token.
    pub response_tokens: usize,
    /// Whether the completion reached the longest allowed.
    pub clipped: bool,
    /// Whether its tokens count in the loss.
    pub kept: bool,
    /// The reward as given.
    pub score: f64,
    /// Reward per token: minus coefficient * KL, and on the last one the shaped score.
    pub rewards: Vec<f64>,
    /// The reward of the whole: shaped score minus coefficient * sum of KL.
    pub reward: f64,
    /// Mean KL that the reward pays for; `None` without policy tokens or without KL in the reward.
    pub mean_kl: Option<f64>,
    /// The critic's values, where there is a critic.
    pub values: Option<Vec<f64>>,
    /// Log-probabilities as trainer and engine see them, where both are known.
    pub logprobs: Option<LogprobPair>,
}

/// Log-probabilities of the policy's tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct LogprobPair {
    /// As the trainer computes them.
    pub trainer: Vec<f64>,
    /// As the engine reported them.
    pub engine: Vec<f64>,
}

/// Columns that scoring reads with these settings, beside those of the algorithm.
pub fn columns(settings: &Settings) -> Vec<Column> {
    let mut columns = vec![Column::Tokens, Column::LossMask, Column::Reward, Column::GroupId, Column::SampleIndex];
    if settings.reward.use_kl_in_reward {
        columns.extend([Column::OldLogprob, Column::RefLogprob]);
    }
    if rollout_correction::corrects(settings) {
        columns.extend([Column::OldLogprob, Column::RolloutLogprob]);
    }
    columns
}

/// The rows of a shard.
pub fn rows(shard: &Batch, settings: &Settings, state: &State, needed: &[Column]) -> Result<Vec<Row>, AlgoError> {
    shard.require(needed)?;
    let source = Source::of(shard)?;
    let mut start = 0;
    let mut rows = Vec::with_capacity(source.lengths.len());
    for (row, &length) in source.lengths.iter().enumerate() {
        rows.push(source.row(row, start, length, settings, state)?);
        start += length;
    }
    Ok(rows)
}

/// The columns of a shard, rows concatenated.
struct Source {
    lengths: Vec<usize>,
    mask: Vec<f32>,
    reward: Vec<f32>,
    group: Vec<i64>,
    index: Vec<i64>,
    old: Option<Vec<f32>>,
    rollout: Option<Vec<f32>>,
    reference: Option<Vec<f32>>,
    value: Option<Vec<f32>>,
}

impl Source {
    fn of(shard: &Batch) -> Result<Source, AlgoError> {
        let optional = |column| shard.has(column).then(|| shard.f32_values(column)).transpose();
        Ok(Source {
            lengths: shard.row_lengths()?,
            mask: shard.f32_values(Column::LossMask)?,
            reward: shard.f32_values(Column::Reward)?,
            group: shard.i64_values(Column::GroupId)?,
            index: shard.i64_values(Column::SampleIndex)?,
            old: optional(Column::OldLogprob)?,
            rollout: optional(Column::RolloutLogprob)?,
            reference: optional(Column::RefLogprob)?,
            value: optional(Column::Value)?,
        })
    }

    fn row(
        &self,
        row: usize,
        start: usize,
        length: usize,
        settings: &Settings,
        state: &State,
    ) -> Result<Row, AlgoError> {
        let sample = Sample { index: self.index[row], group: self.group[row], row };
        let tokens = policy_tokens(&self.mask[start..start + length], sample)?;
        let score = finite(self.reward[row], Column::Reward, None, sample)?;
        let stream = |values: &Option<Vec<f32>>, column| match values {
            None => Ok(None),
            Some(values) => {
                let at = |&t: &usize| finite(values[start + t], column, Some(t), sample);
                tokens.iter().map(at).collect::<Result<Vec<f64>, AlgoError>>().map(Some)
            }
        };
        let old = stream(&self.old, Column::OldLogprob)?;
        let reference = stream(&self.reference, Column::RefLogprob)?;
        let rollout = stream(&self.rollout, Column::RolloutLogprob)?;
        let values = stream(&self.value, Column::Value)?;
        let (prompt_tokens, response_tokens) = extent(&tokens, length);
        let clipped = response_tokens >= settings.limits.max_response_tokens;
        let shaped = score + overlong::penalty(&settings.reward.overlong_buffer, response_tokens, settings.limits);
        let paid = Paid::of(tokens.len(), shaped, old.as_deref().zip(reference.as_deref()), settings, state);
        Ok(Row {
            sample,
            length,
            prompt_tokens,
            response_tokens,
            clipped,
            kept: !(clipped && settings.reward.overlong_filter),
            score,
            reward: paid.total,
            rewards: paid.per_token,
            mean_kl: paid.mean_kl,
            values,
            logprobs: old.zip(rollout).map(|(trainer, engine)| LogprobPair { trainer, engine }),
            tokens,
        })
    }
}

/// What a completion earns.
struct Paid {
    total: f64,
    per_token: Vec<f64>,
    mean_kl: Option<f64>,
}

impl Paid {
    /// The shaped score on the last token, less coefficient * KL on each where settings ask for it.
    fn of(
        num_tokens: usize,
        shaped: f64,
        logprobs: Option<(&[f64], &[f64])>,
        settings: &Settings,
        state: &State,
    ) -> Paid {
        let mut per_token = vec![0.0; num_tokens];
        let (mut total, mut mean_kl) = (shaped, None);
        if let Some((old, reference)) = logprobs.filter(|_| settings.reward.use_kl_in_reward && num_tokens > 0) {
            let kls = kl::per_token(settings.reward.kl_penalty.estimator(), old, reference);
            per_token.iter_mut().zip(&kls).for_each(|(reward, kl)| *reward = -(state.kl_coef * kl));
            total += per_token.iter().sum::<f64>();
            mean_kl = Some(kls.iter().sum::<f64>() / num_tokens as f64);
        }
        if let Some(last) = per_token.last_mut() {
            *last += shaped;
        }
        Paid { total, per_token, mean_kl }
    }
}

/// Tokens of the prompt and of the completion. The first policy token is predicted by the prompt's last.
fn extent(tokens: &[usize], length: usize) -> (usize, usize) {
    match (tokens.first(), tokens.last()) {
        (Some(&first), Some(&last)) => (first + 1, last - first + 1),
        _ => (length, 0),
    }
}

fn policy_tokens(mask: &[f32], sample: Sample) -> Result<Vec<usize>, AlgoError> {
    if let Some(token) = mask.iter().position(|&m| m != 0.0 && m != 1.0) {
        return Err(AlgoError::Mask { sample, token, value: mask[token] });
    }
    Ok((0..mask.len()).filter(|&t| mask[t] == 1.0).collect())
}

fn finite(value: f32, column: Column, token: Option<usize>, sample: Sample) -> Result<f64, AlgoError> {
    if !value.is_finite() {
        return Err(AlgoError::NotFinite { sample, column, token, value });
    }
    Ok(f64::from(value))
}

impl Row {
    /// Whether there is no policy token.
    pub fn aborted(&self) -> bool {
        self.tokens.is_empty()
    }

    /// A stream over policy tokens as an f32 column: rounded once, 0 elsewhere.
    pub(crate) fn scatter(&self, stream: &[f64], column: Column) -> Result<Vec<f32>, AlgoError> {
        let mut scattered = vec![0.0; self.length];
        for (&token, &value) in self.tokens.iter().zip(stream) {
            let rounded = value as f32;
            if !rounded.is_finite() {
                return Err(AlgoError::Overflow { sample: self.sample, column, value });
            }
            // + 0.0: no negative zeros.
            scattered[token] = rounded + 0.0;
        }
        Ok(scattered)
    }
}
