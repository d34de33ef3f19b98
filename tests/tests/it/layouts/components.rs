//! Sums of loss components, and `forward`, in many layouts: one rank in float64 against the formulas written down again
//! here, row by row without packing, and its gradient against differences of that; then every layout in fp32 against one
//! rank in fp32, with rows dealt unevenly and in another order, in micro-batches of a budget of tokens, in which what rows
//! begin with is computed once.

use super::harness::{Case, LR, RankStep, Step, VOCAB, join, owned_gradients};
use crate::support;
use std::collections::BTreeMap;
use std::panic::catch_unwind;
use tangelo_configs::Plan;
use tangelo_core::batch::{ragged_f32, ragged_u32};
use tangelo_core::hash::mix64;
use tangelo_core::{Aggregation, Batch, Column, Group, KlEstimator, LossComponent, LossSpec};
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::device;
use tangelo_models::{Model, PackContext};
use tangelo_trainer::micro_batch::MicroBatches;
use tangelo_trainer::worker::{LossStats, TrainWorker};
use tch::{Device, Kind, Tensor};

/// Tokens of a micro-batch: several rows, or one long one.
const BUDGET: usize = 48;
const ROWS: usize = 13;
/// Neighbouring rows that begin with the same tokens, except for every fourth such family.
const FAMILY: usize = 3;

/// One sequence and its streams.
struct Row {
    tokens: Vec<u32>,
    streams: BTreeMap<Column, Vec<f32>>,
}

impl Row {
    /// A prompt and a completion with a hole in its mask; every sixth row is not marked at all. Old values and
    /// log-probabilities lie around what a model says that knows nothing, so that some tokens are clipped.
    fn draw(seed: u64, index: usize) -> Row {
        let mut unit = units(seed ^ mix64(index as u64 + 77));
        let first = Row::draw_first(seed, index / FAMILY);
        let n = first.len() + 2 + (unit() * (38.0 - first.len() as f64)) as usize;
        let own = n - first.len();
        let tokens: Vec<u32> = first.iter().copied().chain((0..own).map(|_| (unit() * VOCAB as f64) as u32)).collect();
        let prompt = first.len().max(1) + (unit() * (own as f64 - 1.0)) as usize;
        let mut streams: BTreeMap<Column, Vec<f32>> = BTreeMap::new();
        for t in 0..n {
            let marked = index % 6 != 5 && t + 1 < n && t + 1 >= prompt && (n < 6 || unit() < 0.8);
            let uniform = -(VOCAB as f64).ln();
            let mut put = |column, value: f64| streams.entry(column).or_default().push(value as f32);
            put(Column::LossMask, f64::from(u8::from(marked)));
            put(Column::CeWeight, if marked { 0.5 + unit() } else { 0.0 });
            put(Column::Advantage, unit() * 4.0 - 2.0);
            put(Column::OldLogprob, uniform + unit() - 0.5);
            put(Column::RefLogprob, uniform + unit() * 2.0 - 1.0);
            put(Column::ImportanceWeight, unit() * 2.0);
            put(Column::Value, unit() - 0.5);
            put(Column::Return, unit() * 2.0 - 1.0);
        }
        Row { tokens, streams }
    }

    /// What the rows of a family begin with.
    fn draw_first(seed: u64, family: usize) -> Vec<u32> {
        let mut unit = units(seed ^ mix64(family as u64 + 7777));
        let n = match family % 4 {
            0 => 6 + (unit() * 12.0) as usize,
            3 => 0,
            _ => 2 + (unit() * 16.0) as usize,
        };
        (0..n).map(|_| (unit() * VOCAB as f64) as u32).collect()
    }

    fn targets(&self) -> Vec<u32> {
        self.tokens[1..].iter().copied().chain([0]).collect()
    }
}

