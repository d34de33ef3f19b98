//! `cargo xtask bench`: Tangelo and its peers side by side on this machine, as a table of medians and ratios.
//!
//! The two sides of a comparison take turns, round by round, so that a machine that slows down slows both. Inputs are the
//! same: model shape, tokens per step, threads, text. Never part of a test: a number is not right or wrong. What each
//! peer does is in tests/python/bench.py. `bench parallel` is about several ranks, `bench rlhf`
//! about reinforcement learning, `bench engine` about generation.

mod engine;
mod inputs;
mod parallel;
mod rlhf;
mod table;

use crate::setup;
use crate::shell::{self, Repo};
use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use inputs::{Inputs, LOCAL_BATCH_SIZE, SEQ_LEN, step_seconds};
use std::fs;
use std::path::Path;
use std::time::Instant;
use table::{Row, WARM_UP_STEPS, column, counted, median, records, table};

/// What to measure.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
pub struct Options {
    #[command(subcommand)]
    command: Option<Measurement>,
    /// Measure these only.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    #[command(flatten)]
    turns: Turns,
}

/// How long to measure.
#[derive(Args)]
struct Turns {
    /// Turns that each side, or each layout, takes; bytes need one.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Training steps per turn, of which the first two are not counted.
    #[arg(long, default_value_t = 8)]
    steps: usize,
}

#[derive(Subcommand)]
enum Measurement {
    /// Several ranks: bytes sent against the least there can be, time spent waiting, tokens/s against DDP and FSDP2.
    Parallel(parallel::Options),
    /// Steps of GRPO and PPO against TRL: seconds, split into generation, scoring and training.
    Rlhf(rlhf::Options),
    /// Generation against transformers, ctranslate2, openvino and llama.cpp.
    Engine(engine::Options),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Tokens/s and peak memory of SmolLM2-135M's shape in fp32, against transformers eager.
    Fp32,
    /// The same in bf16, against transformers eager and compiled.
    Bf16,
    /// From the command to the end of step 1, ten million parameters.
    FirstStep,
    /// Text to tokens, MB/s, 2 processes or threads.
    Tokenise,
    /// How long a step stands still for an asynchronous save.
    Save,
}

impl Part {
    const ALL: [Part; 5] = [Part::Fp32, Part::Bf16, Part::FirstStep, Part::Tokenise, Part::Save];
}

/// Sets up, builds, measures, prints.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    match &options.command {
        Some(Measurement::Parallel(options)) => return parallel::run(repo, options),
        Some(Measurement::Rlhf(options)) => return rlhf::run(repo, options),
        Some(Measurement::Engine(options)) => return engine::run(repo, options),
        None => {}
    }
    setup::libtorch(repo)?;
    setup::peers(repo)?;
    build(repo)?;
    let bench = Bench { inputs: Inputs::new(repo)?, options };
    let parts = if options.only.is_empty() { Part::ALL.to_vec() } else { options.only.clone() };
    let mut rows = Vec::new();
    for part in parts {
        rows.extend(shell::step(&format!("{part:?}"), || bench.measure(part))?);
    }
    println!("\n{}", table(&rows));
    Ok(())
}

fn build(repo: &Repo) -> Result<()> {
    shell::step("building tangelo and tangelo-worker (release)", || {
        shell::run(&mut repo.cargo(&["build", "--release"]))
    })
}

struct Bench<'a> {
    inputs: Inputs<'a>,
    options: &'a Options,
}

/// What a training turn gives.
struct Turn {
    tokens_per_second: f64,
    peak_gigabytes: f64,
}

