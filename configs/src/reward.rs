//! `[reward]`: what a completion is worth, as a weighted sum of parts.
//!
//! ```toml
//! [[reward.parts]]
//! type = "numeric"          # the last number after `####` equals the ground truth
//!
//! [[reward.parts]]
//! type = "python"           # a verl-style compute_score, unchanged
//! path = "my_reward.py"
//! weight = 0.5
//! on_error = "drop"
//! ```
//!
//! Invariants: a part's value does not depend on the other parts; the total is the sum of weight x value over the parts
//! that apply to a sample. Deliberately absent: what a part does (`tangelo-driver`'s `reward/`), and the reward model
//! itself, which is a role of the job.

use crate::ConfigError;
use crate::check::Found;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Processes of one part: more would be a mistake of the unit.
const MAX_PROCESSES: usize = 1 << 10;
/// Calls under way in one process.
const MAX_CALLS: usize = 1 << 16;
/// A day: a deadline beyond it is none.
const MAX_SECONDS: f64 = 86_400.0;

/// `[reward]` (our own section).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Reward {
    /// The parts; a sample's reward is the sum of weight x value over those that apply to it.
    pub parts: Vec<RewardPart>,
}

/// One part of the reward.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RewardPart {
    /// What gives the value.
    #[serde(flatten)]
    pub function: RewardFunction,
    /// Names the part in metrics, rollouts and errors. Default: its type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The factor of its value in the sum; negative punishes, 0 records the value only.
    #[serde(default = "one")]
    pub weight: f64,
    /// What becomes of a sample that this part cannot score.
    #[serde(default)]
    pub on_error: OnError,
    /// The part applies to samples of these data sources only; to all where empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_sources: Vec<String>,
}

/// What becomes of a sample that a part of the reward cannot score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// The sample is left out of training.
    Drop,
    /// The part counts as 0.
    Zero,
    /// The job ends with the error.
    #[default]
    Stop,
}

/// What gives a part's value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardFunction {
    /// 1 where the answer is the ground truth as text, else 0.
    Exact {
        /// A regular expression; the answer is the first group (or the whole) of its last match. Default: the whole
        /// completion.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        extract: Option<String>,
        /// Upper and lower case are the same.
        #[serde(default)]
        ignore_case: bool,
        /// Runs of white space are one space, and none at the ends.
        #[serde(default = "yes")]
        normalize_whitespace: bool,
    },
    /// 1 where the number found in the completion equals the ground truth, else 0. Understands 1,234 and $12 and 50%
    /// and 1/2 and 1.5e3, and compares exactly.
    Numeric {
        /// Where the number is looked for.
        #[serde(default)]
        method: NumericMethod,
        /// What stands before the number where `method` is `strict`.
        #[serde(default = "gsm8k_marker")]
        marker: String,
        /// Largest difference that still counts as equal, relative to the ground truth; 0: exactly equal.
        #[serde(default)]
        tolerance: f64,
        /// Value where there is a number, but a wrong one.
        #[serde(default)]
        format_score: f64,
    },
    /// 1 where the last `\boxed{...}` is the ground truth after normalisation of LaTeX, numbers compared exactly; else
    /// 0.
    Boxed {
        /// Value where there is a box, but a wrong one.
        #[serde(default)]
        format_score: f64,
    },
    /// 1 where the pattern matches somewhere in the completion, else 0. Where it has a group named `answer`, what the
    /// group holds in the last match must also be the ground truth, white space aside.
    Regex {
        /// The pattern, as Rust's regex crate reads it: no look-around, linear time.
        pattern: String,
    },
    /// 1 where the completion is these elements in this order, each once and not empty, with only white space between
    /// them; else 0.
    Format {
        /// Names of elements: `think` stands for `<think>...</think>`.
        #[serde(default = "think_answer")]
        tags: Vec<String>,
    },
    /// 1 at the target length, falling in a straight line to 0 at `tolerance_tokens` from it.
    Length {
        /// The length aimed at, tokens.
        target_tokens: usize,
        /// How far from the target the value reaches 0, tokens.
        tolerance_tokens: usize,
    },
    /// DAPO's soft punishment of overlong completions (arXiv 2503.14476, equation 13): 0 up to `max_tokens` less
    /// `buffer_tokens`, then falling in a straight line to -1 at `max_tokens`.
    Overlong {
        /// Where the punishment reaches -1, tokens.
        max_tokens: usize,
        /// Over how many tokens it grows.
        buffer_tokens: usize,
    },
    /// 1 where the completion's last expression uses each of the ground truth's `numbers` exactly once, with + - * / and
    /// brackets, and gives its `target`; else 0.
    Countdown {
        /// Value where there is an expression of the right numbers, but with another result.
        #[serde(default)]
        format_score: f64,
    },
    /// A program of the user's, in any language, that answers JSON lines (docs/rewards.md).
    Command {
        /// The program and its arguments; no shell is put between.
        command: Vec<String>,
        /// How long a call may take; the process is then ended and started anew.
        #[serde(default = "call_timeout")]
        timeout_seconds: f64,
        /// How many processes run at once.
        #[serde(default = "two")]
        processes: usize,
        /// How many calls a process is given at once.
        #[serde(default = "four")]
        calls_in_flight: usize,
    },
    /// A Python function `compute_score(data_source, solution_str, ground_truth, extra_info)`, as verl calls it.
    Python {
        /// The file that defines it.
        path: PathBuf,
        /// The function's name; it may be `async`.
        #[serde(default = "compute_score")]
        function: String,
        /// Further keyword arguments of every call (verl's `reward_kwargs`).
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        arguments: BTreeMap<String, Value>,
        /// The interpreter: a name on PATH, or a path such as `.venv/bin/python`.
        #[serde(default = "python")]
        interpreter: PathBuf,
        /// How long a call may take; the process is then ended and started anew.
        #[serde(default = "call_timeout")]
        timeout_seconds: f64,
        /// How long the file may take to be imported.
        #[serde(default = "startup_timeout")]
        startup_timeout_seconds: f64,
        /// How many processes run at once.
        #[serde(default = "two")]
        processes: usize,
        /// How many calls a process is given at once; an `async` function runs them together.
        #[serde(default = "four")]
        calls_in_flight: usize,
    },
    /// The score of a reward model.
    Model {
        /// The role that gives it.
        #[serde(default = "reward_role")]
        role: String,
    },
}