/// Numbers in [0, 1).
fn units(seed: u64) -> impl FnMut() -> f64 {
    let mut state = mix64(seed);
    move || {
        state = mix64(state);
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn batch_of(rows: &[&Row]) -> Batch {
    let u32s = |of: &dyn Fn(&Row) -> Vec<u32>| ragged_u32(&rows.iter().map(|row| of(row)).collect::<Vec<_>>());
    let mut columns = vec![
        (Column::Tokens, u32s(&|row| row.tokens.clone())),
        (Column::Targets, u32s(&Row::targets)),
        (Column::Positions, u32s(&|row| (0..row.tokens.len() as u32).collect())),
        (Column::SeqId, u32s(&|row| vec![0; row.tokens.len()])),
    ];
    for column in Row::draw(0, 0).streams.into_keys() {
        columns.push((column, ragged_f32(&rows.iter().map(|row| row.streams[&column].clone()).collect::<Vec<_>>())));
    }
    Batch::from_columns(columns).expect("columns of equal lengths")
}

/// Which rows each reader gets: families in any order, of each any rows in any order, perhaps none.
fn deal(seed: u64, readers: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..ROWS).collect();
    order.sort_by_key(|&row| (mix64(seed ^ mix64((row / FAMILY) as u64)), mix64(seed ^ mix64(row as u64))));
    let mut parts = vec![Vec::new(); readers];
    for (at, row) in order.into_iter().enumerate() {
        parts[mix64(seed ^ (at as u64) << 8) as usize % readers].push(row);
    }
    parts
}

/// What is minimised, and whether by a critic.
fn losses(aggregation: Aggregation) -> [(LossSpec, bool); 2] {
    let policy = vec![
        LossComponent::PolicyGradient {
            clip_low: 0.2,
            clip_high: 0.28,
            clip_dual: Some(1.5),
            corrects_rollout: true,
            aggregation,
        },
        LossComponent::Kl { estimator: KlEstimator::K3, straight_through: false, coefficient: 0.4, aggregation },
        LossComponent::Entropy { coefficient: 0.3, aggregation },
        LossComponent::CrossEntropy { weight: Column::CeWeight, coefficient: 0.1 },
    ];
    let critic = vec![LossComponent::Value { clip: 0.2, coefficient: 0.5, aggregation }];
    [(LossSpec { components: policy, temperature: 0.7 }, false), (LossSpec::new(critic), true)]
}

fn scalar(mut case: Case) -> Case {
    case.set("model", &["head={type='scalar'}", "tie_word_embeddings=false"]);
    case
}

// ---- one rank in float64, against the formulas ---------------------------------------------------------------------

/// Log-probabilities and entropies, or values and nothing, of a row's tokens.
fn said(model: &Model, row: &Row, temperature: f64) -> [Vec<f64>; 2] {
    let logits = model.logits(&PackContext::single(&row.tokens, Device::Cpu));
    let list = |t: Tensor| Vec::<f64>::try_from(t).expect("a flat f64 tensor");
    if logits.size()[1] == 1 {
        return [list(logits.squeeze_dim(1)), vec![0.0; row.tokens.len()]];
    }
    let logprobs = (logits / temperature).log_softmax(-1, Kind::Double);
    let targets: Vec<i64> = row.targets().into_iter().map(i64::from).collect();
    let chosen = logprobs.gather(1, &Tensor::from_slice(&targets).unsqueeze(1), false).squeeze_dim(1);
    let entropy = -(logprobs.exp() * &logprobs).sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
    [list(chosen), list(entropy)]
}

/// The loss of all rows, from what the model says of each.
fn printed(loss: &LossSpec, rows: &[Row], said: &[[Vec<f64>; 2]]) -> f64 {
    let at = |row: usize, column: Column, t: usize| f64::from(rows[row].streams[&column][t]);
    let sum = |weight: Column, cost: &dyn Fn(usize, usize) -> f64, row: usize| -> f64 {
        (0..rows[row].tokens.len()).map(|t| at(row, weight, t) * cost(row, t)).sum()
    };
    let total = |weight: Column| -> f64 { (0..rows.len()).map(|row| sum(weight, &|_, _| 1.0, row)).sum() };
    let marked = |row: usize| sum(Column::LossMask, &|_, _| 1.0, row);
    let num_sequences = (0..rows.len()).filter(|&row| marked(row) > 0.0).count() as f64;
    let aggregate = |how: Aggregation, cost: &dyn Fn(usize, usize) -> f64| -> f64 {
        let sums = || (0..rows.len()).map(|row| sum(Column::LossMask, cost, row));
        match how {
            Aggregation::TokenMean => sums().sum::<f64>() / total(Column::LossMask),
            Aggregation::TokenSum => sums().sum(),
            Aggregation::SeqMeanTokenSum => sums().sum::<f64>() / num_sequences,
            Aggregation::SeqMeanTokenMean => {
                sums().enumerate().map(|(row, s)| s / marked(row).max(1.0)).sum::<f64>() / num_sequences
            }
            Aggregation::SeqMeanTokenSumNorm(norm) => sums().sum::<f64>() / num_sequences / norm,
        }
    };
    let component = |component: &LossComponent| -> f64 {
        match *component {
            LossComponent::PolicyGradient { clip_low, clip_high, clip_dual, aggregation, .. } => {
                let cost = |row: usize, t: usize| {
                    let (a, old) = (at(row, Column::Advantage, t), at(row, Column::OldLogprob, t));
                    let ratio = (said[row][0][t] - old).clamp(-20.0, 20.0).exp();
                    let both = (-a * ratio).max(-a * ratio.clamp(1.0 - clip_low, 1.0 + clip_high));
                    let kept = clip_dual.filter(|_| a < 0.0).map_or(both, |c| both.min(-a * c));
                    kept * at(row, Column::ImportanceWeight, t)
                };
                aggregate(aggregation, &cost)
            }
            LossComponent::Kl { coefficient, aggregation, .. } => {
                let cost = |row: usize, t: usize| {
                    let back = (at(row, Column::RefLogprob, t) - said[row][0][t]).clamp(-20.0, 20.0);
                    (back.exp() - back - 1.0).clamp(-10.0, 10.0)
                };
                coefficient * aggregate(aggregation, &cost)
            }
            LossComponent::Entropy { coefficient, aggregation } => {
                -coefficient * aggregate(aggregation, &|row, t| said[row][1][t])
            }
            LossComponent::CrossEntropy { weight, coefficient } => {
                let all: f64 = (0..rows.len()).map(|row| sum(weight, &|row, t| -said[row][0][t], row)).sum();
                coefficient * all / total(weight)
            }
            LossComponent::Value { clip, coefficient, aggregation } => {
                let cost = |row: usize, t: usize| {
                    let (old, target) = (at(row, Column::Value, t), at(row, Column::Return, t));
                    let value = said[row][0][t];
                    let kept = value.clamp(old - clip, old + clip);
                    0.5 * (value - target).powi(2).max((kept - target).powi(2))
                };
                coefficient * aggregate(aggregation, &cost)
            }
        }
    };
    loss.components.iter().map(component).sum()
}

#[test]
fn one_rank_in_float64_has_the_printed_loss_and_its_gradient() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let rows: Vec<Row> = (0..ROWS).map(|row| Row::draw(seed, row)).collect();
    let all: Vec<&Row> = rows.iter().collect();
    let modes = [
        Aggregation::TokenMean,
        Aggregation::TokenSum,
        Aggregation::SeqMeanTokenSum,
        Aggregation::SeqMeanTokenMean,
        Aggregation::SeqMeanTokenSumNorm(40.0),
    ];
    for (mode, (loss, is_critic)) in modes.into_iter().flat_map(|mode| losses(mode).map(|loss| (mode, loss))) {
        let case = Case::parse("mha", seed);
        let case = if is_critic { scalar(case) } else { case };
        let mut worker =
            TrainWorker::with_kind(&case.plan(), 0, Communicator::single(), Device::Cpu, Kind::Double).unwrap();
        worker.start_from_seed(seed);
        worker.set_micro_batches(MicroBatches::Tokens(BUDGET));
        worker.set_share_prompts(mode != Aggregation::TokenSum);
        let stats = worker.forward_backward(&batch_of(&all), &loss, false).unwrap();
        let written = |model: &Model| {
            let said: Vec<_> = rows.iter().map(|row| said(model, row, loss.temperature)).collect();
            printed(&loss, &rows, &said)
        };
        let expected = written(worker.model());
        // The same numbers added in another order, in float64.
        let error = (stats.loss - expected).abs() / (1.0 + expected.abs());
        assert!(error < 1e-10, "{mode:?}: {} instead of {expected}", stats.loss);
        check_direction(&worker, written, &format!("{mode:?}, critic {is_critic}"));
    }
}

