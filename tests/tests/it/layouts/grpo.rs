//! GRPO's losses against TRL's own method on the same model and sequences: loss, KL, entropy, clipped share, every gradient.

use super::harness::{Case, relative_error};
use crate::support;
use std::collections::HashMap;
use std::path::Path;
use tangelo_core::batch::{ragged_f32, ragged_u32};
use tangelo_core::{Aggregation, Batch, Column, KlEstimator, LossComponent, LossSpec};
use tangelo_formats::Weights;
use tangelo_kernels::comm::Communicator;
use tangelo_kernels::device;
use tangelo_trainer::micro_batch::MicroBatches;
use tangelo_trainer::worker::TrainWorker;
use tch::{Device, Kind, Tensor};

/// As in tests/python/grpo.py.
const LONGEST: usize = 24;
/// Sums of some hundred numbers in fp32 on either side.
const MAX_NUMBER_ERROR: f64 = 1e-5;
/// ||ours - theirs|| / ||theirs|| of a gradient: both are fp32, each some 1e-6 to 4e-6 off for models this small.
const MAX_GRADIENT_ERROR: f64 = 2e-5;

type Tensors = HashMap<String, Tensor>;

fn read(path: &Path) -> Tensors {
    Tensor::read_safetensors(path).expect("grpo.py writes safetensors").into_iter().collect()
}

/// TRL's loss types as sums of components. `dapo` divides by the marked tokens of the whole batch, as `bnpo` of all rows.
fn loss_of(kind: &str) -> LossSpec {
    let aggregation = match kind {
        "grpo" => Aggregation::SeqMeanTokenMean,
        "dr_grpo" => Aggregation::SeqMeanTokenSumNorm(LONGEST as f64),
        _ => Aggregation::TokenMean,
    };
    let mut components = vec![
        LossComponent::PolicyGradient {
            clip_low: 0.2,
            clip_high: 0.28,
            clip_dual: None,
            corrects_rollout: false,
            aggregation,
        },
        LossComponent::Kl { estimator: KlEstimator::K3, straight_through: false, coefficient: 0.04, aggregation },
    ];
    let coefficient = if kind == "bnpo" { 0.01 } else { 0.0 };
    components.push(LossComponent::Entropy { coefficient, aggregation: Aggregation::TokenMean });
    LossSpec { components, temperature: 0.9 }
}

/// The padded sequences as ragged rows; a stream speaks of the next token.
fn batch_of(padded: &Tensors) -> Batch {
    let rows = padded["advantages"].size()[0] as usize;
    let row = |name: &str, row: usize| Vec::<f32>::try_from(padded[name].get(row as i64)).unwrap();
    let mut tokens: Vec<Vec<u32>> = Vec::new();
    let mut streams: HashMap<Column, Vec<Vec<f32>>> = HashMap::new();
    for i in 0..rows {
        let kept = |ids: &str, mask: &str| -> Vec<u32> {
            let marked = row(mask, i).into_iter().map(|m| m > 0.0);
            row(ids, i).into_iter().zip(marked).filter(|(_, m)| *m).map(|(id, _)| id as u32).collect()
        };
        let (prompt, completion) = (kept("prompt_ids", "prompt_mask"), kept("completion_ids", "completion_mask"));
        let of_next = |values: Vec<f32>| {
            let mut stream = vec![0.0; prompt.len() - 1];
            stream.extend(&values[..completion.len()]);
            stream.push(0.0);
            stream
        };
        let advantage = padded["advantages"].double_value(&[i as i64]) as f32;
        let of = [
            (Column::LossMask, vec![1.0; completion.len()]),
            (Column::Advantage, vec![advantage; completion.len()]),
            (Column::OldLogprob, row("old_per_token_logps", i)),
            (Column::RefLogprob, row("ref_per_token_logps", i)),
        ];
        of.into_iter().for_each(|(column, values)| streams.entry(column).or_default().push(of_next(values)));
        tokens.push([prompt, completion].concat());
    }
    let u32s = |of: fn(&Vec<u32>) -> Vec<u32>| ragged_u32(&tokens.iter().map(of).collect::<Vec<_>>());
    let mut columns = vec![
        (Column::Targets, u32s(|t| t[1..].iter().copied().chain([0]).collect())),
        (Column::Positions, u32s(|t| (0..t.len() as u32).collect())),
        (Column::SeqId, u32s(|t| vec![0; t.len()])),
        (Column::Tokens, ragged_u32(&tokens)),
    ];
    columns.extend(streams.into_iter().map(|(column, rows)| (column, ragged_f32(&rows))));
    Batch::from_columns(columns).expect("columns of equal lengths")
}

#[test]
fn grpo_equals_trls() {
    let Some(python) = support::python() else { return };
    device::set_threads(1);
    let (folder, seed) = (tempfile::tempdir().unwrap(), support::fresh_seed());
    support::run_script(&python, "grpo.py", &[folder.path().to_str().unwrap(), &seed.to_string()]);
    let plan = Case::parse("mha", seed).plan();
    let mut worker = TrainWorker::new(&plan, 0, Communicator::single(), Device::Cpu).unwrap();
    worker.start_from(&Weights::open(&folder.path().join("model")).unwrap()).unwrap();
    worker.set_micro_batches(MicroBatches::Balanced(80));
    let batch = batch_of(&read(&folder.path().join("batch.safetensors")));
    for kind in ["grpo", "bnpo", "dr_grpo", "dapo"] {
        let theirs = read(&folder.path().join(format!("{kind}.safetensors")));
        let stats = worker.forward_backward(&batch, &loss_of(kind), false).unwrap();
        let of = |name: &str| stats.metrics.iter().find(|(n, _)| *n == name).unwrap().1;
        let clipped = of("actor/pg_clipfrac");
        let mut ours = vec![(stats.loss, 0)];
        if kind != "grpo" && kind != "dr_grpo" {
            // Theirs are means over tokens whatever the type.
            ours.extend([(of("actor/kl_loss"), 1), (of("actor/entropy"), 2)]);
        }
        ours.push((clipped, 3));
        for (ours, at) in ours {
            let theirs = theirs["numbers"].double_value(&[at]);
            let error = (ours - theirs).abs() / (0.1 + theirs.abs());
            assert!(error <= MAX_NUMBER_ERROR, "seed {seed}, {kind}, number {at}: {ours}, theirs {theirs}");
        }
        println!("{kind}: loss {:.6}, clipped {clipped:.3}, gradients {:.1e} off", stats.loss, worst(&worker, &theirs));
        assert!(worst(&worker, &theirs) <= MAX_GRADIENT_ERROR, "seed {seed}, {kind}: gradients differ");
        worker.discard_gradients();
    }
}

fn worst(worker: &TrainWorker, theirs: &Tensors) -> f64 {
    let gradients = theirs.iter().filter_map(|(key, g)| Some((key.strip_prefix("grad.")?, g)));
    let error = |(name, theirs): (&str, &Tensor)| {
        let ours = worker.model().weight(name).and_then(|w| w.grad().map(Tensor::shallow_clone)).expect(name);
        relative_error(&ours, &theirs.to_kind(Kind::Double))
    };
    gradients.map(error).fold(0.0, f64::max)
}
