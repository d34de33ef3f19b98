//! From reduced gradients to updated weights: clip, check, update.
//!
//! Invariants: after a pass and [`Optimizer::sum_replicated`], the ranges of the kept gradients that a rank owns hold the
//! sum over all ranks, elementwise in group order, whatever the bucket; the global norm is the same f64 on every rank; the
//! decision to skip a step is therefore the same everywhere without a vote.

mod muon;
mod norm;

use crate::error::Result;
use crate::groups::Groups;
use crate::shards::{OwnedRange, narrow, owned};
use crate::store::WeightStore;
use muon::Matrices;
use norm::ChunkOrder;
use std::ops::Range;
use std::time::Duration;
use tangelo_configs::job::{Optimizer as OptimizerConfig, OptimizerName};
use tangelo_configs::model::EMBEDDING;
use tangelo_configs::{ModelSpec, Sharding};
use tangelo_core::{Group, Level};
use tangelo_kernels::device::lasting_zeros;
use tangelo_kernels::op;
use tangelo_models::Model;
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

/// What an optimizer remembers of gradients; fp32.
#[derive(Debug)]
pub enum Moments {
    /// Of AdamW.
    AdamW {
        /// First moment.
        exp_avg: Tensor,
        /// Second moment.
        exp_avg_sq: Tensor,
    },
    /// Of Muon, whose parameters are whole matrices.
    Muon {
        /// Running mean of gradients.
        momentum: Tensor,
    },
}

/// Moments of what a rank owns, and its fp32 master weights where the model's are narrower.
#[derive(Debug)]
pub struct OwnedState {
    /// Index of the unit.
    pub unit: usize,
    /// Where in the unit's flat buffer.
    pub range: OwnedRange,
    /// Where in the unit's kept weights.
    pub weights_at: Range<usize>,
    /// Where in the unit's kept gradients.
    pub gradients_at: Range<usize>,
    /// fp32 weights: a view of the kept ones where those are fp32.
    pub master: Tensor,
    /// What the optimizer remembers.
    pub moments: Moments,
    /// Weight decay of this parameter.
    weight_decay: f64,
    /// The group that must sum this gradient because it holds the same weights.
    replicated_over: Option<Group>,
}

impl OwnedState {
    /// The kept weights where they are narrower than the master weights: a view.
    fn model_copy(&self, model: &Model, store: &WeightStore) -> Option<Tensor> {
        (model.kind() != Kind::Float).then(|| narrow(store.weights(model, self.unit), &self.weights_at))
    }
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with states cut over a ZeRO scope, and Muon where the plan asks for it.
pub struct Optimizer {
    config: OptimizerConfig,
    max_norm: f64,
    states: Vec<OwnedState>,
    /// By bucket: what Muon updates.
    matrices: Vec<Matrices>,
    chunks: ChunkOrder,
}

impl Optimizer {
    /// States of zeros for what `rank` owns. `buckets` are ranges of the model's units; `max_norm` 0 switches clipping
    /// off.
    pub fn new(
        model: &Model,
        sharding: &Sharding,
        store: &WeightStore,
        buckets: &[Range<usize>],
        rank: usize,
        config: &OptimizerConfig,
        max_norm: f64,
    ) -> Optimizer {
        let states: Vec<OwnedState> = (0..model.units().len())
            .flat_map(|unit| {
                let ranges = owned(sharding, &model.units()[unit], Level::States, rank);
                ranges.into_iter().map(move |range| (unit, range))
            })
            .map(|(unit, range)| owned_state(model, sharding, store, unit, range, config))
            .collect();
        Optimizer {
            config: config.clone(),
            max_norm,
            matrices: buckets.iter().map(|units| Matrices::new(model, sharding, &states, units, rank)).collect(),
            states,
            chunks: ChunkOrder::new(model, sharding, rank),
        }
    }

    /// The optimizer of a model that does not learn: it owns nothing.
    pub fn none(model: &Model, sharding: &Sharding, rank: usize, config: &OptimizerConfig) -> Optimizer {
        let chunks = ChunkOrder::new(model, sharding, rank);
        Optimizer { config: config.clone(), max_norm: 0.0, states: Vec::new(), matrices: Vec::new(), chunks }
    }

    /// Which optimizer the job asked for.
    pub fn name(&self) -> OptimizerName {
        self.config.name
    }

    /// What this rank owns, in the order of units and flat buffers.
    pub fn states(&self) -> &[OwnedState] {
        &self.states
    }