/// The gradient along a random direction is what the loss changes by.
fn check_direction(worker: &TrainWorker, loss: impl Fn(&Model) -> f64, what: &str) {
    let units = worker.model().units().iter();
    let weights: Vec<_> = units.flat_map(|unit| unit.spans().iter().map(move |span| (unit, span))).collect();
    let mut slope = 0.0;
    let directions: Vec<(Tensor, Tensor)> = weights
        .into_iter()
        .map(|(unit, span)| {
            let weight = unit.weight(&span.meta.name);
            let direction = weight.value.randn_like() * 0.1;
            slope += (&direction * weight.grad().expect("a trained model")).sum(Kind::Double).double_value(&[]);
            (weight.value.shallow_clone(), direction)
        })
        .collect();
    let moved = |by: f64| {
        let shift =
            |by: f64| tch::no_grad(|| directions.iter().for_each(|(w, d)| _ = w.shallow_clone().g_add_(&(d * by))));
        shift(by);
        let found = loss(worker.model());
        shift(-by);
        found
    };
    let differences = [1e-5, 1e-6, 1e-7].map(|step| (moved(step) - moved(-step)) / (2.0 * step));
    let error = |difference: f64| (difference - slope).abs() / slope.abs().max(1e-3);
    // Rounding 1e-16 / 1e-7 at worst, curvature 1e-10. A step may take a token over a clip's edge; a shorter one then does
    // not.
    let holds = differences.iter().any(|&difference| error(difference) < 1e-4);
    assert!(holds, "{what}: the loss changes by {differences:?} along a direction, the gradient says {slope}");
}

