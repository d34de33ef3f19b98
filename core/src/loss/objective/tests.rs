//! Slopes against differences of losses; sums against the same formulas written as sums over a padded table; how a batch
//! is cut and padded.

use super::*;
use crate::batch::{ragged_f32, ragged_u32};
use crate::hash::mix64;
use crate::loss::KlEstimator;
use std::time::{SystemTime, UNIX_EPOCH};

const AGGREGATIONS: [Aggregation; 5] = [
    Aggregation::TokenMean,
    Aggregation::TokenSum,
    Aggregation::SeqMeanTokenSum,
    Aggregation::SeqMeanTokenMean,
    Aggregation::SeqMeanTokenSumNorm(48.0),
];

/// Numbers from a seed that is another in every run.
struct Draw(u64);

impl Draw {
    fn fresh() -> Draw {
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::from(d.subsec_nanos()));
        println!("seed {seed}");
        Draw(seed)
    }

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f64 {
        self.0 = mix64(self.0);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }
}

/// Rows of a batch: per row, per token. Masks have holes; the second row is not marked at all.
struct Rows {
    lengths: Vec<usize>,
    streams: BTreeMap<Column, Vec<Vec<f32>>>,
    found: Vec<Vec<Prediction>>,
}

const STREAMS: [Column; 8] = [
    Column::LossMask,
    Column::CeWeight,
    Column::Advantage,
    Column::OldLogprob,
    Column::RefLogprob,
    Column::ImportanceWeight,
    Column::Value,
    Column::Return,
];

impl Rows {
    fn draw(d: &mut Draw) -> Rows {
        let lengths: Vec<usize> = (0..6).map(|_| 1 + (d.unit() * 9.0) as usize).collect();
        let mut rows = Rows { lengths: lengths.clone(), streams: BTreeMap::new(), found: Vec::new() };
        for (row, &n) in lengths.iter().enumerate() {
            rows.found.push(Vec::new());
            for column in STREAMS {
                rows.streams.entry(column).or_default().push(Vec::new());
            }
            for _ in 0..n {
                let marked = row != 1 && d.unit() < 0.7;
                let (old, value) = (d.between(-4.0, -0.1), d.between(-1.0, 1.0));
                // Far enough to be clipped on both sides, now and then beyond what a ratio is made of.
                let far = if d.unit() < 0.1 { 25.0 } else { 0.8 };
                let logprob = old + d.between(-far, far);
                let reference = old + d.between(-3.0, 3.0);
                let drawn = [
                    f64::from(u8::from(marked)),
                    if marked { d.between(0.5, 2.0) } else { 0.0 },
                    d.between(-2.0, 2.0),
                    old,
                    reference,
                    d.between(0.0, 2.0),
                    value,
                    value + d.between(-1.0, 1.0),
                ];
                for (column, value) in STREAMS.into_iter().zip(drawn) {
                    rows.streams.get_mut(&column).unwrap()[row].push(value as f32);
                }
                let found = Prediction { logprob, entropy: d.between(0.0, 5.0), value: value + d.between(-0.6, 0.6) };
                rows.found[row].push(found);
            }
        }
        rows
    }

    fn batch(&self, rows: &[usize]) -> Batch {
        let ids = |value: u32| ragged_u32(&rows.iter().map(|&r| vec![value; self.lengths[r]]).collect::<Vec<_>>());
        let mut columns = vec![(Column::Tokens, ids(1)), (Column::Targets, ids(1)), (Column::SeqId, ids(0))];
        let pick = |all: &Vec<Vec<f32>>| ragged_f32(&rows.iter().map(|&r| all[r].clone()).collect::<Vec<_>>());
        columns.extend(self.streams.iter().map(|(column, all)| (*column, pick(all))));
        Batch::from_columns(columns).unwrap()
    }

    fn at(&self, column: Column, row: usize, t: usize) -> f64 {
        f64::from(self.streams[&column][row][t])
    }

