//! Gradients on their way from the ranks that keep them to those that own their states, and new weights on their way back:
//! neighbouring units together, in buckets.
//!
//! ```text
//!   kept gradients --reduce-scatter--> owned --all-reduce over replicas--> owned sums --update--> all-gather: kept weights
//!                  (states cut further)      (states not cut over all)                            (states cut further)
//! ```

use crate::error::Result;
use crate::groups::{Arriving, Groups};
use crate::shards::Cut;
use crate::store::{WeightStore, gradient_kind};
use std::ops::Range;
use tangelo_configs::Sharding;
use tangelo_core::{Group, Level};
use tangelo_models::Model;
use tch::Tensor;

/// How the buckets of one rank are cut.
#[derive(Debug, Default)]
pub struct Buckets {
    /// By bucket: gradients, from the ranks that share them to those that own their states.
    reduces: Vec<Cut>,
    /// By bucket: weights, from the ranks that own their states to those that keep them.
    publishes: Vec<Cut>,
}

impl Buckets {
    /// Buckets of the units `buckets`, for `rank`.
    pub fn new(
        model: &Model,
        sharding: &Sharding,
        store: &WeightStore,
        buckets: &[Range<usize>],
        rank: usize,
    ) -> Buckets {
        let cut = |places: &[_], group| {
            let one =
                |bucket: &Range<usize>| Cut::new(model, sharding, bucket.clone(), places, Level::States, group, rank);
            buckets.iter().map(one).collect()
        };
        Buckets {
            reduces: cut(store.gradient_places(), Group::StatesOverGradients),
            publishes: cut(store.weight_places(), Group::StatesOverParameters),
        }
    }

    /// Number of buckets.
    pub fn len(&self) -> usize {
        self.publishes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.publishes.is_empty()
    }

    /// Sends a bucket's kept gradients to the owners of their states; where those are the ranks that keep them, asks for
    /// the sum over the scope's replicas.
    pub fn start_reduce(&self, bucket: usize, model: &Model, store: &WeightStore, groups: &Groups) -> Arriving {
        let cut = &self.reduces[bucket];
        let (kind, device) = (gradient_kind(model), model.device());
        let buffer = |unit| store.gradients(model, unit);
        let Some(comm) = groups.beside(Group::StatesOverGradients) else {
            return sum(cut.pack_own(buffer, kind, device), groups);
        };
        let all = cut.pack(buffer, kind, device);
        let tensor = Tensor::empty([cut.own_len() as i64], (kind, device));
        let pending = comm.start_reduce_scatter(tensor.shallow_clone(), all, cut.counts().to_vec());
        Arriving { tensor, pending }
    }

    /// Waits for what was sent and asks for its sum over the scope's replicas.
    pub fn sum(&self, arriving: Arriving, groups: &Groups) -> Result<Arriving> {
        Ok(sum(arriving.wait()?, groups))
    }

    /// Waits for the sums; afterwards the owned ranges of the kept gradients hold them.
    pub fn finish_reduce(&self, bucket: usize, arriving: Arriving, model: &Model, store: &WeightStore) -> Result<()> {
        let sums = arriving.wait()?;
        tch::no_grad(|| self.reduces[bucket].unpack_own(&sums, |unit| store.gradients(model, unit)));
        Ok(())
    }

    /// Gives a bucket's updated weights to the ranks that keep them.
    pub fn publish(&self, bucket: usize, model: &Model, store: &WeightStore, groups: &Groups) -> Result<()> {
        let Some(comm) = groups.get(Group::StatesOverParameters) else { return Ok(()) };
        let cut = &self.publishes[bucket];
        let (kind, device) = (model.kind(), model.device());
        let own = cut.pack_own(|unit| store.weights(model, unit), kind, device);
        let all = Tensor::empty([cut.len() as i64], (kind, device));
        comm.all_gather_into(&all, &own, cut.counts())?;
        cut.unpack(&all, |unit| store.weights(model, unit));
        Ok(())
    }
}

fn sum(tensor: Tensor, groups: &Groups) -> Arriving {
    let comm = groups.beside(Group::Replicas).expect("a bucket is reduced over some group");
    let pending = comm.start_all_reduce(tensor.shallow_clone());
    Arriving { tensor, pending }
}