// ---- layouts -------------------------------------------------------------------------------------------------------

const LAYOUTS: [&str; 17] = [
    "gqa tp2",
    "odd tp4",
    "gqa tp8",
    "mha cp2 heads2",
    "gqa cp8 heads8",
    "gqa cp2 ring",
    "odd cp3 ring full",
    "gqa pp2",
    "qwen pp4 gpipe",
    "gqa dp2",
    "gqa dp2 z1.1.2",
    "mha dp4 z4.4.4",
    "gqa dp2 z2.2.2 full",
    "mha dp2 tp2 cp2 ring z2.4.4",
    "odd tp2 cp2 pp2 ring",
    "gqa rep2 dp2 tp2 z2.2.2",
    "gqa tp2 pp2 stages1.3",
];

/// Norm of the difference of all gradients over that of the gradient.
const MAX_GRADIENT_ERROR: f64 = 1e-6;
/// Metrics are sums of float64 of numbers that are rounded to fp32.
const MAX_METRIC_ERROR: f64 = 1e-5;

struct Outcome {
    step: Step,
    stats: LossStats,
}

/// One step of `loss` on rows dealt to the readers. In balanced micro-batches rows share what they begin with.
fn step(case: &Case, loss: &LossSpec, rows: &[Row], micro_batches: MicroBatches) -> Outcome {
    let parts: Vec<(RankStep, LossStats)> = case.on_all_ranks(|plan, comm| {
        let mut worker = case.worker(plan, comm);
        worker.set_micro_batches(micro_batches);
        worker.set_share_prompts(matches!(micro_batches, MicroBatches::Balanced(_)));
        let stats = worker.forward_backward(&own_batch(case, plan, &worker, rows), loss, false).unwrap();
        let update = worker.optim_step(LR, &stats).unwrap();
        assert!(!update.skipped);
        let gradients = owned_gradients(&worker);
        (RankStep { loss: stats.loss, norm: update.grad_norm, gradients }, stats)
    });
    let stats = parts[0].1.clone();
    let same = |s: &LossStats| (&s.metrics, s.loss, s.tokens) == (&stats.metrics, stats.loss, stats.tokens);
    assert!(parts.iter().all(|(_, s)| same(s)), "ranks found other losses or metrics");
    Outcome { step: join(parts.iter().map(|(step, _)| step).collect(), &case.plan().model), stats }
}

