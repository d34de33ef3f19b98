//! What the policy can do on prompts that it is not trained on.

use crate::collect::{Rollout, Rollouts};
use std::collections::BTreeMap;

/// Named values by data source: the mean over all answers, and the share of prompts that some answer of theirs passes.
pub fn metrics(rollouts: &Rollouts, passes_from: f64) -> Vec<(String, f64)> {
    let mut by_source: BTreeMap<&str, BTreeMap<i64, Vec<&Rollout>>> = BTreeMap::new();
    for rollout in &rollouts.rollouts {
        let source = rollout.prompt.prompt.data_source.as_str();
        by_source.entry(source).or_default().entry(rollout.group).or_default().push(rollout);
    }
    by_source.iter().flat_map(|(source, groups)| of_source(source, groups, passes_from)).collect()
}

fn of_source(source: &str, groups: &BTreeMap<i64, Vec<&Rollout>>, passes_from: f64) -> Vec<(String, f64)> {
    let totals = |group: &Vec<&Rollout>| group.iter().map(|r| r.scored.total).collect::<Vec<f64>>();
    let groups: Vec<Vec<f64>> = groups.values().map(totals).collect();
    let n = groups.iter().map(Vec::len).max().unwrap_or(0);
    let answers = groups.iter().map(Vec::len).sum::<usize>().max(1) as f64;
    let prompts = groups.len().max(1) as f64;
    let over = |of_group: &dyn Fn(&Vec<f64>) -> f64| groups.iter().map(of_group).sum::<f64>() / prompts;
    let best = over(&|group| group.iter().copied().fold(f64::NEG_INFINITY, f64::max));
    let passed = over(&|group| f64::from(group.iter().any(|&total| total >= passes_from)));
    let mean = groups.iter().flatten().sum::<f64>() / answers;
    vec![
        (format!("val-core/{source}/reward/mean@{n}"), mean),
        (format!("val-core/{source}/reward/best@{n}"), best),
        (format!("val-core/{source}/reward/pass@{n}"), passed),
    ]
}
