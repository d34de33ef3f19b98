//! Against plain float64 loops over the masked rows, written from the papers and on purpose not as the crate does it:
//! leave-one-out means instead of n / (n - 1), recursions over whole rows with holes, two-pass variances.
//!
//! Both sides compute in f64, so what is left is the rounding of columns to f32 (2^-24 of the value) and, where a
//! small deviation divides, f64's error over it: at most 1e-15 * 10 / 1e-6.

use crate::make::{Sequence, algorithm, batch, column, score};
use proptest::prelude::*;
use tangelo_core::Column;

const RELATIVE: f64 = 1.0 / (1u64 << 24) as f64;
const ABSOLUTE: f64 = 1e-8;

/// Completions of a few prompts, with holes, aborted ones and noise where the mask is 0.
pub fn sequences() -> impl Strategy<Value = Vec<Sequence>> {
    let token = (prop::bool::weighted(0.7), -8f32..0.0, -0.5f32..0.5, -8f32..0.0, -2f32..2.0);
    let reward = prop_oneof![Just(0.0f32), Just(1.0), -3f32..3.0];
    let sequence =
        (0i64..4, reward, prop::collection::vec(token, 1..12)).prop_map(|(group, reward, tokens)| Sequence {
            index: 0,
            group,
            reward,
            mask: tokens.iter().map(|t| f32::from(u8::from(t.0))).collect(),
            old: tokens.iter().map(|t| t.1).collect(),
            rollout: tokens.iter().map(|t| t.1 + t.2).collect(),
            reference: tokens.iter().map(|t| t.3).collect(),
            value: tokens.iter().map(|t| t.4).collect(),
        });
    prop::collection::vec(sequence, 1..16).prop_map(|mut all| {
        (0..).zip(&mut all).for_each(|(index, sequence)| sequence.index = index);
        all
    })
}

fn check(toml: &str, rows: &[Sequence], of: Column, expected: &[Vec<f64>]) {
    let algorithm = algorithm(toml);
    let outcome = score(&*algorithm, &algorithm.initial_state(), &[batch(rows)]).unwrap();
    for (row, (found, expected)) in column(&outcome, of).iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len());
        for (t, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs();
            assert!(
                error <= RELATIVE * expected.abs() + ABSOLUTE,
                "{toml}\n{of} row {row} token {t}: {found} != {expected}\n{rows:?}"
            );
        }
    }
}

/// A value on every token that the mask marks.
fn on_mask(row: &Sequence, value: f64) -> Vec<f64> {
    row.mask.iter().map(|&m| f64::from(m) * value).collect()
}

fn peers<'a>(rows: &'a [Sequence], of: &Sequence) -> Vec<&'a Sequence> {
    rows.iter().filter(|r| r.group == of.group).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// With n - 1 below.
fn variance(values: &[f64]) -> f64 {
    let mean = mean(values);
    values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (values.len() as f64 - 1.0)
}

/// Whitened over all marked tokens of all rows, 0 elsewhere.
pub fn whitened(rows: &[Sequence], raw: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let marked: Vec<f64> =
        rows.iter().zip(raw).flat_map(|(row, raw)| row.tokens().into_iter().map(|t| raw[t])).collect();
    let (mean, deviation) = match marked.len() {
        0 => (0.0, 1.0),
        1 => (marked[0], 1.0),
        _ => (mean(&marked), (variance(&marked) + 1e-8).sqrt()),
    };
    let whiten = |(row, raw): (&Sequence, &Vec<f64>)| {
        row.mask.iter().zip(raw).map(|(&m, x)| f64::from(m) * (x - mean) / deviation).collect()
    };
    rows.iter().zip(raw).map(whiten).collect()
}

