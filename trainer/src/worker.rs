//! A rank's share of the model, and the verbs that a recipe drives it with.

use crate::error::{Result, TrainError};
use crate::executor::{BlockExecutor, PassStats};
use crate::micro_batch;
use crate::optim::{Optimizer, StepStats};
use crate::shards::ZeroScope;
use std::time::{Duration, Instant};
use tangelo_configs::Plan;
use tangelo_configs::job::ComputeType;
use tangelo_core::{Batch, LossSpec};
use tangelo_kernels::comm::Communicator;
use tangelo_models::Model;
use tch::{Device, Kind, Tensor};

/// What [`TrainWorker::forward_backward`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossStats {
    /// The loss: weighted mean over all trained tokens of the global batch.
    pub loss: f64,
    /// Sum of token weights over the global batch.
    pub total_weight: f64,
    /// Tokens over all ranks.
    pub tokens: u64,
    /// This rank's time in forward loops.
    pub forward: Duration,
    /// This rank's time in backward loops.
    pub backward: Duration,
    /// This rank's time in collectives, waiting for slower ranks included.
    pub communication: Duration,
    /// Whether any rank asked to stop after this step.
    pub stop: bool,
}

/// The model, the optimizer and the groups of one rank.
pub struct TrainWorker {
    model: Model,
    executor: BlockExecutor,
    optimizer: Optimizer,
    zero: ZeroScope,
    rank: usize,
    rows_per_micro_batch: usize,
    /// AdamW updates done so far.
    num_updates: u64,
}

/// libtorch's type for the resolved compute type.
pub fn kind_of(compute: ComputeType) -> Kind {
    match compute {
        ComputeType::Bfloat16 => Kind::BFloat16,
        ComputeType::Auto | ComputeType::Float32 => Kind::Float,
    }
}

