//! `gpu-check`: what a machine with a GPU can check and measure by itself, without Rust.
//!
//! A random model is run on the CPU in float64 and on the GPU in fp32 and bf16: logits, loss and every gradient are
//! compared, so that every operator's CUDA path is on the way. Then cached against uncached generation, the
//! communicators, and speed. Without a GPU it says so and succeeds.

use super::generate::{Options, generate};
use crate::alone::Alone;
use crate::error::{Result, TrainError};
use crate::init;
use crate::sample::Sampler;
use std::time::Instant;
use tangelo_configs::ModelSpec;
use tangelo_core::batch::{ragged_f32, ragged_u32};
use tangelo_core::hash::{mix64, uniform};
use tangelo_core::{Batch, Column};
use tangelo_kernels::{comm, device};
use tangelo_models::Model;
use tch::{Device, Kind, Tensor};

/// fp32 products on a GPU (TF32 off) round as a CPU's do; sums of some thousand terms stay within this.
const FP32_TOLERANCE: f64 = 2e-5;
/// bf16 keeps 8 bits: each of some ten roundings on the way adds up to 4e-3 relative.
const BF16_TOLERANCE: f64 = 5e-2;
/// The seed of weights and tokens.
const SEED: u64 = 7;
/// Steps that are timed, after as many to warm up.
const TIMED_STEPS: u32 = 10;

/// Prints one line per check; fails where any does.
pub fn run() -> Result<()> {
    if !device::driver_present() {
        println!("skipped: no CUDA driver (libcuda.so.1) on this machine");
        return Ok(());
    }
    let count = device::open_cuda().map_err(|e| TrainError::Device(e.to_string()))?;
    println!("{count} GPU(s)");
    let gpu = Device::Cuda(0);
    let mut failed = 0;
    for name in ["debugmodel", "qwen3-0.6b", "qwen2.5-0.5b", "mistral-7b"] {
        let spec = small(name)?;
        for (kind, tolerance) in [(Kind::Float, FP32_TOLERANCE), (Kind::BFloat16, BF16_TOLERANCE)] {
            failed += print(&format!("{name} {kind:?} against float64"), compare(&spec, gpu, kind, tolerance));
        }
        failed += print(&format!("{name} cached generation"), cached_equals_uncached(&spec, gpu));
    }
    for check in comm::check::gpu_checks() {
        failed += print(&check.name, check.outcome);
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        failed += print(&format!("speed of SmolLM2-135M {kind:?}"), speed(gpu, kind));
    }
    if failed > 0 { Err(TrainError::Device(format!("{failed} GPU checks failed"))) } else { Ok(()) }
}

fn print(name: &str, outcome: std::result::Result<String, String>) -> u32 {
    match &outcome {
        Ok(found) => println!("ok      {name}: {found}"),
        Err(wrong) => println!("FAILED  {name}: {wrong}"),
    }
    u32::from(outcome.is_err())
}

/// The family of a flavor at a size that a CPU runs in float64 at once.
fn small(flavor: &str) -> Result<ModelSpec> {
    let shape = tangelo_configs::flavor::flavor(flavor).and_then(|flavor| flavor.spec(512));
    let mut spec = shape.map_err(|e| TrainError::Internal(e.to_string()))?;
    spec.blocks.truncate(2);
    (spec.vocab_size, spec.hidden_size) = (512, 64);
    for block in &mut spec.blocks {
        let tangelo_configs::MixerSpec::Attention(a) = &mut block.mixer;
        (a.num_heads, a.num_kv_heads, a.head_dim) = (4, 2, 16);
        a.sliding_window = a.sliding_window.map(|_| 9);
        block.feed_forward.intermediate_size = 96;
    }
    Ok(spec)
}

fn model(spec: &ModelSpec, kind: Kind, device: Device) -> Model {
    let model = Model::zeros(spec, kind, device, true);
    model.units().iter().for_each(|unit| init::from_seed(unit, SEED, model.spec().initializer_range));
    model
}

/// `count` random tokens in documents of uneven length, as one row.
fn batch(vocab: usize, count: usize) -> Batch {
    let token = |i: usize| (mix64(SEED ^ i as u64) % vocab as u64) as u32;
    let borders = [0, count / 3, count / 2, count];
    let documents = || borders.windows(2).enumerate();
    let column = |values: Vec<u32>| ragged_u32(&[values]);
    let columns = vec![
        (Column::Tokens, column((0..count).map(token).collect())),
        (Column::Targets, column((0..count).map(|i| token(i + 1)).collect())),
        (Column::Positions, column(documents().flat_map(|(_, b)| 0..(b[1] - b[0]) as u32).collect())),
        (Column::SeqId, column(documents().flat_map(|(id, b)| vec![id as u32; b[1] - b[0]]).collect())),
        (Column::CeWeight, ragged_f32(&[(0..count).map(|i| (uniform(SEED, i as u64) + 0.5) as f32).collect()])),
    ];
    Batch::from_columns(columns).expect("columns of one row")
}