/// Reward per token, over the whole row, with coefficient 0.1 * the estimator of KL.
fn token_rewards(row: &Sequence, estimator: &str) -> Vec<f64> {
    let last = row.tokens().last().copied();
    (0..row.mask.len())
        .map(|t| {
            let log_ratio = f64::from(row.reference[t]) - f64::from(row.old[t]);
            let kl = match estimator {
                "none" => 0.0,
                "k1" => -log_ratio,
                "abs" => log_ratio.abs(),
                "k2" => log_ratio.powi(2) / 2.0,
                _ => (log_ratio.exp() - 1.0 - log_ratio).min(10.0),
            };
            let paid = f64::from(row.mask[t]) * 0.1 * kl;
            if Some(t) == last { f64::from(row.reward) - paid } else { -paid }
        })
        .collect()
}

fn with_kl(toml: &str, estimator: &str) -> String {
    if estimator == "none" {
        return toml.into();
    }
    format!(
        "{toml}\n[reward]\nuse_kl_in_reward = true\nkl_penalty = '{estimator}'\n\
         kl_ctrl = {{ type = 'fixed', kl_coef = 0.1 }}"
    )
}

/// The sequence's own reward: its token rewards, or the score alone where no token can carry it.
fn total(row: &Sequence, estimator: &str) -> f64 {
    if row.tokens().is_empty() { f64::from(row.reward) } else { token_rewards(row, estimator).iter().sum() }
}

