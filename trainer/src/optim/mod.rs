//! From accumulated gradients to updated weights: reduce, clip, check, update, gather.
//!
//! Invariants: after [`Optimizer::reduce`], the ranges of the gradient buffers that a rank owns hold the sum over all
//! data ranks, the same bits for every ZeRO scope and bucket size; the global norm is the same f64 on every rank; the
//! decision to skip a step is therefore the same everywhere without a vote.

mod bucket;

use crate::error::Result;
use crate::shards::{OwnedRange, ZeroScope};
use bucket::Bucket;
use std::time::{Duration, Instant};
use tangelo_configs::ModelSpec;
use tangelo_configs::job::Optimizer as OptimizerConfig;
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::op;
use tangelo_models::Model;
use tangelo_planner::memory::BUCKET_ELEMENTS;
use tch::{Kind, Tensor};

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepStats {
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Whether the update was left out because the norm is not finite.
    pub skipped: bool,
    /// Time inside collectives.
    pub communication: Duration,
    /// Time in clipping and updating.
    pub update: Duration,
}

/// First and second moments of what a rank owns, and its fp32 master weights where the model's are narrower.
#[derive(Debug)]
pub struct OwnedState {
    /// Index of the unit.
    pub unit: usize,
    /// Where in the unit's flat buffer.
    pub range: OwnedRange,
    /// fp32 weights: a view of the model's own where those are fp32.
    pub master: Tensor,
    /// First moment, fp32.
    pub exp_avg: Tensor,
    /// Second moment, fp32.
    pub exp_avg_sq: Tensor,
    /// Weight decay of this parameter.
    weight_decay: f64,
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with states cut over a ZeRO scope.
pub struct Optimizer {
    config: OptimizerConfig,
    max_norm: f64,
    /// All data ranks.
    data: Communicator,
    /// The ranks that share one copy of the states.
    scope: Communicator,
    buckets: Vec<Bucket>,
    states: Vec<OwnedState>,
    /// Chunks of each owned range of each rank of the scope, in global order: who has it and how many.
    chunk_order: Vec<(usize, usize)>,
    chunk_counts: Vec<usize>,
}

impl Optimizer {
    /// States of zeros for what this rank owns of `model`.
    ///
    /// `max_norm` 0 switches clipping off. `scope` is the group of [`ZeroScope::group`], in that order.
    pub fn new(
        model: &Model,
        zero: &ZeroScope,
        rank: usize,
        data: Communicator,
        scope: Communicator,
        config: &OptimizerConfig,
        max_norm: f64,
    ) -> Optimizer {
        let group = zero.group(rank);
        let mut states = Vec::new();
        let (mut chunk_order, mut chunk_counts) = (Vec::new(), vec![0; group.len()]);
        for (index, unit) in model.units().iter().enumerate() {
            states.extend(
                zero.owned(unit.spans(), rank).into_iter().map(|range| owned_state(model, index, range, config)),
            );
            let owned: Vec<Vec<OwnedRange>> = group.iter().map(|&member| zero.owned(unit.spans(), member)).collect();
            for param in 0..unit.spans().len() {
                for (member, ranges) in owned.iter().enumerate() {
                    for range in ranges.iter().filter(|r| r.param == param) {
                        chunk_order.push((member, range.num_chunks()));
                        chunk_counts[member] += range.num_chunks();
                    }
                }
            }
        }
        let buckets = Bucket::cut(model, zero, &group, BUCKET_ELEMENTS);
        Optimizer { config: config.clone(), max_norm, data, scope, buckets, states, chunk_order, chunk_counts }
    }

    /// What this rank owns, in global order.
    pub fn states(&self) -> &[OwnedState] {
        &self.states
    }

    /// The communicator over all data ranks.
    pub fn data(&self) -> &Communicator {
        &self.data
    }

    /// Sums gradients over the data ranks; afterwards the owned ranges hold the sums.
    pub fn reduce(&self, model: &Model) -> Result<Duration> {
        let start = Instant::now();
        if self.data.size() > 1 {
            for bucket in &self.buckets {
                bucket.reduce(model, &self.data, &self.scope)?;
            }
        }
        Ok(start.elapsed())
    }

    /// The global norm of the reduced gradient: f64 over fixed chunks in global order.
    /// Also returns the time of its collective.
    pub fn grad_norm(&self, model: &Model) -> Result<(f64, Duration)> {
        let local: Vec<f64> = self.states.iter().flat_map(|s| square_sums(model, s)).collect();
        let start = Instant::now();
        let all = self.gather_chunks(&local)?;
        let gathering = start.elapsed();
        let mut next: Vec<usize> =
            self.chunk_counts.iter().scan(0, |at, &n| Some(std::mem::replace(at, *at + n))).collect();
        let mut total = 0.0;
        for &(member, count) in &self.chunk_order {
            // One by one: a sum of sums would depend on how chunks are cut among ranks.
            all[next[member]..next[member] + count].iter().for_each(|chunk| total += chunk);
            next[member] += count;
        }
        Ok((total.sqrt(), gathering))
    }

