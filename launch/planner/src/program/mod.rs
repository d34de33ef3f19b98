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

use block::Step;
pub use calls::Sizes;
use std::ops::Range;
use tangelo_configs::Plan;
use tangelo_configs::job::{OptimizerName, PipelineSchedule as Schedule};
use tangelo_core::pipeline::{self, Pass, PipelineSchedule};
use tangelo_core::{DType, Group, Instruction, Program, Unit};

/// Elements of fp32 after which a bucket of gradients is closed. Blocks of large models fill one each; smaller ones need
/// several buckets, so that all but the last are on their way while backward goes on.
pub fn bucket_elements(plan: &Plan) -> usize {
    (plan.config.parallelism.gradient_bucket_mb * f64::from(1 << 20) / 4.0) as usize
}

/// The program of the ranks of `stage`.
pub fn build(plan: &Plan, stage: usize) -> Program {
    let mut builder = Builder::new(plan, stage);
    builder.pass();
    let pass = std::mem::take(&mut builder.list);
    builder.evaluate();
    let evaluate = std::mem::take(&mut builder.list);
    builder.update();
    Program { pass, update: builder.list, evaluate, buckets: builder.buckets }
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
    /// The unit whose gradients are on their way.
    reducing: Option<Unit>,
    buckets: Vec<Range<usize>>,
    /// By bucket, in the backward of the last micro-batch: units whose gradients are still to come.
    missing: Vec<usize>,
    /// The bucket on its way to the owners of states, where it is summed over replicas next; the one in its last call.
    scattering: Option<usize>,
    summing: Option<usize>,
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
            reducing: None,
            buckets: buckets(plan, stage),
            missing: Vec::new(),
            scattering: None,
            summing: None,
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

    /// A unit's gradients of one micro-batch are made. Where they are cut they are sent away, once those of the unit before
    /// have arrived: one is on its way while the next is made.
    fn made(&mut self, unit: Unit) {
        if !self.is_split(Group::Gradients) {
            return self.close(unit);
        }
        self.settle();
        self.emit(Instruction::StartReduce(unit));
        self.reducing = Some(unit);
    }

    fn settle(&mut self) {
        if let Some(unit) = self.reducing.take() {
            self.emit(Instruction::FinishReduce(unit));
            self.close(unit);
        }
    }

    // ---- buckets, in the backward of the last micro-batch ----------------------------------------------------------

    /// This rank keeps the sum of a unit's gradients over all micro-batches: a bucket whose units are all there leaves.
    fn close(&mut self, unit: Unit) {
        let index = self.units.iter().position(|&own| own == unit).expect("a unit of this stage");
        let bucket = self.buckets.iter().position(|units| units.contains(&index)).expect("buckets cover the units");
        let Some(missing) = self.missing.get_mut(bucket) else { return };
        *missing -= 1;
        if *missing == 0 {
            self.send_bucket(bucket);
        }
    }

    /// One bucket is on its way at a time, and one in each of two calls where two are made.
    fn send_bucket(&mut self, bucket: usize) {
        match (self.is_split(Group::StatesOverGradients), self.is_split(Group::Replicas)) {
            (false, false) => {}
            (true, true) => {
                self.sum_scattered();
                self.emit(Instruction::StartBucket(bucket));
                self.scattering = Some(bucket);
            }
            _ => {
                self.finish_bucket();
                self.emit(Instruction::StartBucket(bucket));
                self.summing = Some(bucket);
            }
        }
    }

    fn sum_scattered(&mut self) {
        self.finish_bucket();
        if let Some(bucket) = self.scattering.take() {
            self.emit(Instruction::SumBucket(bucket));
            self.summing = Some(bucket);
        }
    }

    fn finish_bucket(&mut self) {
        if let Some(bucket) = self.summing.take() {
            self.emit(Instruction::FinishBucket(bucket));
        }
    }

    // ---- forward and backward --------------------------------------------------------------------------------------

    fn pass(&mut self) {
        self.emit(Instruction::CountTokens);
        let start = self.list.len();
        let actions = actions(self.plan, self.stage);
        let last = actions.iter().rposition(|action| action.pass == Pass::Backward);
        for (index, action) in actions.iter().enumerate() {
            if last == Some(index) {
                self.settle();
                self.missing = self.buckets.iter().map(Range::len).collect();
            }
            match action.pass {
                Pass::Forward => {
                    let own = pipeline::Action { pass: Pass::Backward, ..*action };
                    self.forward(action.micro_batch, true, self.is_last && actions.get(index + 1) == Some(&own));
                }
                Pass::Backward => {
                    let is_after_forward = index > 0 && actions[index - 1].micro_batch == action.micro_batch;
                    if self.is_last && !is_after_forward {
                        self.start_head();
                    }
                    self.backward(action.micro_batch);
                }
            }
        }
        self.settle();
        self.sum_scattered();
        self.finish_bucket();
        if self.gathers() && !self.plan.reshards_after_forward() {
            self.keep_gathered(start);
        } else {
            keep_at_turns(&mut self.list);
        }
        self.emit(Instruction::ShareLoss);
    }

    /// Leaves in the list from `start` on only the first gather of each unit, one unit ahead of its use; weights are given
    /// back at the list's end.
    fn keep_gathered(&mut self, start: usize) {
        let rest = self.list.split_off(start);
        let units = self.units.clone();
        self.start(units.first().copied());
        let mut next = 1;
        for instruction in rest {
            match instruction {
                Instruction::StartGather(_) | Instruction::Release(_) => {}
                Instruction::FinishGather(unit) if units[..next - 1].contains(&unit) => {}
                Instruction::FinishGather(_) => {
                    self.start(units.get(next).copied());
                    next += 1;
                    self.emit(instruction);
                }
                _ => self.emit(instruction),
            }
        }
        units.into_iter().for_each(|unit| self.release(unit));
    }

    fn layers(&self) -> Range<usize> {
        self.plan.stage_layers[self.stage].clone()
    }

    /// Forward of a micro-batch; `is_before_loss` where its loss follows at once.
    fn forward(&mut self, micro_batch: usize, train: bool, is_before_loss: bool) {
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
            if layer + 1 < layers.end {
                self.start(Some(Unit::Block(layer + 1)));
            } else if is_before_loss {
                self.start_head();
            }
            self.finish(Unit::Block(layer));
            for group in block::groups(self.plan, layer) {
                if train && group.again {
                    self.emit(Instruction::Stash(micro_batch));
                }
                self.run(&group.steps, layer, micro_batch, train && !group.again);
            }
            self.release(Unit::Block(layer));
        }
        if !self.is_last {
            self.emit(Instruction::Send(Pass::Forward, micro_batch));
        }
    }

    fn run(&mut self, steps: &[Step], layer: usize, micro_batch: usize, keep: bool) {
        self.list.extend(steps.iter().map(|step| step.forward(layer, micro_batch, keep)));
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
                    self.run(group.replayed(), layer, micro_batch, true);
                }
                self.list.extend(group.backward(layer, micro_batch));
            }
            self.release(unit);
            if layer == layers.start && !self.is_first {
                // The stage before waits for it: before this one's own gradients leave.
                self.emit(Instruction::Send(Pass::Backward, micro_batch));
            }
            self.made(unit);
        }
        if self.is_first {
            if !self.ties_here {
                self.open(Unit::Embedding);
            }
            self.emit(Instruction::EmbedBackward(micro_batch));
            self.made(Unit::Embedding);
        }
    }

    /// What the loss reads.
    fn head_units(&self) -> Vec<Unit> {
        let tied = self.ties_here.then_some(Unit::Embedding);
        std::iter::once(Unit::Head).chain(tied).collect()
    }

    fn start_head(&mut self) {
        self.head_units().into_iter().for_each(|unit| self.start(Some(unit)));
    }

    /// Head and loss. A tied head adds to the embedding's gradient, which stays open until the embedding's own backward.
    fn loss(&mut self, micro_batch: usize, train: bool) {
        let units = self.head_units();
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
            self.made(Unit::Head);
        }
    }

    fn evaluate(&mut self) {
        self.forward(0, false, self.is_last);
        if self.is_last {
            self.loss(0, false);
        }
    }

    // ---- update ----------------------------------------------------------------------------------------------------

    fn update(&mut self) {
        let num_buckets = self.buckets.len();
        let replicated = [Group::Tensor, Group::KeyReplicas].into_iter().any(|group| self.is_split(group));
        let copies = self.plan.sharding().copies_embedding() && (self.is_first || self.is_last);
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
}

