//! Tokens per second of the engine on a model of SmolLM2-135M's shape with random weights: prompts computed, tokens drawn.
//!
//! `cargo run --release --example bench_engine -- [DTYPE] [THREADS] [PROMPT] [NEW] [SEQUENCES..]`, by default
//! `bfloat16 2 38 64 1 16 64`. Greedily, with log-probabilities. Prints on stderr one line per number of sequences: prompt
//! tokens per second, drawn tokens per second of the steps after the first, per second of processor time, and what a step
//! takes; and as JSON on stdout seconds and seconds of processor time from the prompts to the last token, in lists, of a
//! second go.

use std::time::Instant;
use tangelo_configs::{EngineConfig, SamplingParams, flavor};
use tangelo_kernels::device::{keep_freed_memory, set_threads};
use tangelo_models::Model;
use tangelo_rollout::{Engine, Request};
use tch::{Device, Kind, Tensor};

type Error = Box<dyn std::error::Error>;

fn model(kind: Kind) -> Result<Model, Error> {
    let spec = flavor::flavor("smollm2-135m")?.spec(49152)?;
    let model = Model::zeros(&spec, kind, Device::Cpu, false);
    for unit in model.units() {
        let mut flat = unit.flat().shallow_clone();
        tch::no_grad(|| flat.copy_(&(Tensor::randn(flat.size(), (Kind::Float, Device::Cpu)) * 0.04)));
    }
    Ok(model)
}

/// User and system time of this process, seconds.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |i: usize| fields.get(i).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// Seconds, and seconds of processor time, of all of it.
fn measure(model: &Model, sequences: usize, prompt: usize, new: usize) -> Result<(f64, f64), Error> {
    let config = EngineConfig { max_num_seqs: sequences, max_num_batched_tokens: 8192, ..EngineConfig::default() };
    let mut engine = Engine::new(model, &config, &[], None)?;
    for id in 0..sequences as u64 {
        let prompt = (0..prompt as u64).map(|i| ((i * 7919 + id * 104_729) % 49152) as u32).collect();
        let sampling =
            SamplingParams { max_tokens: new, ignore_eos: true, temperature: 0.0, ..SamplingParams::default() };
        engine.add(Request { id, prompt, sampling, seed: id })?;
    }
    let (begin, processor_at_begin) = (Instant::now(), processor_seconds());
    engine.step(model)?;
    let prefill = begin.elapsed().as_secs_f64();
    let (start, processor) = (Instant::now(), processor_seconds());
    let mut drawn = 0;
    while !engine.is_idle() {
        drawn += engine.step(model)?.num_drawn;
    }
    let (seconds, processor) = (start.elapsed().as_secs_f64(), processor_seconds() - processor);
    eprintln!(
        "{sequences:4} sequences: prompts {:7.0} tokens/s, drawn {:7.1} tokens/s, {:6.1} per processor second, step {:6.1} ms",
        (sequences * prompt) as f64 / prefill,
        drawn as f64 / seconds,
        drawn as f64 / processor.max(0.01),
        seconds * 1e3 * sequences as f64 / drawn as f64
    );
    Ok((begin.elapsed().as_secs_f64(), processor_seconds() - processor_at_begin))
}

fn main() -> Result<(), Error> {
    keep_freed_memory();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let kind = match arguments.first().map(String::as_str) {
        None | Some("bfloat16") => Kind::BFloat16,
        Some("float32") => Kind::Float,
        Some(other) => return Err(format!("type {other}; expected bfloat16 or float32").into()),
    };
    let number = |i: usize, default: usize| arguments.get(i).map_or(Ok(default), |text| text.parse::<usize>());
    set_threads(number(1, 2)?);
    let (prompt, new) = (number(2, 38)?, number(3, 64)?);
    let model = model(kind)?;
    let counts = arguments.iter().skip(4).map(|text| text.parse()).collect::<Result<Vec<usize>, _>>()?;
    for sequences in if counts.is_empty() { vec![1, 16, 64] } else { counts } {
        measure(&model, sequences, prompt, new)?;
        let (seconds, processor) = measure(&model, sequences, prompt, new)?;
        println!("{{\"seconds\":[{seconds}],\"processor_seconds\":[{processor}]}}");
    }
    Ok(())
}
