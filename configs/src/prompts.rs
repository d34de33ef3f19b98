//! `[prompts]`: the questions that are put to the policy, and what is known of their answers.
//!
//! From files (verl's Parquet columns, or a plain form with a prompt and an answer), or from a built-in generator, so
//! that a demonstration needs no data. Deliberately absent: how prompts become tokens (the tokenizer's chat template).

use crate::ConfigError;
use crate::check::Found;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Largest operand of a generated task: sums and products of a few stay exact in 64 bits.
const MAX_OPERAND: i64 = 1_000_000;
/// Operands of a generated task.
const MAX_OPERANDS: usize = 6;
/// Prompts of a generator, tokens of a prompt: far above anything of use.
const MAX_PROMPTS: usize = 1 << 40;

/// `[prompts]` (our own section).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Prompts {
    /// Globs of .parquet, .arrow or .jsonl(.gz|.zst) files; or use `generator`.
    pub files: Vec<String>,
    /// Tasks that are made up; or use `files`.
    pub generator: Option<PromptGenerator>,
    /// The column of the prompt: a text, or a list of messages {role, content}. Default: `prompt`, or `question` where
    /// there is no `prompt`.
    pub prompt_key: Option<String>,
    /// The column of the ground truth. Default: `reward_model.ground_truth` as verl writes it, else `ground_truth`,
    /// else `answer`.
    pub answer_key: Option<String>,
    /// The ground truth is what follows the last of these marks in its column, such as `####` in GSM8K.
    pub answer_after: Option<String>,
    /// Name of the data source where there is no `data_source` column. Default: the file's name without its ending.
    pub data_source: Option<String>,
    /// A prompt that is a text is the user's message, rendered by the chat template; else the policy goes on with the
    /// text as it stands.
    pub chat: bool,
    /// A system message put before each prompt that has none.
    pub system_prompt: Option<String>,
    /// Text put after each prompt (the last user message), such as an instruction how to answer.
    pub prompt_suffix: Option<String>,
    /// Longest prompt, tokens.
    pub max_prompt_length: usize,
    /// What becomes of longer ones.
    pub overlong: Overlong,
    /// Each epoch has an order of its own; else prompts come in the order of the files.
    pub shuffle: bool,
    /// The orders follow from this.
    pub seed: u64,
    /// Globs of files with the validation set.
    pub validation_files: Vec<String>,
    /// Prompts of the validation set. Of `validation_files` that many are taken (0: all); a generator makes that many
    /// that it never trains on; from `files` that many are held out where there are no `validation_files`.
    pub validation_size: usize,
}

impl Default for Prompts {
    fn default() -> Prompts {
        Prompts {
            files: Vec::new(),
            generator: None,
            prompt_key: None,
            answer_key: None,
            answer_after: None,
            data_source: None,
            chat: true,
            system_prompt: None,
            prompt_suffix: None,
            max_prompt_length: 512,
            overlong: Overlong::default(),
            shuffle: true,
            seed: 0,
            validation_files: Vec::new(),
            validation_size: 0,
        }
    }
}

/// What becomes of a prompt that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// It is left out, and counted.
    Drop,
    /// Its first tokens are cut off.
    TruncateLeft,
    /// The job does not start.
    #[default]
    Error,
}

/// A built-in generator of tasks: task `i` is a function of (seed, `i`) alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum PromptGenerator {
    /// `What is 17 + 25?`; the ground truth is the number.
    Arithmetic {
        /// Operators to draw from: `+`, `-`, `*`.
        #[serde(default = "plus_minus")]
        operators: Vec<String>,
        /// Smallest operand.
        #[serde(default)]
        min: i64,
        /// Largest operand.
        #[serde(default = "ninety_nine")]
        max: i64,
        /// Numbers in a task, from 2 to 6.
        #[serde(default = "two")]
        operands: usize,
        /// The question; `{expression}` stands for the task.
        #[serde(default = "arithmetic_template")]
        template: String,
        /// Tasks in an epoch.
        #[serde(default = "many")]
        size: usize,
        /// Tasks follow from this.
        #[serde(default)]
        seed: u64,
    },
    /// Numbers and a target: an expression of the numbers, each used once, must give the target. The ground truth is
    /// {target, numbers}, as TinyZero writes it; the reward `countdown` checks it.
    Countdown {
        /// Fewest numbers in a task, from 2 to 6.
        #[serde(default = "three")]
        min_numbers: usize,
        /// Most numbers in a task, from 2 to 6.
        #[serde(default = "four")]
        max_numbers: usize,
        /// Smallest number.
        #[serde(default = "one")]
        min: i64,
        /// Largest number.
        #[serde(default = "ninety_nine")]
        max: i64,
        /// Largest target; the smallest is 1.
        #[serde(default = "hundred")]
        max_target: i64,
        /// The question; `{numbers}` and `{target}` stand for the task.
        #[serde(default = "countdown_template")]
        template: String,
        /// Tasks in an epoch.
        #[serde(default = "many")]
        size: usize,
        /// Tasks follow from this.
        #[serde(default)]
        seed: u64,
    },
}

