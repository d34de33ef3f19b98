//! Converts a model to a Hugging Face folder of bf16 weights and says what that took:
//! `cargo run --release -p tangelo-formats --example convert -- MODEL FOLDER`.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;
use tangelo_core::DType;
use tangelo_formats::writer::{MAX_SHARD_BYTES, convert};
use tangelo_formats::{Weights, tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model, folder] = paths.as_slice() else { return Err("usage: convert MODEL FOLDER".into()) };
    let start = Instant::now();
    let weights = Weights::open(model)?;
    let num_parameters = weights.spec().num_parameters();
    println!("open: {:.3} s, {num_parameters} parameters, {}", start.elapsed().as_secs_f64(), memory()?);

    let start = Instant::now();
    convert(&weights, folder, DType::BF16, MAX_SHARD_BYTES, None)?;
    println!("convert: {:.3} s, {}", start.elapsed().as_secs_f64(), memory()?);

    let start = Instant::now();
    let tokenizer = tokenizer::load(model)?;
    tokenizer.save(folder)?;
    println!("tokenizer: {:.3} s, {} ids, {}", start.elapsed().as_secs_f64(), tokenizer.vocab_size(), memory()?);
    Ok(())
}

/// The peak of this process's memory so far, pages of mapped files included.
fn memory() -> Result<String, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM in /proc/self/status")?;
    Ok(format!("peak resident {}", peak.trim()))
}
