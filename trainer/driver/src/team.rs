//! The worker groups of a job, and the few things that they do together.
//!
//! Deliberately absent: where they live. Roles of one pool take turns, roles of different pools work at once; the same
//! lines say both.

use crate::error::Result;
use crate::state::role_folder;
use std::path::Path;
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
    /// log-probabilities are taken for the policy's, or those of a recorded step, they are there already.
    ///
    /// # Errors
    /// Whatever a rank reports.
    pub async fn annotate(&self, batch: RemoteBatch) -> Result<RemoteBatch> {
        let old = (!batch.has(Column::OldLogprob)).then_some((&self.policy, Column::OldLogprob));
        let reference = self.reference.as_ref().map(|group| (group, Column::RefLogprob));
        let value = self.critic.as_ref().map(|group| (group, Column::Value));
        let batch = &batch;
        let column = |asked: Option<(&WorkerGroup, Column)>| {
            let asked = asked.map(|(group, column)| (group.clone(), column));
            async move {
                match asked {
                    Some((group, column)) => group.forward(batch, &[column]).await.map(Some),
                    None => Ok(None),
                }
            }
        };
        let (old, reference, value) = tokio::try_join!(column(old), column(reference), column(value))?;
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
    ) -> Result<Metrics> {
        let learn = |group: Option<&WorkerGroup>, lesson: Option<&Lesson>| {
            let (group, lesson) = (group.cloned(), lesson.cloned());
            async move {
                let (Some(group), Some(lesson)) = (group, lesson) else { return Ok(Metrics::default()) };
                let mut metrics = group.forward_backward(minibatch, &lesson.loss).await?;
                metrics.merge(&group.optim_step(lesson.lr).await?);
                Ok::<Metrics, tangelo_control::ControlError>(metrics)
            }
        };
        let (mut metrics, critics) =
            tokio::try_join!(learn(Some(&self.policy), policy), learn(self.critic.as_ref(), critic))?;
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
