//! Gives the weights that ranks train to the ranks that generate.
//!
//! ```text
//!   kept weights (a stage's, a tensor rank's, a ZeRO shard's)      generation model (all layers, one of tp parts)
//!        |  cast to the generator's type, packed by destination         ^
//!        |                                                               |  unpacked
//!        +------------------ one all-to-all per bucket -----------------+     what a rank has itself is copied
//! ```
//!
//! Where a rank generates with exactly what it trains, in the same type, the generation model is made over the trainer's
//! memory: nothing is copied and nothing is held twice. Who gives what to whom is
//! [`tangelo_planner::publish::Publish`], the same on every rank.

use crate::error::Result;
use crate::init::part_of;
use crate::shards::{Place, narrow};
use crate::worker::TrainWorker;
use std::ops::Range;
use tangelo_core::{BoxCopy, IndexBox, Level, ParamMeta};
use tangelo_kernels::comm::Communicator;
use tangelo_models::{Model, UnitWeights};
use tangelo_planner::publish::{Bucket, GenerationLayout, Publish, is_local};
use tch::{Kind, Tensor};

/// Which ranks of a communicator train, and which generate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// By training rank.
    pub training: Vec<usize>,
    /// By generation rank.
    pub generation: Vec<usize>,
}

impl Members {
    /// Every rank does both.
    pub fn same(num_ranks: usize) -> Members {
        Members { training: (0..num_ranks).collect(), generation: (0..num_ranks).collect() }
    }

    /// The first ranks train, the others generate.
    pub fn separate(training: usize, generation: usize) -> Members {
        Members { training: (0..training).collect(), generation: (training..training + generation).collect() }
    }
}

/// What one transition moved on this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Bytes from other ranks.
    pub received_bytes: u64,
    /// Bytes to other ranks.
    pub sent_bytes: u64,
    /// Bytes that were used where they lie.
    pub shared_bytes: u64,
}

/// A model to generate with, as the part that `layout` gives to generation rank `rank`, of type `kind`. Units that the
/// `worker` of the same process trains exactly so lie in its memory; the others are zeros until weights are published.
pub fn generation_model(
    worker: Option<&TrainWorker>,
    spec: &tangelo_configs::ModelSpec,
    layout: &GenerationLayout,
    rank: usize,
    kind: Kind,
    device: tch::Device,
) -> Model {
    let unit = |name, parts: Vec<(ParamMeta, IndexBox)>| match worker.and_then(|w| lent(w, name, &parts, kind)) {
        Some(flat) => UnitWeights::over(parts, flat),
        None => UnitWeights::zeros(parts, kind, device, false),
    };
    Model::assemble(spec, &layout.sharding(spec), layout.part(rank), kind, device, (unit, |_: &UnitWeights| {}))
}

/// The buffer of a unit whose parts are `parts` and nothing else, where the worker always holds it.
fn lent(worker: &TrainWorker, name: tangelo_core::Unit, parts: &[(ParamMeta, IndexBox)], kind: Kind) -> Option<Tensor> {
    let model = worker.model();
    let index = model.unit_names().iter().position(|&unit| unit == name)?;
    let unit = &model.units()[index];
    let same = unit.spans().iter().map(|s| (&s.meta.name, &s.held)).eq(parts.iter().map(|(m, held)| (&m.name, held)));
    let kept = matches!(worker.store().weight_places()[index], Place::Flat);
    (same && kept && model.kind() == kind).then(|| unit.flat().shallow_clone())
}

/// One rank's end of the way from training to generation.
pub struct Publisher {
    way: Publish,
    members: Members,
    kind: Kind,
}

impl Publisher {
    /// Along `way`, between `members` of the communicator that [`Publisher::run`] is given; values travel as `kind`.
    pub fn new(way: Publish, members: Members, kind: Kind) -> Publisher {
        Publisher { way, members, kind }
    }

    /// The way.
    pub fn way(&self) -> &Publish {
        &self.way
    }

    /// Fills `target`, where this rank generates, with the weights of all workers. Every rank of `comm` must call it.
    pub fn run(&self, comm: &Communicator, source: Option<&TrainWorker>, target: Option<&Model>) -> Result<Published> {
        let mut moved = Published {
            shared_bytes: source.zip(target).map_or(0, |(s, t)| shared_bytes(s, t)),
            ..Published::default()
        };
        tch::no_grad(|| {
            self.way.buckets.iter().try_for_each(|bucket| self.bucket(comm, bucket, source, target, &mut moved))
        })?;
        Ok(moved)
    }

    fn bucket(
        &self,
        comm: &Communicator,
        bucket: &Bucket,
        source: Option<&TrainWorker>,
        target: Option<&Model>,
        moved: &mut Published,
    ) -> Result<()> {
        let (train, generate) = (at(&self.members.training, comm.rank()), at(&self.members.generation, comm.rank()));
        let mut send_counts = vec![0; comm.size()];
        let mut receive_counts = vec![0; comm.size()];
        for (_, copy) in copies(bucket) {
            if self.is_local(copy) {
                continue;
            }
            if Some(copy.src) == train {
                send_counts[self.members.generation[copy.dst]] += copy.indices.volume();
            }
            if Some(copy.dst) == generate {
                receive_counts[self.members.training[copy.src]] += copy.indices.volume();
            }
        }
        if let (Some(source), Some(target)) = (source, target) {
            self.keep(bucket, generate, source, target);
        }
        let send = self.pack(bucket, train, source, comm, &send_counts);
        let received = Tensor::empty([total(&receive_counts)], (self.kind, comm.device()));
        if comm.size() > 1 {
            comm.all_to_all_single(&received, &send, &receive_counts, &send_counts)?;
        }
        drop(send);
        self.unpack(bucket, generate, target, &received, &receive_counts);
        let width = self.kind.elt_size_in_bytes() as u64;
        moved.sent_bytes += total(&send_counts) as u64 * width;
        moved.received_bytes += received.numel() as u64 * width;
        Ok(())
    }