    /// Sums the owned gradients of weights that several tensor ranks or both ends of a pipeline hold.
    pub fn sum_replicated(&self, model: &Model, store: &WeightStore, groups: &Groups) -> Result<()> {
        let is_copy = |s: &&OwnedState| model.units()[s.unit].spans()[s.range.param].meta.name == EMBEDDING;
        for group in [Group::Tensor, Group::KeyReplicas] {
            let shared = self.states.iter().filter(|s| s.replicated_over == Some(group));
            self.sum_over(group, shared.collect(), model, store, groups)?;
        }
        let tied = groups.get(Group::TiedEnds).is_some() && model.spec().tie_word_embeddings;
        let copies = self.states.iter().filter(|_| tied).filter(is_copy).collect();
        self.sum_over(Group::TiedEnds, copies, model, store, groups)
    }

    fn sum_over(
        &self,
        group: Group,
        states: Vec<&OwnedState>,
        model: &Model,
        store: &WeightStore,
        groups: &Groups,
    ) -> Result<()> {
        let Some(comm) = groups.get(group) else { return Ok(()) };
        let gradients: Vec<Tensor> = states.iter().map(|s| gradient(s, model, store)).collect();
        if gradients.is_empty() {
            return Ok(());
        }
        let sum = Tensor::cat(&gradients, 0);
        comm.all_reduce(&sum)?;
        let mut at = 0;
        for gradient in gradients {
            let len = gradient.numel();
            gradient.shallow_clone().copy_(&narrow(&sum, &(at..at + len)));
            at += len;
        }
        Ok(())
    }

    /// The global norm of the reduced gradient.
    pub fn grad_norm(&self, model: &Model, store: &WeightStore, groups: &Groups) -> Result<f64> {
        self.chunks.norm(&self.states, |state| gradient(state, model, store), groups)
    }

    /// Clips to the largest norm allowed and updates the hidden matrices of a bucket that this rank owns, with Muon.
    pub fn update_matrices(
        &mut self,
        bucket: usize,
        model: &Model,
        store: &WeightStore,
        groups: &Groups,
        (lr, grad_norm): (f64, f64),
    ) -> Result<()> {
        let options = muon::options(&self.config, self.max_norm, lr, grad_norm);
        self.matrices[bucket].update(model, store, &self.states, groups, &options)
    }

    /// Clips to the largest norm allowed and updates what this rank owns, with AdamW. `step` counts from 1.
    pub fn update(&mut self, model: &Model, store: &WeightStore, step: u64, lr: f64, grad_norm: f64) {
        let c = &self.config;
        let grad_scale = clip_scale(self.max_norm, grad_norm);
        let options = op::AdamW { lr, beta1: c.beta1, beta2: c.beta2, eps: c.eps, step, grad_scale };
        for state in &self.states {
            let Moments::AdamW { exp_avg, exp_avg_sq } = &state.moments else { continue };
            let grad = gradient(state, model, store);
            let copy = state.model_copy(model, store);
            let buffers =
                op::AdamWState { master: &state.master, exp_avg, exp_avg_sq, grad: &grad, model_copy: copy.as_ref() };
            let segment = op::DecaySegment { range: 0..state.range.flat.len(), weight_decay: state.weight_decay };
            op::adamw_step(buffers, &[segment], &options);
        }
    }

    /// Copies master weights into the kept narrower ones (after a restore).
    pub fn round_master(&self, model: &Model, store: &WeightStore) {
        for state in &self.states {
            if let Some(mut copy) = state.model_copy(model, store) {
                copy.copy_(&state.master);
            }
        }
    }
}

/// What gradients of this norm are multiplied by.
fn clip_scale(max_norm: f64, grad_norm: f64) -> f64 {
    // The small constant is PyTorch's, so that clipped runs can be compared with it.
    if max_norm > 0.0 { (max_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// The kept gradient of what a rank owns: a view.
pub fn gradient(state: &OwnedState, model: &Model, store: &WeightStore) -> Tensor {
    narrow(store.gradients(model, state.unit), &state.gradients_at)
}

fn owned_state(
    model: &Model,
    sharding: &Sharding,
    store: &WeightStore,
    unit: usize,
    range: OwnedRange,
    config: &OptimizerConfig,
) -> OwnedState {
    let weights_at = store.weight_places()[unit].locate(&range.flat);
    let gradients_at = store.gradient_places()[unit].locate(&range.flat);
    let own = narrow(store.weights(model, unit), &weights_at);
    let zeros = || lasting_zeros(range.flat.len(), Kind::Float, model.device());
    let name = &model.units()[unit].spans()[range.param].meta.name;
    OwnedState {
        unit,
        weights_at,
        gradients_at,
        master: if model.kind() == Kind::Float { own } else { own.to_kind(Kind::Float) },
        moments: match sharding.is_whole(name) {
            true => Moments::Muon { momentum: zeros() },
            false => Moments::AdamW { exp_avg: zeros(), exp_avg_sq: zeros() },
        },
        weight_decay: if ModelSpec::decays(name) { config.weight_decay } else { 0.0 },
        replicated_over: sharding.replicated_over(name),
        range,
    }
}
