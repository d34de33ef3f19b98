//! Expressions in a normal form, so that two ways of writing one value are seen to be one: sums of terms, each a
//! rational number times the square root of a square-free whole number times powers of names.
//!
//! `\frac{\sqrt{12}}{4}` is 1/2 √3, `(x+1)^2` is x² + 2x + 1. Invariants: arithmetic is exact; the work is bounded
//! ([`MAX_TERMS`], [`MAX_DEPTH`], [`MAX_BITS`]); what is not understood is no expression, and is compared as text.
//! Deliberately absent: functions, equations, inequalities, and factoring of denominators with several terms.

use super::latex::group;
use super::number::{Rational, integer};
use num_bigint::BigInt;
use std::collections::BTreeMap;
use std::fmt::Write;

const MAX_TERMS: usize = 64;
const MAX_DEPTH: usize = 40;
const MAX_BITS: u64 = 10_000;
const MAX_POWER: i64 = 16;
/// Square roots of larger whole numbers stay as they are written: their factors are found by trial.
const MAX_RADICAND: u64 = 10_000_000_000;

/// What follows the coefficient in a term.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    powers: BTreeMap<String, i64>,
    /// Square-free; 1 where there is no root.
    radicand: u64,
}

/// A sum of terms in normal form: no coefficient is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expression(BTreeMap<Key, Rational>);

impl Expression {
    /// Reads an answer that [`normalize`](super::latex::normalize) wrote.
    pub fn parse(text: &str) -> Option<Expression> {
        let mut parser = Parser { rest: text, depth: 0 };
        parser.sum().filter(|_| parser.rest.is_empty())
    }

    fn term(coefficient: Rational, radicand: u64, powers: BTreeMap<String, i64>) -> Expression {
        let zero = coefficient == integer(0);
        Expression(if zero { BTreeMap::new() } else { [(Key { powers, radicand }, coefficient)].into() })
    }

    fn number(value: Rational) -> Expression {
        Expression::term(value, 1, BTreeMap::new())
    }

    fn name(name: String) -> Expression {
        Expression::term(integer(1), 1, [(name, 1)].into())
    }

    fn as_number(&self) -> Option<Rational> {
        match self.0.first_key_value() {
            None => Some(integer(0)),
            Some((key, value)) if self.0.len() == 1 && key.radicand == 1 && key.powers.is_empty() => {
                Some(value.clone())
            }
            Some(_) => None,
        }
    }

    fn add(mut self, other: Expression) -> Option<Expression> {
        for (key, value) in other.0 {
            let sum = self.0.remove(&key).unwrap_or_else(|| integer(0)) + value;
            if sum != integer(0) {
                self.0.insert(key, sum);
            }
        }
        (self.0.len() <= MAX_TERMS).then_some(self)
    }

    fn mul(&self, other: &Expression) -> Option<Expression> {
        let mut product = Expression(BTreeMap::new());
        for (a, x) in &self.0 {
            for (b, y) in &other.0 {
                let shared = gcd(a.radicand, b.radicand);
                let radicand = (a.radicand / shared).checked_mul(b.radicand / shared)?;
                let coefficient = x * y * Rational::from_integer(BigInt::from(shared));
                let small = coefficient.numer().bits() + coefficient.denom().bits() <= MAX_BITS;
                product = product.add(Expression::term(coefficient, radicand, add_powers(&a.powers, &b.powers)))?;
                if !small {
                    return None;
                }
            }
        }
        Some(product)
    }

    /// One over it; a sum of several terms becomes a name of its own.
    fn inverse(&self) -> Option<Expression> {
        match self.0.first_key_value() {
            None => None,
            Some((key, value)) if self.0.len() == 1 => {
                let root = Rational::from_integer(BigInt::from(key.radicand));
                let powers = key.powers.iter().map(|(name, power)| (name.clone(), -power)).collect();
                Some(Expression::term(integer(1) / (value * root), key.radicand, powers))
            }
            Some(_) => {
                // Scaled so that 1/(2x + 2) is 1/2 of 1/(x + 1).
                let (_, lead) = self.0.last_key_value()?;
                let scale = Expression::number(integer(1) / lead);
                let name = format!("1/({})", self.mul(&scale)?.canonical());
                Expression::name(name).mul(&scale)
            }
        }
    }

