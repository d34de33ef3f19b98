//! The loop: one driver, worker groups over calls; the same for every algorithm.
//!
//! ```text
//!   prompts -> rollout: completions -> rewards -> policy, reference, critic: log-probabilities, values (at once)
//!        ^                                                                   |
//!        |                                                           score: advantages
//!        |                                                                   |
//!   rollout: pull <- policy: publish <--------- mini-batches: policy, critic: forward_backward, optim_step
//! ```
//!
//! Invariants: the driver moves no tensors; a step's numbers depend on (configuration, state, weights) alone, so that a
//! resumed run is the undisturbed one. Deliberately absent: algorithms (`tangelo-algo`) and placement (configuration).

use crate::error::Result;
use crate::scoring::score;
use crate::session::Session;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The last step done.
    pub step: u64,
    /// Whether a signal ended it before the last step that was asked for.
    pub stopped: bool,
}

/// Runs steps until `training.steps`, or until a signal.
///
/// # Errors
/// The first failure of anybody, with rank, role, verb and step.
pub async fn run(s: &mut Session) -> Result<Outcome> {
    s.validate_before_training().await?;
    while s.state.step < s.steps && !s.stop.is_set() {
        s.begin_step();
        // ---- one step ---------------------------------------------------------------------------------------------
        let rollouts = s.collector.next_batch(&s.team, &mut s.state, &mut s.clock).await?;
        let batch = s.clock.time("old_log_prob", s.team.annotate(rollouts.batch.clone())).await?;
        let scoring = score(&s.team, s.course.algorithm.as_ref(), &batch, &s.state.algorithm);
        let (batch, scored, next) = s.clock.time("adv", scoring).await?;
        for minibatch in s.course.minibatches(&batch)? {
            let (policy, critic) = s.course.lessons(&s.state);
            let learnt = s.team.update(&minibatch, policy.as_ref(), critic.as_ref());
            s.tracker.learnt(s.clock.time("update_actor", learnt).await?);
        }
        s.state.policy_version += 1;
        let moved = s.clock.time("update_weights", s.team.publish(s.state.policy_version)).await?;
        s.state.algorithm = next;
        // ---- below here nothing is on the hot path ----------------------------------------------------------------
        s.record(&rollouts, &batch, scored, moved).await?;
        s.save_if_due().await?;
        s.validate_if_due().await?;
        s.end_step().await?;
    }
    s.finish().await
}
