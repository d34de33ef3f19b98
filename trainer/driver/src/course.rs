//! How a step's batch is learnt from: its mini-batches, and what policy and critic are told of each. The same for a step
//! of a run and for one that is replayed.

use crate::error::Result;
use crate::state::DriverState;
use crate::team::Lesson;
use std::collections::BTreeMap;
use std::ops::Range;
use tangelo_algo::{Algorithm, Role};
use tangelo_configs::rlhf::Rlhf;
use tangelo_configs::{JobPlan, Role as JobRole};
use tangelo_control::RemoteBatch;
use tangelo_core::{LossSpec, LrSchedule};

/// What a job says about learning.
pub struct Course {
    /// The algorithm.
    pub algorithm: Box<dyn Algorithm>,
    /// Whether completions of one prompt are compared with one another.
    pub compares_group: bool,
    /// `[rlhf]`
    settings: Rlhf,
    /// Divides the logits in sampling, so in the loss too.
    temperature: f64,
    /// Learning rate of the policy.
    schedule: LrSchedule,
    critic_schedule: LrSchedule,
}

impl Course {
    /// The job's.
    pub fn new(job: &JobPlan, algorithm: Box<dyn Algorithm>) -> Course {
        Course {
            algorithm,
            compares_group: job.algorithm().compares_group(),
            settings: job.rlhf().clone(),
            temperature: job.rollout().sampling.temperature,
            schedule: job.policy.schedule(),
            critic_schedule: job.plan(JobRole::Critic).unwrap_or(&job.policy).schedule(),
        }
    }

    /// A step's mini-batches: whole groups in their order, once per epoch. Where groups were dropped and the rest falls into
    /// no whole mini-batches, there is one less, and they are a little larger.
    ///
    /// # Errors
    /// None that a user could cause.
    pub fn minibatches(&self, batch: &RemoteBatch) -> Result<Vec<RemoteBatch>> {
        let mut rows_of: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
        batch.rows().iter().enumerate().for_each(|(row, of)| rows_of.entry(of.group).or_default().push(row));
        let groups: Vec<Vec<usize>> = rows_of.into_values().collect();
        let one_epoch: Vec<RemoteBatch> = even_cuts(groups.len(), self.settings.ppo_mini_batch_size)
            .map(|groups_of_one| batch.select(&groups[groups_of_one].concat()))
            .collect::<std::result::Result<_, _>>()?;
        Ok((0..self.settings.ppo_epochs).flat_map(|_| one_epoch.clone()).collect())
    }

    /// What a step learns by, by name: learning rates of those that learn, the coefficient of the distance in the loss.
    pub fn rates(&self, state: &DriverState) -> Vec<(String, f64)> {
        let (policy, critic) = self.lessons(state);
        let loss = &self.algorithm.settings().policy;
        let rates = [
            policy.map(|lesson| ("actor/lr", lesson.lr)),
            critic.map(|lesson| ("critic/lr", lesson.lr)),
            loss.use_kl_loss.then_some(("actor/kl_coef", loss.kl_loss_coef)),
        ];
        rates.into_iter().flatten().map(|(name, value)| (name.to_owned(), value)).collect()
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

/// `count` things in order, cut into as many parts of at least `size` as there can be (0: one), as even as can be.
fn even_cuts(count: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = count.checked_div(size).unwrap_or(1).max(1);
    (0..parts).map(move |part| part * count / parts..(part + 1) * count / parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_step_falls_into_even_mini_batches() {
        let check = |count, size, expected: &[usize]| {
            let parts: Vec<Range<usize>> = even_cuts(count, size).collect();
            assert_eq!(parts.iter().map(Range::len).collect::<Vec<_>>(), expected, "{count} by {size}");
            assert!(parts.into_iter().flatten().eq(0..count), "{count} by {size}");
        };
        check(8, 2, &[2, 2, 2, 2]);
        // A group was dropped: a mini-batch of one group would have nothing for the second rank.
        check(7, 2, &[2, 2, 3]);
        check(11, 4, &[5, 6]);
        check(3, 4, &[3]);
        check(6, 0, &[6]);
    }
}
