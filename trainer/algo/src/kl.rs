//! Distance from the reference: what the reward pays for it, and the coefficient that follows it.

use tangelo_configs::algorithm::KlController;
use tangelo_core::KlEstimator;

/// A coefficient's relative error from its target counts at most this.
const ERROR_BOUND: f64 = 0.2;

/// The estimate of KL(policy || reference) at each token.
pub fn per_token(estimator: KlEstimator, logprob: &[f64], reference: &[f64]) -> Vec<f64> {
    logprob.iter().zip(reference).map(|(p, r)| estimator.estimate(p - r).0).collect()
}

/// The coefficient after a batch of `sequences` at mean distance `kl` (Ziegler et al., arXiv 1909.08593, section 2.2).
pub fn next_coefficient(controller: &KlController, coefficient: f64, kl: f64, sequences: u64) -> f64 {
    match controller {
        KlController::Fixed(_) => coefficient,
        KlController::Adaptive(adaptive) => {
            let error = (kl / adaptive.target_kl - 1.0).clamp(-ERROR_BOUND, ERROR_BOUND);
            // A batch larger than the horizon must not turn the coefficient negative.
            coefficient * (1.0 + error * sequences as f64 / adaptive.horizon).max(0.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangelo_configs::algorithm::{AdaptiveKl, FixedKl};
    use tangelo_core::loss::kl::k3;

    #[test]
    fn estimates() {
        let check = |estimator: KlEstimator, d: f64, expected: f64| {
            let found = estimator.estimate(d).0;
            // Both sides are a few f64 operations.
            assert!((found - expected).abs() <= 1e-14 * expected.abs().max(1.0), "{estimator:?} {d}: {found}");
        };
        for d in [-1.3, -0.01, 0.0, 0.4, 2.0] {
            check(KlEstimator::K1, d, d);
            check(KlEstimator::Abs, d, d.abs());
            check(KlEstimator::K2, d, d.powi(2) / 2.0);
            check(KlEstimator::K3, d, 1.0 / d.exp() - 1.0 + d);
        }
        check(KlEstimator::K3, -300.0, 10.0);
        check(KlEstimator::K3, 300.0, 10.0);
        // exp(d) - 1 - d would lose all digits here.
        assert!((k3(1e-9) - 5e-19).abs() < 1e-24, "{}", k3(1e-9));
    }

    #[test]
    fn the_coefficient_follows_its_target() {
        let adaptive = KlController::Adaptive(AdaptiveKl { kl_coef: 0.01, target_kl: 0.1, horizon: 1000.0 });
        let check = |controller: &KlController, kl, sequences, expected: f64| {
            let found = next_coefficient(controller, 0.01, kl, sequences);
            assert!((found - expected).abs() < 1e-15, "{found} != {expected}");
        };
        check(&adaptive, 0.1, 500, 0.01);
        check(&adaptive, 0.11, 500, 0.01 * (1.0 + 0.1 * 0.5));
        check(&adaptive, 5.0, 500, 0.01 * (1.0 + 0.2 * 0.5));
        check(&adaptive, -5.0, 500, 0.01 * (1.0 - 0.2 * 0.5));
        check(&adaptive, -5.0, 1_000_000, 0.0);
        check(&KlController::Fixed(FixedKl { kl_coef: 0.01 }), 5.0, 500, 0.01);
    }
}
