//! Forward and backward: the interpreter of a [`Program`](tangelo_core::Program).
//!
//! ```text
//!                 a run of parts without communication between them is one small graph on detached inputs:
//!  forward :  local graph on (x, w) -> keep inputs and outputs on the lane's tape
//!  backward:  pop the tape; backward(outputs, gradients) -> gradients of the inputs -> drop the graph
//! ```
//!
//! A micro-batch under way is a `Lane`. What runs again in backward, when weights are gathered and given back, what ranks
//! exchange and in which order a pipeline takes its micro-batches are instructions, made where the layout is known
//! (`tangelo-planner`); here each is done once, by its name. No hooks. World size 1 takes the same path.
//!
//! Invariant: gradients of weights accumulate in the fp32 buffers of [`tangelo_models::UnitWeights`]; no weight has a
//! `.grad`.

mod exchange;
mod head;
mod lane;
mod loss;
mod ring;

use crate::buckets::Buckets;
use crate::error::Result;
use crate::groups::{Arriving, Groups};
use crate::micro_batch::{Rows, Work};
use crate::store::WeightStore;
use crate::worker::sum_over_ranks;
use exchange::Exchanger;
use lane::Lane;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tangelo_core::loss::objective::{Prediction, Scales, Sums};
use tangelo_core::{Group, Instruction, Pass, Phase, Unit};
use tangelo_kernels::comm::Pending;
use tangelo_models::Model;
use tch::Tensor;

/// Tokens of logits that exist at once: V = 128K in fp32 is then 256 MB.
pub const LOSS_CHUNK_TOKENS: i64 = tangelo_planner::memory::LOSS_CHUNK_TOKENS as i64;

/// What a pass gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassStats {
    /// Sum over this rank's tokens of weight * -log p(target), not normalised; 0 where another rank counts them.
    pub loss_sum: f64,
    /// Sum of token weights (of marks, in a sum of components), and number of tokens, over all rows of all ranks.
    pub totals: [f64; 2],
    /// The loss of the whole batch, and on how many ranks this was asked to be the last step.
    pub shared: [f64; 2],
    /// What components tell beside the loss, over the whole batch.
    pub metrics: Vec<(&'static str, f64)>,
    /// What the model says of each of this rank's tokens, where that was asked for.
    pub predictions: Vec<Prediction>,
    /// Time computing on the way to the loss.
    pub forward: Duration,
    /// Time computing on the way back.
    pub backward: Duration,
    /// Time standing still in collectives.
    pub communication: Duration,
}

/// What a pass works on: a rank's part of the model and its groups.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    /// The part of the model.
    pub model: &'a Model,
    /// Where weights and gradients are kept.
    pub store: &'a WeightStore,
    /// How gradients go to the owners of states.
    pub buckets: &'a Buckets,
    /// The rank's communicators.
    pub groups: &'a Groups,
}

/// Runs micro-batches through this rank's part of the model.
pub struct Executor<'a> {
    model: &'a Model,
    store: &'a WeightStore,
    buckets: &'a Buckets,
    groups: &'a Groups,
    exchanger: Exchanger<'a>,
    rows: &'a Rows<'a>,
    /// Coefficient of the loss over the whole batch's weight.
    scale: f64,
    /// The same for a sum of components, and what these have summed up.
    scales: Scales,
    sums: Sums,
    /// Whether this rank was asked to stop; travels with the loss, so that all ranks learn it in the same step.
    stop: bool,
    lanes: HashMap<usize, Lane>,
    /// Weights and gradients on their way, by unit; sums of gradients, by bucket.
    gathering: HashMap<Unit, Arriving>,
    reducing: HashMap<Unit, Arriving>,
    summing: HashMap<usize, Arriving>,
    /// Values and gradients on their way to neighbours.
    sent: Vec<Pending>,
    stats: PassStats,
}