/// Where `numeric` looks for the number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NumericMethod {
    /// After the last marker that a number follows.
    #[default]
    Strict,
    /// The last number of the completion.
    Flexible,
}

fn one() -> f64 {
    1.0
}
fn yes() -> bool {
    true
}
fn two() -> usize {
    2
}
fn four() -> usize {
    4
}
fn gsm8k_marker() -> String {
    "####".into()
}
fn think_answer() -> Vec<String> {
    vec!["think".into(), "answer".into()]
}
fn call_timeout() -> f64 {
    10.0
}
fn startup_timeout() -> f64 {
    60.0
}
fn compute_score() -> String {
    "compute_score".into()
}
fn python() -> PathBuf {
    "python3".into()
}
fn reward_role() -> String {
    "reward".into()
}

impl RewardFunction {
    /// The word that stands for it in `type = "..."`.
    pub fn type_name(&self) -> &'static str {
        match self {
            RewardFunction::Exact { .. } => "exact",
            RewardFunction::Numeric { .. } => "numeric",
            RewardFunction::Boxed { .. } => "boxed",
            RewardFunction::Regex { .. } => "regex",
            RewardFunction::Format { .. } => "format",
            RewardFunction::Length { .. } => "length",
            RewardFunction::Overlong { .. } => "overlong",
            RewardFunction::Countdown { .. } => "countdown",
            RewardFunction::Command { .. } => "command",
            RewardFunction::Python { .. } => "python",
            RewardFunction::Model { .. } => "model",
        }
    }
}

impl RewardPart {
    /// A part of weight 1 that stops the job where it fails.
    pub fn new(function: RewardFunction) -> RewardPart {
        RewardPart { function, name: None, weight: one(), on_error: OnError::default(), data_sources: Vec::new() }
    }

    /// Its name in metrics, rollouts and errors.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_else(|| self.function.type_name())
    }
}

impl Reward {
    /// Bounds of values, and names that are used twice.
    ///
    /// # Errors
    /// [`ConfigError::Values`] with everything that is wrong. Patterns are checked where they are compiled.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut found = Found::default();
        self.find_wrong(&mut found);
        found.result()
    }

    pub(crate) fn find_wrong(&self, found: &mut Found) {
        found.require(!self.parts.is_empty(), || {
            "`reward.parts` is empty: nothing to train towards; add [[reward.parts]] with type = \"numeric\" or another"
                .into()
        });
        let mut names = BTreeSet::new();
        for (index, part) in self.parts.iter().enumerate() {
            let key = format!("reward.parts.{index}");
            found.require(names.insert(part.name()), || {
                format!("`{key}.name`: two parts are named \"{}\"; give each its own `name`", part.name())
            });
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            found.require(!part.name().is_empty() && part.name().chars().all(plain), || {
                format!("`{key}.name` = \"{}\"; it is made of letters, digits, `_`, `-` and `.`", part.name())
            });
            found.finite(&format!("{key}.weight"), part.weight);
            check_function(found, &key, &part.function);
        }
    }
}

