//! Whitening: values brought to mean 0 and variance 1 over the tokens of the whole batch.

use crate::statistics::{Center, Moments};

/// What keeps a variance of 0 from dividing, as in verl.
const EPSILON: f64 = 1e-8;

/// (x - mean) / sqrt(variance + 1e-8), with n - 1 below the variance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Whitening {
    center: Center,
    deviation: f64,
}

impl Whitening {
    /// From the moments of all values. Fewer than two have no variance: they become 0.
    pub fn of(moments: &Moments) -> Whitening {
        Whitening { center: moments.center(), deviation: (moments.variance() + EPSILON).sqrt() }
    }

    /// The whitened value.
    pub fn apply(self, value: f64) -> f64 {
        self.center.deviation(value) / self.deviation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitens() {
        let check = |values: &[f64], expected: &[f64]| {
            let mut moments = Moments::default();
            values.iter().for_each(|&x| moments.add(x));
            let whitening = Whitening::of(&moments);
            for (&value, expected) in values.iter().zip(expected) {
                // One division and one root beside the reference's: 4 units of f64.
                assert!((whitening.apply(value) - expected).abs() < 1e-15, "{value}: {}", whitening.apply(value));
            }
        };
        let unit = (1.0f64 + 1e-8).sqrt();
        check(&[4.0, 5.0, 6.0], &[-1.0 / unit, 0.0, 1.0 / unit]);
        check(&[0.1; 5], &[0.0; 5]);
        check(&[7.0], &[0.0]);
    }
}
