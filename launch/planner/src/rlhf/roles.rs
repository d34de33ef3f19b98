//! Which role lives on which ranks, in which layout, and what it starts from.

use crate::table::{Align, Table, count};
use tangelo_configs::job::Parallelism;
use tangelo_configs::{JobPlan, Plan, Role};

/// The roles as a table.
pub(super) fn render(job: &JobPlan) -> String {
    use Align::{Left, Right};
    let columns =
        [("role", Left), ("pool", Left), ("ranks", Left), ("layout", Left), ("parameters", Right), ("", Left)];
    let mut table = Table::new(&columns);
    for role in job.roles() {
        let ranks = job.ranks(role);
        let shown =
            if ranks.len() == 1 { ranks.start.to_string() } else { format!("{}-{}", ranks.start, ranks.end - 1) };
        let plan = job.plan(role).unwrap_or(&job.policy);
        table.row([
            role.name().into(),
            job.pool(role),
            shown,
            layout(job, role),
            count(plan.model.num_parameters() as f64),
            does(job, role, plan),
        ]);
    }
    table.render()
}

fn layout(job: &JobPlan, role: Role) -> String {
    let Some(plan) = job.plan(role) else {
        let (tp, ranks) = (job.rollout().tensor_parallel_degree, job.ranks(role).len());
        return format!("{} x tensor parallel {tp}, {:?}", ranks / tp.max(1), job.rollout_dtype()).to_lowercase();
    };
    let degrees = degrees(&plan.config.parallelism);
    let dtype = format!("{:?}", plan.config.training.mixed_precision_param).to_lowercase();
    if degrees.is_empty() { format!("one part, {dtype}") } else { format!("{degrees}, {dtype}") }
}

/// Degrees above 1.
fn degrees(p: &Parallelism) -> String {
    let all = [
        ("pipeline", p.pipeline_parallel_degree as i64),
        ("replicate", p.data_parallel_replicate_degree as i64),
        ("shard", p.data_parallel_shard_degree),
        ("context", p.context_parallel_degree as i64),
        ("tensor", p.tensor_parallel_degree as i64),
        ("weights over", p.zero_parameter_degree),
        ("gradients over", p.zero_gradient_degree),
        ("states over", p.zero_optimizer_degree),
    ];
    let above: Vec<String> = all.iter().filter(|(_, n)| *n > 1).map(|(name, n)| format!("{name} {n}")).collect();
    above.join(", ")
}

fn does(job: &JobPlan, role: Role, plan: &Plan) -> String {
    let start = match &plan.config.checkpoint.initial_load_path {
        Some(path) => format!("starts from {}", path.display()),
        None => "starts from the seed".to_owned(),
    };
    match role {
        Role::Policy | Role::Critic => format!("learns with lr {:e}; {start}", plan.config.optimizer.lr),
        Role::Rollout => {
            let n = job.rollout().sampling.n;
            format!("generates {n} answers to a prompt with the policy's weights")
        }
        Role::Reference => format!("scores; stays what it is; {start}"),
        Role::Reward => format!("judges; {start}"),
    }
}