fn check_function(found: &mut Found, key: &str, function: &RewardFunction) {
    match function {
        RewardFunction::Exact { extract: Some(pattern), .. } => {
            found.not_empty(&format!("{key}.extract"), pattern, "or leave it out to compare the whole completion");
        }
        RewardFunction::Exact { extract: None, .. } => {}
        RewardFunction::Numeric { marker, tolerance, format_score, method } => {
            let hint = "or set method = \"flexible\" to take the last number wherever it stands";
            if *method == NumericMethod::Strict {
                found.not_empty(&format!("{key}.marker"), marker, hint);
            }
            found.not_negative(&format!("{key}.tolerance"), *tolerance);
            found.finite(&format!("{key}.format_score"), *format_score);
        }
        RewardFunction::Boxed { format_score } | RewardFunction::Countdown { format_score } => {
            found.finite(&format!("{key}.format_score"), *format_score);
        }
        RewardFunction::Regex { pattern } => found.not_empty(&format!("{key}.pattern"), pattern, "such as '\\d+'"),
        RewardFunction::Format { tags } => check_tags(found, &format!("{key}.tags"), tags),
        RewardFunction::Length { tolerance_tokens, .. } => {
            found.at_least(&format!("{key}.tolerance_tokens"), *tolerance_tokens, 1);
        }
        RewardFunction::Overlong { max_tokens, buffer_tokens } => {
            found.within(&format!("{key}.buffer_tokens"), *buffer_tokens, 1, (*max_tokens).max(1));
        }
        RewardFunction::Command { .. } | RewardFunction::Python { .. } => check_program(found, key, function),
        RewardFunction::Model { role } => found.require(*role == reward_role(), || {
            format!("`{key}.role` = \"{role}\"; a job has one reward model, the role \"reward\" (`roles.reward`)")
        }),
    }
}

/// A part whose values a program of the user's gives.
fn check_program(found: &mut Found, key: &str, function: &RewardFunction) {
    match function {
        RewardFunction::Command { command, timeout_seconds, processes, calls_in_flight } => {
            found.require(command.first().is_some_and(|program| !program.is_empty()), || {
                format!("`{key}.command` names no program; write command = [\"python3\", \"reward.py\"]")
            });
            check_processes(found, key, *timeout_seconds, *processes, *calls_in_flight);
        }
        RewardFunction::Python {
            path,
            function,
            timeout_seconds,
            startup_timeout_seconds,
            processes,
            calls_in_flight,
            ..
        } => {
            found.require(!path.as_os_str().is_empty(), || {
                format!("`{key}.path` is empty; it is the Python file that defines `{function}`")
            });
            found.not_empty(&format!("{key}.function"), function, "such as \"compute_score\"");
            found.seconds(&format!("{key}.startup_timeout_seconds"), *startup_timeout_seconds, MAX_SECONDS);
            check_processes(found, key, *timeout_seconds, *processes, *calls_in_flight);
        }
        _ => {}
    }
}

fn check_tags(found: &mut Found, key: &str, tags: &[String]) {
    found.require(!tags.is_empty(), || format!("`{key}` is empty; name elements, such as [\"think\", \"answer\"]"));
    let plain = |tag: &String| !tag.is_empty() && tag.chars().all(|c| c.is_alphanumeric() || "_-".contains(c));
    for tag in tags.iter().filter(|tag| !plain(tag)) {
        found.require(false, || {
            format!("`{key}`: \"{tag}\" is no name of an element; write \"think\" for <think>...</think>")
        });
    }
    let distinct: BTreeSet<&String> = tags.iter().collect();
    found.require(distinct.len() == tags.len(), || format!("`{key}`: each element may be named once"));
}

fn check_processes(found: &mut Found, key: &str, timeout_seconds: f64, processes: usize, calls_in_flight: usize) {
    found.seconds(&format!("{key}.timeout_seconds"), timeout_seconds, MAX_SECONDS);
    found.within(&format!("{key}.processes"), processes, 1, MAX_PROCESSES);
    found.within(&format!("{key}.calls_in_flight"), calls_in_flight, 1, MAX_CALLS);
}