impl TrainWorker {
    /// A worker with zeroed weights and optimizer states. `data` spans all ranks of the plan's mesh.
    pub fn new(plan: &Plan, rank: usize, data: Communicator, device: Device) -> Result<TrainWorker> {
        let kind = kind_of(plan.config.training.mixed_precision_param);
        let model = Model::zeros(&plan.model, kind, device, true);
        let zero = ZeroScope::new(&plan.mesh, plan.zero_optimizer_degree)?;
        let scope = scope_of(&data, &zero, rank)?;
        let optimizer =
            Optimizer::new(&model, &zero, rank, data, scope, &plan.config.optimizer, plan.config.training.max_norm);
        let executor = BlockExecutor::new((0..model.num_blocks()).map(|layer| plan.recomputes(layer)).collect());
        let rows_per_micro_batch = plan.config.training.local_batch_size;
        Ok(TrainWorker { model, executor, optimizer, zero, rank, rows_per_micro_batch, num_updates: 0 })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// How optimizer states lie over ranks.
    pub fn zero(&self) -> &ZeroScope {
        &self.zero
    }

    /// The communicator over all data ranks.
    pub fn data(&self) -> &Communicator {
        self.optimizer.data()
    }

    /// AdamW updates done so far.
    pub fn num_updates(&self) -> u64 {
        self.num_updates
    }

    /// Waits until every rank is here, for up to `patience` where one of them has something longer to do than a rank may
    /// wait for in a step; afterwards a rank waits for up to `step` again.
    pub fn wait_for_all(&self, patience: Duration, step: Duration) -> Result<()> {
        if self.data().size() > 1 {
            self.data().set_timeout(patience);
            self.data().barrier()?;
            self.data().set_timeout(step);
        }
        Ok(())
    }

    /// This worker's global rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// After weights were written into the model: makes the optimizer's master copies equal to them.
    pub fn adopt_weights(&mut self) {
        for state in self.optimizer.states() {
            if self.model.kind() != Kind::Float {
                let flat = self.model.units()[state.unit].flat();
                let own = flat.narrow(0, state.range.flat.start as i64, state.range.flat.len() as i64);
                tch::no_grad(|| state.master.shallow_clone().copy_(&own));
            }
        }
    }

    /// Gives the master copies `values`, which lie at `start` in the flat buffer of `unit`: what this rank owns of them.
    /// The model's own weights may be narrower and do not hold them exactly.
    pub fn adopt_values(&self, unit: usize, start: usize, values: &[f32]) {
        for state in self.optimizer.states().iter().filter(|state| state.unit == unit) {
            let owned = &state.range.flat;
            let (from, to) = (owned.start.max(start), owned.end.min(start + values.len()));
            if from < to {
                let mut master = state.master.narrow(0, (from - owned.start) as i64, (to - from) as i64);
                tch::no_grad(|| master.copy_(&Tensor::from_slice(&values[from - start..to - start])));
            }
        }
    }

    /// After optimizer states were written: makes the model's weights equal to the master copies on every rank.
    pub fn adopt_state(&mut self, num_updates: u64) -> Result<()> {
        self.num_updates = num_updates;
        tch::no_grad(|| self.optimizer.publish_master(&self.model))
    }

    /// Adds the gradients of the loss over this rank's rows of a global batch, normalised by the whole batch's weight.
    ///
    /// `stop` travels with the loss: every rank learns in the same step that one of them was asked to end.
    pub fn forward_backward(&mut self, batch: &Batch, loss: &LossSpec, stop: bool) -> Result<LossStats> {
        let (weight, coefficient) = micro_batch::weight_column(loss)?;
        let local_weight: f64 = batch.f32_values(weight)?.iter().map(|&w| f64::from(w)).sum();
        let start = Instant::now();
        let totals = sum_over_ranks(self.data(), &[local_weight, batch.num_tokens() as f64])?;
        let mut stats = LossStats { total_weight: totals[0], tokens: totals[1] as u64, ..LossStats::default() };
        stats.communication = start.elapsed();
        let inverse = if totals[0] > 0.0 { coefficient / totals[0] } else { 0.0 };
        let mut pass = PassStats::default();
        for micro in micro_batch::cut(batch, loss, self.rows_per_micro_batch, self.model.device())? {
            let one = self.executor.forward_backward(&self.model, &micro, inverse);
            pass.loss_sum += one.loss_sum;
            pass.forward += one.forward;
            pass.backward += one.backward;
        }
        let start = Instant::now();
        let sums = sum_over_ranks(self.data(), &[pass.loss_sum, f64::from(u8::from(stop))])?;
        (stats.loss, stats.stop) = (sums[0] * inverse, sums[1] > 0.0);
        stats.communication += start.elapsed();
        (stats.forward, stats.backward) = (pass.forward, pass.backward);
        Ok(stats)
    }

    /// Reduces, clips and, unless the loss or the gradient is not finite, updates the weights.
    pub fn optim_step(&mut self, lr: f64, loss: &LossStats) -> Result<StepStats> {
        let next = self.num_updates + 1;
        let stats = tch::no_grad(|| self.optimizer.step(&self.model, next, lr, loss.loss.is_finite()))?;
        if !stats.skipped {
            self.num_updates = next;
        }
        Ok(stats)
    }

    /// Mean loss over the global batches that `next` yields; every rank must be given its rows of each.
    pub fn evaluate(&self, batches: impl Iterator<Item = Result<Batch>>, loss: &LossSpec) -> Result<f64> {
        let (weight, _) = micro_batch::weight_column(loss)?;
        let (mut sum, mut total) = (0.0, 0.0);
        for batch in batches {
            let batch = batch?;
            total += batch.f32_values(weight)?.iter().map(|&w| f64::from(w)).sum::<f64>();
            for micro in micro_batch::cut(&batch, loss, self.rows_per_micro_batch, self.model.device())? {
                sum += self.executor.evaluate(&self.model, &micro);
            }
        }
        let sums = sum_over_ranks(self.data(), &[sum, total])?;
        if sums[1] > 0.0 { Ok(sums[0] / sums[1]) } else { Err(no_validation_tokens()) }
    }
}

fn no_validation_tokens() -> TrainError {
    TrainError::Data("the held-out split has no tokens to evaluate; raise data.validation_fraction".into())
}

/// The ranks that share one copy of the optimizer states.
fn scope_of(data: &Communicator, zero: &ZeroScope, rank: usize) -> Result<Communicator> {
    if zero.degree() == 1 {
        return Ok(Communicator::single_on(data.device()));
    }
    // Every rank asks for the group of its own; groups of one colour find each other.
    let color = zero.group(rank)[0] as u32;
    let scope = data.split("zero", Some(color), zero.index(rank) as i64)?;
    scope.ok_or_else(|| TrainError::Internal("a rank without a ZeRO scope".into()))
}

/// Sums numbers over ranks in rank order, in f64.
pub fn sum_over_ranks(comm: &Communicator, values: &[f64]) -> Result<Vec<f64>> {
    if comm.size() == 1 {
        return Ok(values.to_vec());
    }
    let all = comm.all_gather(&Tensor::from_slice(values).to_device(comm.device()))?.to_device(Device::Cpu);
    let all = Vec::<f64>::try_from(all.reshape([-1])).expect("an f64 tensor");
    Ok((0..values.len()).map(|i| all.iter().skip(i).step_by(values.len()).sum()).collect())
}

impl From<tangelo_kernels::comm::CommError> for TrainError {
    fn from(e: tangelo_kernels::comm::CommError) -> TrainError {
        if e.is_peer_failure() { TrainError::Peer(e.to_string()) } else { TrainError::Internal(e.to_string()) }
    }
}
