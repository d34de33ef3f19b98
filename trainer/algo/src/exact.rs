//! Sums whose value does not depend on the order or grouping of what is added.
//!
//! An [`ExactSum`] is a floating-point expansion: numbers that do not overlap in their bits and whose sum is the exact
//! one (Shewchuk, "Adaptive precision floating-point arithmetic", 1997). Adding loses nothing, so any order gives the
//! same value, and [`ExactSum::value`] rounds it once, to nearest.
//!
//! Invariants: parts ascend in magnitude and do not overlap; none is 0. What is added is finite and sums stay below
//! f64's range; products are exact above 2^-960, below which f64 has no room for their last bits. Two sums are equal
//! when their values are, and serialise alike.

use serde::{Deserialize, Serialize};

/// An exact sum of f64 numbers. Mergeable, serialisable.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(from = "Vec<f64>", into = "Vec<f64>")]
pub struct ExactSum {
    parts: Vec<f64>,
}

impl ExactSum {
    /// The sum of nothing, 0.
    pub fn new() -> ExactSum {
        ExactSum::default()
    }

    /// Adds a number.
    pub fn add(&mut self, number: f64) {
        let mut carry = number;
        let mut kept = 0;
        for at in 0..self.parts.len() {
            let (sum, error) = two_sum(carry, self.parts[at]);
            if error != 0.0 {
                self.parts[kept] = error;
                kept += 1;
            }
            carry = sum;
        }
        self.parts.truncate(kept);
        if carry != 0.0 {
            self.parts.push(carry);
        }
    }

    /// Adds the exact product of two numbers.
    pub fn add_product(&mut self, a: f64, b: f64) {
        let (product, error) = two_product(a, b);
        self.add(error);
        self.add(product);
    }

    /// Adds another sum.
    pub fn merge(&mut self, other: &ExactSum) {
        other.parts.iter().for_each(|&part| self.add(part));
    }

    /// The sum times a number.
    pub fn times(&self, factor: f64) -> ExactSum {
        let mut scaled = ExactSum::new();
        self.parts.iter().for_each(|&part| scaled.add_product(part, factor));
        scaled
    }

    /// The square of the sum.
    pub fn squared(&self) -> ExactSum {
        let mut square = ExactSum::new();
        for &a in &self.parts {
            self.parts.iter().for_each(|&b| square.add_product(a, b));
        }
        square
    }

    /// This minus another.
    pub fn minus(&self, other: &ExactSum) -> ExactSum {
        let mut difference = self.clone();
        other.parts.iter().for_each(|&part| difference.add(-part));
        difference
    }

    /// The sum, rounded once to the nearest f64, ties to even.
    pub fn value(&self) -> f64 {
        let mut parts = self.parts.iter().rev().copied();
        let Some(mut high) = parts.next() else { return 0.0 };
        let mut low = 0.0;
        for part in parts.by_ref() {
            (high, low) = two_sum(high, part);
            if low != 0.0 {
                break;
            }
        }
        // `high` is right unless `low` is exactly half a unit of it and what is left decides the tie.
        if let Some(rest) = parts.next()
            && (rest > 0.0) == (low > 0.0)
        {
            let doubled = 2.0 * low;
            let other = high + doubled;
            if other - high == doubled {
                return other;
            }
        }
        high
    }

    /// The one expansion whose every part is the rest rounded to nearest, largest first.
    fn canonical(&self) -> Vec<f64> {
        let mut rest = self.clone();
        let mut parts = Vec::new();
        while !rest.parts.is_empty() {
            let part = rest.value();
            rest.add(-part);
            parts.push(part);
        }
        parts
    }
}

impl PartialEq for ExactSum {
    fn eq(&self, other: &ExactSum) -> bool {
        self.minus(other).parts.is_empty()
    }
}

impl From<Vec<f64>> for ExactSum {
    fn from(parts: Vec<f64>) -> ExactSum {
        parts.into_iter().collect()
    }
}

impl From<ExactSum> for Vec<f64> {
    fn from(sum: ExactSum) -> Vec<f64> {
        sum.canonical()
    }
}

impl FromIterator<f64> for ExactSum {
    fn from_iter<I: IntoIterator<Item = f64>>(numbers: I) -> ExactSum {
        let mut sum = ExactSum::new();
        numbers.into_iter().for_each(|number| sum.add(number));
        sum
    }
}

