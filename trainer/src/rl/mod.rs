//! The roles of a reinforcement-learning job on one rank, and the verbs that the driver asks of them.
//!
//! ```text
//!   Rank (calls, batches) -> RlWorker on the device thread
//!        policy, critic: Learner { TrainWorker, Saver }     forward_backward, optim_step, forward, save, restore
//!        reference, reward: TrainWorker                     forward
//!        rollout: Generator { Model, Engine }               generate, pull
//!        policy -> rollout: Publisher                       publish / pull
//!        policy: Algorithm                                  score
//! ```
//!
//! Roles of one pool live in the same process and take turns. Deliberately absent: what comes when; the driver says it.

mod generator;
mod learner;

pub use generator::Generator;
pub use learner::Learner;

use crate::error::TrainError;
use crate::faults::Fault;
use crate::publish::{Published, Publisher};
use crate::worker::TrainWorker;
use std::time::{Duration, Instant};
use tangelo_algo::{Algorithm, Call};
use tangelo_configs::Role;
use tangelo_control::{Context, Control, Job, Metrics, NewColumns, Output, Reading, Request, Worker, WorkerError};
use tangelo_core::{Column, Moment};
use tangelo_kernels::comm::Communicator;

/// The roles of this rank.
pub struct RlWorker {
    /// Learns, and gives its weights to the rollout role.
    pub policy: Option<Learner>,
    /// Predicts returns.
    pub critic: Option<Learner>,
    /// Stays what the policy was.
    pub reference: Option<TrainWorker>,
    /// Judges.
    pub reward: Option<TrainWorker>,
    /// Generates.
    pub rollout: Option<Generator>,
    /// How weights travel from policy to rollout, among the ranks of both.
    pub publishing: Option<(Publisher, Communicator)>,
    /// Scores batches.
    pub algorithm: Box<dyn Algorithm>,
    /// Divides the logits, in sampling as in the loss.
    pub temperature: f64,
    /// The step of the last call.
    pub step: u64,
    /// How long ranks wait for each other once they have learnt; the first update may take longer.
    pub patience: Duration,
    /// Whether an update was done.
    pub has_learnt: bool,
    /// Tests only.
    pub fault: Option<Fault>,
}

type Result<T> = std::result::Result<T, WorkerError>;

impl Worker for RlWorker {
    fn call(&mut self, job: &Job, control: &Control) -> Result<Output> {
        let role = role_of(&job.context)?;
        self.note_step(job.context.step).map_err(refused)?;
        match &job.request {
            Request::ForwardBackward { loss, .. } => {
                self.learner(role)?.forward_backward(job.batch()?, loss).map(Output::metrics).map_err(refused)
            }
            Request::OptimStep { lr } => {
                let metrics = self.learner(role)?.optim_step(*lr).map_err(refused)?;
                self.has_learnt = true;
                Ok(Output::metrics(metrics))
            }
            Request::Forward { outputs, .. } => self.forward(role, job, outputs),
            Request::Score { spec, .. } => self.score(job, spec),
            Request::Publish { version } | Request::Pull { published: tangelo_control::Published { version, .. } } => {
                self.hand_over(role, *version)
            }
            Request::Generate { sampling, .. } => {
                let generator = self.rollout.as_mut().ok_or_else(|| lacks(Role::Rollout))?;
                generator.generate(job.batch()?, sampling, control, job.context.answers)
            }
            Request::Save { folder } => {
                self.learner(role)?.save(folder, job.context.step).map(|()| Output::default()).map_err(refused)
            }
            Request::Restore { folder } => {
                self.learner(role)?.restore(folder, job.context.step).map(|()| Output::default()).map_err(refused)
            }
        }
    }
}

impl RlWorker {
    /// Where a step begins, reports about failures learn of it.
    fn note_step(&mut self, step: u64) -> crate::error::Result<()> {
        if step == self.step {
            return Ok(());
        }
        self.step = step;
        let learners = [&self.policy, &self.critic].into_iter().flatten().map(Learner::worker);
        learners.chain([&self.reference, &self.reward].into_iter().flatten()).try_for_each(|w| w.begin_step(step))?;
        let moment = Moment { step, phase: None };
        self.publishing.iter().for_each(|(_, comm)| comm.enter(moment));
        let learner = [&self.policy, &self.critic].into_iter().flatten().find(|_| self.has_learnt);
        // Of all groups of this rank.
        learner.into_iter().for_each(|learner| learner.worker().world().set_timeout(self.patience));
        self.fault.map_or(Ok(()), |fault| fault.strike(moment))
    }