    /// Sum over sequences and tokens as the five modes are written down, of what `cost` says of a token.
    fn aggregate(&self, aggregation: Aggregation, cost: impl Fn(usize, usize) -> f64) -> f64 {
        let rows = || (0..self.lengths.len()).map(|r| (r, 0..self.lengths[r]));
        let marks = |r: usize| (0..self.lengths[r]).map(|t| self.at(Column::LossMask, r, t)).sum::<f64>();
        let sum = |r: usize| (0..self.lengths[r]).map(|t| self.at(Column::LossMask, r, t) * cost(r, t)).sum::<f64>();
        let n_tok: f64 = rows().map(|(r, _)| marks(r)).sum();
        let n_seq = rows().filter(|(r, _)| marks(*r) > 0.0).count() as f64;
        let total: f64 = rows().map(|(r, _)| sum(r)).sum();
        match aggregation {
            Aggregation::TokenMean => total / n_tok,
            Aggregation::TokenSum => total,
            Aggregation::SeqMeanTokenSum => total / n_seq,
            Aggregation::SeqMeanTokenMean => {
                rows().filter(|(r, _)| marks(*r) > 0.0).map(|(r, _)| sum(r) / marks(r)).sum::<f64>() / n_seq
            }
            Aggregation::SeqMeanTokenSumNorm(norm) => total / n_seq / norm,
        }
    }

    fn order(&self) -> Vec<usize> {
        (0..self.lengths.len()).collect()
    }
}

/// Sums and slopes of all tokens, the rows dealt to ranks in the given way; slopes by row.
fn evaluate(loss: &LossSpec, rows: &Rows, ranks: &[Vec<usize>]) -> (Sums, BTreeMap<(usize, usize), Slopes>) {
    let objectives: Vec<Objective> = ranks.iter().map(|own| Objective::new(loss, &rows.batch(own)).unwrap()).collect();
    let mut counts = vec![0.0; objectives[0].counts().len()];
    for objective in &objectives {
        counts.iter_mut().zip(objective.counts()).for_each(|(sum, own)| *sum += own);
    }
    let (mut sums, mut slopes) = (objectives[0].no_sums(), BTreeMap::new());
    for (objective, own) in objectives.iter().zip(ranks) {
        let scales = objective.scales(&counts);
        let mut at = 0;
        for &row in own {
            for t in 0..rows.lengths[row] {
                let slope = objective.add(at, rows.found[row][t], &scales, &mut sums);
                assert!(objective.counts_token(at) || slope == Slopes::default());
                slopes.insert((row, t), slope);
                at += 1;
            }
        }
    }
    (sums, slopes)
}

fn components(aggregation: Aggregation) -> Vec<LossComponent> {
    let kl =
        |estimator, straight_through| LossComponent::Kl { estimator, straight_through, coefficient: 0.3, aggregation };
    let clipped = |clip_dual, corrects_rollout| LossComponent::PolicyGradient {
        clip_low: 0.2,
        clip_high: 0.28,
        clip_dual,
        corrects_rollout,
        aggregation,
    };
    vec![
        clipped(None, false),
        clipped(Some(3.0), true),
        clipped(Some(1.1), false),
        kl(KlEstimator::K1, false),
        kl(KlEstimator::Abs, false),
        kl(KlEstimator::K2, false),
        kl(KlEstimator::K3, false),
        LossComponent::Entropy { coefficient: 0.01, aggregation },
        LossComponent::Value { clip: 0.2, coefficient: 0.5, aggregation },
        LossComponent::Value { clip: f64::INFINITY, coefficient: 0.5, aggregation },
        LossComponent::CrossEntropy { weight: Column::CeWeight, coefficient: 0.7 },
    ]
}