/// a + b as the nearest f64 and what rounding lost (Knuth).
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_seen = sum - a;
    (sum, (a - (sum - b_seen)) + (b - b_seen))
}

/// a * b as the nearest f64 and what rounding lost (Dekker; a fused multiply-add is a slow call on plain x86-64).
fn two_product(a: f64, b: f64) -> (f64, f64) {
    let product = a * b;
    let ((a_high, a_low), (b_high, b_low)) = (halves(a), halves(b));
    let error = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low);
    (product, error)
}

/// A number as two of at most 26 bits each (Veltkamp).
fn halves(a: f64) -> (f64, f64) {
    const SPLITTER: f64 = (1u64 << 27) as f64 + 1.0;
    let scaled = SPLITTER * a;
    let high = scaled - (scaled - a);
    (high, a - high)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(numbers: &[f64], expected: f64) {
        let sum: ExactSum = numbers.iter().copied().collect();
        assert_eq!(sum.value().to_bits(), expected.to_bits(), "{numbers:?}: {} != {expected}", sum.value());
    }

    #[test]
    fn sums_that_plain_addition_gets_wrong() {
        check(&[], 0.0);
        check(&[1e100, 1.0, -1e100], 1.0);
        check(&[0.1; 10], 1.0);
        check(&[-0.0, 0.0], 0.0);
        // Half a unit above an even number is down; the smallest number more and it is up.
        let half = f64::EPSILON / 2.0;
        check(&[1.0, half], 1.0);
        check(&[1.0, half, f64::from_bits(1)], 1.0 + f64::EPSILON);
        check(&[1.0, half, -f64::from_bits(1)], 1.0);
        check(&[f64::MAX, -f64::MAX, f64::from_bits(1)], f64::from_bits(1));
    }

    /// Numbers m * 2^e of wildly different sizes, and their sum in integers: units of 2^-40.
    fn numbers() -> impl Strategy<Value = Vec<(i64, u32)>> {
        prop::collection::vec((-(1i64 << 53) + 1..1i64 << 53, 0u32..60), 0..50)
    }

    fn as_floats(numbers: &[(i64, u32)]) -> Vec<f64> {
        numbers.iter().map(|&(m, e)| m as f64 * 2f64.powi(e as i32 - 40)).collect()
    }

    proptest! {
        #[test]
        fn any_order_and_grouping_gives_the_correctly_rounded_sum(
            numbers in numbers(), cut in any::<prop::sample::Index>(), seed in any::<u64>(),
        ) {
            // i128 holds 50 * 2^113 and converts to f64 by rounding to nearest, ties to even.
            let integer: i128 = numbers.iter().map(|&(m, e)| i128::from(m) << e).sum();
            let expected = integer as f64 * 2f64.powi(-40);

            let mut floats = as_floats(&numbers);
            let whole: ExactSum = floats.iter().copied().collect();
            prop_assert_eq!(whole.value(), expected);
            floats.sort_by_key(|x| x.to_bits().wrapping_mul(seed | 1));
            let (left, right) = floats.split_at(cut.index(floats.len() + 1));
            let mut merged: ExactSum = right.iter().copied().collect();
            merged.merge(&left.iter().copied().collect());
            prop_assert_eq!(&merged, &whole);
            let (a, b) = (serde_json::to_string(&merged).unwrap(), serde_json::to_string(&whole).unwrap());
            prop_assert_eq!(&a, &b);
            prop_assert_eq!(serde_json::from_str::<ExactSum>(&a).unwrap().value(), expected);
        }

        #[test]
        fn products_are_exact(a in -(1i64 << 53) + 1..1i64 << 53, b in -(1i64 << 53) + 1..1i64 << 53) {
            let mut sum = ExactSum::new();
            sum.add_product(a as f64, b as f64);
            let exact = i128::from(a) * i128::from(b);
            let parts: i128 = Vec::<f64>::from(sum.clone()).iter().map(|&p| p as i128).sum();
            prop_assert_eq!(parts, exact);
            let square: ExactSum = [a as f64, b as f64].into_iter().collect();
            let square = square.squared();
            let twice = square.minus(&sum.times(2.0)).value();
            let expected = i128::from(a) * i128::from(a) + i128::from(b) * i128::from(b);
            prop_assert_eq!(twice, expected as f64);
        }
    }
}
