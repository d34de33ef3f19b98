//! A rank of a reinforcement-learning job: it builds its roles, tells the driver what it is, and does as it is told.

use super::setup;
use crate::error::{Result, TrainError};
use crate::faults::Fault;
use crate::micro_batch::MicroBatches;
use crate::open_model;
use crate::process::{RankInfo, threads_for};
use crate::publish::{Members, Publisher, generation_model};
use crate::rl::{Generator, Learner, RlWorker};
use crate::worker::{TrainWorker, kind_of};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tangelo_configs::{JobPlan, Role};
use tangelo_control::verbs::mesh;
use tangelo_control::{ControlError, Membership, Rank, RankOptions, Seat, Seats};
use tangelo_core::reshard::Ranks;
use tangelo_formats::tokenizer::{StreamDecoder, TokenizerAssets};
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::device;
use tangelo_models::Model;
use tangelo_observe::stderr_line;
use tangelo_planner::publish::{GenerationLayout, Publish};
use tangelo_rollout::{Engine, TextSource, TextStream};
use tch::Device;

/// The most that a rank's batches may take between their making and the end of the step.
const STORE_LIMIT_BYTES: usize = 8 << 30;

/// Serves the driver until it says that the job is over. Calls and batches travel on `runtime`.
///
/// # Errors
/// A role that cannot be built, a driver that is lost, a panic of a role.
pub fn run(job: &JobPlan, info: &RankInfo, runtime: &tokio::runtime::Handle) -> Result<()> {
    let training = &job.policy.config.training;
    let device = open_model::choose_device(training.device, info.local_rank)?;
    setup::be_deterministic(&job.policy, device)?;
    device::set_threads(threads_for(training.num_threads, info.local_world_size));
    let world = setup::connect(&job.policy, info, device)?;
    let (mut worker, seats) = Builder { job, info, rank: info.rank, device }.build(world)?;
    plant(&mut worker, Fault::from_env(info.rank, info.restart_count)?);
    worker.publish()?;
    let member = Membership::from_env().map_err(control_error)?;
    let options = RankOptions { rank: info.rank, seats, store_limit_bytes: STORE_LIMIT_BYTES };
    let rank = runtime.block_on(Rank::start(&member, options)).map_err(control_error)?;
    rank.run(&mut worker).map_err(control_error)
}

/// Tests only: something will go wrong on this rank.
fn plant(worker: &mut RlWorker, fault: Option<Fault>) {
    worker.fault = fault;
    [&mut worker.policy, &mut worker.critic].into_iter().flatten().for_each(|learner| learner.plant(fault));
    [&mut worker.reference, &mut worker.reward].into_iter().flatten().for_each(|scorer| scorer.plant(fault));
}

/// An error of the control plane, by what the user does about it.
fn control_error(error: ControlError) -> TrainError {
    TrainError::of_kind(error.kind(), error.to_string())
}

struct Builder<'a> {
    job: &'a JobPlan,
    info: &'a RankInfo,
    rank: usize,
    device: Device,
}

/// What ranks meet in to hand weights over, beside the roles' own.
const PUBLISH: &str = "publish";