fn alone(model: Model) -> std::result::Result<Alone, String> {
    Alone::new(model).map_err(|e| e.to_string())
}

/// The loss of a batch; gradients are added.
fn pass(alone: &Alone, batch: &Batch) -> std::result::Result<f64, String> {
    let again = vec![false; alone.model().num_blocks()];
    alone.forward_backward(batch, &again).map_err(|e| e.to_string())
}

/// Loss, logits and every unit's gradient on `device` against the CPU in float64.
fn compare(spec: &ModelSpec, device: Device, kind: Kind, tolerance: f64) -> std::result::Result<String, String> {
    // The truth has the same weights: bf16 weights are bf16 numbers in float64 too.
    let tested = alone(model(spec, kind, device))?;
    let truth = alone(Model::zeros(spec, Kind::Double, Device::Cpu, true))?;
    for (to, from) in truth.model().units().iter().zip(tested.model().units()) {
        tch::no_grad(|| to.flat().shallow_clone().copy_(from.flat()));
    }
    let batch = batch(spec.vocab_size, 96);
    let (found, expected) = (pass(&tested, &batch)?, pass(&truth, &batch)?);
    let mut worst = ((found - expected) / expected).abs();
    for (a, b) in tested.model().units().iter().zip(truth.model().units()) {
        let (Some(a), Some(b)) = (a.main_grad(), b.main_grad()) else { continue };
        worst = worst.max(relative_error(a, b));
    }
    let logits = |alone: &Alone| alone.logits(&batch).map_err(|e| e.to_string());
    worst = worst.max(relative_error(&logits(&tested)?, &logits(&truth)?));
    let text = format!("largest relative error {worst:.2e}, at most {tolerance:.0e} allowed");
    if worst <= tolerance { Ok(text) } else { Err(text) }
}

fn relative_error(found: &Tensor, truth: &Tensor) -> f64 {
    let found = found.to_device(Device::Cpu).to_kind(Kind::Double);
    ((found - truth).norm() / truth.norm()).double_value(&[])
}

fn cached_equals_uncached(spec: &ModelSpec, device: Device) -> std::result::Result<String, String> {
    let model = model(spec, Kind::Float, device);
    let sequence = |cache: bool| {
        let options = Options { sampler: Sampler::greedy(), max_new_tokens: 32, stop_ids: vec![], cache };
        let mut ids = Vec::new();
        let each = |token: super::generate::Token| {
            ids.push(token.id);
            Ok(())
        };
        generate(&model, &[1, 2, 3, 4, 5], &options, each).map(|_| ids).map_err(|e| e.to_string())
    };
    let (cached, uncached) = (sequence(true)?, sequence(false)?);
    if cached == uncached { Ok("32 greedy tokens equal".into()) } else { Err(format!("{cached:?} and {uncached:?}")) }
}

/// Tokens per second of forward and backward, 8,192 tokens at once, and what part of a matrix product's speed that is.
fn speed(gpu: Device, kind: Kind) -> std::result::Result<String, String> {
    let shape = tangelo_configs::flavor::flavor("smollm2-135m").and_then(|flavor| flavor.spec(49_152));
    let spec = shape.map_err(|e| e.to_string())?;
    let (trained, tokens) = (alone(model(&spec, kind, gpu))?, 8192);
    let batch = batch(spec.vocab_size, tokens);
    let steps = || -> std::result::Result<(), String> {
        for _ in 0..TIMED_STEPS {
            pass(&trained, &batch)?;
        }
        tch::Cuda::synchronize(0);
        Ok(())
    };
    steps()?;
    let start = Instant::now();
    steps()?;
    let rate = f64::from(TIMED_STEPS) * tokens as f64 / start.elapsed().as_secs_f64();
    let peak = device::measured_matmul_peak_flops(gpu, kind, 1.0).map_err(|e| e.to_string())?;
    let products = 6.0 * spec.num_parameters() as f64;
    let share = 100.0 * rate * products / peak;
    Ok(format!("{rate:.0} tokens/s, products alone {share:.1} % of the measured {:.0} TFLOP/s", peak / 1e12))
}
