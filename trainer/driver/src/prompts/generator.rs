//! Tasks that are made up: sums to work out, and the game of countdown.
//!
//! Invariants: task `index` of a split is a function of (options, seed, index); a task is in the held-out split or in
//! the training split by a hash of what is asked, whatever the seed, so that no task is in both; every countdown task
//! has a solution. Deliberately absent: any state.

use super::columns::dressed;
use super::{Prompt, PromptInput};
use crate::error::{DriverError, Result};
use serde_json::{Value, json};
use tangelo_configs::Prompts;
use tangelo_configs::prompts::PromptGenerator;
use tangelo_core::hash::{hash_bytes, mix64};

/// One task in this many is held out.
const HELD_OUT_ONE_IN: u64 = 8;
/// Tries to find a task of the split wanted: at one in eight, 2000 tries fail once in 10^115.
const MAX_TRIES: u64 = 2000;
/// Fixed, so that the splits do not depend on the seed.
const SALT: u64 = 0x7A5C_5EED;

/// Which tasks are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Train,
    HeldOut,
}

/// A task before it is dressed as a prompt.
#[derive(Clone, Debug, PartialEq)]
struct Task {
    question: String,
    ground_truth: Value,
    /// The same for tasks that ask the same.
    identity: String,
}

/// The prompt with number `index` of a split.
///
/// # Errors
/// Ranges that hold no task of the split, or no countdown task that can be solved.
pub(super) fn prompt_at(generator: &PromptGenerator, config: &Prompts, part: Part, index: u64) -> Result<Prompt> {
    let (name, seed) = match generator {
        PromptGenerator::Arithmetic { seed, .. } => ("arithmetic", *seed),
        PromptGenerator::Countdown { seed, .. } => ("countdown", *seed),
    };
    let stream = mix64(mix64(seed) ^ mix64(index.wrapping_mul(2) + u64::from(part == Part::HeldOut)));
    for attempt in 0..MAX_TRIES {
        let mut draws = Draws { key: mix64(stream ^ mix64(attempt)), count: 0 };
        let Some(task) = draw(generator, &mut draws) else { continue };
        if part_of(&task.identity) == part {
            return Ok(Prompt {
                index,
                input: dressed(PromptInput::Text(task.question), config),
                ground_truth: task.ground_truth,
                data_source: config.data_source.clone().unwrap_or_else(|| name.to_owned()),
                extra_info: Value::Null,
            });
        }
    }
    let (which, hint) = match part {
        Part::Train => ("to train on", "widen its ranges"),
        Part::HeldOut => ("to hold out for validation", "widen its ranges, or set `prompts.validation_size` = 0"),
    };
    Err(DriverError::Prompts(format!(
        "`prompts.generator` ({name}) found no task {which} in {MAX_TRIES} tries: too few can be made; {hint}"
    )))
}

fn part_of(identity: &str) -> Part {
    if hash_bytes(SALT, identity.as_bytes()).is_multiple_of(HELD_OUT_ONE_IN) { Part::HeldOut } else { Part::Train }
}

fn draw(generator: &PromptGenerator, draws: &mut Draws) -> Option<Task> {
    match generator {
        PromptGenerator::Arithmetic { operators, min, max, operands, template, .. } => {
            Some(arithmetic(draws, operators, (*min, *max), *operands, template))
        }
        PromptGenerator::Countdown { min_numbers, max_numbers, min, max, max_target, template, .. } => {
            let count = draws.between(*min_numbers as i64, *max_numbers as i64) as usize;
            let mut numbers: Vec<i64> = (0..count).map(|_| draws.between(*min, *max)).collect();
            let target = combine(draws, numbers.clone()).filter(|t| (1..=*max_target).contains(t))?;
            let shown = numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(", ");
            let question = template.replace("{numbers}", &shown).replace("{target}", &target.to_string());
            let ground_truth = json!({"target": target, "numbers": numbers});
            numbers.sort_unstable();
            Some(Task { question, ground_truth, identity: format!("{target} of {numbers:?}") })
        }
    }
}

fn arithmetic(draws: &mut Draws, operators: &[String], range: (i64, i64), operands: usize, template: &str) -> Task {
    let numbers: Vec<i64> = (0..operands).map(|_| draws.between(range.0, range.1)).collect();
    let signs: Vec<char> = (1..operands)
        .map(|_| operators[draws.between(0, operators.len() as i64 - 1) as usize].chars().next().unwrap_or('+'))
        .collect();
    let shown = |n: i64| if n < 0 { format!("({n})") } else { n.to_string() };
    let mut expression = shown(numbers[0]);
    for (sign, number) in signs.iter().zip(&numbers[1..]) {
        expression.push_str(&format!(" {sign} {}", shown(*number)));
    }
    // 3 + 5 and 5 + 3 ask the same: of one kind of commutative operator, the order of operands does not count.
    let commutes = signs.iter().all(|s| *s == signs[0] && *s != '-');
    let identity = if commutes {
        let mut sorted = numbers.clone();
        sorted.sort_unstable();
        format!("{}{sorted:?}", signs[0])
    } else {
        expression.clone()
    };
    let ground_truth = evaluate(&numbers, &signs).to_string().into();
    Task { question: template.replace("{expression}", &expression), ground_truth, identity }
}

