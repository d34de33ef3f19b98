//! From a plan to the [`Program`] of a pipeline stage: what its ranks compute and communicate in a step, in order.
//!
//! One builder for every layout. A degree of 1 leaves its instructions out, so that one rank runs whole blocks as single
//! graphs; nothing else depends on which degrees are combined.
//!
//! ```text
//!   forward of a block                                       where there is
//!   [input norm] gather [q, k, v] a2a [attend] a2a [output] scatter [residual, norm] gather [ffn] scatter [residual]
//!                tp               heads       heads         tp                       tp           tp
//!                                      ring: keys and values come by rotation or gathering
//! ```
//!
//! Backward is the same list read from its end, each exchange replaced by its transpose. What is recomputed runs forward
//! again first, from where it was stashed.

mod block;
mod calls;

use block::Group as Recomputed;
pub use calls::Sizes;
use std::ops::Range;
use tangelo_configs::Plan;
use tangelo_configs::job::{OptimizerName, PipelineSchedule as Schedule};
use tangelo_core::pipeline::{self, Pass, PipelineSchedule};
use tangelo_core::{DType, Group, Instruction, Program, Unit};

/// Elements after which a bucket of gradients is closed.
pub const BUCKET_ELEMENTS: usize = 16 << 20;

/// The program of the ranks of `stage`.
pub fn build(plan: &Plan, stage: usize) -> Program {
    let mut builder = Builder::new(plan, stage);
    builder.pass();
    let pass = std::mem::take(&mut builder.list);
    builder.evaluate();
    let evaluate = std::mem::take(&mut builder.list);
    let buckets = builder.buckets();
    builder.update(buckets.len());
    Program { pass, update: builder.list, evaluate, buckets }
}

/// The pipeline's order for the actions of `stage`.
pub fn actions(plan: &Plan, stage: usize) -> Vec<pipeline::Action> {
    let schedule = match plan.config.parallelism.pipeline_parallel_schedule {
        Schedule::OneFOneB => PipelineSchedule::OneFOneB,
        Schedule::GPipe => PipelineSchedule::GPipe,
    };
    pipeline::actions(schedule, stage, plan.topology.num_stages(), plan.gradient_accumulation_steps)
}

struct Builder<'a> {
    plan: &'a Plan,
    stage: usize,
    units: Vec<Unit>,
    is_first: bool,
    is_last: bool,
    /// Whether the head reads the embedding's weights on this stage.
    ties_here: bool,
    list: Vec<Instruction>,
    /// Units whose gradients are on their way.
    reducing: Vec<Unit>,
}