fn estimator() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["none", "k1", "abs", "k2", "k3"])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn grpo(rows in sequences(), estimator in estimator(), std in any::<bool>()) {
        let advantage = |row: &Sequence| {
            let rewards: Vec<f64> = peers(&rows, row).iter().map(|r| total(r, estimator)).collect();
            let (mean, deviation) =
                if rewards.len() == 1 { (0.0, 1.0) } else { (mean(&rewards), variance(&rewards).sqrt()) };
            (total(row, estimator) - mean) / if std { deviation + 1e-6 } else { 1.0 }
        };
        let expected: Vec<Vec<f64>> = rows.iter().map(|row| on_mask(row, advantage(row))).collect();
        let toml = with_kl(&format!("type = 'grpo'\nnorm_adv_by_std = {std}"), estimator);
        check(&toml, &rows, Column::Advantage, &expected);
    }

    #[test]
    fn rloo(rows in sequences(), estimator in estimator()) {
        let advantage = |row: &Sequence| {
            let others = peers(&rows, row).into_iter().filter(|r| r.index != row.index);
            let others: Vec<f64> = others.map(|r| total(r, estimator)).collect();
            total(row, estimator) - if others.is_empty() { 0.0 } else { mean(&others) }
        };
        let expected: Vec<Vec<f64>> = rows.iter().map(|row| on_mask(row, advantage(row))).collect();
        check(&with_kl("type = 'rloo'", estimator), &rows, Column::Advantage, &expected);
    }

    #[test]
    fn ppo(rows in sequences(), estimator in estimator(), gamma in 0.5f64..1.0, lam in 0f64..1.0) {
        let mut raw = Vec::new();
        let mut returns = Vec::new();
        for row in &rows {
            let rewards = token_rewards(row, estimator);
            let (mut after, mut carried) = (0.0, 0.0);
            let mut estimates = vec![0.0; rewards.len()];
            for t in (0..rewards.len()).rev().filter(|&t| row.mask[t] == 1.0) {
                let value = f64::from(row.value[t]);
                carried = rewards[t] + gamma * after - value + gamma * lam * carried;
                after = value;
                estimates[t] = carried;
            }
            let add = |t: usize| f64::from(row.mask[t]) * (estimates[t] + f64::from(row.value[t]));
            returns.push((0..rewards.len()).map(add).collect());
            raw.push(estimates);
        }
        let toml = with_kl(&format!("type = 'ppo'\ngamma = {gamma:?}\nlam = {lam:?}"), estimator);
        check(&toml, &rows, Column::Advantage, &whitened(&rows, &raw));
        check(&toml, &rows, Column::Return, &returns);
        let rewards: Vec<Vec<f64>> = rows.iter().map(|row| token_rewards(row, estimator)).collect();
        let masked = |(row, rewards): (&Sequence, &Vec<f64>)| {
            row.mask.iter().zip(rewards).map(|(&m, r)| f64::from(m) * r).collect()
        };
        let rewards: Vec<Vec<f64>> = rows.iter().zip(&rewards).map(masked).collect();
        check(&toml, &rows, Column::TokenReward, &rewards);
    }

    /// Discounted sums forward from each token, as the paper writes them.
    #[test]
    fn reinforce_plus_plus(rows in sequences(), estimator in estimator(), gamma in 0.5f64..1.0) {
        let raw: Vec<Vec<f64>> = rows
            .iter()
            .map(|row| {
                let (rewards, tokens) = (token_rewards(row, estimator), row.tokens());
                let from = |t: usize| tokens.iter().filter(move |&&k| k >= t).enumerate();
                let sum = |t| from(t).map(|(k, &at)| gamma.powi(k as i32) * rewards[at]).sum::<f64>();
                (0..rewards.len()).map(sum).collect()
            })
            .collect();
        let toml = with_kl(&format!("type = 'reinforce_plus_plus'\ngamma = {gamma:?}"), estimator);
        check(&toml, &rows, Column::Advantage, &whitened(&rows, &raw));
    }

    #[test]
    fn reinforce_plus_plus_with_a_baseline(rows in sequences(), estimator in estimator()) {
        let raw: Vec<Vec<f64>> = rows
            .iter()
            .map(|row| {
                let rewards: Vec<f64> = peers(&rows, row).iter().map(|r| total(r, estimator)).collect();
                let baseline = if rewards.len() == 1 { 0.0 } else { mean(&rewards) };
                vec![total(row, estimator) - baseline; row.mask.len()]
            })
            .collect();
        let toml = with_kl("type = 'reinforce_plus_plus'\nbaseline = true", estimator);
        check(&toml, &rows, Column::Advantage, &whitened(&rows, &raw));
    }

    #[test]
    fn overlong_punishment_and_filter(rows in sequences(), buffer in 1usize..60) {
        // The longest completion allowed is 64 tokens; rows grow so that some reach it.
        let grown: Vec<Sequence> = rows
            .into_iter()
            .map(|row| {
                let mask: Vec<f32> = row.mask.iter().copied().cycle().take(row.mask.len() * 6).collect();
                Sequence { index: row.index, mask, ..Sequence::plain(row.group, row.reward, &"0".repeat(row.mask.len() * 6)) }
            })
            .collect();
        let length = |row: &Sequence| row.tokens().last().map_or(0, |last| last + 1 - row.tokens()[0]);
        let punished = |row: &Sequence| {
            let over = length(row) as f64 - (64.0 - buffer as f64);
            f64::from(row.reward) + (-over / buffer as f64 * 0.5).min(0.0)
        };
        let expected: Vec<Vec<f64>> = grown
            .iter()
            .map(|row| {
                let rewards: Vec<f64> = peers(&grown, row).into_iter().map(punished).collect();
                let baseline = if rewards.len() == 1 { 0.0 } else { mean(&rewards) };
                on_mask(row, if length(row) >= 64 { 0.0 } else { punished(row) - baseline })
            })
            .collect();
        let toml = format!(
            "type = 'grpo'\nnorm_adv_by_std = false\n[reward]\noverlong_filter = true\n\
             overlong_buffer = {{ enable = true, len = {buffer}, penalty_factor = 0.5 }}"
        );
        check(&toml, &grown, Column::Advantage, &expected);
        let masks: Vec<Vec<f64>> =
            grown.iter().map(|row| on_mask(row, if length(row) >= 64 { 0.0 } else { 1.0 })).collect();
        check(&toml, &grown, Column::LossMask, &masks);
    }
}