/// Products before sums and differences, from left to right.
fn evaluate(numbers: &[i64], signs: &[char]) -> i64 {
    let mut terms = vec![numbers[0]];
    for (sign, number) in signs.iter().zip(&numbers[1..]) {
        match (sign, terms.last_mut()) {
            ('*', Some(last)) => *last *= number,
            ('-', _) => terms.push(-number),
            _ => terms.push(*number),
        }
    }
    terms.iter().sum()
}

/// Puts numbers together two by two until one is left; nothing where a step gives no whole number above 0.
fn combine(draws: &mut Draws, mut numbers: Vec<i64>) -> Option<i64> {
    while numbers.len() > 1 {
        let a = numbers.swap_remove(draws.between(0, numbers.len() as i64 - 1) as usize);
        let b = numbers.swap_remove(draws.between(0, numbers.len() as i64 - 1) as usize);
        let result = match draws.between(0, 3) {
            0 => a.checked_add(b)?,
            1 => a - b,
            2 => a.checked_mul(b)?,
            _ if b != 0 && a % b == 0 => a / b,
            _ => return None,
        };
        if result <= 0 {
            return None;
        }
        numbers.push(result);
    }
    numbers.pop()
}

/// Numbers drawn by counting.
struct Draws {
    key: u64,
    count: u64,
}

impl Draws {
    /// Uniform over `least..=most`, to one part in 2^64 over the width.
    fn between(&mut self, least: i64, most: i64) -> i64 {
        self.count += 1;
        let width = (most - least) as u128 + 1;
        least + ((u128::from(mix64(self.key ^ mix64(self.count))) * width) >> 64) as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::countdown_solvable;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn generator(toml: &str) -> PromptGenerator {
        serde_json::from_str(toml).unwrap()
    }

    fn text(prompt: &Prompt) -> String {
        let PromptInput::Messages(messages) = &prompt.input else { panic!("{prompt:?}") };
        messages[0].content.clone()
    }

    #[test]
    fn tasks_depend_on_seed_and_index_alone() {
        let config = Prompts::default();
        let g = generator(r#"{"type": "arithmetic", "seed": 7}"#);
        let at = |g: &PromptGenerator, index| text(&prompt_at(g, &config, Part::Train, index).unwrap());
        let forward: Vec<String> = (0..50).map(|i| at(&g, i)).collect();
        let backward: Vec<String> = (0..50).rev().map(|i| at(&g, i)).collect();
        assert!(forward.iter().eq(backward.iter().rev()));
        let other = generator(r#"{"type": "arithmetic", "seed": 8}"#);
        assert!((0..50).filter(|&i| at(&other, i) == forward[i as usize]).count() < 5);
        // A release may not change the tasks of a seed: resumed runs would go on with others.
        expect_test::expect![[r#"
            [
                "What is 75 + 92?",
            ]
        "#]]
        .assert_debug_eq(&vec![at(&g, 0)]);
    }

    #[test]
    fn sums_are_right() {
        let config = Prompts::default();
        let g =
            generator(r#"{"type": "arithmetic", "operators": ["+", "-", "*"], "operands": 3, "min": -20, "max": 20}"#);
        for index in 0..500 {
            let prompt = prompt_at(&g, &config, Part::Train, index).unwrap();
            let question = text(&prompt);
            let expression = question.strip_prefix("What is ").and_then(|t| t.strip_suffix('?')).unwrap();
            // (-3) in brackets is no operand of the expression reader: 0 - 3 is.
            let readable = expression.replace("(-", "(0 - ");
            let (value, _) = crate::reward::countdown_evaluate(&readable).unwrap();
            assert_eq!(Value::String(value.to_string()), prompt.ground_truth, "{expression}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn held_out_tasks_are_never_trained_on(seed: u32, max in 3i64..30, countdown: bool) {
            let g = if countdown {
                generator(&format!(r#"{{"type": "countdown", "max": {max}, "seed": {seed}}}"#))
            } else {
                generator(&format!(r#"{{"type": "arithmetic", "max": {max}, "seed": {seed}}}"#))
            };
            let config = Prompts::default();
            let all = |part| -> HashSet<String> {
                (0..300).filter_map(|i| prompt_at(&g, &config, part, i).ok()).map(|p| text(&p)).collect()
            };
            let (train, held) = (all(Part::Train), all(Part::HeldOut));
            prop_assert!(!train.is_empty() && train.is_disjoint(&held));
        }
    }

    #[test]
    fn countdown_tasks_can_be_solved() {
        let config = Prompts::default();
        let g = generator(r#"{"type": "countdown", "min_numbers": 2, "max_numbers": 4}"#);
        let mut targets = HashSet::new();
        for index in 0..60 {
            let prompt = prompt_at(&g, &config, Part::Train, index).unwrap();
            assert!(countdown_solvable(&prompt.ground_truth), "{prompt:?}");
            targets.insert(prompt.ground_truth["target"].as_i64().unwrap());
        }
        assert!(targets.len() > 20, "{targets:?}");
    }

    #[test]
    fn ranges_too_narrow_are_named() {
        let g = generator(r#"{"type": "arithmetic", "operators": ["+"], "min": 1, "max": 1}"#);
        let results = [Part::Train, Part::HeldOut].map(|part| prompt_at(&g, &Prompts::default(), part, 0));
        let errors: Vec<String> = results.into_iter().filter_map(|r| r.err()).map(|e| e.to_string()).collect();
        expect_test::expect![[r#"
            [
                "`prompts.generator` (arithmetic) found no task to hold out for validation in 2000 tries: too few can be made; widen its ranges, or set `prompts.validation_size` = 0",
            ]
        "#]]
        .assert_debug_eq(&errors);
    }
}