impl Builder<'_> {
    fn new(plan: &Plan, stage: usize) -> Builder<'_> {
        let sharding = plan.sharding();
        Builder {
            plan,
            stage,
            units: sharding.units(stage),
            is_first: sharding.is_first(stage),
            is_last: sharding.is_last(stage),
            ties_here: plan.model.tie_word_embeddings && !sharding.copies_embedding(),
            list: Vec::new(),
            reducing: Vec::new(),
        }
    }

    fn is_split(&self, group: Group) -> bool {
        self.plan.topology.size(group) > 1
    }

    fn emit(&mut self, instruction: Instruction) {
        self.list.push(instruction);
    }

    // ---- weights and gradients -------------------------------------------------------------------------------------

    fn gathers(&self) -> bool {
        self.is_split(Group::Parameters)
    }

    /// Asks for weights; nothing where they are always there.
    fn start(&mut self, unit: Option<Unit>) {
        if let Some(unit) = unit.filter(|_| self.gathers()) {
            self.emit(Instruction::StartGather(unit));
        }
    }

    fn finish(&mut self, unit: Unit) {
        if self.gathers() {
            self.emit(Instruction::FinishGather(unit));
        }
    }

    fn release(&mut self, unit: Unit) {
        if self.gathers() {
            self.emit(Instruction::Release(unit));
        }
    }

    fn open(&mut self, unit: Unit) {
        if self.is_split(Group::Gradients) {
            self.emit(Instruction::OpenGradient(unit));
        }
    }

    /// Sends a unit's gradients away, and waits for those of the unit before: one is on its way while the next is made.
    fn reduce(&mut self, unit: Unit) {
        if !self.is_split(Group::Gradients) {
            return;
        }
        self.settle();
        self.emit(Instruction::StartReduce(unit));
        self.reducing.push(unit);
    }

    fn settle(&mut self) {
        for unit in std::mem::take(&mut self.reducing) {
            self.emit(Instruction::FinishReduce(unit));
        }
    }

    // ---- forward and backward --------------------------------------------------------------------------------------

    fn pass(&mut self) {
        self.emit(Instruction::CountTokens);
        let keeps = self.gathers() && !self.plan.reshards_after_forward();
        if keeps {
            self.gather_all();
        }
        let start = self.list.len();
        for action in actions(self.plan, self.stage) {
            match action.pass {
                Pass::Forward => self.forward(action.micro_batch, true),
                Pass::Backward => self.backward(action.micro_batch),
            }
        }
        if keeps {
            self.keep_gathered(start);
        }
        self.emit(Instruction::ShareLoss);
    }

    fn gather_all(&mut self) {
        for unit in self.units.clone() {
            self.start(Some(unit));
            self.finish(unit);
        }
    }

    /// Takes gathers and releases out of the list from `start` on; weights are given back at its end.
    fn keep_gathered(&mut self, start: usize) {
        let moves = |i: &Instruction| {
            matches!(i, Instruction::StartGather(_) | Instruction::FinishGather(_) | Instruction::Release(_))
        };
        let rest: Vec<Instruction> = self.list.drain(start..).filter(|i| !moves(i)).collect();
        self.list.extend(rest);
        for unit in self.units.clone() {
            self.release(unit);
        }
    }

    fn layers(&self) -> Range<usize> {
        self.plan.stage_layers[self.stage].clone()
    }

    fn forward(&mut self, micro_batch: usize, train: bool) {
        let layers = self.layers();
        if self.is_first {
            self.start(Some(Unit::Embedding));
            self.start(Some(Unit::Block(layers.start)));
            self.finish(Unit::Embedding);
            self.emit(Instruction::Embed(micro_batch));
            self.release(Unit::Embedding);
        } else {
            self.start(Some(Unit::Block(layers.start)));
            self.emit(Instruction::Receive(Pass::Forward, micro_batch));
        }
        for layer in layers.clone() {
            self.start((layer + 1 < layers.end).then_some(Unit::Block(layer + 1)));
            self.finish(Unit::Block(layer));
            for group in block::groups(self.plan, layer) {
                if train && group.again {
                    self.emit(Instruction::Stash(micro_batch));
                }
                self.run(&group, layer, micro_batch, train && !group.again);
            }
            self.release(Unit::Block(layer));
        }
        if !self.is_last {
            self.emit(Instruction::Send(Pass::Forward, micro_batch));
        }
    }

    fn run(&mut self, group: &Recomputed, layer: usize, micro_batch: usize, keep: bool) {
        let steps = group.steps.iter().map(|step| step.forward(layer, micro_batch, keep));
        self.list.extend(steps);
    }

    fn backward(&mut self, micro_batch: usize) {
        let layers = self.layers();
        if self.is_last {
            self.loss(micro_batch, true);
        } else {
            self.emit(Instruction::Receive(Pass::Backward, micro_batch));
        }
        self.start(Some(Unit::Block(layers.end - 1)));
        for layer in layers.clone().rev() {
            let unit = Unit::Block(layer);
            self.start((layer > layers.start).then(|| Unit::Block(layer - 1)));
            self.finish(unit);
            self.open(unit);
            for group in block::groups(self.plan, layer).iter().rev() {
                if group.again {
                    self.emit(Instruction::Restore(micro_batch));
                    self.run(group, layer, micro_batch, true);
                }
                let steps = group.steps.iter().rev().map(|step| step.backward(layer, micro_batch));
                self.list.extend(steps);
            }
            self.release(unit);
            self.reduce(unit);
        }
        if self.is_first {
            if !self.ties_here {
                self.open(Unit::Embedding);
            }
            self.emit(Instruction::EmbedBackward(micro_batch));
            self.reduce(Unit::Embedding);
        } else {
            self.emit(Instruction::Send(Pass::Backward, micro_batch));
        }
        self.settle();
    }

    /// Head and loss. A tied head adds to the embedding's gradient, which stays open until the embedding's own backward.
    fn loss(&mut self, micro_batch: usize, train: bool) {
        let tied = self.ties_here.then_some(Unit::Embedding);
        let units: Vec<Unit> = std::iter::once(Unit::Head).chain(tied).collect();
        for &unit in &units {
            self.start(Some(unit));
        }
        for &unit in &units {
            self.finish(unit);
            if train {
                self.open(unit);
            }
        }
        self.emit(Instruction::Loss { micro_batch, train });
        for &unit in &units {
            self.release(unit);
        }
        if train {
            self.reduce(Unit::Head);
        }
    }

    fn evaluate(&mut self) {
        self.forward(0, false);
        if self.is_last {
            self.loss(0, false);
        }
    }

    // ---- update ----------------------------------------------------------------------------------------------------

    fn update(&mut self, num_buckets: usize) {
        let reduces = self.is_split(Group::StatesOverGradients) || self.is_split(Group::Replicas);
        let replicated = [Group::Tensor, Group::KeyReplicas].into_iter().any(|group| self.is_split(group));
        let copies = self.plan.sharding().copies_embedding() && (self.is_first || self.is_last);
        if reduces {
            self.list.extend((0..num_buckets).map(Instruction::ReduceBucket));
        }
        if replicated || copies {
            self.emit(Instruction::SumReplicated);
        }
        self.emit(Instruction::Norm);
        if self.plan.config.optimizer.name == OptimizerName::Muon {
            self.list.extend((0..num_buckets).map(Instruction::UpdateMatrices));
        }
        self.emit(Instruction::Update);
        if self.is_split(Group::StatesOverParameters) {
            self.list.extend((0..num_buckets).map(Instruction::PublishBucket));
        }
    }

    /// Neighbouring units until a bucket is full.
    fn buckets(&self) -> Vec<Range<usize>> {
        let sharding = self.plan.sharding();
        let size = |unit: &Unit| -> usize {
            let metas = sharding.parameters(&self.plan.model, *unit, DType::F32);
            metas.iter().map(|m| m.num_elements()).sum::<usize>() / self.plan.topology.size(Group::Tensor)
        };
        let mut buckets: Vec<Range<usize>> = Vec::new();
        let mut filled = usize::MAX;
        for (index, unit) in self.units.iter().enumerate() {
            if filled >= BUCKET_ELEMENTS {
                buckets.push(index..index);
                filled = 0;
            }
            if let Some(open) = buckets.last_mut() {
                open.end = index + 1;
            }
            filled += size(unit);
        }
        buckets
    }
}
