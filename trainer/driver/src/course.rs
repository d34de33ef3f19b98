//! How a step's batch is learnt from: its mini-batches, and what policy and critic are told of each. The same for a step
//! of a run and for one that is replayed.

use crate::error::Result;
use crate::state::DriverState;
use crate::team::Lesson;
use std::collections::BTreeMap;
use tangelo_algo::{Algorithm, Role};
use tangelo_configs::rlhf::Rlhf;
use tangelo_configs::{JobPlan, Role as JobRole};
use tangelo_control::RemoteBatch;
use tangelo_core::{LossSpec, LrSchedule};

/// What a job says about learning.
pub struct Course {
    /// The algorithm.
    pub algorithm: Box<dyn Algorithm>,
    /// `[rlhf]`
    settings: Rlhf,
    /// Divides the logits in sampling, so in the loss too.
    temperature: f64,
    /// Learning rate of the policy.
    pub schedule: LrSchedule,
    critic_schedule: LrSchedule,
}

impl Course {
    /// The job's.
    pub fn new(job: &JobPlan, algorithm: Box<dyn Algorithm>) -> Course {
        Course {
            algorithm,
            settings: job.rlhf().clone(),
            temperature: job.rollout().sampling.temperature,
            schedule: job.policy.schedule(),
            critic_schedule: job.plan(JobRole::Critic).unwrap_or(&job.policy).schedule(),
        }
    }

    /// A step's mini-batches: whole groups in their order, once per epoch.
    ///
    /// # Errors
    /// None that a user could cause.
    pub fn minibatches(&self, batch: &RemoteBatch) -> Result<Vec<RemoteBatch>> {
        let mut rows_of: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
        batch.rows().iter().enumerate().for_each(|(row, of)| rows_of.entry(of.group).or_default().push(row));
        let groups: Vec<Vec<usize>> = rows_of.into_values().collect();
        let size = match self.settings.ppo_mini_batch_size {
            0 => groups.len(),
            size => size,
        };
        let one_epoch: Vec<RemoteBatch> = groups
            .chunks(size.max(1))
            .map(|groups| batch.select(&groups.concat()))
            .collect::<std::result::Result<_, _>>()?;
        Ok((0..self.settings.ppo_epochs).flat_map(|_| one_epoch.clone()).collect())
    }

    /// What policy and critic are told for a mini-batch of the step of `state`.
    pub fn lessons(&self, state: &DriverState) -> (Option<Lesson>, Option<Lesson>) {
        let loss = |role| self.algorithm.loss(role, &state.algorithm);
        let at_temperature = |loss: LossSpec| LossSpec { temperature: self.temperature, ..loss };
        let step = state.step as usize;
        let warm = step > self.settings.critic_warmup;
        let policy = loss(Role::Policy).filter(|_| warm).map(at_temperature);
        let critic = loss(Role::Critic);
        (
            policy.map(|loss| Lesson { loss, lr: self.schedule.lr(step) }),
            critic.map(|loss| Lesson { loss, lr: self.critic_schedule.lr(step) }),
        )
    }
}

/// The mean over a step's updates of each of their numbers.
pub fn mean_of_updates(updates: &[tangelo_control::Metrics]) -> Vec<(String, f64)> {
    let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for (name, reading) in updates.iter().flat_map(|m| &m.0) {
        let (sum, count) = sums.entry(name.clone()).or_default();
        (*sum, *count) = (*sum + reading.value(), *count + 1.0);
    }
    sums.into_iter().map(|(name, (sum, count))| (name, sum / count)).collect()
}
