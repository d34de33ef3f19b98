//! Weights, gradients and states of a stage: what a rank keeps of them, and what is there whole for a while.

use std::ops::Range;
use tangelo_configs::Plan;
use tangelo_configs::job::OptimizerName;
use tangelo_core::{DType, Group, Level, ParamMeta, Unit};

/// Elements that the first tensor rank of a stage (which has the most) computes with.
pub(super) struct StageUnits<'a> {
    plan: &'a Plan,
    stage: usize,
    /// By unit.
    elements: Vec<(Unit, u64)>,
}

impl StageUnits<'_> {
    pub(super) fn new(plan: &Plan, stage: usize) -> StageUnits<'_> {
        let sharding = plan.sharding();
        let mut found = StageUnits { plan, stage, elements: Vec::new() };
        let rank = found.first_rank();
        let elements = |unit| -> u64 {
            let metas = sharding.parameters(&plan.model, unit, DType::F32);
            metas.iter().map(|meta| sharding.model_box(meta, rank).volume() as u64).sum()
        };
        found.elements = sharding.units(stage).into_iter().map(|unit| (unit, elements(unit))).collect();
        found
    }

    fn size(&self, group: Group) -> u64 {
        self.plan.topology.size(group) as u64
    }

    fn of(&self, is_one: impl Fn(Unit) -> bool) -> Vec<u64> {
        self.elements.iter().filter(|(unit, _)| is_one(*unit)).map(|(_, n)| *n).collect()
    }

    /// All of them.
    pub(super) fn total(&self) -> u64 {
        self.elements_of(&(0..self.elements.len()))
    }

    /// Those of some units.
    pub(super) fn elements_of(&self, units: &Range<usize>) -> u64 {
        self.elements[units.clone()].iter().map(|(_, n)| n).sum()
    }

    fn embedding(&self) -> u64 {
        self.of(|unit| unit == Unit::Embedding).into_iter().sum()
    }

    /// The head, and the embedding where it reads that one's weights.
    fn head(&self) -> u64 {
        let head: u64 = self.of(|unit| unit == Unit::Head).into_iter().sum();
        let tied = self.plan.model.tie_word_embeddings && self.plan.topology.num_stages() == 1;
        head + if tied { self.embedding() } else { 0 }
    }

    fn largest_block(&self) -> u64 {
        self.of(|unit| matches!(unit, Unit::Block(_))).into_iter().max().unwrap_or(0)
    }

    fn gathers(&self) -> bool {
        self.size(Group::Parameters) > 1 && self.plan.reshards_after_forward()
    }

    /// Weights that are gathered once and stay for the pass.
    pub(super) fn kept_whole(&self, e: u64) -> u64 {
        let never = self.size(Group::Parameters) > 1 && !self.plan.reshards_after_forward();
        if never { e * self.total() } else { 0 }
    }

    /// Whole weights of a block and of the next one on its way; gradients of one, of another as they are sent, and what
    /// arrives of them. A tied embedding's gradient stays open.
    pub(super) fn in_backward(&self, e: u64) -> u64 {
        let (block, g) = (self.largest_block(), self.size(Group::Gradients));
        let next = if self.plan.stage_layers[self.stage].len() > 1 { 2 } else { 1 };
        let weights = if self.gathers() { next * e * block } else { 0 };
        let tied = self.head() - self.of(|unit| unit == Unit::Head).into_iter().sum::<u64>();
        let gradients = if g > 1 { 4 * (2 * block + block.div_ceil(g) + tied) } else { 0 };
        weights + gradients
    }

    /// Whole weights and gradients of the head, and the weights of the last block, which backward reads next.
    pub(super) fn in_loss(&self, e: u64) -> u64 {
        let weights = if self.gathers() { e * (self.head() + self.last_block()) } else { 0 };
        let gradients = if self.size(Group::Gradients) > 1 { 4 * self.head() } else { 0 };
        weights + gradients
    }

    fn last_block(&self) -> u64 {
        self.of(|unit| matches!(unit, Unit::Block(_))).last().copied().unwrap_or(0)
    }

    /// Elements that the fullest rank holds at a level. Scopes cut evenly but for some chunks; Muon's matrices are dealt.
    pub(super) fn held(&self, level: Level) -> u64 {
        if !self.is_muon() {
            return self.total().div_ceil(self.plan.topology.scopes.degree(level) as u64);
        }
        self.fullest(level, |_| 1)
    }

    /// Bytes of the optimizer's fp32 states on the fullest rank: two moments, but one momentum of Muon's matrices.
    pub(super) fn state_bytes(&self) -> u64 {
        if !self.is_muon() {
            return 8 * self.held(Level::States);
        }
        let sharding = self.plan.sharding();
        self.fullest(Level::States, |name| if sharding.is_whole(name) { 4 } else { 8 })
    }

    fn is_muon(&self) -> bool {
        self.plan.config.optimizer.name == OptimizerName::Muon
    }

    fn first_rank(&self) -> usize {
        self.stage * (self.plan.topology.mesh.world_size() / self.plan.topology.num_stages())
    }

    fn fullest(&self, level: Level, weight: impl Fn(&str) -> u64) -> u64 {
        self.fullest_of(&(0..self.elements.len()), level, weight)
    }

    /// The same of some units.
    fn fullest_of(&self, units: &Range<usize>, level: Level, weight: impl Fn(&str) -> u64) -> u64 {
        let sharding = self.plan.sharding();
        let names = self.elements[units.clone()].iter().map(|(unit, _)| *unit);
        let metas: Vec<ParamMeta> =
            names.flat_map(|unit| sharding.parameters(&self.plan.model, unit, DType::F32)).collect();
        let ranks = self.plan.topology.members(Group::States, self.first_rank());
        let mut held = vec![0; ranks.len()];
        for meta in &metas {
            let placement = sharding.placement(meta, level);
            for (sum, &rank) in held.iter_mut().zip(&ranks) {
                let part = placement.box_of(&meta.shape, &self.plan.topology.mesh, rank);
                *sum += weight(&meta.name) * part.volume() as u64;
            }
        }
        held.into_iter().max().unwrap_or(0)
    }

    /// What Muon needs beside states: the largest matrix as moved, normalised, iterated and next, two products of it with
    /// itself, and under tensor parallelism what all ranks of the group give of the matrices owned of a bucket.
    pub(super) fn matrices(&self, buckets: &[Range<usize>]) -> u64 {
        if !self.is_muon() {
            return 0;
        }
        let sharding = self.plan.sharding();
        let metas = self.elements.iter().flat_map(|(unit, _)| sharding.parameters(&self.plan.model, *unit, DType::F32));
        let whole = metas.filter(|meta| sharding.is_whole(&meta.name));
        let needs = |meta: &ParamMeta| {
            let (rows, columns) = (meta.shape[0] as u64, meta.shape[1] as u64);
            4 * (4 * rows * columns + 2 * rows.min(columns).pow(2))
        };
        let largest = whole.map(|meta| needs(&meta)).max().unwrap_or(0);
        let tensor = self.size(Group::Tensor);
        let owned = |units| self.fullest_of(units, Level::States, |name| u64::from(sharding.is_whole(name)));
        let gathered = if tensor > 1 { buckets.iter().map(owned).max().unwrap_or(0) } else { 0 };
        largest + 4 * gathered * tensor
    }

    /// Gradients on their way to the owners of states while backward goes on, and how many blocks have left by then;
    /// nothing where there is one bucket, which leaves at the end.
    pub(super) fn leaving(&self, buckets: &[Range<usize>]) -> (u64, usize) {
        // The first bucket leaves after the last block.
        let [_, others @ ..] = buckets else { return (0, 0) };
        let Some(last) = others.last() else { return (0, 0) };
        let blocks = self.elements[last.clone()].iter().filter(|(unit, _)| matches!(unit, Unit::Block(_))).count();
        let (scatters, sums) = (self.size(Group::StatesOverGradients) > 1, self.size(Group::Replicas) > 1);
        let bytes = |units: &Range<usize>| {
            let elements = self.elements_of(units);
            let owned = match self.is_muon() {
                true => self.fullest_of(units, Level::States, |_| 1),
                false => elements.div_ceil(self.size(Group::States)),
            };
            let sent = if scatters { elements.div_ceil(self.size(Group::Gradients)) + owned } else { 0 };
            4 * (sent + if sums { owned } else { 0 })
        };
        (others.iter().map(bytes).max().unwrap_or(0), blocks)
    }

    /// The embedding as it arrives and unpacked, with the first block on its way; or its gradient, as made and as sent.
    pub(super) fn in_embedding(&self, e: u64) -> u64 {
        let (embedding, g) = (self.embedding(), self.size(Group::Gradients));
        let weights = if self.gathers() && embedding > 0 { e * (2 * embedding + self.largest_block()) } else { 0 };
        let gradients = if g > 1 { 4 * (2 * embedding + embedding.div_ceil(g)) } else { 0 };
        weights.max(gradients)
    }

    /// The largest of: a bucket of gradients as it is sent and as much for what arrives; a bucket of weights, kept and
    /// owned; the gradient of a copied embedding as it is summed.
    pub(super) fn collectives(&self, buckets: &[Range<usize>], e: u64) -> u64 {
        let largest = buckets.iter().map(|units| self.elements_of(units)).max().unwrap_or(0);
        let (p, g, z) = (self.size(Group::Parameters), self.size(Group::Gradients), self.size(Group::States));
        let reduces = self.size(Group::StatesOverGradients) > 1 || self.size(Group::Replicas) > 1;
        let reduce = if reduces { 2 * 4 * largest.div_ceil(g) } else { 0 };
        let publishes = self.size(Group::StatesOverParameters) > 1;
        let publish = if publishes { e * (largest.div_ceil(p) + largest.div_ceil(z)) } else { 0 };
        reduce.max(publish).max(2 * 4 * self.copied_embedding().div_ceil(z))
    }

    /// Elements of the embedding where both ends of a pipeline have one.
    fn copied_embedding(&self) -> u64 {
        let sharding = self.plan.sharding();
        let is_end = sharding.is_first(self.stage) || sharding.is_last(self.stage);
        let tensor = self.size(Group::Tensor);
        let model = &self.plan.model;
        let whole = (model.vocab_size as u64).div_ceil(tensor) * model.hidden_size as u64;
        if sharding.copies_embedding() && is_end { whole } else { 0 }
    }
}
