//! Defaults that depend on what kind of job it is, laid under whatever the user gave.
//!
//! The defaults of the sections ([`crate::job`]) are those of pre-training. What would harm another kind of job is here,
//! and nothing else; a key that a user, an include or a `--set` gave always wins. The resolved file shows them all.

use toml::{Table, Value};

/// Reinforcement learning nudges a model that is there: verl's optimizer of the actor, and a constant rate from the start.
const RLHF: &str = "
[optimizer]
lr = 1e-6
beta2 = 0.999
weight_decay = 0.01
[lr_scheduler]
warmup_steps = 0
decay_ratio = 0.0
[rollout.sampling]
n = 8
";

/// Fine-tuning as TRL's `SFTTrainer` has it.
const SFT: &str = "
[optimizer]
lr = 2e-5
";

/// The learning rate of a critic, which starts from a head that knows nothing (verl's).
pub(crate) const CRITIC_LR: f64 = 1e-5;

/// Adds the defaults of the job's kind to the values of its file.
pub(crate) fn lay_under(values: &mut Table) {
    match at(values, &["job", "type"]).and_then(Value::as_str) {
        Some("rlhf") => lay(values, read(RLHF)),
        Some("sft") => lay(values, read(SFT)),
        _ => {}
    }
}

fn read(defaults: &str) -> Table {
    defaults.parse().unwrap_or_else(|e| unreachable!("a text of our own: {e}"))
}

fn at<'a>(values: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(values.get(*first)?, |value, key| value.get(key))
}

/// Adds keys that are not there, table by table. Where a user gave something else than a table, reading it says so.
fn lay(values: &mut Table, defaults: Table) {
    for (key, default) in defaults {
        match (values.get_mut(&key), default) {
            (Some(Value::Table(given)), Value::Table(default)) => lay(given, default),
            (Some(_), _) => {}
            (None, default) => _ = values.insert(key, default),
        }
    }
}
