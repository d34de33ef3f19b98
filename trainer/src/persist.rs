//! A worker's state into checkpoints and out of them.
//!
//! Every box that a rank owns is copied out of the model into one arena, on a CPU while the next forward and backward
//! run; where several ranks own the same box, [`plan_writes`] says who writes it. Reading goes through boxes too, so that a checkpoint of any layout
//! loads into any other.

use crate::checkpoint::{Checkpoint, CheckpointError, Saver, StateKind, TrainState, plan_writes};
use crate::error::{Result, TrainError};
use crate::init::TensorSource;
use crate::optim::{Moments, OwnedState};
use crate::worker::TrainWorker;
use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;
use tangelo_configs::Plan;
use tangelo_core::{DType, IndexBox, Level, ParamMeta};
use tch::{Device, Tensor};

/// Which state tensors this rank writes: the kind and the index among [`OwnedState`]s.
#[derive(Debug)]
pub struct WritePlan {
    full: Vec<(StateKind, usize)>,
    weights_only: Vec<(StateKind, usize)>,
}

impl WritePlan {
    /// Elements that this rank writes in a full checkpoint.
    pub fn num_elements(&self, worker: &TrainWorker) -> usize {
        self.full.iter().map(|&(_, index)| worker.optimizer().states()[index].range.flat.len()).sum()
    }

    /// What `worker` writes among all ranks of the plan.
    pub fn new(plan: &Plan, worker: &TrainWorker) -> WritePlan {
        let for_kinds = |kinds: &[StateKind]| assign(plan, worker, kinds);
        WritePlan { full: for_kinds(&StateKind::ALL), weights_only: for_kinds(&[StateKind::Param]) }
    }
}

fn assign(plan: &Plan, worker: &TrainWorker, kinds: &[StateKind]) -> Vec<(StateKind, usize)> {
    let (metas, sharding) = (plan.model.parameters(DType::F32), worker.sharding());
    let world_size = plan.topology.mesh.world_size();
    let boxes = |meta: &ParamMeta| (0..world_size).map(|rank| sharding.box_at(meta, Level::States, rank)).collect();
    let of_kind = |&kind: &StateKind| metas.iter().map(move |meta| (kind, meta));
    let exists = |(kind, meta): &(StateKind, &ParamMeta)| kinds_of(sharding.is_whole(&meta.name)).contains(kind);
    let tensors: Vec<(StateKind, &ParamMeta)> = kinds.iter().flat_map(of_kind).filter(exists).collect();
    let held: Vec<Vec<IndexBox>> = tensors.iter().map(|(_, meta)| boxes(meta)).collect();
    let owned = owned_by_name(worker);
    let mine = &plan_writes(world_size, &held)[worker.rank()];
    let locate = |&tensor: &usize| (tensors[tensor].0, owned[tensors[tensor].1.name.as_str()]);
    mine.iter().map(locate).collect()
}

/// What there is of a parameter: Muon's states where ZeRO scopes leave it whole.
fn kinds_of(whole: bool) -> &'static [StateKind] {
    if whole { &StateKind::MUON } else { &StateKind::ADAMW }
}

fn owned_by_name(worker: &TrainWorker) -> HashMap<&str, usize> {
    let states = worker.optimizer().states().iter().enumerate();
    states.map(|(i, s)| (meta_of(worker, s).name.as_str(), i)).collect()
}

fn meta_of<'a>(worker: &'a TrainWorker, state: &OwnedState) -> &'a ParamMeta {
    &worker.model().units()[state.unit].spans()[state.range.param].meta
}

fn tensor_of(state: &OwnedState, kind: StateKind) -> &Tensor {
    match (kind, &state.moments) {
        (StateKind::Param, _) => &state.master,
        (StateKind::ExpAvg, Moments::AdamW { exp_avg, .. }) => exp_avg,
        (StateKind::ExpAvgSq, Moments::AdamW { exp_avg_sq, .. }) => exp_avg_sq,
        (StateKind::Momentum, Moments::Muon { momentum }) => momentum,
        (kind, moments) => unreachable!("{moments:?} have no {kind}"),
    }
}