fn plus_minus() -> Vec<String> {
    vec!["+".into(), "-".into()]
}
fn one() -> i64 {
    1
}
fn two() -> usize {
    2
}
fn three() -> usize {
    3
}
fn four() -> usize {
    4
}
fn ninety_nine() -> i64 {
    99
}
fn hundred() -> i64 {
    100
}
fn many() -> usize {
    100_000
}
fn arithmetic_template() -> String {
    "What is {expression}?".into()
}
fn countdown_template() -> String {
    "Using the numbers {numbers}, write an expression that equals {target}. Use each number exactly once, and only \
     +, -, *, / and brackets. Put the expression in <answer> </answer> tags, such as <answer>(1 + 2) / 3</answer>."
        .into()
}

impl PromptGenerator {
    /// Tasks in an epoch.
    pub fn size(&self) -> usize {
        match self {
            PromptGenerator::Arithmetic { size, .. } | PromptGenerator::Countdown { size, .. } => *size,
        }
    }
}

impl Prompts {
    /// Bounds of values, and keys that exclude each other.
    ///
    /// # Errors
    /// [`ConfigError::Values`] with everything that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut found = Found::default();
        self.find_wrong(&mut found);
        found.result()
    }

    pub(crate) fn find_wrong(&self, found: &mut Found) {
        found.require(!self.files.is_empty() || self.generator.is_some(), || {
            "`prompts.files` is empty and there is no `prompts.generator`: nothing to ask; set files = \
             [\"train.parquet\"] or generator = { type = \"arithmetic\" }"
                .into()
        });
        found.require(self.files.is_empty() || self.generator.is_none(), || {
            "`prompts.files` and `prompts.generator` are both set; remove one".into()
        });
        for (key, value) in [
            ("prompts.prompt_key", &self.prompt_key),
            ("prompts.answer_key", &self.answer_key),
            ("prompts.answer_after", &self.answer_after),
        ] {
            found.require(value.is_none() || self.generator.is_none() || !self.validation_files.is_empty(), || {
                format!("`{key}` says how to read files, but `prompts.generator` makes the prompts; remove one")
            });
            found.require(value.as_deref() != Some(""), || format!("`{key}` is empty; remove it or name something"));
        }
        found.require(self.chat || self.system_prompt.is_none(), || {
            "`prompts.system_prompt` is a message, but `prompts.chat` = false has none; remove one".into()
        });
        found.require(self.generator.is_none() || self.overlong != Overlong::Drop, || {
            "`prompts.overlong` = \"drop\" is for files: a generator's prompts are numbered; use \"truncate_left\""
                .into()
        });
        found.within("prompts.max_prompt_length", self.max_prompt_length, 1, MAX_PROMPTS);
        found.within("prompts.validation_size", self.validation_size, 0, MAX_PROMPTS);
        found.require(self.seed <= i64::MAX as u64, || {
            format!("`prompts.seed` = {} is above {}, the largest integer of a TOML file", self.seed, i64::MAX)
        });
        if let Some(generator) = &self.generator {
            check_generator(found, generator);
        }
    }
}

fn check_generator(found: &mut Found, generator: &PromptGenerator) {
    let key = "prompts.generator";
    found.within(&format!("{key}.size"), generator.size(), 1, MAX_PROMPTS);
    match generator {
        PromptGenerator::Arithmetic { operators, min, max, operands, template, .. } => {
            let known = |o: &String| matches!(o.as_str(), "+" | "-" | "*");
            found.require(!operators.is_empty() && operators.iter().all(known), || {
                format!("`{key}.operators` = {operators:?}; name some of \"+\", \"-\" and \"*\"")
            });
            found.within(&format!("{key}.operands"), *operands, 2, MAX_OPERANDS);
            check_range(found, key, *min, *max, -MAX_OPERAND);
            require_place(found, key, template, "{expression}");
            let product = operators.iter().any(|o| o == "*");
            found.require(!product || *operands <= 3, || {
                format!(
                    "`{key}.operands` = {operands} with \"*\" among the `operators`: at most 3, so that results fit"
                )
            });
        }
        PromptGenerator::Countdown { min_numbers, max_numbers, min, max, max_target, template, .. } => {
            found.within(&format!("{key}.max_numbers"), *max_numbers, 2, MAX_OPERANDS);
            found.within(&format!("{key}.min_numbers"), *min_numbers, 2, (*max_numbers).max(2));
            check_range(found, key, *min, *max, 1);
            found.require((1..=MAX_OPERAND).contains(max_target), || {
                format!("`{key}.max_target` = {max_target}; it must be from 1 to {MAX_OPERAND}")
            });
            require_place(found, key, template, "{numbers}");
            require_place(found, key, template, "{target}");
        }
    }
}

fn check_range(found: &mut Found, key: &str, min: i64, max: i64, least: i64) {
    found.require(least <= min && min <= max && max <= MAX_OPERAND, || {
        format!("`{key}.min` = {min} and `{key}.max` = {max}; expected {least} <= min <= max <= {MAX_OPERAND}")
    });
}

fn require_place(found: &mut Found, key: &str, template: &str, place: &str) {
    found.require(template.contains(place), || {
        format!("`{key}.template` lacks {place}, where the task goes: it is {template:?}")
    });
}