/// A token's loss as the formulas are printed, with min and max.
fn printed(rows: &Rows, component: &LossComponent, row: usize, t: usize) -> f64 {
    let (at, found) = (|c| rows.at(c, row, t), rows.found[row][t]);
    match *component {
        LossComponent::PolicyGradient { clip_low, clip_high, clip_dual, corrects_rollout, .. } => {
            let a = at(Column::Advantage);
            let r = (found.logprob - at(Column::OldLogprob)).clamp(-20.0, 20.0).exp();
            let both = (-a * r).max(-a * r.clamp(1.0 - clip_low, 1.0 + clip_high));
            let loss = match clip_dual {
                Some(c) if a < 0.0 => both.min(-a * c),
                _ => both,
            };
            loss * if corrects_rollout { at(Column::ImportanceWeight) } else { 1.0 }
        }
        LossComponent::Kl { estimator, .. } => {
            let d = found.logprob - at(Column::RefLogprob);
            match estimator {
                KlEstimator::K1 => d,
                KlEstimator::Abs => d.abs(),
                KlEstimator::K2 => d * d / 2.0,
                KlEstimator::K3 => {
                    let back = (-d).clamp(-20.0, 20.0);
                    (back.exp() - back - 1.0).clamp(-10.0, 10.0)
                }
            }
        }
        LossComponent::Entropy { .. } => -found.entropy,
        LossComponent::Value { clip, .. } => {
            let (old, target) = (at(Column::Value), at(Column::Return));
            let kept = found.value.clamp(old - clip, old + clip);
            0.5 * (found.value - target).powi(2).max((kept - target).powi(2))
        }
        LossComponent::CrossEntropy { .. } => unreachable!("has weights of its own"),
    }
}

fn coefficient(component: &LossComponent) -> f64 {
    match *component {
        LossComponent::PolicyGradient { .. } => 1.0,
        LossComponent::CrossEntropy { coefficient, .. }
        | LossComponent::Kl { coefficient, .. }
        | LossComponent::Entropy { coefficient, .. }
        | LossComponent::Value { coefficient, .. } => coefficient,
    }
}

#[test]
fn losses_are_the_printed_formulas() {
    let rows = Rows::draw(&mut Draw::fresh());
    for aggregation in AGGREGATIONS {
        for component in components(aggregation) {
            if matches!(component, LossComponent::CrossEntropy { .. }) {
                continue;
            }
            let expected =
                coefficient(&component) * rows.aggregate(aggregation, |row, t| printed(&rows, &component, row, t));
            let (sums, _) = evaluate(&LossSpec::new(vec![component.clone()]), &rows, &[rows.order()]);
            // A few dozen float64 additions.
            assert!((sums.loss() - expected).abs() <= 1e-12 * (1.0 + expected.abs()), "{component:?}");
        }
    }
}

#[test]
fn slopes_are_what_the_loss_changes_by() {
    let mut d = Draw::fresh();
    let rows = Rows::draw(&mut d);
    for aggregation in AGGREGATIONS {
        let all = components(aggregation);
        let (values, distribution): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|c| matches!(c, LossComponent::Value { .. }));
        for components in [values, distribution] {
            check_slopes(&LossSpec::new(components), &rows);
        }
    }
}

fn check_slopes(loss: &LossSpec, rows: &Rows) {
    const STEP: f64 = 1e-6;
    let order = [rows.order()];
    let (_, slopes) = evaluate(loss, rows, &order);
    let moved = |row: usize, t: usize, by: Prediction| {
        let mut other =
            Rows { lengths: rows.lengths.clone(), streams: rows.streams.clone(), found: rows.found.clone() };
        let found = &mut other.found[row][t];
        found.logprob += by.logprob;
        found.entropy += by.entropy;
        found.value += by.value;
        evaluate(loss, &other, &order).0.loss()
    };
    for (&(row, t), slope) in &slopes {
        let along = |by: fn(f64) -> Prediction| {
            let (after, before) = (moved(row, t, by(STEP)), moved(row, t, by(-STEP)));
            // What a few dozen additions round: other tokens may cost up to 1e9 (a ratio of e^20).
            ((after - before) / (2.0 * STEP), 16.0 * f64::EPSILON * after.abs().max(before.abs()) / STEP)
        };
        let found = [
            (along(|s| Prediction { logprob: s, ..Prediction::default() }), slope.logprob),
            (along(|s| Prediction { entropy: s, ..Prediction::default() }), slope.entropy),
            (along(|s| Prediction { value: s, ..Prediction::default() }), slope.value),
        ];
        for ((difference, rounding), slope) in found {
            // Central differences: their rounding, curvature 1e-12.
            let tolerance = 1e-6 + rounding + 2e-4 * slope.abs();
            assert!((difference - slope).abs() <= tolerance, "{row} {t}: {difference} and {slope}");
        }
    }
}

