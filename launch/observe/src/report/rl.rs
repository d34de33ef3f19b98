//! Curves and tiles of a reinforcement-learning run, whose metrics have verl's names.

use super::chart::{self, Format, Frame, Line};
use super::series::Series;
use crate::records::NamedRecord;
use std::collections::BTreeSet;

/// The metric that every such run has.
const REWARD: &str = "critic/score/mean";
/// Phases of a step, in order, with their colours.
const PHASES: [(&str, usize); 8] = [
    ("gen", 0),
    ("reward", 5),
    ("old_log_prob", 3),
    ("ref", 3),
    ("values", 1),
    ("adv", 2),
    ("update_actor", 1),
    ("update_weights", 4),
];

/// Whether the run is one of reinforcement learning.
pub fn is_of_rl(records: &[NamedRecord]) -> bool {
    records.iter().any(|r| r.values.iter().any(|(name, _)| name == REWARD || name.starts_with("val-core/")))
}

fn series(records: &[NamedRecord], name: &str) -> Series {
    let value = |r: &NamedRecord| r.values.iter().find(|(n, _)| n == name).map(|&(_, v)| (r.step, v));
    Series { points: records.iter().filter_map(value).collect() }
}

fn names<'a>(records: &'a [NamedRecord], begin: &str) -> BTreeSet<&'a str> {
    let all = records.iter().flat_map(|r| r.values.iter().map(|(name, _)| name.as_str()));
    all.filter(|name| name.starts_with(begin)).collect()
}

/// `gsm8k mean@4` of `val-core/gsm8k/reward/mean@4`.
pub fn validation_name(metric: &str) -> String {
    metric.trim_start_matches("val-core/").replace("/reward/", " ")
}

/// The first and the last reward, and of the validation's means.
pub fn tiles(records: &[NamedRecord]) -> Vec<(&'static str, String, String)> {
    let told = |label, name: &str| {
        let series = series(records, name);
        let (first, (_, last)) = (series.finite().next()?, series.last()?);
        Some((label, Format::Plain.write(last), format!("from {}", Format::Plain.write(first))))
    };
    let validation = names(records, "val-core/").into_iter().find(|name| name.contains("/mean@"));
    told("reward", REWARD).into_iter().chain(validation.and_then(|name| told("validation", name))).collect()
}

/// The curves.
pub fn charts(records: &[NamedRecord], frame: &Frame) -> String {
    let line = |metric: &str, name: &str, color, dots| Line {
        name: name.to_owned(),
        color,
        series: series(records, metric),
        dots,
    };
    let part = |(index, metric): (usize, &str)| {
        line(metric, metric.trim_start_matches("reward/").trim_end_matches("/mean"), index % 6, false)
    };
    let parts = names(records, "reward/").into_iter().filter(|name| name.ends_with("/mean"));
    let parts: Vec<Line> = parts.enumerate().map(part).collect();
    // One part alone is the reward.
    let parts = if parts.len() > 1 { parts } else { Vec::new() };
    let checks = names(records, "val-core/").into_iter().enumerate();
    let checks: Vec<Line> = checks.map(|(i, m)| line(m, &validation_name(m), i % 6, true)).collect();
    let phases: Vec<Line> =
        PHASES.iter().map(|(phase, color)| line(&format!("timing_s/{phase}"), phase, *color, false)).collect();
    // A critic that has learnt nothing yet explains less than nothing, by any amount.
    let mut explained = line("critic/vf_explained_var", "explained", 2, false);
    explained.series.points.iter_mut().filter(|(_, value)| *value < -1.0).for_each(|(_, value)| *value = -1.0);
    let plain = |title: &str, lines: &[Line]| {
        let any = lines.iter().any(|line| line.series.finite().next().is_some());
        if any { chart::lines(title, Format::Plain, false, lines, frame) } else { String::new() }
    };
    [
        plain("Reward", &[line(REWARD, "mean of a step's completions", 0, false)]),
        plain("Validation", &checks),
        plain("Parts of the reward", &parts),
        plain("KL of an update", &[line("actor/ppo_kl", "old to new policy", 3, false)]),
        plain(
            "KL from the reference",
            &[
                line("actor/kl_loss", "in the loss", 1, false),
                line("actor/reward_kl_penalty", "in the reward", 2, false),
            ],
        ),
        plain("Entropy, nats per token", &[line("actor/entropy", "policy", 2, false)]),
        plain(
            "Length of completions, tokens",
            &[line("response_length/mean", "mean", 0, false), line("response_length/max", "longest", 4, false)],
        ),
        plain(
            "Gradient norm",
            &[line("actor/grad_norm", "policy", 3, false), line("critic/grad_norm", "critic", 1, false)],
        ),
        plain(
            "Share of clipped tokens",
            &[line("actor/pg_clipfrac", "policy", 5, false), line("critic/vf_clipfrac", "values", 1, false)],
        ),
        plain("Critic: loss of its values", &[line("critic/vf_loss", "values", 1, false)]),
        plain("Critic: explained variance of returns, from -1", &[explained]),
        plain(
            "Distance of engine and trainer",
            &[
                line("rollout_corr/kl", "KL", 0, false),
                line("training/rollout_probs_diff_max", "largest difference", 1, false),
            ],
        ),
        chart::stacked("Where a step's time goes", Format::Seconds, &phases, frame),
        plain("Tokens per second and rank", &[line("perf/throughput", "tokens/s", 0, false)]),
    ]
    .concat()
}
