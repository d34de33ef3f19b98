//! Numbers as people and models write them, read exactly.
//!
//! `1,234`, `-$5`, `50%`, `3/4`, `1 1/2`, `.5`, `1.5e3`, `1.5 × 10^3`, `\frac{1}{2}`. Invariants: a value is a rational
//! number, never a float; no input makes the work more than linear in its length. Deliberately absent: number words,
//! and commas as decimal points.

use num_bigint::BigInt;
use num_rational::Ratio;

/// An exact number.
pub(crate) type Rational = Ratio<BigInt>;

/// Digits of a number, and its power of ten: beyond, it is no number, so that no answer makes the work unbounded.
const MAX_DIGITS: usize = 1000;

/// A number found in a text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Number {
    /// Its value, a percent sign not counted.
    pub value: Rational,
    /// A percent sign follows it.
    pub percent: bool,
}

impl Number {
    /// Whether the two mean the same: 50% is both 50 and 1/2, as data sets write either.
    pub fn equals(&self, other: &Number) -> bool {
        self.meanings().iter().any(|a| other.meanings().contains(a))
    }

    fn meanings(&self) -> Vec<Rational> {
        let hundredth = self.percent.then(|| &self.value / integer(100));
        std::iter::once(self.value.clone()).chain(hundredth).collect()
    }

    /// Whether it differs from `truth` by at most `tolerance` times `truth`.
    pub fn is_near(&self, truth: &Number, tolerance: f64) -> bool {
        let near = |a: &Rational, b: &Rational| (to_f64(a) - to_f64(b)).abs() <= tolerance * to_f64(b).abs();
        self.equals(truth) || self.meanings().iter().any(|a| truth.meanings().iter().any(|b| near(a, b)))
    }
}

/// A whole number.
pub(crate) fn integer(value: i64) -> Rational {
    Rational::from_integer(BigInt::from(value))
}

fn to_f64(value: &Rational) -> f64 {
    let float = |i: &BigInt| i.to_string().parse::<f64>().unwrap_or(f64::NAN);
    float(value.numer()) / float(value.denom())
}

/// The text as one number, with nothing but white space and a full stop around it.
pub(crate) fn parse(text: &str) -> Option<Number> {
    let text = text.trim().trim_end_matches('.').trim_end();
    let mut scan = Scan { rest: text };
    scan.number().filter(|_| scan.rest.trim().is_empty())
}

/// The number that `text` starts with.
pub(crate) fn leading(text: &str) -> Option<Number> {
    Scan { rest: text }.number()
}

/// The last number of `text`. A minus sign directly after a digit, a letter or a bracket is an operator.
pub(crate) fn last(text: &str) -> Option<Number> {
    let mut found = None;
    let (mut scan, mut before) = (Scan { rest: text }, ' ');
    while let Some(next) = scan.rest.chars().next() {
        let operator = matches!(next, '-' | '+' | '−') && (before.is_alphanumeric() || ")]}".contains(before));
        let start = scan.rest;
        match if operator { None } else { scan.number() } {
            Some(number) => found = Some(number),
            // A run of digits that is no number is passed over whole, or long ones would be read from each digit.
            None if next.is_ascii_digit() => scan.rest = start.trim_start_matches(|c: char| c.is_ascii_digit()),
            None => scan.rest = &start[next.len_utf8()..],
        }
        before = start[..start.len() - scan.rest.len()].chars().next_back().unwrap_or(next);
    }
    found
}

/// What is left of a text.
struct Scan<'a> {
    rest: &'a str,
}

