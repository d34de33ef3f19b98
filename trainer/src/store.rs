//! Where a rank keeps weights and gradients between their uses: whole, or cut over a ZeRO scope.
//!
//! | | scope of one rank | scope of several |
//! |---|---|---|
//! | weights | the flat buffer | a shard; the flat buffer is filled by [`WeightStore::finish_gather`], emptied by `release` |
//! | gradients | the flat buffer, over all micro-batches | a shard; the flat buffer holds one micro-batch of one unit |
//!
//! Invariant: a graph that saved a weight finds the same values in backward, whether or not they were given back between.

use crate::error::Result;
use crate::groups::{Arriving, Groups};
use crate::shards::{Cut, Place};
use tangelo_configs::Sharding;
use tangelo_core::{Group, Level, Unit};
use tangelo_kernels::autograd;
use tangelo_kernels::device::lasting_zeros;
use tangelo_models::Model;
use tch::{Kind, Tensor};

/// The shards of one rank, by unit of its stage.
#[derive(Debug)]
pub struct WeightStore {
    weight_places: Vec<Place>,
    gradient_places: Vec<Place>,
    /// The parts of weights that this rank keeps, in the model's type.
    weights: Vec<Option<Tensor>>,
    /// The parts of gradients that this rank keeps.
    gradients: Vec<Option<Tensor>>,
    gathers: Vec<Cut>,
    reduces: Vec<Cut>,
}

impl WeightStore {
    /// Shards of zeros for the units of `model`; for gradients only where it `learns`.
    pub fn new(model: &Model, sharding: &Sharding, rank: usize, learns: bool) -> WeightStore {
        let units = model.units();
        let place = |level| units.iter().map(|unit| Place::of(sharding, unit, level, rank)).collect::<Vec<_>>();
        let (weight_places, gradient_places) = (place(Level::Parameters), place(Level::Gradients));
        let flat = vec![Place::Flat; units.len()];
        let cut = |level, group| {
            let one = |unit| Cut::new(model, sharding, unit..unit + 1, &flat, level, group, rank);
            (0..units.len()).map(one).collect()
        };
        let shard = |place: &Place, kind| place.shard_len().map(|len| lasting_zeros(len, kind, model.device()));
        WeightStore {
            weights: weight_places.iter().map(|p| shard(p, model.kind())).collect(),
            gradients: gradient_places
                .iter()
                .map(|p| if learns { shard(p, gradient_kind(model)) } else { None })
                .collect(),
            gathers: cut(Level::Parameters, Group::Parameters),
            reduces: cut(Level::Gradients, Group::Gradients),
            weight_places,
            gradient_places,
        }
    }

    /// Where a unit's kept weights lie.
    pub fn weight_places(&self) -> &[Place] {
        &self.weight_places
    }

    /// Where a unit's kept gradients lie.
    pub fn gradient_places(&self) -> &[Place] {
        &self.gradient_places
    }

    /// The buffer of kept weights of a unit: its shard, or the model's own.
    pub fn weights<'a>(&'a self, model: &'a Model, unit: usize) -> &'a Tensor {
        self.weights[unit].as_ref().unwrap_or_else(|| model.units()[unit].flat())
    }

    /// The buffer of kept gradients of a unit: its shard, or the model's own.
    pub fn gradients<'a>(&'a self, model: &'a Model, unit: usize) -> &'a Tensor {
        let own = || model.units()[unit].main_grad().expect("a trained model has gradients");
        self.gradients[unit].as_ref().unwrap_or_else(own)
    }

    /// Asks the ranks that keep a unit's weights for them.
    pub fn start_gather(&self, model: &Model, unit: Unit, groups: &Groups) -> Arriving {
        let index = model.unit_index(unit);
        let own = self.weights[index].as_ref().expect("weights that are gathered are cut");
        let comm = groups.beside(Group::Parameters).expect("weights are cut over a group");
        let cut = &self.gathers[index];
        let all = Tensor::empty([cut.len() as i64], (own.kind(), own.device()));
        let pending = comm.start_all_gather_into(all.shallow_clone(), own.shallow_clone(), cut.counts().to_vec());
        Arriving { tensor: all, pending }
    }