#[test]
fn cuts_and_order_of_rows_change_nothing() {
    let mut d = Draw::fresh();
    let rows = Rows::draw(&mut d);
    for aggregation in AGGREGATIONS {
        let loss = LossSpec::new(components(aggregation));
        let (whole, slopes) = evaluate(&loss, &rows, &[rows.order()]);
        let (cut, other) = evaluate(&loss, &rows, &[vec![5, 1], vec![0], vec![3, 2, 4]]);
        for (a, b) in whole.0.iter().zip(&cut.0) {
            // The same terms in another order, in float64.
            assert!((a - b).abs() <= 1e-12 * (1.0 + a.abs()), "{whole:?} {cut:?}");
        }
        assert_eq!(slopes, other, "a token's slopes do not depend on where it lies");
    }
}

#[test]
fn straight_through_has_the_slope_of_k2_and_the_value_of_its_own() {
    let rows = Rows::draw(&mut Draw::fresh());
    let kl = |estimator, straight_through| {
        let aggregation = Aggregation::TokenMean;
        LossSpec::new(vec![LossComponent::Kl { estimator, straight_through, coefficient: 1.0, aggregation }])
    };
    let (_, k2) = evaluate(&kl(KlEstimator::K2, false), &rows, &[rows.order()]);
    for estimator in [KlEstimator::K1, KlEstimator::Abs, KlEstimator::K3] {
        let (plain, _) = evaluate(&kl(estimator, false), &rows, &[rows.order()]);
        let (through, slopes) = evaluate(&kl(estimator, true), &rows, &[rows.order()]);
        assert_eq!((through, slopes), (plain, k2.clone()), "{estimator:?}");
    }
}

#[test]
fn on_policy_the_ratio_is_one() {
    let mut rows = Rows::draw(&mut Draw::fresh());
    for (row, found) in rows.found.iter_mut().enumerate() {
        for (t, f) in found.iter_mut().enumerate() {
            f.logprob = f64::from(rows.streams[&Column::OldLogprob][row][t]);
        }
    }
    let loss = LossSpec::new(vec![components(Aggregation::TokenMean).swap_remove(0)]);
    let (sums, slopes) = evaluate(&loss, &rows, &[rows.order()]);
    assert_eq!(sums.0[2..], [0.0; 3], "ppo_kl and the clipped fractions");
    let n: f64 = rows.streams[&Column::LossMask].iter().flatten().map(|&m| f64::from(m)).sum();
    for ((row, t), slope) in slopes {
        let expected = -rows.at(Column::Advantage, row, t) * rows.at(Column::LossMask, row, t) / n;
        assert!((slope.logprob - expected).abs() <= 1e-15, "a ratio of exactly 1");
    }
}

#[test]
fn documents_of_a_row_are_sequences() {
    let (shares, marked) = shares_of(&[1.0, 1.0, 0.0, 1.0, 0.0, 0.5], &[0, 0, 0, 1, 0, 0], &[4, 2]);
    assert_eq!(shares, [0.5, 0.5, 0.0, 1.0, 0.0, 1.0]);
    assert_eq!(marked, 3);
}
