//! Answers in LaTeX, in one way of writing: what stands in the last box, without spacing, sizing, units and dressing.
//!
//! Invariant: the result of [`normalize`] says the same as its input to a reader of mathematics; nothing is computed
//! here. Deliberately absent: macros of the document.

use super::number;

/// What the last `\boxed{...}` (or `\fbox{...}`, or `\boxed x`) of `text` holds; nothing where it is not closed.
pub(crate) fn last_boxed(text: &str) -> Option<&str> {
    let start = ["\\boxed", "\\fbox"].iter().filter_map(|name| Some(text.rfind(name)? + name.len())).max()?;
    let rest = &text[start..];
    if rest.trim_start().starts_with('{') {
        return group(rest.trim_start()).map(|(inside, _)| inside);
    }
    let word = rest.strip_prefix(' ')?.split(['$', '\n']).next()?.trim();
    (!word.is_empty()).then_some(word)
}

/// Splits `{inside}rest`; braces may be nested, escaped ones do not count.
pub(crate) fn group(text: &str) -> Option<(&str, &str)> {
    let (mut depth, mut escaped) = (0usize, false);
    for (index, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' if depth == 1 => return Some((&text[1..index], &text[index + 1..])),
            '}' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return None;
        }
    }
    None
}

/// Commands that change how a thing looks, not what it is.
const DRESSING: &[&str] = &[
    "\\displaystyle",
    "\\textstyle",
    "\\limits",
    "\\left",
    "\\right",
    "\\bigl",
    "\\bigr",
    "\\Bigl",
    "\\Bigr",
    "\\big",
    "\\Big",
    "\\quad",
    "\\qquad",
    "\\!",
    "\\,",
    "\\;",
    "\\:",
    "\\ ",
    "~",
    "^{\\circ}",
    "^\\circ",
    "\\circ",
    "\\degree",
    "°",
    "\\$",
    "$",
    "\\(",
    "\\)",
    "\\[",
    "\\]",
];

/// Two ways to write the same; the second is ours.
const SYNONYMS: &[(&str, &str)] = &[
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"),
    ("{,}", ","),
    ("\\cdot", "*"),
    ("\\times", "*"),
    ("×", "*"),
    ("·", "*"),
    ("\\div", "/"),
    ("÷", "/"),
    ("−", "-"),
    ("–", "-"),
    ("π", "\\pi"),
    ("∞", "\\infty"),
    ("√", "\\sqrt"),
    ("\\leq", "\\le"),
    ("≤", "\\le"),
    ("\\geq", "\\ge"),
    ("≥", "\\ge"),
    ("\\lbrace", "\\{"),
    ("\\rbrace", "\\}"),
    ("\\dots", "\\ldots"),
    ("**", "^"),
    ("\\neq", "\\ne"),
];

/// Commands whose argument is text or looks different, but means itself.
const WRAPPERS: &[&str] = &[
    "\\text",
    "\\textbf",
    "\\textit",
    "\\textrm",
    "\\mathrm",
    "\\mathbf",
    "\\mbox",
    "\\operatorname",
    "\\boxed",
    "\\fbox",
];

/// The answer in one way of writing.
pub(crate) fn normalize(answer: &str) -> String {
    let mut text = answer.trim().trim_end_matches(['.', ',', ';']).to_owned();
    for (other, ours) in SYNONYMS {
        text = text.replace(other, ours);
    }
    text = without_dressing(&text);
    text = unwrapped(&text);
    text = without_assignment(text.trim()).to_owned();
    text = without_unit(text.trim()).to_owned();
    text = without_thousands(&text.replace("\\%", "%"));
    let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    without_choice_brackets(text.trim_end_matches('.')).to_owned()
}

/// A command ends where no letter follows: `\left` is in `\left(`, not in `\leftarrow`.
fn without_dressing(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let ends = |name: &str| {
            !name.starts_with('\\') || !name.ends_with(|c: char| c.is_ascii_alphabetic()) || {
                !rest[name.len()..].starts_with(|c: char| c.is_ascii_alphabetic())
            }
        };
        match DRESSING.iter().find(|name| rest.starts_with(**name) && ends(name)) {
            Some(name) => {
                rest = &rest[name.len()..];
                // A space keeps words apart that spacing kept apart.
                if name.starts_with("\\q") || *name == "\\ " || *name == "~" {
                    kept.push(' ');
                }
            }
            None => {
                kept.push(next);
                rest = &rest[next.len_utf8()..];
                // An escaped character is one thing: the second backslash of a line break starts no command.
                if next == '\\' && rest.starts_with('\\') {
                    kept.push('\\');
                    rest = &rest[1..];
                }
            }
        }
    }
    kept
}

/// Unwraps `\text{...}` and its like; where a number stands before it, what it holds is a unit and goes.
fn unwrapped(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('\\') {
        kept.push_str(&rest[..start]);
        rest = &rest[start..];
        let wrapper = WRAPPERS.iter().filter_map(|name| {
            let after = rest.strip_prefix(name)?.trim_start();
            after.starts_with('{').then(|| group(after)).flatten()
        });
        match wrapper.max_by_key(|(inside, _)| std::cmp::Reverse(inside.len())) {
            Some((inside, after)) if is_unit(inside) && number::parse(&kept).is_some() => {
                rest = after.trim_start_matches(|c: char| "^{}23".contains(c));
            }
            Some((inside, after)) => {
                kept.push_str(&unwrapped(inside));
                rest = after;
            }
            None => {
                let length = rest.chars().take(2).map(char::len_utf8).sum();
                kept.push_str(&rest[..length]);
                rest = &rest[length..];
            }
        }
    }
    kept.push_str(rest);
    kept
}

