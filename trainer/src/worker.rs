//! A rank's share of the model, and the verbs that a recipe drives it with: `forward_backward`, `optim_step`, `evaluate`;
//! `forward` lies in [`crate::forward`].

use crate::buckets::Buckets;
use crate::error::{Result, TrainError};
use crate::executor::{Executor, Parts};
use crate::faults::Fault;
use crate::groups::Groups;
use crate::init::{self, TensorSource};
use crate::micro_batch::{MicroBatches, Reader, Rows, Work};
use crate::optim::{Optimizer, StepStats};
use crate::shards::narrow;
use crate::store::WeightStore;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tangelo_configs::job::{ComputeType, RotateMethod};
use tangelo_configs::model::HeadSpec;
use tangelo_configs::{Plan, Sharding};
use tangelo_core::loss::Reads;
use tangelo_core::{Batch, Group, Instruction, LossSpec, Phase, Program, env};
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::device;
use tangelo_models::Model;
use tch::{Device, Kind, Tensor};

/// What [`TrainWorker::forward_backward`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossStats {
    /// The loss over the global batch: the weighted mean over all trained tokens, or the sum of components.
    pub loss: f64,
    /// What components of a sum tell beside the loss, under verl's names, over the global batch.
    pub metrics: Vec<(&'static str, f64)>,
    /// Sum of token weights (of marks, in a sum of components) over the global batch.
    pub total_weight: f64,
    /// Tokens over all ranks.
    pub tokens: u64,
    /// What this rank and those that share its rows computed: of each document, how many tokens, and how many of a shared
    /// prompt go before them.
    pub computed: Vec<(usize, usize)>,
    /// This rank's time in forward loops.
    pub forward: Duration,
    /// This rank's time in backward loops.
    pub backward: Duration,
    /// This rank's time in collectives, waiting for slower ranks included.
    pub communication: Duration,
    /// Whether any rank asked to stop after this step.
    pub stop: bool,
    /// Peak bytes of tensors that this rank's pass allocated, where they are counted.
    pub allocated: Option<u64>,
}

/// The model, the optimizer and the groups of one rank.
pub struct TrainWorker {
    plan: Plan,
    model: Model,
    store: WeightStore,
    buckets: Buckets,
    optimizer: Optimizer,
    groups: Groups,
    sharding: Sharding,
    program: Program,
    /// Passes of other numbers of micro-batches than the plan's.
    passes: RefCell<HashMap<usize, Arc<[Instruction]>>>,
    rank: usize,
    micro_batches: MicroBatches,
    share_prompts: bool,
    rotate_method: RotateMethod,
    /// Whether the gradients are those of a whole pass, summed over ranks.
    has_gradients: bool,
    /// Updates done so far.
    num_updates: u64,
    counts_allocations: bool,
}

/// libtorch's type for the resolved compute type.
pub fn kind_of(compute: ComputeType) -> Kind {
    match compute {
        ComputeType::Bfloat16 => Kind::BFloat16,
        ComputeType::Auto | ComputeType::Float32 => Kind::Float,
    }
}

impl TrainWorker {
    /// A worker with zeroed weights and optimizer states. `world` spans all ranks of the plan's mesh.
    pub fn new(plan: &Plan, rank: usize, world: Communicator, device: Device) -> Result<TrainWorker> {
        let kind = kind_of(plan.config.training.mixed_precision_param);
        TrainWorker::with_kind(plan, rank, world, device, kind)
    }

    /// As [`TrainWorker::new`], with weights of any type: float64 for checks.
    pub fn with_kind(plan: &Plan, rank: usize, world: Communicator, device: Device, kind: Kind) -> Result<TrainWorker> {
        TrainWorker::build(plan, rank, world, (device, kind), true)
    }

    /// A worker that only answers [`TrainWorker::forward`]: no gradients, no optimizer states, and no memory for them.
    pub fn frozen(plan: &Plan, rank: usize, world: Communicator, device: Device) -> Result<TrainWorker> {
        let kind = kind_of(plan.config.training.mixed_precision_param);
        TrainWorker::build(plan, rank, world, (device, kind), false)
    }

