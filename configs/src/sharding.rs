//! Which box of every tensor each rank holds: the one description of a layout that the model, the optimizer, the
//! checkpoints, the planner and the prover read.
//!
//! A parameter is first cut by pipeline stage (whole units) and tensor parallelism (heads, features, ids), then along
//! dim 0, in whole chunks of rows, over the nested ZeRO scopes. A chunk is never split and its size depends on the shape
//! alone, so sums over chunks in global order do not depend on the scope. Chunks are dealt out in turn: a parameter begins
//! where the one before it ended, so that no rank collects what is left over of each.
//!
//! Under Muon, which needs whole matrices, the hidden ones are not cut over ZeRO scopes: each has one owner, chosen by
//! `owners`. A tensor rank's part of a matrix is owned by the rank with the same coordinates otherwise.

use crate::model::{EMBEDDING, TensorCut};
use crate::{MixerSpec, ModelSpec};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use tangelo_core::{
    Axis, DType, Group, IndexBox, Level, ParamMeta, Placement, Split, SubAxis, Topology, Unit, ZeroScopes,
};

/// Elements a chunk aims at: small enough that eight ranks share a small model evenly, large enough that the square
/// sums of an 8B model are 4 MB.
const CHUNK_ELEMENTS: usize = 16_384;

/// Rows per chunk of a parameter with rows of `row_len` elements.
pub fn chunk_rows(row_len: usize) -> usize {
    (CHUNK_ELEMENTS / row_len.max(1)).max(1)
}

/// How a model lies over the ranks of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Sharding {
    topology: Topology,
    stage_layers: Vec<Range<usize>>,
    tied: bool,
    head_dim: usize,
    /// Which coordinate of each nested cut gets the first part of a parameter, by name.
    first: BTreeMap<String, [usize; 3]>,
    /// Matrices that no ZeRO scope cuts: the first of each cut owns them.
    whole: BTreeSet<String>,
}

impl Sharding {
    /// A model of `spec` whose stage i holds the layers `stage_layers[i]`.
    pub fn new(spec: &ModelSpec, topology: Topology, stage_layers: Vec<Range<usize>>) -> Sharding {
        assert_eq!(topology.num_stages(), stage_layers.len(), "layers for every stage");
        let head_dim = spec.blocks.first().map_or(1, |block| {
            let MixerSpec::Attention(a) = &block.mixer;
            a.head_dim
        });
        let (tied, first, whole) = (spec.tie_word_embeddings, BTreeMap::new(), BTreeSet::new());
        let mut sharding = Sharding { topology, stage_layers, tied, head_dim, first, whole };
        sharding.first = turns(&sharding, spec);
        sharding
    }

    /// The same with hidden matrices owned whole, as Muon needs them.
    pub fn with_whole_matrices(mut self, spec: &ModelSpec) -> Sharding {
        let owners = owners(&self, spec);
        self.whole = owners.keys().cloned().collect();
        self.first = turns(&self, spec);
        self.first.extend(owners);
        self
    }

    /// Whether ZeRO scopes leave a parameter whole: then its owner updates it with Muon.
    pub fn is_whole(&self, name: &str) -> bool {
        self.whole.contains(name)
    }

    /// The whole model on one rank.
    pub fn single(spec: &ModelSpec) -> Sharding {
        let layers = 0..spec.blocks.len();
        Sharding::new(spec, Topology::single(), std::iter::once(layers).collect())
    }

    /// The ranks and their groups.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The layers of a stage.
    pub fn layers(&self, stage: usize) -> Range<usize> {
        self.stage_layers[stage].clone()
    }

    /// Whether a stage holds the embedding.
    pub fn is_first(&self, stage: usize) -> bool {
        stage == 0
    }

    /// Whether a stage holds the head.
    pub fn is_last(&self, stage: usize) -> bool {
        stage + 1 == self.stage_layers.len()
    }

    /// Whether the last stage holds a copy of the embedding.
    pub fn copies_embedding(&self) -> bool {
        self.tied && self.stage_layers.len() > 1
    }

    /// The units of a stage, in execution order.
    pub fn units(&self, stage: usize) -> Vec<Unit> {
        let embedding = self.is_first(stage).then_some(Unit::Embedding);
        let head = self.is_last(stage).then_some(Unit::Head);
        embedding.into_iter().chain(self.layers(stage).map(Unit::Block)).chain(head).collect()
    }