fn own_batch(case: &Case, plan: &Plan, worker: &TrainWorker, rows: &[Row]) -> Batch {
    let readers = plan.topology.size(Group::Batch);
    let own = deal(case.seed(), readers).swap_remove(plan.topology.index(Group::Batch, worker.rank()));
    batch_of(&own.iter().map(|&row| &rows[row]).collect::<Vec<_>>())
}

fn difference(found: &Step, truth: &Step) -> f64 {
    let square = |t: &Tensor| t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
    let off: f64 = found.gradients.iter().map(|(name, g)| square(&(g - &truth.gradients[name]))).sum();
    (off / truth.gradients.values().map(square).sum::<f64>()).sqrt()
}

fn compare(found: &Outcome, truth: &Outcome) -> Result<f64, String> {
    for ((name, value), (other, expected)) in found.stats.metrics.iter().zip(&truth.stats.metrics) {
        if name != other || (value - expected).abs() > MAX_METRIC_ERROR * (0.1 + expected.abs()) {
            return Err(format!("{name} is {value} instead of {expected} ({other})"));
        }
    }
    if found.stats.tokens != truth.stats.tokens || found.stats.total_weight != truth.stats.total_weight {
        return Err(format!("{:?} instead of {:?}", found.stats, truth.stats));
    }
    let error = difference(&found.step, &truth.step);
    if error <= MAX_GRADIENT_ERROR { Ok(error) } else { Err(format!("gradients differ by {error:.1e}")) }
}

#[test]
fn sums_of_components_are_the_same_in_every_layout() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let rows: Vec<Row> = (0..ROWS).map(|row| Row::draw(seed, row)).collect();
    let (mut truths, mut failures) = (BTreeMap::new(), Vec::new());
    for (at, line) in LAYOUTS.into_iter().enumerate() {
        let mode = [Aggregation::SeqMeanTokenMean, Aggregation::TokenMean][at % 2];
        for (loss, is_critic) in losses(mode) {
            let of = |line: &str| if is_critic { scalar(Case::parse(line, seed)) } else { Case::parse(line, seed) };
            let case = of(line);
            let truth = truths
                .entry((case.model, at % 2, is_critic))
                .or_insert_with(|| step(&of(case.model), &loss, &rows, MicroBatches::Tokens(usize::MAX)));
            // Two of three share prompts.
            let cut = if at % 3 == 0 { MicroBatches::Tokens(BUDGET) } else { MicroBatches::Balanced(2 * BUDGET) };
            let found = catch_unwind(|| step(&case, &loss, &rows, cut));
            match found.map_err(|_| "a rank panicked: see above".to_owned()).and_then(|found| compare(&found, truth)) {
                Ok(error) => println!("{line:40} critic {is_critic:5} {error:.1e}"),
                Err(message) => failures.push(format!("{line}, critic {is_critic}: {message}")),
            }
        }
    }
    assert!(failures.is_empty(), "{} layouts differ:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn forward_says_the_same_in_every_layout_and_makes_ratios_of_one() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let rows: Vec<Row> = (0..ROWS).map(|row| Row::draw(seed, row)).collect();
    let mut failures = Vec::new();
    for line in ["gqa", "mha"].into_iter().chain(LAYOUTS) {
        let checked = catch_unwind(|| check_forward(line, seed, &rows));
        match checked.map_err(|_| "a rank panicked: see above".to_owned()).and_then(|found| found) {
            Ok(error) => println!("{line:40} {error:.1e}"),
            Err(message) => failures.push(format!("{line}: {message}")),
        }
    }
    assert!(failures.is_empty(), "{} layouts differ:\n{}", failures.len(), failures.join("\n"));
}