impl Bench<'_> {
    fn measure(&self, part: Part) -> Result<Vec<Row>> {
        match part {
            Part::Fp32 => self.training("float32", &[("fp32", "eager")]),
            Part::Bf16 => self.training("bfloat16", &[("bf16", "eager"), ("bf16", "compile")]),
            Part::FirstStep => self.first_step(),
            Part::Tokenise => self.tokenise(),
            Part::Save => self.save(),
        }
    }

    fn training(&self, dtype: &str, peers: &[(&str, &str)]) -> Result<Vec<Row>> {
        let config = self.inputs.peer_config("smollm2-135m")?;
        let names = std::iter::once(format!("tangelo {dtype}"))
            .chain(peers.iter().map(|(dtype, mode)| format!("transformers {mode} {dtype}")));
        let mut turns: Vec<(String, Vec<Turn>)> = names.map(|name| (name, Vec::new())).collect();
        for round in 0..self.options.turns.rounds {
            turns[0].1.push(self.our_turn(dtype)?);
            for (i, (dtype, mode)) in peers.iter().enumerate() {
                turns[i + 1].1.push(self.peer_turn(&config, dtype, mode)?);
            }
            println!("    round {} of {}", round + 1, self.options.turns.rounds);
        }
        let row = |name: &str, unit, value: &dyn Fn(&Turn) -> f64, turns: &[Turn]| Row {
            name: name.to_owned(),
            unit,
            values: turns.iter().map(value).collect(),
        };
        let speed = turns.iter().map(|(name, t)| row(name, "tokens/s", &|t| t.tokens_per_second, t));
        let memory = turns.iter().map(|(name, t)| row(name, "GB peak", &|t| t.peak_gigabytes, t));
        Ok(speed.chain(memory).collect())
    }

    fn our_turn(&self, dtype: &str) -> Result<Turn> {
        let (run, mut command) = self.inputs.train("smollm2-135m", dtype, self.options.turns.steps, &[])?;
        shell::run(&mut command)?;
        let records = records(&run)?;
        let memory = column(&records, "memory_bytes").into_iter().fold(0.0, f64::max);
        Ok(turn(&column(&records, "step_seconds"), memory))
    }

    fn peer_turn(&self, config: &Path, dtype: &str, mode: &str) -> Result<Turn> {
        let steps = self.options.turns.steps.to_string();
        let answer = self.inputs.peer(&["train", &config.display().to_string(), dtype, mode, &steps, "512", "2"])?;
        Ok(turn(&step_seconds(&answer), answer["peak_bytes"].as_f64().unwrap_or(0.0)))
    }

    fn first_step(&self) -> Result<Vec<Row>> {
        let config = self.inputs.peer_config("tiny-10m")?;
        let tokens = self.inputs.folder.join("tokens.u16");
        fs::write(&tokens, (0u16..2048).flat_map(u16::to_le_bytes).collect::<Vec<u8>>()).context("no space")?;
        let (config, tokens) = (config.display().to_string(), tokens.display().to_string());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..self.options.turns.rounds {
            let (_, mut command) = self.inputs.train("tiny-10m", "float32", 1, &[])?;
            let start = Instant::now();
            shell::run(&mut command)?;
            ours.push(start.elapsed().as_secs_f64());
            let start = Instant::now();
            self.inputs.peer(&["first-step", &config, &tokens, "512", "2"])?;
            theirs.push(start.elapsed().as_secs_f64());
        }
        let row = |name: &str, values| Row { name: name.into(), unit: "s to the end of step 1", values };
        Ok(vec![row("tangelo run, data prepared", ours), row("Python script with transformers", theirs)])
    }

    fn tokenise(&self) -> Result<Vec<Row>> {
        let megabytes = fs::metadata(self.inputs.corpus()).context("no corpus")?.len() as f64 / 1e6;
        let (tokenizer, corpus) =
            (self.inputs.tokenizer().display().to_string(), self.inputs.corpus().display().to_string());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..self.options.turns.rounds {
            let output = self.inputs.folder.join(format!("shards-{round}"));
            let cache = self.inputs.folder.join(format!("datasets-{round}"));
            for folder in [&output, &cache] {
                let _ = fs::remove_dir_all(folder);
            }
            let mut command = self.inputs.tangelo(&["data", "prepare", &corpus, "--tokenizer", &tokenizer, "--quiet"]);
            command.args(["--threads", "2", "--output"]).arg(&output);
            let start = Instant::now();
            shell::run(&mut command)?;
            ours.push(megabytes / start.elapsed().as_secs_f64());
            let answer = self.inputs.peer(&["tokenise", &tokenizer, &corpus, "512", &cache.display().to_string()])?;
            theirs.push(megabytes / answer["seconds"].as_f64().context("no time")?);
        }
        let row = |name: &str, values| Row { name: name.into(), unit: "MB/s of text", values };
        Ok(vec![row("tangelo data prepare, start-up included", ours), row("datasets.map, start-up excluded", theirs)])
    }

    fn save(&self) -> Result<Vec<Row>> {
        let interval = 5;
        let saving = ["checkpoint.enable=true".to_owned(), format!("checkpoint.interval={interval}")];
        let (run, mut command) = self.inputs.train("smollm2-135m", "bfloat16", 4 * interval + 1, &saving)?;
        shell::run(&mut command)?;
        let records = records(&run)?;
        // The record after a save's step holds how long training stood still for it, and how long the step took beside
        // the copying and writing. The first save is left out with the warm-up.
        let (seconds, stalls) = (column(&records, "step_seconds"), column(&records, "checkpoint_seconds"));
        let after: Vec<usize> = (2 * interval..seconds.len()).step_by(interval).collect();
        let quiet = (WARM_UP_STEPS..seconds.len()).filter(|i| i % interval > 1).map(|i| seconds[i]);
        let step = median(&quiet.collect::<Vec<_>>());
        let row = |name: &str, values| Row { name: name.into(), unit: "% of a step", values };
        Ok(vec![
            row("stall under an asynchronous save", after.iter().map(|&i| 100.0 * stalls[i] / step).collect()),
            row("step beside a save, slower by", after.iter().map(|&i| 100.0 * (seconds[i] / step - 1.0)).collect()),
        ])
    }
}

fn turn(step_seconds: &[f64], peak_bytes: f64) -> Turn {
    let tokens_per_second = (LOCAL_BATCH_SIZE * SEQ_LEN) as f64 / median(counted(step_seconds));
    Turn { tokens_per_second, peak_gigabytes: peak_bytes / 1e9 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_steps_do_not_count() {
        assert_eq!(turn(&[9.0, 9.0, 1.0, 1.0], 2e9).tokens_per_second, 1024.0);
    }
}