/// Neighbouring units of a stage until a bucket is full, as ranges of its units.
pub fn buckets(plan: &Plan, stage: usize) -> Vec<Range<usize>> {
    let sharding = plan.sharding();
    let size = |unit| -> usize {
        let metas = sharding.parameters(&plan.model, unit, DType::F32);
        metas.iter().map(|m| m.num_elements()).sum::<usize>() / plan.topology.size(Group::Tensor)
    };
    let (mut buckets, full): (Vec<Range<usize>>, usize) = (Vec::new(), bucket_elements(plan));
    let mut filled = usize::MAX;
    for (index, unit) in sharding.units(stage).into_iter().enumerate() {
        if filled >= full {
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

/// Where the block whose weights are given back is the next one to be gathered (forward turns into backward), they stay.
fn keep_at_turns(list: &mut Vec<Instruction>) {
    // The release that nothing was gathered after, and of units that stay, whether their gather was left out already.
    let (mut released, mut staying) = (None, None);
    let mut left_out = Vec::new();
    for (at, &instruction) in list.iter().enumerate() {
        match instruction {
            Instruction::Release(unit @ Unit::Block(_)) => released = Some((unit, at)),
            Instruction::StartGather(unit @ Unit::Block(_)) => {
                if let Some((_, release)) = released.take().filter(|(last, _)| *last == unit) {
                    left_out.extend([release, at]);
                    staying = Some(unit);
                }
            }
            Instruction::FinishGather(unit) if staying == Some(unit) => {
                left_out.push(at);
                staying = None;
            }
            _ => {}
        }
    }
    left_out.sort_unstable();
    let mut at = 0;
    list.retain(|_| {
        at += 1;
        left_out.binary_search(&(at - 1)).is_err()
    });
}