/// Columns of every reader's rows, as the ranks of the last stage found them.
fn forward(case: &Case, rows: &[Row], what: &[Column], temperature: f64, share: bool) -> Vec<Batch> {
    let found = case.on_all_ranks(|plan, comm| {
        let mut worker = case.worker(plan, comm);
        worker.set_micro_batches(MicroBatches::Tokens(BUDGET));
        worker.set_share_prompts(share);
        let batch = own_batch(case, plan, &worker, rows);
        let reader = plan.topology.index(Group::Batch, worker.rank());
        worker.forward(&batch, what, temperature).unwrap().map(|batch| (reader, batch))
    });
    let plan = case.plan();
    let last = plan.topology.mesh.world_size() / plan.topology.num_stages();
    assert_eq!(found.iter().flatten().count(), last, "every rank of the last stage answers, no other");
    let readers = plan.topology.size(Group::Batch);
    let of = |reader| {
        let mut all = found.iter().flatten().filter(|(at, _)| *at == reader).map(|(_, batch)| batch.clone());
        let first = all.next().expect("somebody answers for every reader");
        assert!(all.all(|batch| batch == first), "ranks that share rows say the same");
        first
    };
    (0..readers).map(of).collect()
}

/// By row of the whole batch.
fn by_row(case: &Case, found: &[Batch], column: Column) -> BTreeMap<usize, Vec<f32>> {
    let mut all = BTreeMap::new();
    for (own, batch) in deal(case.seed(), found.len()).into_iter().zip(found) {
        own.into_iter()
            .enumerate()
            .for_each(|(at, row)| _ = all.insert(row, batch.slice(at, 1).f32_values(column).unwrap()));
    }
    all
}

fn check_forward(line: &str, seed: u64, rows: &[Row]) -> Result<f64, String> {
    const TEMPERATURE: f64 = 0.7;
    let what = [Column::OldLogprob, Column::RefLogprob, Column::Entropy];
    let case = Case::parse(line, seed);
    let found = forward(&case, rows, &what, TEMPERATURE, true);
    let mut worst = 0f64;
    let mut differ = |case: &Case, found: &[Batch], column| {
        let alone = one_rank(case);
        let truth = by_row(&alone, &forward(&alone, rows, &[column], TEMPERATURE, false), column);
        for (row, values) in by_row(case, found, column) {
            let off = |(a, b): (&f32, &f32)| if (a - b).is_finite() { f64::from((a - b).abs()) } else { f64::INFINITY };
            worst = values.iter().zip(&truth[&row]).map(off).fold(worst, f64::max);
        }
    };
    differ(&case, &found, Column::OldLogprob);
    differ(&case, &found, Column::Entropy);
    let critic = scalar(Case::parse(line, seed));
    differ(&critic, &forward(&critic, rows, &[Column::Value], 1.0, true), Column::Value);
    // Numbers of size 6 or less, from sums of some hundred terms in fp32.
    if worst > 1e-5 {
        return Err(format!("off by {worst:.1e}"));
    }
    on_policy(&case, &found).map(|()| worst)
}

fn one_rank(case: &Case) -> Case {
    let alone = Case::parse(case.model, case.seed());
    if case.plan().model.head == tangelo_configs::HeadSpec::Vocabulary { alone } else { scalar(alone) }
}