    fn build(
        plan: &Plan,
        rank: usize,
        world: Communicator,
        (device, kind): (Device, Kind),
        learns: bool,
    ) -> Result<TrainWorker> {
        let sharding = plan.sharding();
        let program = tangelo_planner::program::build(plan, sharding.topology().stage(rank));
        let groups = Groups::open(world, sharding.topology())?;
        let model = Model::part(&plan.model, &sharding, rank, kind, device, learns);
        let store = WeightStore::new(&model, &sharding, rank, learns);
        let (config, max_norm) = (&plan.config.optimizer, plan.config.training.max_norm);
        let buckets = Buckets::new(&model, &sharding, &store, &program.buckets, rank);
        let optimizer = match learns {
            true => Optimizer::new(&model, &sharding, &store, &program.buckets, rank, config, max_norm),
            false => Optimizer::none(&model, &sharding, rank, config),
        };
        Ok(TrainWorker {
            plan: plan.clone(),
            model,
            store,
            buckets,
            optimizer,
            groups,
            sharding,
            program,
            passes: RefCell::default(),
            rank,
            micro_batches: MicroBatches::Rows(plan.config.training.local_batch_size),
            share_prompts: false,
            rotate_method: plan.config.parallelism.context_parallel_rotate_method,
            has_gradients: false,
            num_updates: 0,
            counts_allocations: !device.is_cuda()
                && std::env::var_os(env::COUNT_ALLOCATIONS).is_some_and(|v| !v.is_empty()),
        })
    }