impl<'a> Executor<'a> {
    /// An executor for one pass over `rows`.
    pub fn new(parts: Parts<'a>, rows: &'a Rows<'a>, stop: bool) -> Executor<'a> {
        let Parts { model, store, buckets, groups } = parts;
        let exchanger = Exchanger::new(groups, rows.place);
        Executor {
            model,
            store,
            buckets,
            groups,
            exchanger,
            rows,
            scale: 0.0,
            scales: Scales::default(),
            sums: Sums::default(),
            stop,
            lanes: HashMap::new(),
            gathering: HashMap::new(),
            reducing: HashMap::new(),
            summing: HashMap::new(),
            sent: Vec::new(),
            stats: PassStats::default(),
        }
    }

    /// Does what the program says, from its first instruction to its last.
    pub fn run(mut self, program: &[Instruction]) -> Result<PassStats> {
        let mut again = false;
        for &instruction in program {
            // What runs again on the way back is part of it.
            again = matches!(instruction, Instruction::Restore(_)) || again && !is_backward(instruction);
            let (start, waited) = (Instant::now(), self.groups.waited());
            self.groups.enter(Phase::of(instruction))?;
            self.step(instruction)?;
            let waited = self.groups.waited() - waited;
            let computed = start.elapsed().saturating_sub(waited);
            self.stats.communication += waited;
            *(if again || is_backward(instruction) { &mut self.stats.backward } else { &mut self.stats.forward }) +=
                computed;
        }
        let waited = self.groups.waited();
        self.sent.drain(..).try_for_each(|sent| sent.wait().map(drop))?;
        self.stats.communication += self.groups.waited() - waited;
        Ok(self.stats)
    }

    fn step(&mut self, instruction: Instruction) -> Result<()> {
        use Instruction as I;
        let (model, store, buckets, groups) = (self.model, self.store, self.buckets, self.groups);
        match instruction {
            I::StartGather(unit) => _ = self.gathering.insert(unit, store.start_gather(model, unit, groups)),
            I::FinishGather(unit) => {
                let arriving = self.gathering.remove(&unit).expect(STARTED);
                store.finish_gather(model, unit, arriving)?;
            }
            I::Release(unit) => store.release(model, unit),
            I::OpenGradient(unit) => store.open_gradient(model, unit),
            I::StartReduce(unit) => _ = self.reducing.insert(unit, store.start_reduce(model, unit, groups)),
            I::FinishReduce(unit) => {
                let arriving = self.reducing.remove(&unit).expect(STARTED);
                store.finish_reduce(model, unit, arriving)?;
            }
            I::Embed(m) => self.embed(m)?,
            I::EmbedBackward(m) => self.embed_backward(m)?,
            I::Receive(pass, m) => self.receive(pass, m)?,
            I::Send(pass, m) => self.send(pass, m)?,
            I::Stash(m) => self.lane(m).stash(),
            I::Restore(m) => self.lane(m).restore(),
            I::Block { layer, parts, micro_batch, keep } => self.lane(micro_batch).run(model, layer, parts, keep),
            I::BlockBackward { micro_batch, .. } => self.lane(micro_batch).back(),
            I::ResidualBackward(m) => self.lane(m).back_residual(),
            I::RingAttend { layer, micro_batch, keep } => self.ring(layer, micro_batch, keep)?,
            I::RingAttendBackward { layer, micro_batch } => self.ring_backward(layer, micro_batch)?,
            I::Exchange { exchange, pass, layer, micro_batch } => {
                let lane = self.lanes.get_mut(&micro_batch).expect("a micro-batch under way");
                let layout = lane.layout();
                self.exchanger.apply(exchange, lane.side(pass), layout, model.block_shape(layer))?;
            }
            I::Loss { micro_batch, train } => self.loss(micro_batch, train)?,
            I::CountTokens => self.count_tokens()?,
            I::ShareLoss => self.share_loss()?,
            I::StartBucket(bucket) => {
                let started = tch::no_grad(|| buckets.start_reduce(bucket, model, store, groups));
                self.summing.insert(bucket, started);
            }
            I::SumBucket(bucket) => {
                let arriving = self.summing.remove(&bucket).expect(STARTED);
                self.summing.insert(bucket, buckets.sum(arriving, groups)?);
            }
            I::FinishBucket(bucket) => {
                let arriving = self.summing.remove(&bucket).expect(STARTED);
                buckets.finish_reduce(bucket, arriving, model, store)?;
            }
            I::SumReplicated | I::Norm | I::UpdateMatrices(_) | I::Update | I::PublishBucket(_) => {
                unreachable!("{instruction:?} belongs to the update")
            }
        }
        Ok(())
    }

    fn lane(&mut self, micro_batch: usize) -> &mut Lane {
        self.lanes.get_mut(&micro_batch).expect("a program opens a micro-batch before it uses it")
    }

    /// The whole batch's weight normalises every micro-batch, however rows are cut.
    fn count_tokens(&mut self) -> Result<()> {
        let own = self.rows.counts();
        let totals = self.groups.get(Group::Batch).map_or(Ok(own.clone()), |comm| sum_over_ranks(comm, &own))?;
        self.stats.totals = [totals[0], totals[1]];
        match &*self.rows.work {
            Work::CrossEntropy { coefficient, .. } => {
                self.scale = if totals[0] > 0.0 { coefficient / totals[0] } else { 0.0 };
            }
            Work::Objective { objective, .. } => {
                let counts: Vec<f64> = totals[..1].iter().chain(&totals[2..]).copied().collect();
                (self.scales, self.sums) = (objective.scales(&counts), objective.no_sums());
            }
            Work::Predict { .. } => {}
        }
        Ok(())
    }

    fn share_loss(&mut self) -> Result<()> {
        let stop = f64::from(u8::from(self.stop));
        let Work::Objective { objective, .. } = &*self.rows.work else {
            let sums = sum_over_ranks(self.groups.world(), &[self.stats.loss_sum, stop])?;
            self.stats.shared = [sums[0] * self.scale, sums[1]];
            return Ok(());
        };
        let own: Vec<f64> = [self.sums.loss(), stop].into_iter().chain(self.sums.0[1..].iter().copied()).collect();
        let sums = sum_over_ranks(self.groups.world(), &own)?;
        self.stats.shared = [sums[0], sums[1]];
        self.stats.metrics = objective.metrics().into_iter().zip(sums[2..].iter().copied()).collect();
        Ok(())
    }

    // ---- ends of a stage -------------------------------------------------------------------------------------------

    fn embed(&mut self, m: usize) -> Result<()> {
        let batch = self.rows.micro_batch(m)?;
        let x = tch::no_grad(|| self.model.embed(&batch.pack.tokens));
        let x = self.exchanger.scatter_sequence(x, batch.layout)?;
        self.lanes.insert(m, Lane::new(self.model, batch, x));
        Ok(())
    }

    fn embed_backward(&mut self, m: usize) -> Result<()> {
        let lane = self.lanes.remove(&m).expect("a micro-batch under way");
        let gradient = self.exchanger.gather_sequence(lane.x_gradient(), lane.layout())?;
        tch::no_grad(|| self.model.embed_backward(&lane.batch.pack.tokens, &gradient));
        Ok(())
    }

    fn receive(&mut self, pass: Pass, m: usize) -> Result<()> {
        let neighbours = self.groups.neighbours();
        if pass == Pass::Backward {
            let lane = self.lanes.get_mut(&m).expect("a micro-batch under way");
            let gradient = lane.x().empty_like();
            neighbours.gradients_in.as_ref().expect(NOT_AN_END).recv(&gradient)?;
            lane.set_x_gradient(gradient);
            return Ok(());
        }
        let batch = self.rows.micro_batch(m)?;
        let tokens = self.exchanger.own_tokens(batch.layout) as i64;
        let options = (self.model.kind(), self.model.device());
        let x = Tensor::empty([tokens, self.model.spec().hidden_size as i64], options);
        neighbours.values_in.as_ref().expect(NOT_AN_END).recv(&x)?;
        self.lanes.insert(m, Lane::new(self.model, batch, x));
        Ok(())
    }

    /// Sends without waiting: the stage goes on with its next action.
    fn send(&mut self, pass: Pass, m: usize) -> Result<()> {
        let neighbours = self.groups.neighbours();
        let sent = match pass {
            Pass::Forward => {
                neighbours.values_out.as_ref().expect(NOT_AN_END).start_send(self.lanes[&m].x().contiguous())
            }
            Pass::Backward => {
                let lane = self.lanes.remove(&m).expect("a micro-batch under way");
                neighbours.gradients_out.as_ref().expect(NOT_AN_END).start_send(lane.x_gradient().contiguous())
            }
        };
        self.sent.push(sent);
        Ok(())
    }
}

const STARTED: &str = "a program starts what it finishes";
const NOT_AN_END: &str = "the first stage has none before it, the last none after it";

fn is_backward(instruction: Instruction) -> bool {
    matches!(
        instruction,
        Instruction::BlockBackward { .. }
            | Instruction::ResidualBackward(_)
            | Instruction::RingAttendBackward { .. }
            | Instruction::EmbedBackward(_)
            | Instruction::Exchange { pass: Pass::Backward, .. }
    )
}