impl Scan<'_> {
    /// Reads one number, or leaves everything as it was.
    fn number(&mut self) -> Option<Number> {
        let start = self.rest;
        let number = self.try_number();
        if number.is_none() {
            self.rest = start;
        }
        number
    }

    fn try_number(&mut self) -> Option<Number> {
        let mut negative = self.sign();
        self.skip_any(&["\\$", "$", "€", "£", "¥"]);
        negative ^= self.sign();
        let mut value = match self.latex_fraction() {
            Some(fraction) => fraction,
            None => self.decimal()?,
        };
        if negative {
            value = -value;
        }
        let start = self.rest;
        self.skip_spaces();
        let percent = self.skip_any(&["%", "\\%"]);
        if !percent {
            self.rest = start;
        }
        Some(Number { value, percent })
    }

    fn decimal(&mut self) -> Option<Rational> {
        let whole = self.grouped_digits();
        let fraction = match self.rest.strip_prefix('.') {
            Some(after) if after.starts_with(|c: char| c.is_ascii_digit()) => {
                self.rest = after;
                self.digits()
            }
            _ => String::new(),
        };
        if whole.is_empty() && fraction.is_empty() || whole.len() + fraction.len() > MAX_DIGITS {
            return None;
        }
        let plain = fraction.is_empty();
        let exponent = self.exponent().unwrap_or(0) - fraction.len() as i64;
        let value = scaled(&format!("{whole}{fraction}"), exponent)?;
        Some(if plain { self.over(value) } else { value })
    }

    /// `value / n`, or `value n/m` as a mixed number, where that follows a whole number.
    fn over(&mut self, value: Rational) -> Rational {
        if !value.is_integer() {
            return value;
        }
        if let Some(below) = self.denominator() {
            return value / below;
        }
        let start = self.rest;
        if let Some(after) = self.rest.strip_prefix(' ') {
            self.rest = after;
            let above = self.digits();
            let below = self.denominator();
            if let (Some(above), Some(below)) = (scaled(&above, 0).filter(|_| !above.is_empty()), below)
                && above < below
            {
                return value + above / below;
            }
        }
        self.rest = start;
        value
    }

    fn denominator(&mut self) -> Option<Rational> {
        let start = self.rest;
        self.skip_spaces();
        let below = self.rest.strip_prefix('/').and_then(|after| {
            self.rest = after;
            self.skip_spaces();
            let digits = self.grouped_digits();
            let decimal = self.rest.strip_prefix('.').is_some_and(|r| r.starts_with(|c: char| c.is_ascii_digit()));
            scaled(&digits, 0).filter(|v| !digits.is_empty() && !decimal && *v != integer(0))
        });
        if below.is_none() {
            self.rest = start;
        }
        below
    }

    /// `e3`, `E-3`, `× 10^3`, `\times 10^{3}`.
    fn exponent(&mut self) -> Option<i64> {
        let start = self.rest;
        let found = self.try_exponent().filter(|e| e.unsigned_abs() as usize <= MAX_DIGITS);
        if found.is_none() {
            self.rest = start;
        }
        found
    }

    fn try_exponent(&mut self) -> Option<i64> {
        if self.skip_any(&["e", "E"]) {
            let exponent = self.signed_digits()?;
            return (!self.rest.starts_with(|c: char| c.is_alphanumeric())).then_some(exponent);
        }
        self.skip_spaces();
        if !self.skip_any(&["\\times", "\\cdot", "×", "·", "*", "x"]) {
            return None;
        }
        self.skip_spaces();
        if !self.skip_any(&["10^", "10**"]) {
            return None;
        }
        let braced = self.skip_any(&["{"]);
        let exponent = self.signed_digits()?;
        (!braced || self.skip_any(&["}"])).then_some(exponent)
    }

    fn signed_digits(&mut self) -> Option<i64> {
        let negative = self.sign();
        let value: i64 = self.digits().parse().ok()?;
        Some(if negative { -value } else { value })
    }

    /// `\frac{1}{2}` of whole numbers.
    fn latex_fraction(&mut self) -> Option<Rational> {
        let start = self.rest;
        let found = self.skip_any(&["\\frac", "\\dfrac", "\\tfrac"]).then(|| self.two_arguments()).flatten();
        if found.is_none() {
            self.rest = start;
        }
        found
    }

    fn two_arguments(&mut self) -> Option<Rational> {
        let (above, below) = (self.argument()?, self.argument()?);
        (below != integer(0)).then(|| above / below)
    }

    fn argument(&mut self) -> Option<Rational> {
        let inside = self.rest.strip_prefix('{')?;
        let (text, after) = inside.split_once('}')?;
        let digits = text.trim();
        let (negative, digits) = digits.strip_prefix('-').map_or((false, digits), |d| (true, d));
        if digits.is_empty() || digits.len() > MAX_DIGITS || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        self.rest = after;
        scaled(digits, 0).map(|v| if negative { -v } else { v })
    }

    /// Digits, with commas between groups as in 1,234,567 and 12,34,567; without the commas.
    fn grouped_digits(&mut self) -> String {
        let mut digits = self.digits();
        if digits.is_empty() || digits.len() > 3 {
            return digits;
        }
        // Groups of two count only where one of three follows: the comma in "1, 12" separates.
        let (mut kept, mut after_kept) = (digits.clone(), self.rest);
        while self.skip_any(&["{,}", ","]) && digits.len() <= MAX_DIGITS {
            let group = self.digits();
            if !(2..=3).contains(&group.len()) {
                break;
            }
            digits.push_str(&group);
            if group.len() == 3 {
                (kept, after_kept) = (digits.clone(), self.rest);
            }
        }
        self.rest = after_kept;
        kept
    }

    fn digits(&mut self) -> String {
        let end = self.rest.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        digits.to_owned()
    }

    /// Skips a sign; true for minus.
    fn sign(&mut self) -> bool {
        let negative = self.skip_any(&["-", "−"]);
        if !negative {
            self.skip_any(&["+"]);
        }
        negative
    }

    fn skip_any(&mut self, texts: &[&str]) -> bool {
        let rest = texts.iter().find_map(|text| self.rest.strip_prefix(text));
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn skip_spaces(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\u{a0}']);
    }
}