    /// This rank's part of the model. Weights that are cut are there only while they are used.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Whether it learns.
    pub fn learns(&self) -> bool {
        !self.optimizer.states().is_empty()
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// How the model lies over ranks.
    pub fn sharding(&self) -> &Sharding {
        &self.sharding
    }

    /// Where this rank keeps weights and gradients.
    pub fn store(&self) -> &WeightStore {
        &self.store
    }

    /// The gradients that this rank keeps of a unit, by its place in the model: a view.
    pub fn kept_gradient(&self, unit: usize) -> &Tensor {
        self.store.gradients(&self.model, unit)
    }

    /// The communicator over all ranks.
    pub fn world(&self) -> &Communicator {
        self.groups.world()
    }

    /// Updates done so far.
    pub fn num_updates(&self) -> u64 {
        self.num_updates
    }

    /// Waits until every rank is here, for up to `patience` where one of them has something longer to do than a rank may
    /// wait for in a step; afterwards a rank waits for up to `step` again.
    pub fn wait_for_all(&self, patience: Duration, step: Duration) -> Result<()> {
        if self.world().size() > 1 {
            self.world().set_timeout(patience);
            self.world().barrier()?;
            self.world().set_timeout(step);
        }
        Ok(())
    }

    /// The rank begins a step.
    pub fn begin_step(&self, step: u64) -> Result<()> {
        self.groups.begin_step(step)
    }

    /// The rank enters a phase of its step that is no instruction.
    pub fn enter(&self, phase: Phase) -> Result<()> {
        self.groups.enter(phase)
    }

    /// Tests only: something will go wrong on this rank.
    pub fn plant(&mut self, fault: Option<Fault>) {
        self.groups.plant(fault);
    }

    /// This worker's global rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Gives every weight its first values from `seed`.
    pub fn start_from_seed(&mut self, seed: u64) {
        let std = self.model.spec().initializer_range;
        for (index, unit) in self.model.units().iter().enumerate() {
            self.store.fill(&self.model, index, || init::from_seed(unit, seed, std));
        }
        self.adopt_weights();
    }

    /// Gives every weight the values of a pre-trained model; master copies get them unrounded.
    pub fn start_from(&mut self, source: &dyn TensorSource) -> Result<()> {
        for (index, unit) in self.model.units().iter().enumerate() {
            let exact = &mut |at: usize, values: &[f32]| self.adopt_values(index, at, values);
            self.store.fill(&self.model, index, || init::from_source(unit, source, exact))?;
        }
        Ok(())
    }

    /// Makes the optimizer's master copies equal to the kept weights.
    fn adopt_weights(&self) {
        for state in self.optimizer.states().iter().filter(|_| self.model.kind() != Kind::Float) {
            let own = narrow(self.store.weights(&self.model, state.unit), &state.weights_at);
            tch::no_grad(|| state.master.shallow_clone().copy_(&own));
        }
    }

    /// Gives the master copies `values`, which lie at `start` in the flat buffer of `unit`: what this rank owns of them.
    /// The model's own weights may be narrower and do not hold them exactly.
    fn adopt_values(&self, unit: usize, start: usize, values: &[f32]) {
        let narrower = self.model.kind() != Kind::Float;
        for state in self.optimizer.states().iter().filter(|state| narrower && state.unit == unit) {
            let owned = &state.range.flat;
            let (from, to) = (owned.start.max(start), owned.end.min(start + values.len()));
            if from < to {
                let mut master = state.master.narrow(0, (from - owned.start) as i64, (to - from) as i64);
                tch::no_grad(|| master.copy_(&Tensor::from_slice(&values[from - start..to - start])));
            }
        }
    }

    /// After optimizer states were written: makes the kept weights equal to the master copies on every rank.
    pub fn adopt_state(&mut self, num_updates: u64) -> Result<()> {
        self.num_updates = num_updates;
        let (model, store, groups) = (&self.model, &self.store, &self.groups);
        tch::no_grad(|| {
            self.optimizer.round_master(model, store);
            (0..self.buckets.len()).try_for_each(|bucket| self.buckets.publish(bucket, model, store, groups))
        })
    }

    /// Adds the gradients of the loss over this rank's rows of a global batch, normalised by the whole batch's weight, and
    /// sums them over ranks: once before every [`TrainWorker::optim_step`].
    ///
    /// `stop` travels with the loss: every rank learns in the same step that one of them was asked to end.
    pub fn forward_backward(&mut self, batch: &Batch, loss: &LossSpec, stop: bool) -> Result<LossStats> {
        if self.has_gradients {
            return Err(TrainError::Internal("forward_backward was called again without optim_step between".into()));
        }
        let rows = self.rows(batch, self.work(batch, loss)?)?;
        let (program, computed) = (self.pass(rows.len())?, rows.computed());
        let run = || Executor::new(self.parts(), &rows, stop).run(&program);
        let (pass, allocated) = match self.counts_allocations {
            true => device::count_allocations(run),
            false => (run(), 0),
        };
        // A pass that failed leaves a part of them: only `discard_gradients` helps.
        self.has_gradients = true;
        let pass = pass?;
        Ok(LossStats {
            allocated: self.counts_allocations.then_some(allocated),
            loss: pass.shared[0],
            metrics: pass.metrics,
            total_weight: pass.totals[0],
            tokens: pass.totals[1] as u64,
            computed,
            forward: pass.forward,
            backward: pass.backward,
            communication: pass.communication,
            stop: pass.shared[1] > 0.0,
        })
    }

    /// How rows become micro-batches from now on; every rank must be told the same. At first: the plan's rows each.
    pub fn set_micro_batches(&mut self, micro_batches: MicroBatches) {
        self.micro_batches = micro_batches;
    }

    /// Whether what neighbouring rows begin with (the prompt of several answers) is computed once from now on; every rank
    /// must be told the same. At first: not. A ring computes every row whole.
    pub fn set_share_prompts(&mut self, share_prompts: bool) {
        self.share_prompts = share_prompts;
    }

    /// The instructions of a pass of `count` micro-batches. With so many rows each, that is a fixed number.
    fn pass(&self, count: usize) -> Result<Arc<[Instruction]>> {
        let expected = self.plan.gradient_accumulation_steps;
        if let MicroBatches::Rows(each) = self.micro_batches
            && count != expected
        {
            return Err(TrainError::Data(format!(
                "a batch of {count} micro-batches of {each} sequences, expected {expected}: a rank's share of \
                 training.global_batch_size"
            )));
        }
        let (plan, stage) = (&self.plan, self.sharding.topology().stage(self.rank));
        let build = || {
            let plan = Plan { gradient_accumulation_steps: count, ..plan.clone() };
            tangelo_planner::program::build(&plan, stage).pass.into()
        };
        Ok(Arc::clone(self.passes.borrow_mut().entry(count).or_insert_with(build)))
    }

    fn work(&self, batch: &Batch, loss: &LossSpec) -> Result<Work> {
        let reads = loss.check().map_err(TrainError::Config)?;
        match (self.model.spec().head, reads) {
            (HeadSpec::Vocabulary, Reads::Distribution) | (HeadSpec::Scalar { .. }, Reads::Value) => {
                Work::of(loss, batch)
            }
            (head, reads) => Err(TrainError::Config(format!(
                "the model has a head of type {head:?}, but the loss reads {reads:?}: `value` belongs to a critic, all \
                 other components to a policy"
            ))),
        }
    }

    /// The rows of this rank as micro-batches, on all ranks the same number of them.
    pub(crate) fn rows(&self, batch: &Batch, work: Work) -> Result<Rows<'_>> {
        let reader = Reader {
            topology: self.sharding.topology(),
            rank: self.rank,
            rotate_method: self.rotate_method,
            vocab_size: self.model.spec().vocab_size,
            device: self.model.device(),
            share_prompts: self.share_prompts,
        };
        let rows = Rows::new(batch, work, reader)?;
        let needed = rows.needed(self.micro_batches);
        let count = match (self.micro_batches, self.groups.get(Group::Batch)) {
            (MicroBatches::Rows(_), _) | (_, None) => needed,
            (_, Some(readers)) => most_over_ranks(readers, needed)?,
        };
        Ok(rows.cut(self.micro_batches, count))
    }

