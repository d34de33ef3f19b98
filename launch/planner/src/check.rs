//! What `tangelo check` prints: the resolved job, its layers, its memory, one step of it, and the proof of its
//! schedule.

use crate::{Proof, layers, memory, prove, walk};
use std::time::Duration;
use tangelo_configs::Plan;

/// The report but for the schedule, as plain text.
pub fn render_check(plan: &Plan) -> String {
    let toml = plan.to_toml().unwrap_or_else(|error| format!("# {error}\n"));
    let memory = memory::predict(plan);
    let sections = [
        ("resolved job", toml),
        ("layers", layers::render(plan)),
        ("memory", memory.render(plan)),
        ("one step", walk::render(plan)),
    ];
    sections.map(|(title, text)| section(title, &text)).join("\n")
}

/// What follows it, of a role that learns (`title`): what ranks communicate, and that they understand each other, which took so long to show.
pub fn render_schedule(title: &str, plan: &Plan, proof: &Proof, took: Duration) -> String {
    format!("\n{}", section(title, &prove::render(plan, proof, took)))
}

/// A text under its title, as the report has them.
pub fn section(title: &str, text: &str) -> String {
    format!("# ---- {title} {}\n\n{text}", "-".repeat(72 - title.len()))
}