/// `digits` times ten to the `exponent`; nothing where the number would be too long.
fn scaled(digits: &str, exponent: i64) -> Option<Rational> {
    if exponent.unsigned_abs() as usize > 2 * MAX_DIGITS || digits.len() > 2 * MAX_DIGITS {
        return None;
    }
    let digits: BigInt = if digits.is_empty() { BigInt::from(0) } else { digits.parse().ok()? };
    let power = Rational::from_integer(BigInt::from(10).pow(exponent.unsigned_abs() as u32));
    let value = Rational::from_integer(digits);
    Some(if exponent < 0 { value / power } else { value * power })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shown(number: Option<Number>) -> String {
        number.map_or("-".into(), |n| format!("{}{}", n.value, if n.percent { "%" } else { "" }))
    }

    fn check(read: fn(&str) -> Option<Number>, cases: &[(&str, &str)]) {
        for (text, expected) in cases {
            assert_eq!(&shown(read(text)), expected, "{text:?}");
        }
    }

    #[test]
    fn whole_texts() {
        check(
            parse,
            &[
                ("42", "42"),
                (" 1,234 ", "1234"),
                ("12,34,567", "1234567"),
                ("1{,}000", "1000"),
                ("-$5.50", "-11/2"),
                ("$-5", "-5"),
                ("+3", "3"),
                ("−7", "-7"),
                (".5", "1/2"),
                ("0.10", "1/10"),
                ("18.", "18"),
                ("3/4", "3/4"),
                ("6 / 8", "3/4"),
                ("1 1/2", "3/2"),
                ("-1 1/2", "-3/2"),
                ("50%", "50%"),
                ("50 \\%", "50%"),
                ("1.5e3", "1500"),
                ("2E-2", "1/50"),
                ("1.5 × 10^3", "1500"),
                ("1.5 \\times 10^{-1}", "3/20"),
                ("\\frac{-1}{2}", "-1/2"),
                ("€1,000,000.01", "100000001/100"),
                ("", "-"),
                (".", "-"),
                ("abc", "-"),
                ("1/0", "-"),
                ("1,2", "-"),
                ("1 2", "-"),
                ("1e9999", "-"),
                ("1.2.3", "-"),
                ("5 apples", "-"),
            ],
        );
    }

    #[test]
    fn last_of_a_text() {
        check(
            last,
            &[
                ("He has 3 apples and 4 pears, so 7.", "7"),
                ("16-3-4=9", "9"),
                ("5-3", "3"),
                ("it fell by -3 degrees", "-3"),
                ("costs $1,234.50, tax included", "2469/2"),
                ("either 1, 2 or 3, 4", "4"),
                ("on 10/2 of them", "5"),
                ("about 12 %, I think", "12%"),
                ("x2", "2"),
                ("the answer is \\frac{3}{4} of it", "3/4"),
                ("9 . . .", "9"),
                ("none", "-"),
                ("10,000,00", "0"),
            ],
        );
    }

    proptest! {
        #[test]
        fn written_numbers_are_read_back(value in -1_000_000_000i64..1_000_000_000, decimals in 0u32..6) {
            let scale = 10i64.pow(decimals);
            let (sign, size) = (if value < 0 { "-" } else { "" }, value.abs());
            let text = match decimals {
                0 => format!("{sign}{size}"),
                _ => format!("{sign}{}.{:0width$}", size / scale, size % scale, width = decimals as usize),
            };
            let expected = Rational::new(BigInt::from(value), BigInt::from(scale));
            prop_assert_eq!(parse(&text).map(|n| n.value), Some(expected.clone()));
            prop_assert_eq!(last(&format!("so we get {text}!")).map(|n| n.value), Some(expected));
        }

        #[test]
        fn no_text_is_too_much(text in "[-0-9,./eE%^{} x$]{0,80}") {
            let _ = (parse(&text), last(&text), leading(&text));
        }
    }

    #[test]
    fn percentages_and_tolerance() {
        let number = |text: &str| parse(text).unwrap();
        assert!(number("50%").equals(&number("50")) && number("50%").equals(&number("0.5")));
        assert!(!number("50").equals(&number("0.5")));
        assert!(number("3.14").is_near(&number("3.14159"), 0.001) && !number("3.1").is_near(&number("3.14159"), 0.001));
        assert!(!number("0.3333").is_near(&number("1/3"), 0.0) && number("2/6").is_near(&number("1/3"), 0.0));
    }
}
