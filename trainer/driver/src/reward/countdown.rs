//! The game of countdown: an expression of given numbers, each used once, that gives a target.
//!
//! Invariant: arithmetic is exact, so that 8 / 3 * 3 is 8. Deliberately absent: signs, powers, and numbers made by
//! writing two side by side.

use super::format::last_element;
use super::number::{Rational, integer};
use serde_json::Value;

/// Longer expressions are none: the numbers of a task are few.
const MAX_BYTES: usize = 1000;
const MAX_DEPTH: usize = 50;

/// A task, as the generator and TinyZero write it: {"target": 98, "numbers": [44, 19, 35]} (or "nums").
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    pub target: i64,
    /// In ascending order.
    pub numbers: Vec<i64>,
}

impl Task {
    pub fn parse(truth: &Value) -> Option<Task> {
        let target = truth.get("target")?.as_i64()?;
        let numbers = truth.get("numbers").or(truth.get("nums"))?.as_array()?;
        let mut numbers: Vec<i64> = numbers.iter().map(Value::as_i64).collect::<Option<_>>()?;
        numbers.sort_unstable();
        Some(Task { target, numbers })
    }
}

/// How far a completion solves a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// There is no expression of the task's numbers.
    None,
    /// There is one, with another result.
    Wrong,
    /// Solved.
    Right,
}

/// Judges the expression in the last `<answer>` element, or else the last line that has one.
pub(crate) fn judge(completion: &str, task: &Task) -> Verdict {
    let found = match last_element(completion, "answer") {
        Some(inside) => evaluate(left_side(inside)),
        None => completion.lines().rev().find_map(|line| evaluate(left_side(line))),
    };
    match found {
        Some((value, mut used)) => {
            used.sort_unstable();
            match used == task.numbers {
                false => Verdict::None,
                true if value == integer(task.target) => Verdict::Right,
                true => Verdict::Wrong,
            }
        }
        None => Verdict::None,
    }
}

/// `(1 + 2) * 3` of `(1 + 2) * 3 = 9`.
fn left_side(text: &str) -> &str {
    text.split('=').next().unwrap_or(text).trim()
}

/// The value of an expression with an operator at least, and the numbers in it; nothing where a divisor is 0.
pub(crate) fn evaluate(text: &str) -> Option<(Rational, Vec<i64>)> {
    if text.len() > MAX_BYTES {
        return None;
    }
    let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    let text = text.replace(['×', '·'], "*").replace('÷', "/").replace('−', "-");
    let mut parser = Parser { rest: &text, numbers: Vec::new(), depth: 0 };
    let value = parser.sum()?;
    (parser.rest.is_empty() && parser.numbers.len() > 1).then_some((value, parser.numbers))
}

struct Parser<'a> {
    rest: &'a str,
    numbers: Vec<i64>,
    depth: usize,
}

impl Parser<'_> {
    fn sum(&mut self) -> Option<Rational> {
        let mut sum = self.product()?;
        loop {
            match self.operator("+-") {
                Some('+') => sum += self.product()?,
                Some(_) => sum -= self.product()?,
                None => return Some(sum),
            }
        }
    }

    fn product(&mut self) -> Option<Rational> {
        let mut product = self.operand()?;
        loop {
            match self.operator("*/") {
                Some('*') => product *= self.operand()?,
                Some(_) => {
                    let divisor = self.operand()?;
                    if divisor == integer(0) {
                        return None;
                    }
                    product /= divisor;
                }
                None => return Some(product),
            }
        }
    }

    fn operand(&mut self) -> Option<Rational> {
        if let Some(rest) = self.rest.strip_prefix('(') {
            self.rest = rest;
            self.depth += 1;
            let inside = if self.depth > MAX_DEPTH { None } else { self.sum() }?;
            self.depth -= 1;
            self.rest = self.rest.strip_prefix(')')?;
            return Some(inside);
        }
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let number: i64 = self.rest[..end].parse().ok()?;
        self.rest = &self.rest[end..];
        self.numbers.push(number);
        Some(integer(number))
    }

    fn operator(&mut self, operators: &str) -> Option<char> {
        let next = self.rest.chars().next().filter(|c| operators.contains(*c))?;
        self.rest = &self.rest[1..];
        Some(next)
    }
}

/// Whether some expression solves a task: all ways to put two numbers together are tried.
#[cfg(test)]
pub(crate) fn solvable(truth: &Value) -> bool {
    fn search(numbers: &[Rational], target: &Rational) -> bool {
        if let [one] = numbers {
            return one == target;
        }
        let pairs = (0..numbers.len()).flat_map(|a| (0..numbers.len()).map(move |b| (a, b)));
        pairs.filter(|(a, b)| a != b).any(|(a, b)| {
            let (x, y) = (&numbers[a], &numbers[b]);
            let quotient = (*y != integer(0)).then(|| x / y);
            let results = [Some(x + y), Some(x - y), Some(x * y), quotient];
            results.into_iter().flatten().any(|result| {
                let rest = (0..numbers.len()).filter(|i| *i != a && *i != b).map(|i| numbers[i].clone());
                search(&rest.chain([result]).collect::<Vec<_>>(), target)
            })
        })
    }
    let Some(task) = Task::parse(truth) else { return false };
    search(&task.numbers.iter().map(|n| integer(*n)).collect::<Vec<_>>(), &integer(task.target))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_used_once_and_results_are_exact() {
        let task = Task::parse(&json!({"target": 24, "numbers": [8, 3, 8, 3]})).unwrap();
        for (text, expected) in [
            ("<answer>8 / (3 - 8 / 3)</answer>", Verdict::Right),
            ("I think <answer>1</answer>, no: <answer>8/(3-8/3) = 24</answer>", Verdict::Right),
            ("Let me see.\n8 ÷ (3 − 8 ÷ 3) = 24", Verdict::Right),
            ("<answer>8 * 3 + 8 - 3</answer>", Verdict::Wrong),
            ("<answer>8 * 3</answer>", Verdict::None),
            ("<answer>8 + 8 + 8 + 0 * 3 * 3</answer>", Verdict::None),
            ("<answer>24</answer>", Verdict::None),
            ("<answer>8 / (3 - 3) + 8</answer>", Verdict::None),
            ("<answer>8 / (3 - 8 / 3</answer>", Verdict::None),
            ("<answer>-8 + 8 + 3 * 3</answer>", Verdict::None),
            ("", Verdict::None),
        ] {
            assert_eq!(judge(text, &task), expected, "{text}");
        }
        assert_eq!(Task::parse(&json!({"target": 3, "nums": [2, 1]})), Some(Task { target: 3, numbers: vec![1, 2] }));
        assert_eq!(Task::parse(&json!("24")), None);
        assert_eq!(evaluate(&"(".repeat(900)), None);
    }
}
