//! The built-in parts: pure functions of a completion and its ground truth.
//!
//! Invariants: linear time in the completion; a completion is never at fault, so an error here is one of the data or the
//! job. Deliberately absent: limits of time, which nothing here needs.

use super::countdown::{Task, Verdict, judge};
use super::{Sample, boxed, format, latex, number};
use crate::prompts::brief;
use regex::Regex;
use serde_json::Value;
use tangelo_configs::reward::{NumericMethod, RewardFunction};

/// What may stand between a marker and its number.
const DRESSING: [char; 4] = [' ', '\t', '*', '\n'];

/// What a part says of a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Judged {
    pub value: f64,
    /// The completion had an answer of the kind that is looked for, right or wrong.
    pub answered: bool,
}

impl Judged {
    fn of(answer: Option<bool>, format_score: f64) -> Judged {
        let value = match answer {
            Some(true) => 1.0,
            Some(false) => format_score,
            None => 0.0,
        };
        Judged { value, answered: answer.is_some() }
    }
}

/// A built-in part, ready to run.
#[derive(Clone, Debug)]
pub(super) enum Builtin {
    Exact { extract: Option<Regex>, ignore_case: bool, normalize_whitespace: bool },
    Numeric { method: NumericMethod, marker: String, tolerance: f64, format_score: f64 },
    Boxed { format_score: f64 },
    Regex { pattern: Regex },
    Format { tags: Vec<String> },
    Length { target: usize, tolerance: usize },
    Overlong { max: usize, buffer: usize },
    Countdown { format_score: f64 },
}

impl Builtin {
    /// The built-in part that a function asks for; nothing where another process or role gives the value.
    ///
    /// # Errors
    /// In words, a pattern that cannot be compiled.
    pub fn new(function: &RewardFunction) -> Result<Option<Builtin>, String> {
        Ok(Some(match function.clone() {
            RewardFunction::Exact { extract, ignore_case, normalize_whitespace } => {
                let extract = extract.map(|pattern| compile(&pattern, "extract")).transpose()?;
                Builtin::Exact { extract, ignore_case, normalize_whitespace }
            }
            RewardFunction::Numeric { method, marker, tolerance, format_score } => {
                Builtin::Numeric { method, marker, tolerance, format_score }
            }
            RewardFunction::Boxed { format_score } => Builtin::Boxed { format_score },
            RewardFunction::Regex { pattern } => Builtin::Regex { pattern: compile(&pattern, "pattern")? },
            RewardFunction::Format { tags } => Builtin::Format { tags },
            RewardFunction::Length { target_tokens, tolerance_tokens } => {
                Builtin::Length { target: target_tokens, tolerance: tolerance_tokens }
            }
            RewardFunction::Overlong { max_tokens, buffer_tokens } => {
                Builtin::Overlong { max: max_tokens, buffer: buffer_tokens }
            }
            RewardFunction::Countdown { format_score } => Builtin::Countdown { format_score },
            RewardFunction::Command { .. } | RewardFunction::Python { .. } | RewardFunction::Model { .. } => {
                return Ok(None);
            }
        }))
    }

    /// Whether the part compares with a ground truth.
    pub fn needs_ground_truth(&self) -> bool {
        match self {
            Builtin::Exact { .. } | Builtin::Numeric { .. } | Builtin::Boxed { .. } | Builtin::Countdown { .. } => true,
            Builtin::Regex { pattern } => has_answer(pattern),
            Builtin::Format { .. } | Builtin::Length { .. } | Builtin::Overlong { .. } => false,
        }
    }

    /// Whether 0 says that the task was not done; a length of 0 punishment says that all is well.
    pub fn zero_is_failure(&self) -> bool {
        !matches!(self, Builtin::Length { .. } | Builtin::Overlong { .. })
    }