    fn is_local(&self, copy: &BoxCopy) -> bool {
        is_local(self.way.ranks, copy.src, copy.dst)
    }

    /// Copies what this rank has itself.
    fn keep(&self, bucket: &Bucket, rank: Option<usize>, source: &TrainWorker, target: &Model) {
        for (param, copy) in copies(bucket).filter(|(_, copy)| self.is_local(copy) && Some(copy.src) == rank) {
            let meta = &self.way.parameters[param];
            let (from, mut to) = (kept(source, meta, &copy.indices), generated(target, meta, &copy.indices));
            if from.data_ptr() != to.data_ptr() {
                to.copy_(&from);
            }
        }
    }

    /// What others need of this rank, by destination.
    fn pack(
        &self,
        bucket: &Bucket,
        rank: Option<usize>,
        source: Option<&TrainWorker>,
        comm: &Communicator,
        counts: &[usize],
    ) -> Tensor {
        let packed = Tensor::empty([total(counts)], (self.kind, comm.device()));
        let Some(source) = source else { return packed };
        let mut at = starts(counts);
        for (param, copy) in copies(bucket).filter(|(_, copy)| Some(copy.src) == rank && !self.is_local(copy)) {
            let part = kept(source, &self.way.parameters[param], &copy.indices);
            let room = take(&packed, &mut at[self.members.generation[copy.dst]], copy.indices.volume());
            room.view_as(&part).copy_(&part);
        }
        packed
    }

    fn unpack(&self, bucket: &Bucket, rank: Option<usize>, target: Option<&Model>, packed: &Tensor, counts: &[usize]) {
        let Some(target) = target else { return };
        let mut at = starts(counts);
        for (param, copy) in copies(bucket).filter(|(_, copy)| Some(copy.dst) == rank && !self.is_local(copy)) {
            let values = take(packed, &mut at[self.members.training[copy.src]], copy.indices.volume());
            let mut part = generated(target, &self.way.parameters[param], &copy.indices);
            part.copy_(&values.view_as(&part));
        }
    }
}

fn at(ranks: &[usize], rank: usize) -> Option<usize> {
    ranks.iter().position(|&r| r == rank)
}

fn total(counts: &[usize]) -> i64 {
    counts.iter().sum::<usize>() as i64
}

/// Every copy of a bucket with the parameter it is part of.
fn copies(bucket: &Bucket) -> impl Iterator<Item = (usize, &BoxCopy)> {
    bucket.slabs.iter().flat_map(|slab| slab.copies.copies.iter().map(|copy| (slab.param, copy)))
}

fn starts(counts: &[usize]) -> Vec<usize> {
    counts.iter().scan(0, |at, &n| Some(std::mem::replace(at, *at + n))).collect()
}

fn take(packed: &Tensor, at: &mut usize, len: usize) -> Tensor {
    let taken = narrow(packed, &(*at..*at + len));
    *at += len;
    taken
}

/// Part of a parameter among the weights that a worker keeps.
fn kept(worker: &TrainWorker, meta: &ParamMeta, indices: &IndexBox) -> Tensor {
    let model = worker.model();
    let unit = holder(model, &meta.name);
    let span = model.units()[unit].span(&meta.name).expect("the unit was found by it");
    let held = worker.sharding().box_at(meta, Level::Parameters, worker.rank());
    let place = worker.store().weight_places()[unit].locate(&span.flat_range(&held));
    view_of(worker.store().weights(model, unit), place, &held, indices)
}

/// Part of a parameter of a generation model.
fn generated(model: &Model, meta: &ParamMeta, indices: &IndexBox) -> Tensor {
    let unit = &model.units()[holder(model, &meta.name)];
    let span = unit.span(&meta.name).expect("the unit was found by it");
    view_of(unit.flat(), span.offset..span.offset + span.len, &span.held, indices)
}

/// The unit with a parameter.
fn holder(model: &Model, name: &str) -> usize {
    let found = model.units().iter().position(|unit| unit.span(name).is_some());
    found.unwrap_or_else(|| panic!("nobody sends {name} from a rank that does not hold it"))
}

/// A view of `indices`, in the coordinates of the full tensor, of which `held` lies in `place` of a flat buffer.
fn view_of(flat: &Tensor, place: Range<usize>, held: &IndexBox, indices: &IndexBox) -> Tensor {
    let shape: Vec<i64> = held.shape().iter().map(|&n| n as i64).collect();
    part_of(&narrow(flat, &place).view(shape.as_slice()), &indices.relative_to(held))
}

/// Bytes of the generation model that lie in the worker's memory.
fn shared_bytes(worker: &TrainWorker, model: &Model) -> u64 {
    let own: Vec<_> = worker.model().units().iter().map(|unit| unit.flat().data_ptr()).collect();
    let shared = model.units().iter().filter(|unit| own.contains(&unit.flat().data_ptr()));
    shared.map(|unit| (unit.len() * model.kind().elt_size_in_bytes()) as u64).sum()
}
