//! The worker groups of a job, and the few things that they do together.
//!
//! Deliberately absent: where they live. Roles of one pool take turns, roles of different pools work at once; the same
//! lines say both.

use crate::clock::Clock;
use crate::error::Result;
use std::path::Path;
use tangelo_configs::rlhf::role_folder;
use tangelo_control::{Cluster, Metrics, RemoteBatch, WorkerGroup};
use tangelo_core::{Column, LossSpec};

/// Handles to every role of a job.
pub struct Team {
    /// All of them, and the batches they hold.
    pub cluster: Cluster,
    /// Learns.
    pub policy: WorkerGroup,
    /// Generates.
    pub rollout: WorkerGroup,
    /// Stays what the policy was.
    pub reference: Option<WorkerGroup>,
    /// Predicts returns.
    pub critic: Option<WorkerGroup>,
    /// The reward model.
    pub reward_model: Option<WorkerGroup>,
    /// Whether the engine's log-probabilities are taken for the trainer's.
    pub trusts_engine: bool,
}

/// What a role that learns is told for one mini-batch.
#[derive(Clone, Debug)]
pub struct Lesson {
    /// The loss.
    pub loss: LossSpec,
    /// The learning rate.
    pub lr: f64,
}

impl Team {
    /// The batch with the log-probabilities and values that scoring reads, from all roles at once. Where the engine's
    /// log-probabilities are taken for the policy's, or those of a recorded step, they are there already; what is there
    /// stays.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn annotate(&self, batch: RemoteBatch, clock: &Clock) -> Result<RemoteBatch> {
        let batch = &batch;
        let column = |group: Option<&WorkerGroup>, column: Column, phase: &'static str| {
            let group = group.filter(|_| !batch.has(column)).cloned();
            async move {
                let Some(group) = group else { return Ok(None) };
                let made = group.forward(batch, &[column]).await?;
                clock.lap(phase);
                Ok::<_, tangelo_control::ControlError>(Some(made))
            }
        };
        let old = column(Some(&self.policy), Column::OldLogprob, "old_log_prob");
        let reference = column(self.reference.as_ref(), Column::RefLogprob, "ref");
        let value = column(self.critic.as_ref(), Column::Value, "values");
        clock.begin_laps();
        let (old, reference, value) = tokio::try_join!(old, reference, value)?;
        let mut annotated = batch.clone();
        for made in [old, reference, value].into_iter().flatten() {
            annotated = annotated.join(&made)?;
        }
        Ok(annotated)
    }

    /// One update of the roles that learn from a mini-batch.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn update(
        &self,
        minibatch: &RemoteBatch,
        policy: Option<&Lesson>,
        critic: Option<&Lesson>,
        clock: &Clock,
    ) -> Result<Metrics> {
        let learn = |group: Option<&WorkerGroup>, lesson: Option<&Lesson>, phase: &'static str| {
            let (group, lesson) = (group.cloned(), lesson.cloned());
            async move {
                let (Some(group), Some(lesson)) = (group, lesson) else { return Ok(Metrics::default()) };
                let mut metrics = group.forward_backward(minibatch, &lesson.loss).await?;
                clock.lap(phase);
                metrics.merge(&group.optim_step(lesson.lr).await?);
                clock.lap(phase);
                Ok::<Metrics, tangelo_control::ControlError>(metrics)
            }
        };
        clock.begin_laps();
        let policy = learn(Some(&self.policy), policy, "update_actor");
        let critic = learn(self.critic.as_ref(), critic, "update_critic");
        let (mut metrics, critics) = tokio::try_join!(policy, critic)?;
        metrics.merge(&critics);
        Ok(metrics)
    }

    /// Gives the policy's weights to the rollout role as `version`.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn publish(&self, version: u64) -> Result<Metrics> {
        // Between two pools weights travel by a collective of both, so both verbs must be under way; in one pool the first
        // does the work and the second notes the version.
        let published = tangelo_control::Published { version, details: Vec::new() };
        let ((_, mut moved), pulled) = tokio::try_join!(self.policy.publish(version), self.rollout.pull(&published))?;
        moved.merge(&pulled);
        Ok(moved)
    }

    /// The roles that learn, and so have a part in checkpoints.
    pub fn learners(&self) -> impl Iterator<Item = &WorkerGroup> {
        std::iter::once(&self.policy).chain(&self.critic)
    }

    /// Writes every learner's part of the current step's checkpoint.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn save(&self, checkpoints: &Path) -> Result<()> {
        for group in self.learners() {
            group.save(&role_folder(checkpoints, group.role())).await?;
        }
        Ok(())
    }

    /// Reads them back.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn restore(&self, checkpoints: &Path) -> Result<()> {
        for group in self.learners() {
            group.restore(&role_folder(checkpoints, group.role())).await?;
        }
        Ok(())
    }
}