    /// The parameters of a unit in execution order; a tied head on a stage of its own has a copy of the embedding.
    pub fn parameters(&self, spec: &ModelSpec, unit: Unit, dtype: DType) -> Vec<ParamMeta> {
        let mut metas = spec.unit_parameters(unit, dtype);
        if unit == Unit::Head && self.copies_embedding() {
            metas.extend(spec.embedding_parameters(dtype));
        }
        metas
    }

    /// The stages that hold a parameter.
    fn stages_of(&self, name: &str) -> Vec<usize> {
        let last = self.stage_layers.len() - 1;
        if name == EMBEDDING {
            return if self.copies_embedding() { vec![0, last] } else { vec![0] };
        }
        match layer_of(name) {
            Some(layer) => (0..=last).filter(|&stage| self.stage_layers[stage].contains(&layer)).collect(),
            None => vec![last],
        }
    }

    /// How a parameter lies over stages and tensor ranks, whole over all others. `partial` names the axes over which
    /// gradients of what a rank holds must still be summed.
    pub fn model_placement(&self, meta: &ParamMeta) -> Placement {
        let t = &self.topology;
        let tensor = t.span(Group::Tensor).to_vec();
        let cut = |dim, over: Vec<SubAxis>, block| {
            let split = Split { dim, over, block, first: 0 };
            if split.over.is_empty() { Vec::new() } else { vec![split] }
        };
        let (splits, partial) = match ModelSpec::tensor_cut(&meta.name) {
            TensorCut::Whole => (Vec::new(), tensor),
            TensorCut::Heads { dim } => (cut(dim, tensor, self.head_dim), Vec::new()),
            TensorCut::KeyHeads => (cut(0, self.key_parts(), self.head_dim), t.span(Group::KeyReplicas).to_vec()),
            TensorCut::Features { dim } => (cut(dim, tensor, 1), Vec::new()),
            TensorCut::Vocabulary => (cut(0, tensor, 1), Vec::new()),
        };
        let only_at = (t.num_stages() > 1).then(|| (Axis::Pp, self.stages_of(&meta.name)));
        Placement { splits, partial, only_at }
    }

    /// The part of tp whose coordinates hold different key and value heads.
    fn key_parts(&self) -> Vec<SubAxis> {
        let (mesh, replicas) = (&self.topology.mesh, self.topology.key_replicas);
        let parts = mesh.degree(Axis::Tp) / replicas;
        if parts == 1 { Vec::new() } else { vec![SubAxis { axis: Axis::Tp, stride: replicas, degree: parts }] }
    }

    /// How a parameter's weights, gradients or optimizer states lie over the ranks.
    pub fn placement(&self, meta: &ParamMeta, level: Level) -> Placement {
        let mut placement = self.model_placement(meta);
        let row_len: usize = local_row_len(&placement, meta, &self.topology);
        // A block of all rows goes to the first coordinate whole.
        let block = if self.is_whole(&meta.name) { meta.shape[0] } else { chunk_rows(row_len) };
        let first = self.first.get(&meta.name).copied().unwrap_or_default();
        placement.splits.extend(self.topology.zero_splits(level, block, first));
        placement
    }

    /// Chunks of what a tensor rank holds of a parameter, on the rank that holds most.
    fn num_chunks(&self, meta: &ParamMeta) -> usize {
        let placement = self.model_placement(meta);
        let row_cuts = placement.splits.iter().filter(|s| s.dim == 0).flat_map(|s| &s.over);
        let rows = meta.shape[0].div_ceil(row_cuts.map(|s| s.degree).product());
        rows.div_ceil(chunk_rows(local_row_len(&placement, meta, &self.topology)))
    }

    /// The box of a parameter that `rank` computes with: its stage's and tensor rank's.
    pub fn model_box(&self, meta: &ParamMeta, rank: usize) -> IndexBox {
        self.model_placement(meta).box_of(&meta.shape, &self.topology.mesh, rank)
    }

    /// The box that `rank` holds at `level`.
    pub fn box_at(&self, meta: &ParamMeta, level: Level, rank: usize) -> IndexBox {
        self.placement(meta, level).box_of(&meta.shape, &self.topology.mesh, rank)
    }

    /// The group over which the gradient of a parameter must be summed because several ranks hold the same weights and
    /// use them for different tokens or heads; `None` where nobody else does.
    pub fn replicated_over(&self, name: &str) -> Option<Group> {
        let group = match ModelSpec::tensor_cut(name) {
            TensorCut::Whole => Group::Tensor,
            TensorCut::KeyHeads => Group::KeyReplicas,
            _ => return None,
        };
        (self.topology.size(group) > 1).then_some(group)
    }