    /// Judges a sample.
    ///
    /// # Errors
    /// In words, a ground truth that is missing or of another kind.
    pub fn judge(&self, sample: &Sample) -> Result<Judged, String> {
        let (completion, truth) = (sample.completion.as_str(), &sample.prompt.ground_truth);
        match self {
            Builtin::Exact { extract, ignore_case, normalize_whitespace } => {
                let answer = match extract {
                    Some(pattern) => last_group(pattern, completion),
                    None => Some(completion),
                };
                let plain = |text: &str| plain(text, *ignore_case, *normalize_whitespace);
                let truths = texts(truth)?;
                Ok(Judged::of(answer.map(|a| truths.iter().any(|t| plain(t) == plain(a))), 0.0))
            }
            Builtin::Numeric { method, marker, tolerance, format_score } => {
                let truths = numbers(truth, marker)?;
                let answer = match method {
                    NumericMethod::Strict => after_marker(completion, marker),
                    NumericMethod::Flexible => number::last(completion),
                };
                let right = answer.map(|a| truths.iter().any(|t| a.is_near(t, *tolerance)));
                Ok(Judged::of(right, *format_score))
            }
            Builtin::Boxed { format_score } => {
                let truths = texts(truth)?;
                let right = |a| truths.iter().any(|t| boxed::equivalent(a, latex::last_boxed(t).unwrap_or(t)));
                Ok(Judged::of(latex::last_boxed(completion).map(right), *format_score))
            }
            Builtin::Regex { pattern } => judge_pattern(pattern, completion, truth),
            Builtin::Format { tags } => Ok(Judged::of(Some(format::is_elements(completion, tags)), 0.0)),
            Builtin::Length { target, tolerance } => {
                let value = format::length(sample.completion_tokens, *target, *tolerance);
                Ok(Judged { value, answered: true })
            }
            Builtin::Overlong { max, buffer } => {
                let value = format::overlong(sample.completion_tokens, *max, *buffer);
                Ok(Judged { value, answered: true })
            }
            Builtin::Countdown { format_score } => {
                let task = Task::parse(truth).ok_or_else(|| {
                    format!("the ground truth is {}; expected {{\"target\": 24, \"numbers\": [4, 6]}}", brief(truth))
                })?;
                let verdict = judge(completion, &task);
                Ok(Judged::of((verdict != Verdict::None).then_some(verdict == Verdict::Right), *format_score))
            }
        }
    }
}

fn compile(pattern: &str, key: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| {
        format!("`{key}` is no regular expression of Rust's regex crate (which has no look-around): {error}")
    })
}

fn has_answer(pattern: &Regex) -> bool {
    pattern.capture_names().flatten().any(|name| name == "answer")
}

fn last_group<'t>(pattern: &Regex, text: &'t str) -> Option<&'t str> {
    let captures = pattern.captures_iter(text).last()?;
    captures.get(1).or_else(|| captures.get(0)).map(|m| m.as_str())
}

fn judge_pattern(pattern: &Regex, completion: &str, truth: &Value) -> Result<Judged, String> {
    if !has_answer(pattern) {
        return Ok(Judged::of(pattern.is_match(completion).then_some(true), 0.0));
    }
    let truths = texts(truth)?;
    let answer = pattern.captures_iter(completion).last().and_then(|c| c.name("answer")).map(|m| m.as_str());
    let plain = |text: &str| plain(text, false, true);
    Ok(Judged::of(answer.map(|a| truths.iter().any(|t| plain(t) == plain(a))), 0.0))
}

fn plain(text: &str, ignore_case: bool, normalize_whitespace: bool) -> String {
    let spaced =
        if normalize_whitespace { text.split_whitespace().collect::<Vec<_>>().join(" ") } else { text.to_owned() };
    if ignore_case { spaced.to_lowercase() } else { spaced }
}

/// The number after the last marker that one follows.
fn after_marker(text: &str, marker: &str) -> Option<number::Number> {
    text.rmatch_indices(marker)
        .find_map(|(at, _)| number::leading(text[at + marker.len()..].trim_start_matches(DRESSING)))
}

/// The ground truths as text: one, or a list of which any will do.
fn texts(truth: &Value) -> Result<Vec<String>, String> {
    match truth {
        Value::String(text) if !text.trim().is_empty() => Ok(vec![text.clone()]),
        Value::Number(number) => Ok(vec![number.to_string()]),
        Value::Bool(value) => Ok(vec![value.to_string()]),
        Value::Array(items) if !items.is_empty() => {
            items.iter().map(texts).collect::<Result<Vec<_>, _>>().map(|found| found.concat())
        }
        Value::Null => Err("there is no ground truth to compare with; set `prompts.answer_key`".into()),
        other => Err(format!("the ground truth is {}; expected a text, a number, or a list of these", brief(other))),
    }
}

fn numbers(truth: &Value, marker: &str) -> Result<Vec<number::Number>, String> {
    let read = |text: &String| {
        let marked = || (!marker.is_empty()).then(|| after_marker(text, marker)).flatten();
        number::parse(text).or_else(marked).ok_or_else(|| {
            format!("the ground truth {text:?} is no number; `numeric` compares numbers, `exact` and `boxed` others")
        })
    };
    texts(truth)?.iter().map(read).collect()
}

#[cfg(test)]
mod tests;
