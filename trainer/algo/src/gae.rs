//! Returns and generalised advantages along one completion.

/// Generalised advantage estimation (Schulman et al., arXiv 1506.02438) over the policy's tokens: advantages and
/// returns. `values[t]` is the value before token t is drawn; after the last token the value is 0.
pub fn advantages(rewards: &[f64], values: &[f64], gamma: f64, lam: f64) -> (Vec<f64>, Vec<f64>) {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_value, mut next_advantage) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let surprise = rewards[t] + gamma * next_value - values[t];
        next_advantage = surprise + gamma * lam * next_advantage;
        next_value = values[t];
        advantages[t] = next_advantage;
    }
    let returns = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, returns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against the definition as an explicit double sum: A_t = sum over k >= t of (gamma lam)^(k-t) delta_k.
        /// 30 terms of at most 30: 1e-12 is 30 * 30 * 2^-53 with room.
        #[test]
        fn agrees_with_the_double_sum(
            steps in prop::collection::vec((-10f64..10.0, -10f64..10.0), 0..30), gamma in 0f64..1.0, lam in 0f64..1.0,
        ) {
            let (rewards, values): (Vec<f64>, Vec<f64>) = steps.into_iter().unzip();
            let (found, returns) = advantages(&rewards, &values, gamma, lam);
            let after = |t: usize| values.get(t + 1).copied().unwrap_or(0.0);
            for t in 0..rewards.len() {
                let terms = (t..rewards.len())
                    .map(|k| (gamma * lam).powi((k - t) as i32) * (rewards[k] + gamma * after(k) - values[k]));
                let expected: f64 = terms.sum();
                prop_assert!((found[t] - expected).abs() < 1e-12 * expected.abs().max(30.0));
                prop_assert_eq!(returns[t], found[t] + values[t]);
            }
        }
    }
}
