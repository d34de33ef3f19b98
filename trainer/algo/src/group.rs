//! Baselines from the other completions of the same prompt.

use crate::statistics::Moments;

/// What keeps a standard deviation of 0 from dividing, as in verl.
const EPSILON: f64 = 1e-6;

/// The reward minus the group's mean; a single completion has no peers, its baseline is 0.
pub fn centered(group: &Moments, reward: f64) -> f64 {
    if group.count() < 2 { reward } else { group.center().deviation(reward) }
}

/// [`centered`], divided by the group's standard deviation (n - 1; 1 of a single completion) plus 1e-6.
pub fn standardised(group: &Moments, reward: f64) -> f64 {
    let deviation = if group.count() < 2 { 1.0 } else { group.variance().sqrt() };
    centered(group, reward) / (deviation + EPSILON)
}

/// The reward minus the mean of the group's others, n / (n - 1) times [`centered`]; a single completion keeps its.
pub fn leave_one_out(group: &Moments, reward: f64) -> f64 {
    let n = group.count() as f64;
    if group.count() < 2 { reward } else { group.center().deviation(reward) * n / (n - 1.0) }
}

/// Whether all rewards of a group of several are equal, so that it teaches nothing.
pub fn is_flat(group: &Moments) -> bool {
    group.count() > 1 && group.range().is_some_and(|(low, high)| low == high)
}