/// A box of state that the saver thread is to copy.
struct Source {
    kind: StateKind,
    meta: ParamMeta,
    indices: IndexBox,
    tensor: Tensor,
}

/// Hands what this rank writes to `saver`; how long training stood still for it.
///
/// On a CPU the saver thread copies while the next forward and backward run: nothing may change the state until
/// [`Saver::fence`] has returned. From a GPU it is copied here.
pub fn save(
    worker: &TrainWorker,
    writes: &WritePlan,
    saver: &mut Saver,
    state: TrainState,
    weights_only: bool,
) -> std::result::Result<Duration, CheckpointError> {
    let start = std::time::Instant::now();
    let list = if weights_only { &writes.weights_only } else { &writes.full };
    let sources: Vec<Source> = list.iter().map(|&(kind, index)| source(worker, kind, index)).collect();
    let snapshot = saver.begin(state);
    saver.save_lazily(snapshot, move |snapshot| {
        for Source { kind, meta, indices, tensor } in &sources {
            let copied: std::result::Result<(), std::convert::Infallible> =
                snapshot.push(*kind, meta, indices, |out| {
                    tensor.copy_data(out, out.len());
                    Ok(())
                });
            let Ok(()) = copied;
        }
    })?;
    Ok(start.elapsed())
}

fn source(worker: &TrainWorker, kind: StateKind, index: usize) -> Source {
    let owned = &worker.optimizer().states()[index];
    let meta = meta_of(worker, owned).clone();
    let indices = worker.sharding().box_at(&meta, Level::States, worker.rank());
    // A shared view on a CPU, a copy from a GPU.
    Source { kind, meta, indices, tensor: tensor_of(owned, kind).to_device(Device::Cpu) }
}

/// Fills weights and, unless `weights_only`, optimizer states from a checkpoint of any layout.
pub fn restore(worker: &mut TrainWorker, from: &Checkpoint, weights_only: bool) -> Result<()> {
    from.check_model(worker.model().spec()).map_err(data_error)?;
    if !weights_only {
        from.check_optimizer(worker.optimizer().name()).map_err(data_error)?;
    }
    let mut buffer = Vec::new();
    for owned in worker.optimizer().states() {
        let meta = meta_of(worker, owned);
        let all = kinds_of(worker.sharding().is_whole(&meta.name));
        let kinds = if weights_only { &[StateKind::Param][..] } else { all };
        let indices = worker.sharding().box_at(meta, Level::States, worker.rank());
        buffer.resize(indices.volume(), 0f32);
        for &kind in kinds {
            from.read(kind, &meta.name, &indices, &mut buffer).map_err(data_error)?;
            tch::no_grad(|| tensor_of(owned, kind).shallow_clone().copy_(&Tensor::from_slice(&buffer)));
        }
    }
    let num_updates = if weights_only { 0 } else { from.state().num_updates };
    worker.adopt_state(num_updates)
}

fn data_error(e: CheckpointError) -> TrainError {
    TrainError::Data(e.to_string())
}

impl TensorSource for Checkpoint {
    fn read_f32(&self, meta: &ParamMeta, rows: Range<usize>, out: &mut [f32]) -> std::result::Result<(), String> {
        let mut indices = IndexBox::full(&meta.shape);
        indices.ranges[0] = rows.into();
        self.read(StateKind::Param, &meta.name, &indices, out).map_err(|e| e.to_string())
    }
}

impl TensorSource for tangelo_formats::Weights {
    fn read_f32(&self, meta: &ParamMeta, rows: Range<usize>, out: &mut [f32]) -> std::result::Result<(), String> {
        tangelo_formats::Weights::read_f32(self, &meta.name, rows, out).map_err(|e| e.to_string())
    }
}
