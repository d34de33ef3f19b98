//! Whether two answers of mathematics are the same: as text after normalisation, as exact numbers, as tuples, intervals
//! and sets of these, or as expressions in normal form.
//!
//! Invariant: [`equivalent`] is symmetric, and an answer that it accepts is right in value, save for units, which it
//! passes over. Deliberately absent: approximation; 0.33 is not 1/3.

use super::algebra::Expression;
use super::{latex, number};

/// A longer answer is compared as text only.
const MAX_ANSWER_BYTES: usize = 2000;

/// Whether `answer` says the same as `truth`.
pub(crate) fn equivalent(answer: &str, truth: &str) -> bool {
    if answer.trim() == truth.trim() {
        return !answer.trim().is_empty();
    }
    if answer.len().max(truth.len()) > MAX_ANSWER_BYTES {
        return false;
    }
    let (answer, truth) = (latex::normalize(answer), latex::normalize(truth));
    !answer.is_empty() && same(&answer, &truth)
}

fn same(a: &str, b: &str) -> bool {
    if a == b {
        return true;
    }
    let is_word = |t: &str| t.len() > 1 && t.chars().all(char::is_alphabetic);
    if is_word(a) && is_word(b) {
        return a.eq_ignore_ascii_case(b);
    }
    if let (Some(x), Some(y)) = (number::parse(a), number::parse(b)) {
        return x.equals(&y);
    }
    match (List::parse(a), List::parse(b)) {
        (Some(x), Some(y)) => x.same(&y),
        (None, None) => Expression::parse(a).is_some_and(|x| Expression::parse(b) == Some(x)),
        _ => false,
    }
}

/// Several answers in one.
struct List<'a> {
    /// The brackets around a tuple or an interval; nothing of sets and bare lists, whose order means nothing.
    brackets: Option<(char, char)>,
    items: Vec<&'a str>,
}

impl<'a> List<'a> {
    fn parse(text: &'a str) -> Option<List<'a>> {
        let united: Vec<&str> = text.split("\\cup").collect();
        if united.len() > 1 {
            return Some(List { brackets: None, items: united });
        }
        if let Some(inside) = text.strip_prefix("\\{").and_then(|t| t.strip_suffix("\\}")) {
            return Some(List { brackets: None, items: split(inside)? });
        }
        let items = split(text)?;
        if items.len() > 1 {
            return Some(List { brackets: None, items });
        }
        let (open, close) = (text.chars().next()?, text.chars().next_back()?);
        if !"([".contains(open) || !")]".contains(close) || text.len() < 2 {
            return None;
        }
        let items = split(&text[1..text.len() - 1])?;
        (items.len() > 1 || open == '[').then_some(List { brackets: Some((open, close)), items })
    }

    fn same(&self, other: &List<'_>) -> bool {
        if self.brackets != other.brackets || self.items.len() != other.items.len() {
            return false;
        }
        if self.brackets.is_some() {
            return self.items.iter().zip(&other.items).all(|(a, b)| same(a, b));
        }
        let mut left = other.items.clone();
        self.items.iter().all(|item| match left.iter().position(|other| same(item, other)) {
            Some(found) => {
                left.swap_remove(found);
                true
            }
            None => false,
        })
    }
}

/// The parts between commas that stand in no bracket; nothing where brackets are not closed. Any bracket closes any:
/// [0, 1) is an interval.
fn split(text: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0usize);
    for (index, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.checked_sub(1)?,
            ',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (depth == 0).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(cases: &[(&str, &str)], expected: bool) {
        for (a, b) in cases {
            assert_eq!(equivalent(a, b), expected, "{a} and {b}");
            assert_eq!(equivalent(b, a), expected, "{b} and {a}");
        }
    }

    #[test]
    fn the_same_answer_in_other_words() {
        check(
            &[
                (r"\frac{1}{2}", "0.5"),
                (r"\dfrac12", "1/2"),
                (r"-\frac{3}{4}", "-0.75"),
                (r"\left( \frac{1}{2}, -3 \right)", "(0.5,-3)"),
                (r"\left[0, 1\right)", "[0,1)"),
                (r"\{1, 2, 3\}", r"\left\{3,1,2\right\}"),
                ("1, 2", "2,1"),
                (r"(-\infty, 0.5) \cup (3, \infty)", r"\left(-\infty,\tfrac12\right)\cup(3,\infty)"),
                (r"90^\circ", "90"),
                (r"12\text{ cm}^2", "12"),
                ("18 dollars", r"\$18"),
                (r"50\%", "50"),
                (r"50\%", "0.5"),
                ("1,000", "1000"),
                ("10000", r"10{,}000"),
                (r"x = \sqrt{8}", r"2\sqrt2"),
                (r"\text{Even}", "even"),
                (r"\text{(B)}", "B"),
                ("x^2 + 2x + 1", r"1+2x+x^2"),
                (r"\frac{\pi}{2}", r"0.5\pi"),
                (r"1.5 \times 10^{3}", "1500"),
                (r"3\frac{1}{2}", r"\frac{7}{2}"),
                (".5", "0.50"),
                (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
                (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
            ],
            true,
        );
    }

    #[test]
    fn other_answers() {
        check(
            &[
                ("0.33", r"\frac13"),
                ("(1,2)", "(2,1)"),
                ("(0,1)", "[0,1]"),
                ("[0,1)", "[0,1]"),
                ("1,2", "1"),
                (r"\{1,1,2\}", r"\{1,2,2\}"),
                ("2", "-2"),
                ("12", "1"),
                ("x", "y"),
                ("", "0"),
                ("", ""),
                ("even", "odd"),
                ("A", "B"),
                (r"\sqrt{2}", "1.41"),
                (r"1010_2", "1010"),
                ("3:45", "3.45"),
                ("(1", "1"),
            ],
            false,
        );
    }

    proptest! {
        #[test]
        fn fractions_are_equal_exactly_where_they_are(a in -50i64..50, b in 1i64..50, c in -50i64..50, d in 1i64..50) {
            let (x, y) = (format!(r"\frac{{{a}}}{{{b}}}"), format!("{c}/{d}"));
            prop_assert_eq!(equivalent(&x, &y), a * d == c * b);
            let (left, right) = (format!("({x}, 1)"), format!("({}/{}, 1)", 3 * a, 3 * b));
            prop_assert!(equivalent(&left, &right));
        }

        #[test]
        fn any_two_texts_are_compared_alike_both_ways(
            a in r"[-0-9x,.+(){}\\ ^frac]{0,24}", b in r"[-0-9x,.+(){}\\ ^frac]{0,24}",
        ) {
            prop_assert_eq!(equivalent(&a, &b), equivalent(&b, &a));
        }
    }
}