impl Builder<'_> {
    /// Every role that lives here, and its seats.
    fn build(&self, world: Communicator) -> Result<(RlWorker, Seats)> {
        let mut comms = self.communicators(&world)?;
        let mut train = |role: Role| comms.remove(role.name()).map(|comm| self.train_worker(role, comm)).transpose();
        let policy = train(Role::Policy)?.map(|worker| Learner::new(Role::Policy, &self.job.policy, worker));
        let critic = match (train(Role::Critic)?, self.job.plan(Role::Critic)) {
            (Some(worker), Some(plan)) => Some(Learner::new(Role::Critic, plan, worker)),
            _ => None,
        };
        let (reference, reward) = (train(Role::Reference)?, train(Role::Reward)?);
        let rollout = comms.remove(Role::Rollout.name());
        let rollout = rollout.map(|group| self.generator(policy.as_ref(), group)).transpose()?;
        let publishing =
            comms.remove(PUBLISH).map(|comm| Ok::<_, TrainError>((self.publisher()?, comm))).transpose()?;
        let algorithm = tangelo_algo::algorithm(self.job.algorithm(), self.job.limits());
        let worker = RlWorker {
            policy,
            critic,
            reference,
            reward,
            rollout,
            publishing,
            algorithm: algorithm.map_err(|e| TrainError::Config(e.to_string()))?,
            temperature: self.job.rollout().sampling.temperature,
            step: 0,
            patience: Duration::from_secs(self.job.policy.config.comm.train_timeout_seconds),
            has_learnt: false,
            fault: None,
        };
        Ok((worker, self.seats()?))
    }

    /// Whether a role of the job lives on this rank.
    fn has(&self, role: Role) -> bool {
        self.job.has(role) && self.job.ranks(role).contains(&self.rank)
    }

    /// One for each role that trains or scores here, one for the ranks that generate together, and one for weights on their
    /// way.
    fn communicators(&self, world: &Communicator) -> Result<BTreeMap<&'static str, Communicator>> {
        let key = self.rank as i64;
        let mut splits: Vec<(&'static str, Option<u32>, i64)> = Vec::new();
        for role in [Role::Policy, Role::Critic, Role::Reference, Role::Reward] {
            if self.job.has(role) {
                splits.push((role.name(), self.has(role).then_some(0), key));
            }
        }
        let layout = self.layout()?;
        let place = self.has(Role::Rollout).then(|| self.rank - self.job.ranks(Role::Rollout).start);
        let (replica, part) = (place.map(|p| layout.replica(p) as u32), place.map_or(0, |p| layout.part(p) as i64));
        splits.push((Role::Rollout.name(), replica, part));
        let hands_over = self.has(Role::Policy) || self.has(Role::Rollout);
        splits.push((PUBLISH, hands_over.then_some(0), key));
        let opened = world.split_many(&splits)?;
        let named = splits.iter().zip(opened).filter_map(|((name, ..), comm)| Some((*name, comm?)));
        Ok(named.collect())
    }

    fn train_worker(&self, role: Role, comm: Communicator) -> Result<TrainWorker> {
        let plan = self.job.plan(role).ok_or_else(|| TrainError::Internal(format!("role {role} has no plan")))?;
        let rank = comm.rank();
        let learns = matches!(role, Role::Policy | Role::Critic);
        let mut worker = match learns {
            true => TrainWorker::new(plan, rank, comm, self.device)?,
            false => TrainWorker::frozen(plan, rank, comm, self.device)?,
        };
        worker.set_micro_batches(MicroBatches::Balanced(self.job.rlhf().ppo_max_token_len_per_rank));
        worker.set_share_prompts(self.job.rlhf().share_prompts);
        let is_first = rank == 0;
        let mut new_head = None;
        setup::give_first_weights(plan, &mut worker, &mut |told| match told {
            setup::Told::Warning(message) if role == Role::Reward => new_head = Some(message.to_owned()),
            setup::Told::Warning(message) if is_first => stderr_line(format!("warning: role {role}: {message}")),
            setup::Told::Warning(_) | setup::Told::Phase(_) => {}
        })?;
        match new_head {
            Some(message) => Err(TrainError::Config(format!(
                "role {role}: {message}, so its values would mean nothing; `roles.reward.hf_assets_path` must be a \
                 sequence-classification model with one label"
            ))),
            None => Ok(worker),
        }
    }

    fn layout(&self) -> Result<GenerationLayout> {
        GenerationLayout::of_job(self.job).map_err(|e| TrainError::Config(e.to_string()))
    }

    fn publisher(&self) -> Result<Publisher> {
        let same = self.job.shares_pool(Role::Policy, Role::Rollout);
        let (training, generating) = (self.job.ranks(Role::Policy), self.job.ranks(Role::Rollout));
        let ranks = if same { Ranks::Same } else { Ranks::Separate };
        let kind = kind_of(self.job.rollout_dtype());
        let bucket = (self.job.rollout().update_weights_bucket_mb << 20) / kind.elt_size_in_bytes();
        let policy = &self.job.policy;
        let way = Publish::new(&policy.model, &policy.sharding(), &self.layout()?, ranks, bucket)
            .map_err(|e| TrainError::Internal(e.to_string()))?;
        // Ranks of the communicator are those of both pools, in global order.
        let mut all: Vec<usize> = training.clone().chain(generating.clone()).collect();
        all.sort_unstable();
        all.dedup();
        let place = |global: usize| all.iter().position(|&r| r == global).expect("a rank of either pool");
        let members = Members { training: training.map(place).collect(), generation: generating.map(place).collect() };
        Ok(Publisher::new(way, members, kind))
    }

    /// This rank's part of generation, in a replica of the model whose ranks are `group`.
    fn generator(&self, policy: Option<&Learner>, group: Communicator) -> Result<Generator> {
        let (layout, spec) = (self.layout()?, &self.job.policy.model);
        let place = self.rank - self.job.ranks(Role::Rollout).start;
        let kind = kind_of(self.job.rollout_dtype());
        let model = generation_model(policy.map(Learner::worker), spec, &layout, place, kind, self.device);
        let tokenizer = setup::job_tokenizer(&self.job.policy)?;
        let engine = self.engine(&model, &tokenizer, group)?;
        let shares_memory = Role::ALL.into_iter().any(|role| role != Role::Rollout && self.has(role));
        Ok(Generator::new(model, engine, shares_memory, self.job.trusts_engine()))
    }

    fn engine(&self, model: &Model, tokenizer: &TokenizerAssets, group: Communicator) -> Result<Engine> {
        let mut ends = model.spec().eos_token_ids.clone();
        ends.extend(&tokenizer.eos_token_ids);
        ends.sort_unstable();
        ends.dedup();
        let tokenizer = Arc::new(tokenizer.tokenizer.clone());
        let text: TextSource = Box::new(move || Box::new(Text(StreamDecoder::new(tokenizer.clone(), true))));
        let mut config = self.job.rollout().engine.clone();
        if self.device == Device::Cpu {
            // Ranks of a node share its memory, and none knows what the others are about to take.
            config.kv_memory_fraction /= self.generating_beside().max(1) as f64;
        }
        let engine = Engine::parallel(model, &config, &ends, Some(text), group);
        engine.map_err(|e| TrainError::Device(e.to_string()))
    }

    /// How many ranks of this node generate.
    fn generating_beside(&self) -> usize {
        let first = self.info.rank - self.info.local_rank;
        let here = first..first + self.info.local_world_size;
        self.job.ranks(Role::Rollout).filter(|rank| here.contains(rank)).count()
    }

    /// Who gets what and who answers, of every role that lives here.
    fn seats(&self) -> Result<Seats> {
        let mut seats = Seats::new();
        for role in Role::ALL.into_iter().filter(|&role| self.has(role)) {
            let place = self.rank - self.job.ranks(role).start;
            let (name, seat) = match (role, self.job.plan(role)) {
                (Role::Rollout, _) | (_, None) => {
                    let layout = self.layout()?;
                    let (index, size) = (layout.replica(place), layout.replicas().len());
                    (mesh::GENERATE, Seat { index, size, answers: layout.part(place) == 0 })
                }
                (_, Some(plan)) => (mesh::TRAIN, Seat::training(&plan.topology.mesh, place)),
            };
            seats.entry(role.name().to_owned()).or_default().insert(name.to_owned(), seat);
        }
        Ok(seats)
    }
}

/// Decodes one sample's tokens as they are drawn, for stop texts.
struct Text(StreamDecoder<Arc<tokenizers::Tokenizer>>);

impl TextStream for Text {
    fn push(&mut self, id: u32) -> std::result::Result<String, String> {
        self.0.push(id).map(Option::unwrap_or_default).map_err(|e| e.to_string())
    }
}