    /// Whether `rank` is the one that counts a parameter it shares with other stages or tensor ranks.
    pub fn counts(&self, name: &str, rank: usize) -> bool {
        let first = self.replicated_over(name).is_none_or(|group| self.topology.index(group, rank) == 0);
        let copy = name == EMBEDDING && self.copies_embedding() && self.topology.stage(rank) != 0;
        first && !copy
    }
}

/// Where each parameter's chunks begin: through the units of a stage in execution order, each where the one before it
/// ended, as if the owners of one cut after the other were dealt to in turn.
fn turns(sharding: &Sharding, spec: &ModelSpec) -> BTreeMap<String, [usize; 3]> {
    let ZeroScopes { parameters, gradients, states } = sharding.topology.scopes;
    let degrees = [parameters, gradients / parameters, states / gradients];
    let mut first = BTreeMap::new();
    if states == 1 {
        return first;
    }
    for stage in 0..sharding.stage_layers.len() {
        let mut next = [0; 3];
        let metas = sharding.units(stage).into_iter().flat_map(|unit| sharding.parameters(spec, unit, DType::F32));
        for meta in metas.filter(|meta| !sharding.is_whole(&meta.name)) {
            let mut chunks = sharding.num_chunks(&meta);
            // The last stage's copy of an embedding lies as the embedding does.
            first.entry(meta.name).or_insert(next);
            // A number of mixed radix: what a cut has gone round is carried to the cut inside it.
            for (next, degree) in next.iter_mut().zip(degrees) {
                chunks += *next;
                *next = chunks % degree;
                chunks /= degree;
            }
        }
    }
    first
}

/// Who owns each hidden matrix: a function of shapes, stages and scopes alone. Through the layers of a stage, the matrices
/// of each from the largest to the smallest, each goes where least is owned so far: first among the parts that weights
/// are cut into, then among those of gradients within it, then of states; the first of equals.
fn owners(sharding: &Sharding, spec: &ModelSpec) -> BTreeMap<String, [usize; 3]> {
    let ZeroScopes { parameters, gradients, states } = sharding.topology.scopes;
    let mut owners = BTreeMap::new();
    for layers in &sharding.stage_layers {
        // Elements owned so far by part of each level; a part is numbered as ranks are: coordinates of inner cuts first.
        let mut owned = [vec![0usize; parameters], vec![0; gradients], vec![0; states]];
        for layer in layers.clone() {
            let mut metas = spec.block_parameters(layer, DType::F32);
            metas.retain(|meta| ModelSpec::is_hidden_matrix(&meta.name));
            metas.sort_by_key(|meta| std::cmp::Reverse(meta.num_elements()));
            for meta in metas {
                let load = |part: usize| (owned[0][part % parameters], owned[1][part % gradients], owned[2][part]);
                let part = (0..states).min_by_key(|&part| load(part)).unwrap_or(0);
                for (level, of) in owned.iter_mut().zip([parameters, gradients, states]) {
                    level[part % of] += meta.num_elements();
                }
                owners.insert(meta.name, [part % parameters, part % gradients / parameters, part / gradients]);
            }
        }
    }
    owners
}

/// Elements per row of what a rank computes with: rows are cut the same on all ranks, so any that holds some will do.
fn local_row_len(placement: &Placement, meta: &ParamMeta, topology: &Topology) -> usize {
    let whole: usize = meta.shape[1..].iter().product();
    let column_cut = placement.splits.iter().find(|s| s.dim > 0);
    column_cut.map_or(whole, |s| {
        let parts: usize = s.over.iter().map(|o| o.degree).product();
        debug_assert!(parts == topology.size(Group::Tensor));
        whole / parts
    })
}