    fn gather_chunks(&self, local: &[f64]) -> Result<Vec<f64>> {
        if self.scope.size() == 1 {
            return Ok(local.to_vec());
        }
        let total: usize = self.chunk_counts.iter().sum();
        let device = self.scope.device();
        let out = Tensor::zeros([total as i64], (Kind::Double, device));
        self.scope.all_gather_into(&out, &Tensor::from_slice(local).to_device(device), &self.chunk_counts)?;
        Ok(Vec::<f64>::try_from(out.to_device(tch::Device::Cpu)).expect("a one-dimensional f64 tensor"))
    }

    /// Reduce, clip, check, update, gather. `step` counts from 1. Gradients are zero afterwards.
    pub fn step(&mut self, model: &Model, step: u64, lr: f64, loss_is_finite: bool) -> Result<StepStats> {
        let mut communication = self.reduce(model)?;
        let start = Instant::now();
        let (grad_norm, gathering) = self.grad_norm(model)?;
        let skipped = !(grad_norm.is_finite() && loss_is_finite);
        if !skipped {
            self.update(model, step, lr, self.clip_scale(grad_norm));
        }
        zero_gradients(model);
        let update = start.elapsed() - gathering;
        communication += gathering;
        if !skipped && self.scope.size() > 1 {
            let start = Instant::now();
            for bucket in &self.buckets {
                bucket.gather(model, &self.scope)?;
            }
            communication += start.elapsed();
        }
        Ok(StepStats { grad_norm, skipped, communication, update })
    }

    fn clip_scale(&self, grad_norm: f64) -> f64 {
        // The small constant is PyTorch's, so that clipped runs can be compared with it.
        if self.max_norm > 0.0 { (self.max_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 }
    }

    fn update(&mut self, model: &Model, step: u64, lr: f64, grad_scale: f64) {
        let c = &self.config;
        let options = op::AdamW { lr, beta1: c.beta1, beta2: c.beta2, eps: c.eps, step, grad_scale };
        for state in &self.states {
            let unit = &model.units()[state.unit];
            let own = |flat: &Tensor| flat.narrow(0, state.range.flat.start as i64, state.range.flat.len() as i64);
            let grad = own(unit.main_grad().expect("a trained model has gradients"));
            let narrow = (model.kind() != Kind::Float).then(|| own(unit.flat()));
            let buffers = op::AdamWState {
                master: &state.master,
                exp_avg: &state.exp_avg,
                exp_avg_sq: &state.exp_avg_sq,
                grad: &grad,
                model_copy: narrow.as_ref(),
            };
            let segment = op::DecaySegment { range: 0..state.range.flat.len(), weight_decay: state.weight_decay };
            op::adamw_step(buffers, &[segment], &options);
        }
    }

    /// Copies master weights into the model's narrower ones and to the other ranks of the scope (after a restore).
    pub fn publish_master(&self, model: &Model) -> Result<()> {
        for state in self.states.iter().filter(|_| model.kind() != Kind::Float) {
            let flat = model.units()[state.unit].flat();
            flat.narrow(0, state.range.flat.start as i64, state.range.flat.len() as i64).copy_(&state.master);
        }
        if self.scope.size() > 1 {
            for bucket in &self.buckets {
                bucket.gather(model, &self.scope)?;
            }
        }
        Ok(())
    }
}

/// Sets every gradient buffer to zero.
pub fn zero_gradients(model: &Model) {
    for grad in model.units().iter().filter_map(|u| u.main_grad()) {
        let _ = grad.shallow_clone().zero_();
    }
}

fn owned_state(model: &Model, unit: usize, range: OwnedRange, config: &OptimizerConfig) -> OwnedState {
    let weights = &model.units()[unit];
    let (start, len) = (range.flat.start as i64, range.flat.len() as i64);
    let own = weights.flat().narrow(0, start, len);
    let zeros = || Tensor::zeros([len], (Kind::Float, model.device()));
    let master = if model.kind() == Kind::Float { own } else { own.to_kind(Kind::Float) };
    let decays = ModelSpec::decays(&weights.spans()[range.param].meta.name);
    let weight_decay = if decays { config.weight_decay } else { 0.0 };
    OwnedState { unit, range, master, exp_avg: zeros(), exp_avg_sq: zeros(), weight_decay }
}

fn square_sums(model: &Model, state: &OwnedState) -> Vec<f64> {
    let grad = model.units()[state.unit].main_grad().expect("a trained model has gradients");
    let own = grad.narrow(0, state.range.flat.start as i64, state.range.flat.len() as i64);
    op::chunk_square_sums(&own, state.range.chunk_len)
}