    fn learner(&mut self, role: Role) -> Result<&mut Learner> {
        let learner = match role {
            Role::Policy => self.policy.as_mut(),
            Role::Critic => self.critic.as_mut(),
            Role::Rollout | Role::Reference | Role::Reward => None,
        };
        learner.ok_or_else(|| lacks(role))
    }

    /// The model that answers for a role without learning.
    fn scorer(&self, role: Role) -> Result<&TrainWorker> {
        let found = match role {
            Role::Policy => self.policy.as_ref().map(Learner::worker),
            Role::Critic => self.critic.as_ref().map(Learner::worker),
            Role::Reference => self.reference.as_ref(),
            Role::Reward => self.reward.as_ref(),
            Role::Rollout => None,
        };
        found.ok_or_else(|| lacks(role))
    }

    fn forward(&self, role: Role, job: &Job, outputs: &[Column]) -> Result<Output> {
        let scored = self.scorer(role)?.forward(job.batch()?, outputs, self.temperature).map_err(refused)?;
        let Some(scored) = scored.filter(|_| job.context.answers) else { return Ok(Output::default()) };
        let column = |&column: &Column| Some((column, scored.records().column_by_name(column.name())?.clone()));
        Ok(Output::columns(NewColumns::new(outputs.iter().filter_map(column).collect())?))
    }

    fn score(&self, job: &Job, spec: &serde_json::Value) -> Result<Output> {
        if !job.context.answers {
            return Ok(Output::default());
        }
        let call: Call = serde_json::from_value(spec.clone()).map_err(internal)?;
        let served = call.serve(self.algorithm.as_ref(), job.batch()?);
        let (columns, statistics) = served.map_err(|e| refused(TrainError::Data(e.to_string())))?;
        let mut output = Output { detail: serde_json::to_value(statistics).map_err(internal)?, ..Output::default() };
        if let Some(scored) = columns {
            let column = |column: Column| Some((column, scored.records().column_by_name(column.name())?.clone()));
            output.columns = Some(NewColumns::new(self.algorithm.writes().into_iter().filter_map(column).collect())?);
        }
        Ok(output)
    }

    /// Weights from policy to rollout. Where both live here, the policy's verb does it all and the rollout's notes the
    /// version; else both take part in the collective.
    fn hand_over(&mut self, role: Role, version: u64) -> Result<Output> {
        let both = self.policy.is_some() && self.rollout.is_some();
        let mut metrics = Metrics::default();
        if !(both && role == Role::Rollout) {
            let start = Instant::now();
            let moved = self.publish().map_err(refused)?;
            metrics = numbers(moved, start.elapsed().as_secs_f64());
        }
        if let (Some(rollout), Role::Rollout) = (&mut self.rollout, role) {
            rollout.set_version(version);
        }
        Ok(Output::metrics(metrics))
    }

    /// Gives the generator this rank's share of the policy's weights.
    ///
    /// # Errors
    /// A rank that is lost.
    pub fn publish(&mut self) -> crate::error::Result<Published> {
        let Some((publisher, comm)) = &self.publishing else { return Ok(Published::default()) };
        publisher.run(comm, self.policy.as_ref().map(Learner::worker), self.rollout.as_ref().map(Generator::model))
    }
}

fn numbers(moved: Published, seconds: f64) -> Metrics {
    let mut metrics = Metrics::default();
    metrics.add("reshard/received_bytes", Reading::Sum(moved.received_bytes as f64));
    metrics.add("reshard/max_received_bytes", Reading::Max(moved.received_bytes as f64));
    metrics.add("reshard/shared_bytes", Reading::Sum(moved.shared_bytes as f64));
    metrics.add("reshard/seconds", Reading::Max(seconds));
    metrics
}

fn role_of(context: &Context) -> Result<Role> {
    let found = Role::ALL.into_iter().find(|role| role.name() == context.role);
    found.ok_or_else(|| internal(format!("rank {} knows no role `{}`", context.rank, context.role)))
}

fn lacks(role: Role) -> WorkerError {
    internal(format!("role {role} does not do that on this rank"))
}

/// An error of the trainer as the driver is told it.
pub(crate) fn refused(error: TrainError) -> WorkerError {
    WorkerError::new(error.kind(), error.to_string())
}

/// A bug of ours.
pub(crate) fn internal(what: impl std::fmt::Display) -> WorkerError {
    WorkerError::new(tangelo_core::FailureKind::Internal, what.to_string())
}
