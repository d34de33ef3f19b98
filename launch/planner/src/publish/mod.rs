//! Weights on their way from the trainer's layout to the generator's.
//!
//! Every rank of a pool of generation ranks holds the whole depth of the model and one of `tp` parts of its width. Which
//! part is chosen so that what the rank trains lies inside what it generates with, where the layouts allow it: then a
//! rank keeps what it has and receives the rest, |generation shard| - |its intersection with the training shard|
//! (HybridFlow, arXiv 2409.19256, section 5). Parameters are cut into slabs of rows and slabs gathered into buckets; each
//! bucket is one all-to-all.
//!
//! Pure: every rank makes the same [`Publish`] by itself.

mod cost;
mod layout;

pub use cost::{PaperBytes, paper_bytes};
pub use layout::{GenerationLayout, GenerationLayoutError};

use std::ops::Range;
use tangelo_configs::{ModelSpec, Sharding};
use tangelo_core::reshard::{Ranks, ReshardError};
use tangelo_core::{IndexBox, Level, ParamMeta, ReshardPlan};

/// Rows of a parameter on their way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slab {
    /// Index among the model's parameters.
    pub param: usize,
    /// Who gives which part of these rows to whom. Sources are ranks of the trainer, destinations of the generator.
    pub copies: ReshardPlan,
}

/// What travels in one all-to-all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// In order of parameters and rows.
    pub slabs: Vec<Slab>,
}

/// The whole way.
#[derive(Clone, Debug, PartialEq)]
pub struct Publish {
    /// The model's parameters, whole.
    pub parameters: Vec<ParamMeta>,
    /// In order.
    pub buckets: Vec<Bucket>,
    /// Whether trainer and generator are the same processes.
    pub ranks: Ranks,
}

impl Publish {
    /// From weights as `training` keeps them to `generation`. A bucket is as large as it can be without any rank sending and
    /// receiving more than `bucket_elements` (but at least one row).
    pub fn new(
        spec: &ModelSpec,
        training: &Sharding,
        generation: &GenerationLayout,
        ranks: Ranks,
        bucket_elements: usize,
    ) -> Result<Publish, ReshardError> {
        let parameters = spec.parameters(tangelo_core::DType::F32);
        let shards = generation.sharding(spec);
        let world = training.topology().mesh.world_size();
        let size = world.max(generation.num_ranks());
        let mut packer =
            Packer { open: Bucket::default(), load: vec![0; 2 * size], size, ranks, bucket_elements, done: vec![] };
        let mut sent = vec![0; world];
        for (param, meta) in parameters.iter().enumerate() {
            let from: Vec<IndexBox> = (0..world).map(|rank| training.box_at(meta, Level::Parameters, rank)).collect();
            let parts: Vec<IndexBox> = (0..generation.tp()).map(|part| shards.model_box(meta, part)).collect();
            let to: Vec<IndexBox> =
                (0..generation.num_ranks()).map(|rank| parts[generation.part(rank)].clone()).collect();
            let mut first = 0;
            while first < meta.shape[0] {
                let mut rows = meta.shape[0] - first;
                let (copies, next) = loop {
                    let (from, to) = (cut(&from, first..first + rows), cut(&to, first..first + rows));
                    let mut next = sent.clone();
                    let copies = ReshardPlan::plan_onto(&from, &to, ranks, &mut next)?;
                    if rows == 1 || fullest(&load_of(&copies, ranks, size), size) <= bucket_elements {
                        break (copies, next);
                    }
                    rows = rows.div_ceil(2);
                };
                packer.add(Slab { param, copies });
                (sent, first) = (next, first + rows);
            }
        }
        Ok(Publish { parameters, buckets: packer.finish(), ranks })
    }

    /// Elements that generation rank `rank` receives from others.
    pub fn received(&self, rank: usize) -> usize {
        self.sum(|src, dst| dst == rank && !is_local(self.ranks, src, dst))
    }

    /// Elements that training rank `rank` sends to others.
    pub fn sent(&self, rank: usize) -> usize {
        self.sum(|src, dst| src == rank && !is_local(self.ranks, src, dst))
    }

    /// Elements that generation rank `rank` needs: its shard.
    pub fn needed(&self, rank: usize) -> usize {
        self.sum(|_, dst| dst == rank)
    }

    fn sum(&self, counts: impl Fn(usize, usize) -> bool) -> usize {
        let copies = self.buckets.iter().flat_map(|bucket| &bucket.slabs).flat_map(|slab| &slab.copies.copies);
        copies.filter(|copy| counts(copy.src, copy.dst)).map(|copy| copy.indices.volume()).sum()
    }
}

/// Whether a copy stays where it is.
pub fn is_local(ranks: Ranks, src: usize, dst: usize) -> bool {
    ranks == Ranks::Same && src == dst
}

/// Gathers slabs into buckets.
struct Packer {
    open: Bucket,
    /// Elements that each rank sends, then those that each receives, in the open bucket.
    load: Vec<usize>,
    size: usize,
    ranks: Ranks,
    bucket_elements: usize,
    done: Vec<Bucket>,
}

impl Packer {
    fn add(&mut self, slab: Slab) {
        let added = load_of(&slab.copies, self.ranks, self.size);
        let load: Vec<usize> = self.load.iter().zip(&added).map(|(a, b)| a + b).collect();
        if fullest(&load, self.size) > self.bucket_elements && !self.open.slabs.is_empty() {
            self.done.push(std::mem::take(&mut self.open));
            self.load = added;
        } else {
            self.load = load;
        }
        self.open.slabs.push(slab);
    }

    fn finish(mut self) -> Vec<Bucket> {
        if !self.open.slabs.is_empty() {
            self.done.push(self.open);
        }
        self.done
    }
}

/// Elements that each rank sends, then those that each receives.
fn load_of(copies: &ReshardPlan, ranks: Ranks, size: usize) -> Vec<usize> {
    let mut load = vec![0; 2 * size];
    for copy in copies.copies.iter().filter(|copy| !is_local(ranks, copy.src, copy.dst)) {
        load[copy.src] += copy.indices.volume();
        load[size + copy.dst] += copy.indices.volume();
    }
    load
}

/// What the fullest rank sends and receives.
fn fullest(load: &[usize], size: usize) -> usize {
    (0..size).map(|rank| load[rank] + load[size + rank]).max().unwrap_or(0)
}

/// The part of each box that lies in `rows` of dim 0.
fn cut(boxes: &[IndexBox], rows: Range<usize>) -> Vec<IndexBox> {
    let inside = |b: &IndexBox| {
        let mut b = b.clone();
        let range = &mut b.ranges[0];
        range.start = range.start.max(rows.start);
        range.end = range.end.min(rows.end).max(range.start);
        b
    };
    boxes.iter().map(inside).collect()
}
