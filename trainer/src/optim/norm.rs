//! The global gradient norm: f64 square sums of fixed chunks, added in global order.
//!
//! A chunk depends on the shape of the parameter alone and is never split, so the sum has the same bits whatever ranks
//! own. What several ranks of the model hold is counted by one of them.

use super::OwnedState;
use crate::error::Result;
use crate::groups::Groups;
use crate::shards::owned;
use crate::worker::sum_over_ranks;
use tangelo_configs::Sharding;
use tangelo_core::{Group, Level};
use tangelo_kernels::op;
use tangelo_models::Model;
use tch::{Device, Kind, Tensor};

/// Whose chunks come when.
#[derive(Debug)]
pub struct ChunkOrder {
    /// In global order: which rank of [`Group::States`] has how many chunks next.
    order: Vec<(usize, usize)>,
    /// Chunks of each rank.
    counts: Vec<usize>,
    /// For each state of this rank: whether this rank counts it.
    counted: Vec<bool>,
}

impl ChunkOrder {
    /// The order for the states of `rank` and its group.
    pub fn new(model: &Model, sharding: &Sharding, rank: usize) -> ChunkOrder {
        let members = sharding.topology().members(Group::States, rank);
        let (mut order, mut counts, mut counted) = (Vec::new(), vec![0; members.len()], Vec::new());
        for unit in model.units() {
            let counts_here = |param: usize| sharding.counts(&unit.spans()[param].meta.name, rank);
            let mut ranges = Vec::new();
            for (member, &who) in members.iter().enumerate() {
                let owned = owned(sharding, unit, Level::States, who);
                if who == rank {
                    counted.extend(owned.iter().map(|range| counts_here(range.param)));
                }
                ranges.extend(owned.into_iter().filter(|r| counts_here(r.param)).map(|r| (r.flat.start, member, r)));
            }
            ranges.sort_by_key(|(start, ..)| *start);
            for (_, member, range) in ranges {
                order.push((member, range.num_chunks()));
                counts[member] += range.num_chunks();
            }
        }
        ChunkOrder { order, counts, counted }
    }

    /// The norm of all gradients.
    pub fn norm(
        &self,
        states: &[OwnedState],
        gradient: impl Fn(&OwnedState) -> Tensor,
        groups: &Groups,
    ) -> Result<f64> {
        let counted = states.iter().zip(&self.counted).filter(|(_, counted)| **counted).map(|(state, _)| state);
        let local: Vec<f64> = counted.flat_map(|s| op::chunk_square_sums(&gradient(s), s.range.chunk_len)).collect();
        let all = self.gather(local, groups)?;
        let mut next: Vec<usize> = self.counts.iter().scan(0, |at, &n| Some(std::mem::replace(at, *at + n))).collect();
        let mut total = 0.0;
        for &(member, count) in &self.order {
            // One by one: a sum of sums would depend on how chunks are cut among ranks.
            all[next[member]..next[member] + count].iter().for_each(|chunk| total += chunk);
            next[member] += count;
        }
        match groups.get(Group::ModelParts) {
            Some(comm) => Ok(sum_over_ranks(comm, &[total])?[0].sqrt()),
            None => Ok(total.sqrt()),
        }
    }

    fn gather(&self, local: Vec<f64>, groups: &Groups) -> Result<Vec<f64>> {
        let Some(comm) = groups.get(Group::States) else { return Ok(local) };
        let device = comm.device();
        let out = Tensor::zeros([self.counts.iter().sum::<usize>() as i64], (Kind::Double, device));
        comm.all_gather_into(&out, &Tensor::from_slice(&local).to_device(device), &self.counts)?;
        Ok(Vec::<f64>::try_from(out.to_device(Device::Cpu)).expect("a one-dimensional f64 tensor"))
    }
}
