//! Muon for the hidden matrices that a rank owns: each whole, or all of its part of it where tensor parallelism cuts it.
//!
//! Orthogonalising needs the whole matrix. Its owners of all tensor ranks give each other what they moved their momenta
//! to, compute the same whole update, and each applies its own part: more arithmetic than sending matrices to one rank
//! and updates back, but one call instead of two, and nobody waits for one rank's products.
//!
//! Invariant: momentum and weights are elementwise and a matrix is orthogonalised whole on one rank, so that the bits do
//! not depend on ZeRO scopes.

use super::{Moments, OwnedState, clip_scale, gradient};
use crate::error::Result;
use crate::groups::Groups;
use crate::init::part_of;
use crate::shards::narrow;
use crate::store::WeightStore;
use std::ops::Range;
use tangelo_configs::Sharding;
use tangelo_configs::job::{MuonAdjustLr, Optimizer as OptimizerConfig};
use tangelo_core::{Group, IndexBox};
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::op::muon::{self, AdjustLr};
use tangelo_models::Model;
use tch::{Kind, Tensor};

/// The least norm that a matrix is divided by: `torch.optim.Muon`'s.
const EPS: f64 = 1e-7;

/// The hidden matrices of one bucket that a rank owns.
#[derive(Debug)]
pub(super) struct Matrices {
    list: Vec<Matrix>,
    /// Elements that each rank of [`Group::Tensor`] sends.
    counts: Vec<usize>,
    /// This rank's elements among what all send.
    own: Range<usize>,
}

#[derive(Debug)]
struct Matrix {
    /// Index among the owned states.
    state: usize,
    /// Of the whole matrix.
    shape: [i64; 2],
    /// This rank's part of it.
    held: IndexBox,
    /// What each tensor rank sends of it, and where that lies among what all send; empty where another sends the same.
    parts: Vec<(IndexBox, Range<usize>)>,
}

/// The operator's options for one step.
pub(super) fn options(config: &OptimizerConfig, max_norm: f64, lr: f64, grad_norm: f64) -> muon::Muon {
    muon::Muon {
        lr,
        momentum: config.muon_momentum,
        nesterov: config.muon_nesterov,
        weight_decay: config.weight_decay,
        ns_steps: config.muon_ns_steps,
        eps: EPS,
        adjust_lr: match config.muon_adjust_lr {
            MuonAdjustLr::MatchRmsAdamW => AdjustLr::MatchRmsAdamW,
            MuonAdjustLr::Original => AdjustLr::Original,
        },
        grad_scale: clip_scale(max_norm, grad_norm),
    }
}

impl Matrices {
    /// Those of the units `bucket` among `states`, which `rank` owns.
    pub(super) fn new(
        model: &Model,
        sharding: &Sharding,
        states: &[OwnedState],
        bucket: &Range<usize>,
        rank: usize,
    ) -> Matrices {
        let members = sharding.topology().members(Group::Tensor, rank);
        let whole = |s: &OwnedState| matches!(s.moments, Moments::Muon { .. }) && bucket.contains(&s.unit);
        let chosen = states.iter().enumerate().filter(|(_, s)| whole(s));
        let mut list: Vec<Matrix> = chosen.map(|(i, s)| matrix(model, sharding, i, s, &members, rank)).collect();
        let (mut counts, mut at) = (Vec::new(), 0);
        for member in 0..members.len() {
            let start = at;
            for matrix in &mut list {
                let (part, place) = &mut matrix.parts[member];
                *place = at..at + part.volume();
                at = place.end;
            }
            counts.push(at - start);
        }
        let index = sharding.topology().index(Group::Tensor, rank);
        let start = counts[..index].iter().sum();
        Matrices { own: start..start + counts[index], list, counts }
    }

    /// Updates them all.
    pub(super) fn update(
        &self,
        model: &Model,
        store: &WeightStore,
        states: &[OwnedState],
        groups: &Groups,
        options: &muon::Muon,
    ) -> Result<()> {
        let moved = |matrix: &Matrix| {
            let state = &states[matrix.state];
            let Moments::Muon { momentum } = &state.moments else { unreachable!("chosen for it") };
            muon::momentum_update(momentum, &gradient(state, model, store), options)
        };
        let gathered = match groups.get(Group::Tensor) {
            Some(comm) if !self.list.is_empty() => Some(self.gather(comm, moved)?),
            _ => None,
        };
        for matrix in &self.list {
            let whole = match &gathered {
                Some(all) => matrix.assemble(all),
                None => moved(matrix).view(matrix.shape),
            };
            matrix.apply(&muon::newton_schulz(&whole, options.ns_steps, options.eps), model, store, states, options);
        }
        Ok(())
    }

    /// Moves all momenta; what all tensor ranks are to orthogonalise.
    fn gather(&self, comm: &Communicator, moved: impl Fn(&Matrix) -> Tensor) -> Result<Tensor> {
        let all = Tensor::empty([self.counts.iter().sum::<usize>() as i64], (Kind::Float, comm.device()));
        let own = narrow(&all, &self.own);
        for matrix in &self.list {
            let (moved, (part, place)) = (moved(matrix), &matrix.parts[comm.rank()]);
            if !part.is_empty() {
                narrow(&own, &(place.start - self.own.start..place.end - self.own.start)).copy_(&moved);
            }
        }
        comm.all_gather_into(&all, &own, &self.counts)?;
        Ok(all)
    }
}

impl Matrix {
    fn assemble(&self, all: &Tensor) -> Tensor {
        let whole = Tensor::empty(self.shape, (Kind::Float, all.device()));
        for (part, place) in self.parts.iter().filter(|(part, _)| !part.is_empty()) {
            let mut view = part_of(&whole, part);
            view.copy_(&narrow(all, place).view_as(&view));
        }
        whole
    }

    fn apply(&self, update: &Tensor, model: &Model, store: &WeightStore, states: &[OwnedState], options: &muon::Muon) {
        let state = &states[self.state];
        let options = muon::Muon { weight_decay: state.weight_decay, ..*options };
        let update = part_of(update, &self.held);
        let copy = state.model_copy(model, store).map(|copy| copy.view_as(&update));
        muon::apply_update(&state.master.view_as(&update), &update, copy.as_ref(), self.shape, &options);
    }
}

fn matrix(
    model: &Model,
    sharding: &Sharding,
    index: usize,
    state: &OwnedState,
    members: &[usize],
    rank: usize,
) -> Matrix {
    let meta = &model.units()[state.unit].spans()[state.range.param].meta;
    let sends = |&member: &usize| match sharding.counts(&meta.name, member) {
        true => (sharding.model_box(meta, member), 0..0),
        false => (IndexBox::new([0..0, 0..0]), 0..0),
    };
    Matrix {
        state: index,
        shape: [meta.shape[0] as i64, meta.shape[1] as i64],
        held: sharding.model_box(meta, rank),
        parts: members.iter().map(sends).collect(),
    }
}
