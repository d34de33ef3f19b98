//! Weights, gradients and states of a stage: what a rank keeps of them, and what is there whole for a while.

use tangelo_configs::Plan;
use tangelo_core::{DType, Group, Unit};

/// Elements that the first tensor rank of a stage (which has the most) computes with.
pub(super) struct StageUnits<'a> {
    plan: &'a Plan,
    stage: usize,
    /// By unit.
    pub(super) elements: Vec<(Unit, u64)>,
}

impl StageUnits<'_> {
    pub(super) fn new(plan: &Plan, stage: usize) -> StageUnits<'_> {
        let sharding = plan.sharding();
        let rank = stage * (plan.topology.mesh.world_size() / plan.topology.num_stages());
        let elements = |unit| -> u64 {
            let metas = sharding.parameters(&plan.model, unit, DType::F32);
            metas.iter().map(|meta| sharding.model_box(meta, rank).volume() as u64).sum()
        };
        let elements = sharding.units(stage).into_iter().map(|unit| (unit, elements(unit))).collect();
        StageUnits { plan, stage, elements }
    }

    fn size(&self, group: Group) -> u64 {
        self.plan.topology.size(group) as u64
    }

    fn of(&self, is_one: impl Fn(Unit) -> bool) -> Vec<u64> {
        self.elements.iter().filter(|(unit, _)| is_one(*unit)).map(|(_, n)| *n).collect()
    }

    /// All of them.
    pub(super) fn total(&self) -> u64 {
        self.elements.iter().map(|(_, n)| n).sum()
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

    /// Whole weights and gradients of the head.
    pub(super) fn in_loss(&self, e: u64) -> u64 {
        let weights = if self.gathers() { e } else { 0 };
        let gradients = if self.size(Group::Gradients) > 1 { 4 } else { 0 };
        (weights + gradients) * self.head()
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
    pub(super) fn collectives(&self, buckets: &[u64], e: u64) -> u64 {
        let largest = buckets.iter().copied().max().unwrap_or(0);
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
