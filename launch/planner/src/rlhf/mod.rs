//! What an `rlhf` job costs before it runs: which role lives where and in which layout, the arithmetic of its batches, the
//! memory of a rank of every pool.
//!
//! Pure functions of a [`JobPlan`], as everything in this crate; `tangelo check` prints [`render`]. Deliberately absent:
//! time, which depends on how long the policy's answers are.

mod batches;
mod memory;
mod roles;

pub use batches::Batches;
pub use memory::{Item, PoolMemory, RoleMemory, pools};

use crate::check::section;
use crate::layers;
use tangelo_configs::job::AsyncMode;
use tangelo_configs::{JobPlan, Plan, Role};

/// The report but for the schedules of the roles that learn, as plain text.
pub fn render(job: &JobPlan) -> String {
    let toml = job.policy.to_toml().unwrap_or_else(|error| format!("# {error}\n"));
    let sections = [
        ("resolved job", toml),
        ("roles", roles::render(job)),
        ("batches", Batches::of(job).render(job)),
        ("layers of the policy", layers::render(&update_plan(job, Role::Policy).unwrap_or_else(|| job.policy.clone()))),
        ("memory", memory::render(job)),
    ];
    sections.map(|(title, text)| section(title, &text)).join("\n")
}

/// The plan of a role's update: micro-batches of as many of the longest rows as a rank computes with at once. None for
/// generation.
pub fn update_plan(job: &JobPlan, role: Role) -> Option<Plan> {
    let mut plan = job.plan(role)?.clone();
    let (batches, parts) = (Batches::of(job), plan.data_parallel_size);
    plan.config.training.local_batch_size = batches.rows_at_once(parts);
    plan.config.training.seq_len = batches.longest_row;
    plan.gradient_accumulation_steps = batches.micro_batches(parts);
    plan.global_batch_size = batches.rows_at_once(parts) * parts * plan.gradient_accumulation_steps;
    plan.config.training.global_batch_size = plan.global_batch_size as i64;
    // Training waits while a checkpoint of such a job is written, but the copy is made all the same.
    plan.config.checkpoint.async_mode = AsyncMode::Async;
    Some(plan)
}
