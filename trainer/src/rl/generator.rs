//! A rank's end of generation: prompts in, rows for training out.
//!
//! Ranks that hold the model together get the same prompts and make the same rows; one of them answers. Told to stop, they
//! agree between two steps of the engine, so that all stop before the same one.
//!
//! A row is a prompt with one completion, less its last token. Per-token columns speak of the target: `loss_mask` is 1
//! where the target was drawn, `rollout_logprob` is its log-probability under the distribution it was drawn from.

use super::{internal, refused};
use crate::error::TrainError;
use arrow::array::ArrayRef;
use tangelo_control::{Control, Metrics, NewColumns, Output, Reading, Sampling, WorkerError};
use tangelo_core::batch::{per_sequence_i64, ragged_f32, ragged_u32};
use tangelo_core::hash::mix64;
use tangelo_core::{Batch, Column, FailureKind};
use tangelo_models::Model;
use tangelo_rollout::{Completion, Engine, FinishReason, Request, RolloutError, StepReport};

/// A model with its engine.
pub struct Generator {
    model: Model,
    engine: Engine,
    /// Whether other roles need the memory of keys and values between calls.
    shares_memory: bool,
    /// Whether the engine's log-probabilities are the trainer's, to the bit.
    is_exact: bool,
}

impl Generator {
    /// An engine over `model`.
    pub fn new(model: Model, mut engine: Engine, shares_memory: bool, is_exact: bool) -> Generator {
        if shares_memory {
            engine.release_kv();
        }
        Generator { model, engine, shares_memory, is_exact }
    }

    /// The weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokens from now on are of this version.
    pub fn set_version(&mut self, version: u64) {
        self.engine.set_version(version);
    }

    /// Completes every prompt of the batch (`tokens`, `group_id`), `n` rows each in their order; nothing comes back where
    /// another rank of the group `answers`.
    pub fn generate(
        &mut self,
        prompts: &Batch,
        sampling: &Sampling,
        control: &Control,
        answers: bool,
    ) -> Result<Output, WorkerError> {
        let groups = prompts.i64_values(Column::GroupId).map_err(internal)?;
        let prompts = rows_of(prompts)?;
        self.engine.acquire_kv();
        let before = self.engine.stats();
        let result = self.complete(&prompts, &groups, sampling, control);
        if self.shares_memory {
            self.engine.release_kv();
        }
        let mut completions = result?;
        if !answers {
            return Ok(Output::default());
        }
        completions.sort_by_key(|c| (c.request, c.index));
        let mut output = Output::columns(self.rows(&prompts, &groups, &completions, sampling.params.n)?);
        output.metrics = numbers(&completions, before, self.engine.stats());
        Ok(output)
    }

    /// Runs the engine until all is done; between two steps it looks whether to stop.
    fn complete(
        &mut self,
        prompts: &[Vec<u32>],
        groups: &[i64],
        sampling: &Sampling,
        control: &Control,
    ) -> Result<Vec<Completion>, WorkerError> {
        for (row, prompt) in prompts.iter().enumerate() {
            let seed = mix64(sampling.seed ^ mix64(groups[row] as u64));
            let request = Request { id: row as u64, prompt: prompt.clone(), sampling: sampling.params.clone(), seed };
            if let Err(e) = self.engine.add(request) {
                self.abort_all(row as u64);
                return Err(failed(e));
            }
        }
        let mut completions = Vec::new();
        while !self.engine.is_idle() {
            match self.step(control) {
                Ok(report) => completions.extend(report.completions),
                Err(e) => {
                    self.abort_all(prompts.len() as u64);
                    return Err(e);
                }
            }
        }
        Ok(completions)
    }

    /// One step, unless any rank of the group was told to stop.
    fn step(&mut self, control: &Control) -> Result<StepReport, WorkerError> {
        let told = control.check();
        if self.engine.any(told.is_err()).map_err(failed)? {
            told?;
            return Err(WorkerError::new(FailureKind::Peer, "another rank of its tensor group was told to stop"));
        }
        self.engine.step(&self.model).map_err(failed)
    }

    fn abort_all(&mut self, requests: u64) {
        (0..requests).for_each(|id| drop(self.engine.abort(id)));
    }

    fn rows(
        &self,
        prompts: &[Vec<u32>],
        groups: &[i64],
        completions: &[Completion],
        n: usize,
    ) -> Result<NewColumns, WorkerError> {
        let mut made = Rows::default();
        for completion in completions {
            let row = completion.request as usize;
            let sample = groups[row].wrapping_mul(n as i64).wrapping_add(completion.index as i64);
            made.push(row as u32, &prompts[row], completion, groups[row], sample);
        }
        made.columns(self.is_exact)
    }
}