/// Whether a text after a number is a unit: words, maybe with a power.
fn is_unit(text: &str) -> bool {
    let text = text.trim();
    text.chars().any(char::is_alphabetic)
        && text.chars().all(|c| c.is_alphabetic() || c.is_whitespace() || "./^23{}'".contains(c))
        && !["and", "or", "to", "if", "for"].iter().any(|word| text.split_whitespace().any(|w| w == *word))
}

/// `x = 5` is 5, `f(x) = 2x` is 2x, `x \in [0,1]` is [0,1].
fn without_assignment(text: &str) -> &str {
    for sign in ["=", "\\in "] {
        let mut sides = text.split(sign);
        let (Some(left), Some(right), None) = (sides.next(), sides.next(), sides.next()) else { continue };
        let left = left.trim();
        let mut letters = left.chars();
        let name = letters.next().is_some_and(char::is_alphabetic);
        let argument = letters.as_str();
        let plain = argument.is_empty() || argument.starts_with('_') && argument.len() <= 4;
        if name && (plain || argument.starts_with('(') && argument.ends_with(')') && argument.len() <= 3) {
            return right;
        }
    }
    text
}

/// `5 cm` is 5, `18 dollars` is 18; `2 x` and `2 pi` stay.
fn without_unit(text: &str) -> &str {
    let Some((before, unit)) = text.split_once(' ') else { return text };
    let is_word =
        |w: &str| w.trim_end_matches('.').chars().count() >= 2 && w.chars().all(|c| c.is_alphabetic() || c == '.');
    let known = ["pi", "sqrt", "and", "or", "to"].iter().any(|w| unit.split_whitespace().any(|u| u == *w));
    let words = unit.trim_end_matches(|c: char| "^{}23".contains(c));
    let is_number = number::parse(before).is_some();
    if is_number && !known && !words.is_empty() && words.split_whitespace().all(is_word) { before } else { text }
}

/// 1,234 is 1234 where the whole answer is a number; in (1,234) the comma separates.
fn without_thousands(text: &str) -> String {
    let plain = text.trim();
    let grouped = plain.contains(',') && !plain.contains([' ', '/']) && number::parse(plain).is_some();
    if grouped { plain.replace(',', "") } else { text.to_owned() }
}

/// (B) is B.
fn without_choice_brackets(text: &str) -> &str {
    let inside = text.strip_prefix('(').and_then(|t| t.strip_suffix(')'));
    inside.filter(|t| t.len() == 1 && t.chars().all(|c| c.is_ascii_uppercase())).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_box_is_found() {
        for (text, expected) in [
            (r"so \boxed{42}.", Some("42")),
            (r"first \boxed{1}, then \boxed{\frac{1}{2}}", Some(r"\frac{1}{2}")),
            (r"\boxed{\left\{ 1, 2 \right\}} done", Some(r"\left\{ 1, 2 \right\}")),
            (r"\boxed {7}", Some("7")),
            (r"$\boxed 5$ apples", Some("5")),
            (r"\fbox{9}", Some("9")),
            (r"\boxed{\boxed{3}}", Some("3")),
            (r"\boxed{}", Some("")),
            (r"\boxed{1 and then the text ends", None),
            (r"\boxed{1} then \boxed{2", None),
            ("no box", None),
            (r"\boxed", None),
        ] {
            assert_eq!(last_boxed(text), expected, "{text}");
        }
    }

    #[test]
    fn one_way_of_writing() {
        for (text, expected) in [
            (r" \dfrac{1}{2} ", r"\frac{1}{2}"),
            (r"\left( 1,\, 2 \right)", "(1,2)"),
            (r"\leftarrow", r"\leftarrow"),
            (r"90^\circ", "90"),
            (r"90^{\circ}", "90"),
            (r"18\text{ cm}^2", "18"),
            (r"18 \mbox{ square feet}", "18"),
            (r"\text{even}", "even"),
            (r"\text{(C)}", "C"),
            (r"(C)", "C"),
            (r"\$1{,}234.50", "1234.50"),
            (r"1,234", "1234"),
            (r"(1,234)", "(1,234)"),
            (r"50\%", "50%"),
            (r"x = 5", "5"),
            (r"x \in [0, 1)", "[0,1)"),
            (r"f(x) = 2x+1", "2x+1"),
            (r"x + y = 5", "x+y=5"),
            ("5 apples.", "5"),
            ("5 cm^2", "5"),
            ("2 pi", "2pi"),
            ("2 x", "2x"),
            ("3 and 4", "3and4"),
            (r"2\pi", r"2\pi"),
            ("π", r"\pi"),
            (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
            ("", ""),
        ] {
            assert_eq!(normalize(text), expected, "{text}");
        }
    }
}
