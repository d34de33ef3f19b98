//! Estimates of KL(policy || reference) at one token, for losses and for rewards.
//!
//! Invariant: the exponential is libm's in Rust, so that its bits do not depend on the machine's C library.

use super::KlEstimator;

/// Log-ratios are kept within this before exponentiation, as in verl.
pub const LOG_RATIO_BOUND: f64 = 20.0;
/// [`KlEstimator::K3`] is kept within this, as in verl.
const K3_BOUND: f64 = 10.0;

/// exp(r) - 1 - r, of a log-ratio r within [`LOG_RATIO_BOUND`].
pub fn k3(log_ratio: f64) -> f64 {
    libm::expm1(log_ratio) - log_ratio
}

impl KlEstimator {
    /// The estimate from `d` = log-probability minus the reference's, and its slope by the log-probability.
    pub fn estimate(self, d: f64) -> (f64, f64) {
        match self {
            KlEstimator::K1 => (d, 1.0),
            KlEstimator::Abs => (d.abs(), if d == 0.0 { 0.0 } else { d.signum() }),
            KlEstimator::K2 => (0.5 * d * d, d),
            KlEstimator::K3 => {
                let back = (-d).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND);
                let kl = k3(back);
                // Where a bound holds the value, nothing changes it. NaN is held by none.
                let slope = if d.abs() > LOG_RATIO_BOUND || kl > K3_BOUND { 0.0 } else { -libm::expm1(back) };
                (if kl > K3_BOUND { K3_BOUND } else { kl }, slope)
            }
        }
    }
}