    fn power(&self, exponent: &Expression) -> Option<Expression> {
        let exponent_value = exponent.as_number();
        let half = exponent_value.as_ref().is_some_and(|e| *e == integer(1) / integer(2));
        if half {
            return self.square_root();
        }
        let whole = exponent_value.filter(Rational::is_integer).and_then(|e| i64::try_from(e.to_integer()).ok());
        let Some(whole) = whole else {
            return Some(Expression::name(format!("({})^({})", self.canonical(), exponent.canonical())));
        };
        let bits = self.0.values().map(|v| v.numer().bits() + v.denom().bits()).max().unwrap_or(0);
        let most = if self.0.len() <= 1 { (MAX_BITS / bits.max(1)) as i64 } else { MAX_POWER };
        if whole.abs() > most {
            return None;
        }
        let base = if whole < 0 { self.inverse()? } else { self.clone() };
        (0..whole.abs()).try_fold(Expression::number(integer(1)), |product, _| product.mul(&base))
    }

    fn square_root(&self) -> Option<Expression> {
        let value = self.as_number().filter(|v| *v >= integer(0));
        let product = value.as_ref().and_then(|v| u64::try_from(v.numer() * v.denom()).ok());
        match (value, product.filter(|p| *p <= MAX_RADICAND)) {
            (Some(value), Some(product)) => {
                let (outside, radicand) = square_free(product);
                let coefficient = Rational::new(BigInt::from(outside), value.denom().clone());
                Some(Expression::term(coefficient, radicand, BTreeMap::new()))
            }
            _ => Some(Expression::name(format!("sqrt({})", self.canonical()))),
        }
    }

    /// A text that is the same for equal expressions.
    fn canonical(&self) -> String {
        let mut text = String::new();
        for (key, value) in &self.0 {
            // Writing into a string cannot fail.
            let _ = write!(text, "+{value}r{}", key.radicand);
            key.powers.iter().for_each(|(name, power)| {
                let _ = write!(text, "[{name}]{power}");
            });
        }
        text
    }
}

