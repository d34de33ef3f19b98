//! What `tangelo check` prints: the resolved job, its layers, its memory, and one step of it.

use crate::{layers, memory, walk};
use tangelo_configs::Plan;

/// The whole report, as plain text.
pub fn render_check(plan: &Plan) -> String {
    let toml = plan.to_toml().unwrap_or_else(|error| format!("# {error}\n"));
    let memory = memory::predict(plan);
    let sections = [
        ("resolved job", toml),
        ("layers", layers::render(plan)),
        ("memory", memory.render(plan)),
        ("one step", walk::render(plan)),
    ];
    let titled = sections.map(|(title, text)| format!("# ---- {title} {}\n\n{text}", "-".repeat(72 - title.len())));
    titled.join("\n")
}