    /// Fills a unit's flat weights with what arrives.
    pub fn finish_gather(&self, model: &Model, unit: Unit, arriving: Arriving) -> Result<()> {
        let index = model.unit_index(unit);
        let all = arriving.wait()?;
        let weights = &model.units()[index];
        tch::no_grad(|| {
            autograd::preserving_version(weights.flat(), || {
                weights.hold_weights(true);
                self.gathers[index].unpack(&all, |_| weights.flat());
            });
        });
        Ok(())
    }

    /// Gives a unit's flat weights back.
    pub fn release(&self, model: &Model, unit: Unit) {
        let index = model.unit_index(unit);
        if self.weights[index].is_some() {
            let weights = &model.units()[index];
            autograd::preserving_version(weights.flat(), || weights.hold_weights(false));
        }
    }

    /// Room for a unit's gradients of one micro-batch.
    pub fn open_gradient(&self, model: &Model, unit: Unit) {
        let index = model.unit_index(unit);
        if self.gradients[index].is_some() {
            model.units()[index].hold_gradients(true);
        }
    }

    /// Sends a unit's gradients of one micro-batch to the ranks that keep their sum, and gives their room back.
    pub fn start_reduce(&self, model: &Model, unit: Unit, groups: &Groups) -> Arriving {
        let index = model.unit_index(unit);
        let comm = groups.beside(Group::Gradients).expect("gradients are cut over a group");
        let cut = &self.reduces[index];
        let unit = &model.units()[index];
        let grad = unit.main_grad().expect("a trained model has gradients");
        let packed = tch::no_grad(|| cut.pack(|_| grad, grad.kind(), grad.device()));
        unit.hold_gradients(false);
        let sum = Tensor::empty([cut.own_len() as i64], (packed.kind(), packed.device()));
        let pending = comm.start_reduce_scatter(sum.shallow_clone(), packed, cut.counts().to_vec());
        Arriving { tensor: sum, pending }
    }

    /// Adds the sum that arrives to what this rank keeps.
    pub fn finish_reduce(&self, model: &Model, unit: Unit, arriving: Arriving) -> Result<()> {
        let sum = arriving.wait()?;
        let kept = self.gradients[model.unit_index(unit)].as_ref().expect("gradients that are reduced are cut");
        tch::no_grad(|| _ = kept.shallow_clone().g_add_(&sum));
        Ok(())
    }

    /// Makes this rank's shard of a unit's weights from the flat buffer, which must be filled.
    pub fn adopt(&self, model: &Model, unit: usize) {
        if let Some(shard) = &self.weights[unit] {
            let own = self.gathers[unit].pack_own(|_| model.units()[unit].flat(), shard.kind(), shard.device());
            tch::no_grad(|| shard.shallow_clone().copy_(&own));
        }
    }

    /// Runs `fill` with a unit's flat weights there, then keeps this rank's part.
    pub fn fill<R>(&self, model: &Model, unit: usize, fill: impl FnOnce() -> R) -> R {
        let weights = &model.units()[unit];
        if self.weights[unit].is_none() {
            return fill();
        }
        weights.hold_weights(true);
        let result = fill();
        self.adopt(model, unit);
        weights.hold_weights(false);
        result
    }

    /// Sets every kept gradient to zero.
    pub fn zero_gradients(&self, model: &Model) {
        for unit in 0..model.units().len() {
            let _ = self.gradients(model, unit).shallow_clone().zero_();
        }
    }
}

/// Type of gradients: wider than weights where those are bf16, as wide as them in float64 checks.
pub fn gradient_kind(model: &Model) -> Kind {
    if model.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}