/// The layer in a parameter's name.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flavor::flavor;
    use tangelo_core::DeviceMesh;

    fn sharding(spec: &ModelSpec, degrees: [usize; 5], key_replicas: usize, scopes: [usize; 3]) -> Sharding {
        let named: Vec<_> = Axis::ALL.into_iter().zip(degrees).collect();
        let [parameters, gradients, states] = scopes;
        let scopes = ZeroScopes { parameters, gradients, states };
        let topology = Topology::new(DeviceMesh::new(&named).unwrap(), 1, key_replicas, scopes).unwrap();
        let (stages, layers) = (degrees[0], spec.blocks.len());
        let cuts = (0..stages).map(|s| s * layers / stages..(s + 1) * layers / stages).collect();
        Sharding::new(spec, topology, cuts)
    }

    #[test]
    fn every_level_of_every_parameter_covers_it_once() {
        let spec = crate::architecture::flavor_spec(&flavor("debugmodel").unwrap().model, 331).unwrap();
        for (degrees, replicas, scopes) in [
            ([1, 1, 1, 1, 1], 1, [1, 1, 1]),
            ([2, 1, 2, 1, 2], 1, [1, 2, 2]),
            ([3, 2, 2, 2, 1], 1, [2, 4, 4]),
            ([1, 1, 1, 2, 4], 1, [1, 1, 2]),
        ] {
            let cut = sharding(&spec, degrees, replicas, scopes);
            let whole = cut.clone().with_whole_matrices(&spec);
            let world = cut.topology().mesh.world_size();
            for meta in spec.parameters(DType::F32) {
                for (level, sharding) in LEVELS.into_iter().flat_map(|level| [(level, &cut), (level, &whole)]) {
                    let held: usize = distinct(sharding, &meta, level, 0..world).iter().map(IndexBox::volume).sum();
                    assert_eq!(held, meta.num_elements(), "{} {level:?} {degrees:?}", meta.name);
                }
            }
        }
    }

    const LEVELS: [Level; 3] = [Level::Parameters, Level::Gradients, Level::States];

    /// The different boxes that `ranks` hold.
    fn distinct(sharding: &Sharding, meta: &ParamMeta, level: Level, ranks: Range<usize>) -> Vec<IndexBox> {
        let boxes = ranks.map(|rank| sharding.box_at(meta, level, rank));
        let mut boxes: Vec<IndexBox> = boxes.filter(|b| !b.is_empty()).collect();
        boxes.sort();
        boxes.dedup();
        boxes
    }

    #[test]
    fn ranks_of_a_scope_hold_alike() {
        let spec = crate::architecture::flavor_spec(&flavor("smollm2-135m").unwrap().model, 49152).unwrap();
        for (dp, scopes) in [(7, [1, 1, 7]), (16, [16, 16, 16]), (64, [8, 64, 64]), (512, [8, 64, 512])] {
            let sharding = sharding(&spec, [1, 1, dp, 1, 1], 1, scopes);
            let metas = spec.parameters(DType::F32);
            let held = |rank| metas.iter().map(|m| sharding.box_at(m, Level::States, rank).volume()).sum::<usize>();
            let (least, most) = ((0..dp).map(held).min().unwrap(), (0..dp).map(held).max().unwrap());
            let even = metas.iter().map(ParamMeta::num_elements).sum::<usize>() / dp;
            // Chunks are of unlike sizes, and nested cuts meet each other's leftovers: half as much again at worst.
            assert!(2 * most <= 3 * even && 2 * least >= even, "{dp} {scopes:?}: {least} to {most}, even {even}");
        }
    }

    #[test]
    fn a_hidden_matrix_has_one_owner_and_owners_have_about_as_much() {
        let spec = crate::architecture::flavor_spec(&flavor("smollm2-135m").unwrap().model, 49152).unwrap();
        for (dp, scopes) in [(2, [1, 1, 2]), (4, [1, 2, 4]), (8, [8, 8, 8]), (8, [2, 4, 8]), (16, [1, 16, 16])] {
            let sharding = sharding(&spec, [1, 1, dp, 1, 1], 1, scopes).with_whole_matrices(&spec);
            let metas = spec.parameters(DType::F32).into_iter().filter(|m| ModelSpec::is_hidden_matrix(&m.name));
            let metas: Vec<ParamMeta> = metas.collect();
            assert_eq!(metas.len(), 7 * spec.blocks.len());
            for level in LEVELS {
                let whole = |meta| distinct(&sharding, meta, level, 0..dp) == [IndexBox::full(&meta.shape)];
                assert!(metas.iter().all(whole), "{scopes:?} {level:?}");
                let owned = |rank| metas.iter().map(|m| sharding.box_at(m, level, rank).volume()).sum::<usize>();
                let (least, most) = ((0..dp).map(owned).min().unwrap(), (0..dp).map(owned).max().unwrap());
                let largest = metas.iter().map(ParamMeta::num_elements).max().unwrap();
                assert!(most - least <= largest, "{scopes:?} {level:?}: {least} to {most}");
            }
        }
    }
}