/// The tokens of each row.
fn rows_of(batch: &Batch) -> Result<Vec<Vec<u32>>, WorkerError> {
    let tokens = batch.u32_values(Column::Tokens).map_err(internal)?;
    let lengths = batch.row_lengths().map_err(internal)?;
    let mut rest = tokens.as_slice();
    let take = |length: usize| {
        let (row, after) = rest.split_at(length);
        rest = after;
        row.to_vec()
    };
    Ok(lengths.into_iter().map(take).collect())
}

/// Rows as columns under way.
#[derive(Default)]
struct Rows {
    origins: Vec<u32>,
    tokens: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
    positions: Vec<Vec<u32>>,
    seq_id: Vec<Vec<u32>>,
    mask: Vec<Vec<f32>>,
    logprob: Vec<Vec<f32>>,
    group: Vec<i64>,
    sample: Vec<i64>,
    version: Vec<i64>,
}

impl Rows {
    fn push(&mut self, origin: u32, prompt: &[u32], completion: &Completion, group: i64, sample: i64) {
        let whole = [prompt, completion.ids.as_slice()].concat();
        let length = whole.len() - 1;
        // The first drawn token is the target of the prompt's last.
        let aligned = |drawn: &[f32]| [&vec![0.0; prompt.len() - 1][..], drawn].concat();
        self.origins.push(origin);
        self.tokens.push(whole[..length].to_vec());
        self.targets.push(whole[1..].to_vec());
        self.positions.push((0..length as u32).collect());
        self.seq_id.push(vec![0; length]);
        self.mask.push(aligned(&vec![1.0; completion.ids.len()]));
        self.logprob.push(aligned(&completion.sampling_logprobs));
        self.group.push(group);
        self.sample.push(sample);
        self.version.push(completion.versions.first().map_or(0, |&v| v as i64));
    }

    fn columns(self, is_exact: bool) -> Result<NewColumns, WorkerError> {
        let logprob = ragged_f32(&self.logprob);
        let mut columns: Vec<(Column, ArrayRef)> = vec![
            (Column::Tokens, ragged_u32(&self.tokens)),
            (Column::Targets, ragged_u32(&self.targets)),
            (Column::Positions, ragged_u32(&self.positions)),
            (Column::SeqId, ragged_u32(&self.seq_id)),
            (Column::LossMask, ragged_f32(&self.mask)),
            (Column::RolloutLogprob, logprob.clone()),
            (Column::GroupId, per_sequence_i64(self.group)),
            (Column::SampleIndex, per_sequence_i64(self.sample)),
            (Column::PolicyVersion, per_sequence_i64(self.version)),
        ];
        columns.extend(is_exact.then_some((Column::OldLogprob, logprob)));
        NewColumns::with_origins(columns, self.origins)
    }
}

fn numbers(
    completions: &[Completion],
    before: tangelo_rollout::EngineStats,
    after: tangelo_rollout::EngineStats,
) -> Metrics {
    let mut metrics = Metrics::default();
    let drawn: usize = completions.iter().map(|c| c.ids.len()).sum();
    let stopped = completions.iter().filter(|c| c.finish_reason == FinishReason::Stop).count();
    let count = completions.len() as f64;
    metrics.add("rollout/generated_tokens", Reading::Sum(drawn as f64));
    metrics.add("rollout/stopped", Reading::Mean { sum: stopped as f64, weight: count });
    metrics.add("rollout/seconds", Reading::Max((after.duration - before.duration).as_secs_f64()));
    metrics.add("rollout/preemptions", Reading::Sum((after.num_preempted - before.num_preempted) as f64));
    metrics
}

/// An error of the engine, by what the user does about it.
fn failed(error: RolloutError) -> WorkerError {
    let message = error.to_string();
    match error {
        RolloutError::Peer(error) => refused(TrainError::from(error)),
        RolloutError::Config(_) | RolloutError::Request { .. } => refused(TrainError::Config(message)),
        RolloutError::Memory(_) => refused(TrainError::Device(message)),
        RolloutError::NotFinite { .. } | RolloutError::Text(_) => refused(TrainError::Data(message)),
        RolloutError::Model(_) => WorkerError::new(FailureKind::Internal, message),
    }
}