    /// What the executor works on.
    pub(crate) fn parts(&self) -> Parts<'_> {
        Parts { model: &self.model, store: &self.store, buckets: &self.buckets, groups: &self.groups }
    }

    /// The rank's communicators.
    pub(crate) fn groups(&self) -> &Groups {
        &self.groups
    }

    /// The program of the plan's own steps.
    pub(crate) fn program(&self) -> &Program {
        &self.program
    }

    /// Throws the gradients of a pass away; another may begin.
    pub fn discard_gradients(&mut self) {
        self.store.zero_gradients(&self.model);
        self.has_gradients = false;
    }

    /// Clips and, unless the loss or the gradient is not finite, updates the weights.
    pub fn optim_step(&mut self, lr: f64, loss: &LossStats) -> Result<StepStats> {
        tch::no_grad(|| self.update(lr, loss.loss.is_finite()))
    }

    fn update(&mut self, lr: f64, loss_is_finite: bool) -> Result<StepStats> {
        let (model, store, groups) = (&self.model, &self.store, &self.groups);
        let (start, waited) = (Instant::now(), groups.waited());
        let mut stats = StepStats::default();
        for &instruction in &self.program.update {
            groups.enter(Phase::of(instruction))?;
            match instruction {
                Instruction::SumReplicated => self.optimizer.sum_replicated(model, store, groups)?,
                Instruction::Norm => {
                    stats.grad_norm = self.optimizer.grad_norm(model, store, groups)?;
                    stats.skipped = !(stats.grad_norm.is_finite() && loss_is_finite);
                }
                Instruction::UpdateMatrices(bucket) if !stats.skipped => {
                    self.optimizer.update_matrices(bucket, model, store, groups, (lr, stats.grad_norm))?;
                }
                Instruction::Update if !stats.skipped => {
                    self.num_updates += 1;
                    self.optimizer.update(model, store, self.num_updates, lr, stats.grad_norm);
                }
                Instruction::PublishBucket(bucket) if !stats.skipped => {
                    self.buckets.publish(bucket, model, store, groups)?;
                }
                Instruction::UpdateMatrices(_) | Instruction::Update | Instruction::PublishBucket(_) => {}
                other => unreachable!("{other:?} belongs to the pass"),
            }
        }
        stats.communication = groups.waited() - waited;
        self.discard_gradients();
        stats.update = start.elapsed().saturating_sub(stats.communication);
        Ok(stats)
    }

    /// Mean loss over the global batches that `next` yields; every rank must be given its rows of each.
    pub fn evaluate(&self, batches: impl Iterator<Item = Result<Batch>>, loss: &LossSpec) -> Result<f64> {
        let (mut sum, mut total) = (0.0, 0.0);
        for batch in batches {
            let batch = batch?;
            let work = self.work(&batch, loss)?;
            let Work::CrossEntropy { .. } = work else {
                return Err(TrainError::Config("evaluation knows cross-entropy at temperature 1 alone".into()));
            };
            let rows = self.rows(&batch, work)?;
            total += rows.counts()[0];
            for index in 0..rows.len() {
                let one = rows.only(index);
                sum += Executor::new(self.parts(), &one, false).run(&self.program.evaluate)?.loss_sum;
            }
        }
        let sum = sum_over_ranks(self.world(), &[sum])?[0];
        let total = self.groups.get(Group::Batch).map_or(Ok(vec![total]), |comm| sum_over_ranks(comm, &[total]))?[0];
        if total > 0.0 { Ok(sum / total) } else { Err(no_validation_tokens()) }
    }
}

fn no_validation_tokens() -> TrainError {
    TrainError::Data("the held-out split has no tokens to evaluate; raise data.validation_fraction".into())
}

/// Sums numbers over ranks in rank order, in f64.
pub fn sum_over_ranks(comm: &Communicator, values: &[f64]) -> Result<Vec<f64>> {
    if comm.size() == 1 {
        return Ok(values.to_vec());
    }
    let all = comm.all_gather(&Tensor::from_slice(values).to_device(comm.device()))?.to_device(Device::Cpu);
    let all = Vec::<f64>::try_from(all.reshape([-1])).expect("an f64 tensor");
    Ok((0..values.len()).map(|i| all.iter().skip(i).step_by(values.len()).sum()).collect())
}

/// The largest of the ranks' numbers.
fn most_over_ranks(comm: &Communicator, own: usize) -> Result<usize> {
    let all = comm.all_gather(&Tensor::from_slice(&[own as i64]).to_device(comm.device()))?;
    Ok(all.max().int64_value(&[]) as usize)
}

impl From<tangelo_kernels::comm::CommError> for TrainError {
    fn from(e: tangelo_kernels::comm::CommError) -> TrainError {
        if e.is_peer_failure() { TrainError::Peer(e.to_string()) } else { TrainError::Internal(e.to_string()) }
    }
}