/// A loss that reads what `forward` said finds no distance at all; after an update, another mini-batch of the same rollout
/// does.
fn on_policy(case: &Case, found: &[Batch]) -> Result<(), String> {
    let aggregation = Aggregation::TokenMean;
    let k2 = LossComponent::Kl { estimator: KlEstimator::K2, straight_through: false, coefficient: 1.0, aggregation };
    let pg = LossComponent::PolicyGradient {
        clip_low: 0.0,
        clip_high: 0.0,
        clip_dual: None,
        corrects_rollout: false,
        aggregation,
    };
    let loss = LossSpec { components: vec![pg, k2], temperature: 0.7 };
    let stats = case.on_all_ranks(|plan, comm| {
        let mut worker = case.worker(plan, comm);
        worker.set_micro_batches(MicroBatches::Tokens(BUDGET));
        worker.set_share_prompts(true);
        let batch = &found[plan.topology.index(Group::Batch, worker.rank())];
        let first = worker.forward_backward(batch, &loss, false).unwrap();
        assert!(!worker.optim_step(LR, &first).unwrap().skipped);
        let half = batch.slice(0, batch.num_sequences().div_ceil(2));
        [first, worker.forward_backward(&half, &loss, false).unwrap()]
    });
    let [first, second] = &stats[0];
    let of = |stats: &LossStats, name: &str| stats.metrics.iter().find(|(n, _)| *n == name).map(|(_, value)| *value);
    let distances = ["actor/kl_loss", "actor/ppo_kl", "actor/pg_clipfrac"].map(|name| of(first, name));
    match (distances == [Some(0.0); 3], of(second, "actor/kl_loss") > Some(0.0)) {
        (true, true) => Ok(()),
        _ => Err(format!("not on-policy, or never off it: {:?}, then {:?}", first.metrics, second.metrics)),
    }
}

/// A policy and a critic on one rank, in the types in which it is an invariant that rows do not depend on their neighbours.
#[test]
fn what_rows_share_is_computed_once_and_has_the_same_bits() {
    device::set_threads(1);
    let seed = support::fresh_seed();
    let rows: Vec<Row> = (0..ROWS).map(|row| Row::draw(seed, row)).collect();
    let batch = batch_of(&rows.iter().collect::<Vec<_>>());
    let policy = [Column::OldLogprob, Column::Entropy].as_slice();
    for (line, what) in ["gqa", "mha", "qwen"].into_iter().flat_map(|line| [(line, policy), (line, &[Column::Value])]) {
        let case = Case::parse(line, seed);
        let case = if what == policy { case } else { scalar(case) };
        let (loss, _) =
            losses(Aggregation::TokenMean).into_iter().find(|(_, critic)| *critic != (what == policy)).unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            let mut worker =
                TrainWorker::with_kind(&case.plan(), 0, Communicator::single(), Device::Cpu, kind).unwrap();
            worker.start_from_seed(seed);
            worker.set_micro_batches(MicroBatches::Balanced(3 * BUDGET));
            let mut turn = |share| {
                worker.set_share_prompts(share);
                let said = worker.forward(&batch, what, 0.7).unwrap().expect("one rank answers");
                let stats = worker.forward_backward(&said, &loss, false).unwrap();
                worker.discard_gradients();
                (said, stats)
            };
            let ((whole, all), (shared, fewer)) = (turn(false), turn(true));
            assert!(whole == shared, "seed {seed}, {line}, {kind:?}: {what:?} differ");
            let computed = |stats: &LossStats| stats.computed.iter().map(|(tokens, _)| tokens).sum::<usize>();
            assert_eq!(computed(&all), batch.num_tokens());
            assert!(computed(&fewer) < batch.num_tokens(), "seed {seed}: nothing was shared");
            assert_eq!(all.tokens, fewer.tokens);
        }
    }
}