fn add_powers(a: &BTreeMap<String, i64>, b: &BTreeMap<String, i64>) -> BTreeMap<String, i64> {
    let mut powers = a.clone();
    for (name, power) in b {
        *powers.entry(name.clone()).or_default() += power;
    }
    powers.retain(|_, power| *power != 0);
    powers
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// `n` as (o, r) with o² r = n and r square-free (of 0: 0 and 1).
fn square_free(n: u64) -> (u64, u64) {
    if n == 0 {
        return (0, 1);
    }
    let (mut outside, mut radicand, mut left, mut factor) = (1, 1, n, 2u64);
    while factor * factor <= left {
        while left.is_multiple_of(factor * factor) {
            left /= factor * factor;
            outside *= factor;
        }
        if left.is_multiple_of(factor) {
            left /= factor;
            radicand *= factor;
        }
        factor += 1;
    }
    (outside, radicand * left)
}

/// Names that stand for themselves; another command is no expression.
const NAMES: &[&str] = &[
    "\\pi",
    "\\infty",
    "\\alpha",
    "\\beta",
    "\\gamma",
    "\\delta",
    "\\epsilon",
    "\\theta",
    "\\lambda",
    "\\mu",
    "\\phi",
    "\\varphi",
    "\\rho",
    "\\sigma",
    "\\tau",
    "\\omega",
];

struct Parser<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn sum(&mut self) -> Option<Expression> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let mut negative = self.sign().unwrap_or(false);
        let mut sum = Expression(BTreeMap::new());
        loop {
            let product = self.product()?;
            let sign = Expression::number(integer(if negative { -1 } else { 1 }));
            sum = sum.add(product.mul(&sign)?)?;
            match self.sign() {
                Some(next) => negative = next,
                None => break,
            }
        }
        self.depth -= 1;
        Some(sum)
    }

    fn sign(&mut self) -> Option<bool> {
        if self.skip("-") { Some(true) } else { self.skip("+").then_some(false) }
    }

    fn product(&mut self) -> Option<Expression> {
        let mut product = self.factor()?;
        loop {
            if self.skip("*") {
                let negative = self.skip("-");
                let factor = self.factor()?;
                product = product.mul(&factor)?.mul(&Expression::number(integer(if negative { -1 } else { 1 })))?;
            } else if self.skip("/") {
                product = product.mul(&self.factor()?.inverse()?)?;
            } else if self.rest.starts_with(|c: char| c.is_alphanumeric() || "({\\".contains(c)) {
                product = product.mul(&self.factor()?)?;
            } else {
                return Some(product);
            }
        }
    }

    fn factor(&mut self) -> Option<Expression> {
        let base = self.base()?;
        if !self.skip("^") {
            return Some(base);
        }
        let exponent = if self.rest.starts_with('{') {
            self.braced()?
        } else {
            let negative = self.skip("-");
            let size = self.base()?;
            size.mul(&Expression::number(integer(if negative { -1 } else { 1 })))?
        };
        base.power(&exponent)
    }

    fn base(&mut self) -> Option<Expression> {
        let next = self.rest.chars().next()?;
        if next.is_ascii_digit() || next == '.' {
            return self.number();
        }
        match next {
            '(' => {
                self.rest = &self.rest[1..];
                let inside = self.sum()?;
                self.skip(")").then_some(inside)
            }
            '{' => self.braced(),
            '\\' => self.command(),
            _ if next.is_alphabetic() => self.variable(),
            _ => None,
        }
    }

    /// A decimal; a whole one directly before a proper fraction is a mixed number.
    fn number(&mut self) -> Option<Expression> {
        let end = self.rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        let value = super::number::parse(digits).filter(|_| !digits.ends_with('.'))?.value;
        self.rest = rest;
        if value.is_integer() && rest.starts_with("\\frac") {
            let mut ahead = Parser { rest, depth: self.depth };
            let fraction = ahead.command()?;
            let part = fraction.as_number().filter(|f| *f > integer(0) && *f < integer(1));
            if let Some(part) = part {
                self.rest = ahead.rest;
                return Some(Expression::number(value + part));
            }
        }
        Some(Expression::number(value))
    }

    /// A letter. Longer words are no products of their letters, and `f(x)` is no product.
    fn variable(&mut self) -> Option<Expression> {
        let letters = self.rest.chars().take_while(|c| c.is_alphabetic()).count();
        let name = self.rest.chars().next()?;
        self.rest = &self.rest[name.len_utf8()..];
        let call = "fgh".contains(name) && self.rest.starts_with('(');
        let plain = letters <= 2 && !call && !self.rest.starts_with(['_', '\'']);
        plain.then(|| Expression::name(name.to_string()))
    }

    fn command(&mut self) -> Option<Expression> {
        if self.skip("\\frac") {
            let (above, below) = (self.argument()?, self.argument()?);
            return above.mul(&below.inverse()?);
        }
        if self.skip("\\sqrt") {
            return self.root();
        }
        let end = self.rest[1..].find(|c: char| !c.is_ascii_alphabetic()).map_or(self.rest.len(), |n| n + 1);
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        (NAMES.contains(&name) && !rest.starts_with('_')).then(|| Expression::name(name.to_owned()))
    }

    fn root(&mut self) -> Option<Expression> {
        let Some(rest) = self.rest.strip_prefix('[') else { return self.argument()?.square_root() };
        let (degree, rest) = rest.split_once(']')?;
        self.rest = rest;
        let of = self.argument()?;
        match degree {
            "2" => of.square_root(),
            _ => Some(Expression::name(format!("root{degree}({})", of.canonical()))),
        }
    }

    /// `{...}`, or one character, or one command.
    fn argument(&mut self) -> Option<Expression> {
        let next = self.rest.chars().next()?;
        match next {
            '{' => self.braced(),
            _ if next.is_ascii_digit() => {
                let (digit, rest) = self.rest.split_at(1);
                self.rest = rest;
                Some(Expression::number(super::number::parse(digit)?.value))
            }
            _ => self.base(),
        }
    }

    fn braced(&mut self) -> Option<Expression> {
        let (inside, rest) = group(self.rest)?;
        let mut parser = Parser { rest: inside, depth: self.depth };
        let value = parser.sum().filter(|_| parser.rest.is_empty());
        self.rest = rest;
        value
    }

    fn skip(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(a: &str, b: &str, equal: bool) {
        let (x, y) = (Expression::parse(a), Expression::parse(b));
        assert_eq!(x.is_some() && x == y, equal, "{a} and {b}: {x:?} {y:?}");
    }

    #[test]
    fn one_value_written_twice() {
        for (a, b) in [
            (r"\frac12", "0.5"),
            (r"\frac{1}{2}", "1/2"),
            (r"\frac{\sqrt{3}}{2}", r"\sqrt3/2"),
            (r"\sqrt{12}", r"2\sqrt{3}"),
            (r"\sqrt{\frac{1}{2}}", r"\frac{\sqrt{2}}{2}"),
            (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"),
            (r"\sqrt{2}\sqrt{6}", r"2\sqrt3"),
            (r"\sqrt{16}", "4"),
            (r"1\frac{1}{2}", "1.5"),
            ("x^2+2x+1", "(x+1)^2"),
            ("xy", "yx"),
            (r"\frac{x}{2}", r"\frac12x"),
            (r"\frac{\pi}{6}", r"\pi/6"),
            ("2^{10}", "1024"),
            ("2^10", "1024"),
            ("2^{-1}", "0.5"),
            ("4^{1/2}", "2"),
            ("-(3-5)", "2"),
            ("2*-3", "-6"),
            (r"\frac{2}{2x+2}", r"\frac{1}{x+1}"),
            (r"\sqrt[3]{2}", r"\sqrt[3]{2}"),
            ("3+4i", "4i+3"),
            ("2^{100}", "1267650600228229401496703205376"),
        ] {
            check(a, b, true);
        }
        for (a, b) in [
            ("0.333", r"\frac13"),
            (r"\sqrt{2}", "1.414"),
            (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5}"),
            ("x^2", "x"),
            (r"\sin(2x)", r"2\sin(x)"),
            ("f(2x)", "2f(x)"),
            ("even", "even"),
            ("x_1", "x_1"),
            ("1/0", "1/0"),
            ("9^{9^{9^{9}}}", "9^{9^{9^{9}}}"),
            ("(x+1)^{99}", "(x+1)^{99}"),
            ("", ""),
        ] {
            check(a, b, false);
        }
    }

    proptest! {
        #[test]
        fn sums_of_roots_are_compared_exactly(a in 1u64..400, b in 1u64..400, p in -9i64..9, q in 1i64..9) {
            // sqrt(a) sqrt(b) = sqrt(ab), and p/q comes out of a sum again.
            check(&format!(r"\sqrt{{{a}}}\sqrt{{{b}}}"), &format!(r"\sqrt{{{}}}", a * b), true);
            check(&format!(r"\frac{{{p}}}{{{q}}}+\sqrt{{{a}}}-\sqrt{{{a}}}"), &format!("{p}/{q}"), true);
            let (outside, radicand) = square_free(a);
            prop_assert_eq!(outside * outside * radicand, a);
            prop_assert!((2..20).all(|k| radicand % (k * k) != 0));
        }

        #[test]
        fn no_text_is_too_much(text in r"[-0-9x+*/^(){}\\.frac sqrt]{0,60}") {
            let _ = Expression::parse(&text);
        }
    }
}
