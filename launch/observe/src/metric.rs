//! The one list of metrics. Files, TensorBoard tags, the report and docs/metrics.md all come from it.
//!
//! A name ends in its unit where it has one. To add a metric, add a line here, run the tests, and they say which
//! line docs/metrics.md lacks.

use std::fmt;

macro_rules! metrics {
    ($($variant:ident = $group:literal, $name:literal, $unit:literal, $meaning:literal;)*) => {
        /// A number that a run records.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Metric { $(#[doc = $meaning] $variant,)* }

        impl Metric {
            /// Every metric, in the order of the documentation.
            pub const ALL: &[Metric] = &[$(Metric::$variant),*];

            /// Its key in metrics.jsonl.
            pub const fn name(self) -> &'static str {
                match self { $(Metric::$variant => $name),* }
            }

            /// Its group: the part of its TensorBoard tag before the slash.
            pub const fn group(self) -> &'static str {
                match self { $(Metric::$variant => $group),* }
            }

            /// Its unit.
            pub const fn unit(self) -> &'static str {
                match self { $(Metric::$variant => $unit),* }
            }

            /// What it means.
            pub const fn meaning(self) -> &'static str {
                match self { $(Metric::$variant => $meaning),* }
            }

            /// Its TensorBoard tag, `group/name`.
            pub const fn tag(self) -> &'static str {
                match self { $(Metric::$variant => concat!($group, "/", $name)),* }
            }
        }
    };
}

metrics! {
    Loss = "train", "loss", "nats per token", "Cross-entropy of the step's global batch, mean over its trained tokens, before the update.";
    GradNorm = "train", "grad_norm", "-", "Global L2 norm of the gradient before clipping.";
    Lr = "train", "lr", "-", "Learning rate of the step.";
    TokensSeen = "train", "tokens_seen", "tokens", "Tokens of all batches so far, over all ranks, resumed steps included.";
    SkippedSteps = "train", "skipped_steps", "steps", "Steps skipped so far because loss or gradient was not finite.";
    EvalLoss = "eval", "eval_loss", "nats per token", "Cross-entropy on held-out documents, mean over their tokens.";
    EvalPerplexity = "eval", "eval_perplexity", "-", "exp(eval_loss).";
    TokensPerSecond = "speed", "tokens_per_second", "tokens/s", "Tokens of all ranks per second since the last record, evaluation and blocking saves left out.";
    Mfu = "speed", "mfu", "fraction", "Model FLOPs over what the devices could do (measured matrix peak); attention counted causally, half the square.";
    MfuFullAttention = "speed", "mfu_full_attention", "fraction", "As mfu, attention counted over the whole square (the convention of PaLM and torchtitan).";
    StepSeconds = "time", "step_seconds", "s", "Wall time of a step, mean since the last record; the parts below add up to it, but for host work between them.";
    DataSeconds = "time", "data_seconds", "s", "Waiting for the batch, per step.";
    ForwardSeconds = "time", "forward_seconds", "s", "Forward, per step, recomputation not included.";
    BackwardSeconds = "time", "backward_seconds", "s", "Backward, per step, recomputation included.";
    CommunicationSeconds = "time", "communication_seconds", "s", "Waiting for collectives, per step: what overlaps with compute is not in it.";
    OptimizerSeconds = "time", "optimizer_seconds", "s", "Clipping and update, per step.";
    CheckpointSeconds = "time", "checkpoint_seconds", "s", "Training standing still for a checkpoint, per step.";
    EvalSeconds = "time", "eval_seconds", "s", "The last evaluation, as a whole.";
    MemoryBytes = "memory", "memory_bytes", "bytes", "Peak memory of the fullest rank: allocated on its GPU, resident set on a CPU.";
    PassAllocationBytes = "memory", "pass_allocation_bytes", "bytes", "Peak bytes of tensors that forward and backward allocate on the fullest rank; recorded where TANGELO_COUNT_ALLOCATIONS is set.";
    PredictedMemoryBytes = "memory", "predicted_memory_bytes", "bytes", "Peak memory per rank as the planner predicts it.";
}

impl Metric {
    /// The metric with this key.
    pub fn from_name(name: &str) -> Option<Metric> {
        Metric::ALL.iter().copied().find(|m| m.name() == name)
    }

    /// The parts of [`Metric::StepSeconds`], in the order in which a step goes through them.
    pub const STEP_PARTS: [Metric; 6] = [
        Metric::DataSeconds,
        Metric::ForwardSeconds,
        Metric::BackwardSeconds,
        Metric::CommunicationSeconds,
        Metric::OptimizerSeconds,
        Metric::CheckpointSeconds,
    ];
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The list as the Markdown table of docs/metrics.md.
pub fn markdown_table() -> String {
    let mut table = String::from("| name | unit | TensorBoard tag | meaning |\n|---|---|---|---|\n");
    for m in Metric::ALL {
        table += &format!("| `{}` | {} | `{}` | {} |\n", m.name(), m.unit(), m.tag(), m.meaning());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_documented() {
        let mut names: Vec<_> = Metric::ALL.iter().map(|m| m.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Metric::ALL.len());
        for &m in Metric::ALL {
            assert_eq!(Metric::from_name(m.name()), Some(m));
            assert!(m.meaning().ends_with('.'), "{m}: the meaning is a sentence");
            assert!(!["step", "time"].contains(&m.name()), "{m}: the key is taken by the record itself");
        }
    }

    #[test]
    fn the_documentation_holds_the_list() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
        let text = std::fs::read_to_string(path).unwrap();
        for line in markdown_table().lines() {
            assert!(text.contains(line), "docs/metrics.md lacks this line:\n{line}");
        }
        let own = text.split("## Reinforcement learning").next().unwrap_or_default();
        let documented = own.lines().filter(|l| l.starts_with("| `")).count();
        assert_eq!(documented, Metric::ALL.len(), "docs/metrics.md lists a metric that is gone");
    }
}
