//! `cargo xtask bench`: Tangelo and its peers side by side on this machine, as a table of medians and ratios.
//!
//! The two sides of a comparison take turns, round by round, so that a machine that slows down slows both. Inputs are the
//! same: model shape, tokens per step, threads, text. Never part of a test: a number is not right or wrong. What each
//! peer does is in tests/python/bench.py.

use crate::shell::{self, Repo};
use crate::{corpus, setup};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Steps left out of medians: allocation, and the peers' compilation.
const WARM_UP_STEPS: usize = 2;

/// What to measure.
#[derive(Args)]
pub struct Options {
    /// Measure these only.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Turns that each side takes.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Training steps per turn, of which the first two are not counted.
    #[arg(long, default_value_t = 8)]
    steps: usize,
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

/// A line of the table: one quantity of one side, one value per round.
struct Row {
    name: String,
    unit: &'static str,
    values: Vec<f64>,
}

/// Sets up, builds, measures, prints.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    setup::libtorch(repo)?;
    setup::peers(repo)?;
    shell::step("building tangelo and tangelo-worker (release)", || {
        shell::run(&mut repo.cargo(&["build", "--release"]))
    })?;
    let bench = Bench::new(repo, options)?;
    let parts = if options.only.is_empty() { Part::ALL.to_vec() } else { options.only.clone() };
    let mut rows = Vec::new();
    for part in parts {
        rows.extend(shell::step(&format!("{part:?}"), || bench.measure(part))?);
    }
    println!("\n{}", table(&rows));
    Ok(())
}

struct Bench<'a> {
    repo: &'a Repo,
    options: &'a Options,
    folder: PathBuf,
}

/// What a training turn gives.
struct Turn {
    tokens_per_second: f64,
    peak_gigabytes: f64,
}

impl<'a> Bench<'a> {
    fn new(repo: &'a Repo, options: &'a Options) -> Result<Bench<'a>> {
        let folder = repo.target().join("bench");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let bench = Bench { repo, options, folder };
        if !bench.corpus().exists() {
            corpus::write(None, &bench.corpus(), 8 << 20)?;
        }
        if !bench.tokenizer().exists() {
            let mut command = bench.tangelo(&["data", "tokenizer", "--vocab-size", "8192", "--quiet", "--output"]);
            shell::run(command.arg(bench.tokenizer()).arg(bench.corpus()))?;
        }
        Ok(bench)
    }

    fn measure(&self, part: Part) -> Result<Vec<Row>> {
        match part {
            Part::Fp32 => self.training("float32", &[("fp32", "eager")]),
            Part::Bf16 => self.training("bfloat16", &[("bf16", "eager"), ("bf16", "compile")]),
            Part::FirstStep => self.first_step(),
            Part::Tokenise => self.tokenise(),
            Part::Save => self.save(),
        }
    }

    fn corpus(&self) -> PathBuf {
        self.folder.join("corpus.jsonl")
    }

    fn tokenizer(&self) -> PathBuf {
        self.folder.join("tokenizer.json")
    }

    fn tangelo(&self, arguments: &[&str]) -> Command {
        let mut command = self.repo.command(self.repo.target().join("release/tangelo"));
        command.args(arguments);
        command
    }

    /// A fresh run folder and the command that trains into it.
    fn train(&self, flavor: &str, dtype: &str, steps: usize, more: &[String]) -> Result<(PathBuf, Command)> {
        let run = self.folder.join("run");
        if run.exists() {
            fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
        }
        let job = self.folder.join("job.toml");
        fs::write(&job, self.job(flavor)).with_context(|| format!("cannot write {}", job.display()))?;
        let mut command = self.tangelo(&["run", "--quiet"]);
        command.arg(&job).args(["--set", &format!("training.mixed_precision_param={dtype:?}")]);
        command.args(["--set", &format!("training.steps={steps}")]);
        for setting in more {
            command.args(["--set", setting]);
        }
        Ok((run, command))
    }

    /// Two sequences of 512 tokens per step on two threads, nothing but training.
    fn job(&self, flavor: &str) -> String {
        let path = |path: PathBuf| format!("{:?}", path.display().to_string());
        format!(
            "[job]\ndump_folder = {}\n[model]\nflavor = \"{flavor}\"\n[data]\nsources = [{{ paths = [{}] }}]\n\
             tokenizer = {}\nprepared_folder = {}\ndocument_mask = false\n[training]\nseq_len = 512\n\
             local_batch_size = 2\nnum_threads = 2\ndevice = \"cpu\"\n[optimizer]\nlr = 1e-4\n\
             [lr_scheduler]\nwarmup_steps = 0\n[checkpoint]\n\
             enable = false\n[metrics]\nlog_freq = 1\nenable_tensorboard = false\n",
            path(self.folder.join("run")),
            path(self.corpus()),
            path(self.tokenizer()),
            path(self.folder.join("prepared"))
        )
    }

    fn training(&self, dtype: &str, peers: &[(&str, &str)]) -> Result<Vec<Row>> {
        let config = self.peer_config("smollm2-135m")?;
        let names = std::iter::once(format!("tangelo {dtype}"))
            .chain(peers.iter().map(|(dtype, mode)| format!("transformers {mode} {dtype}")));
        let mut turns: Vec<(String, Vec<Turn>)> = names.map(|name| (name, Vec::new())).collect();
        for round in 0..self.options.rounds {
            turns[0].1.push(self.our_turn(dtype)?);
            for (i, (dtype, mode)) in peers.iter().enumerate() {
                turns[i + 1].1.push(self.peer_turn(&config, dtype, mode)?);
            }
            println!("    round {} of {}", round + 1, self.options.rounds);
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
        let (run, mut command) = self.train("smollm2-135m", dtype, self.options.steps, &[])?;
        shell::run(&mut command)?;
        let records = records(&run)?;
        let memory = column(&records, "memory_bytes").into_iter().fold(0.0, f64::max);
        Ok(turn(column(&records, "step_seconds"), memory))
    }

    fn peer_turn(&self, config: &Path, dtype: &str, mode: &str) -> Result<Turn> {
        let steps = self.options.steps.to_string();
        let answer = self.peer(&["train", &config.display().to_string(), dtype, mode, &steps, "512", "2"])?;
        let seconds = answer["step_seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        Ok(turn(seconds, answer["peak_bytes"].as_f64().unwrap_or(0.0)))
    }

    /// Runs the script; the JSON line it ends with.
    fn peer(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.repo.command(self.repo.python());
        command.arg("tests/python/bench.py").args(arguments).envs([("HF_HUB_OFFLINE", "1"), ("TQDM_DISABLE", "1")]);
        let line = shell::command_line(&command);
        let text = shell::output(&mut command).with_context(|| format!("`{line}` failed; run it to see why"))?;
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("`{line}` printed {last:?}, expected JSON"))
    }

    /// The model's config.json for transformers: that of the weights which `tangelo run` of no steps would export.
    fn peer_config(&self, flavor: &str) -> Result<PathBuf> {
        let folder = self.folder.join(flavor);
        if !folder.join("config.json").exists() {
            let export = ["checkpoint.enable=true".to_owned(), "checkpoint.last_save_in_hf=true".to_owned()];
            let (run, mut command) = self.train(flavor, "float32", 1, &export)?;
            shell::run(&mut command)?;
            fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            fs::copy(run.join("export/config.json"), folder.join("config.json"))
                .context("the run exported no model")?;
        }
        Ok(folder)
    }

    fn first_step(&self) -> Result<Vec<Row>> {
        let config = self.peer_config("tiny-10m")?;
        let tokens = self.folder.join("tokens.u16");
        fs::write(&tokens, (0u16..2048).flat_map(u16::to_le_bytes).collect::<Vec<u8>>()).context("no space")?;
        let (config, tokens) = (config.display().to_string(), tokens.display().to_string());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..self.options.rounds {
            let (_, mut command) = self.train("tiny-10m", "float32", 1, &[])?;
            let start = Instant::now();
            shell::run(&mut command)?;
            ours.push(start.elapsed().as_secs_f64());
            let start = Instant::now();
            self.peer(&["first-step", &config, &tokens, "512", "2"])?;
            theirs.push(start.elapsed().as_secs_f64());
        }
        let row = |name: &str, values| Row { name: name.into(), unit: "s to the end of step 1", values };
        Ok(vec![row("tangelo run, data prepared", ours), row("Python script with transformers", theirs)])
    }

    fn tokenise(&self) -> Result<Vec<Row>> {
        let megabytes = fs::metadata(self.corpus()).context("no corpus")?.len() as f64 / 1e6;
        let (tokenizer, corpus) = (self.tokenizer().display().to_string(), self.corpus().display().to_string());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..self.options.rounds {
            let output = self.folder.join(format!("shards-{round}"));
            let cache = self.folder.join(format!("datasets-{round}"));
            for folder in [&output, &cache] {
                let _ = fs::remove_dir_all(folder);
            }
            let mut command = self.tangelo(&["data", "prepare", &corpus, "--tokenizer", &tokenizer, "--quiet"]);
            command.args(["--threads", "2", "--output"]).arg(&output);
            let start = Instant::now();
            shell::run(&mut command)?;
            ours.push(megabytes / start.elapsed().as_secs_f64());
            let answer = self.peer(&["tokenise", &tokenizer, &corpus, "512", &cache.display().to_string()])?;
            theirs.push(megabytes / answer["seconds"].as_f64().context("no time")?);
        }
        let row = |name: &str, values| Row { name: name.into(), unit: "MB/s of text", values };
        Ok(vec![row("tangelo data prepare, start-up included", ours), row("datasets.map, start-up excluded", theirs)])
    }

    fn save(&self) -> Result<Vec<Row>> {
        let interval = 5;
        let saving = ["checkpoint.enable=true".to_owned(), format!("checkpoint.interval={interval}")];
        let (run, mut command) = self.train("smollm2-135m", "bfloat16", 4 * interval + 1, &saving)?;
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

fn turn(step_seconds: Vec<f64>, peak_bytes: f64) -> Turn {
    let counted = step_seconds.get(WARM_UP_STEPS..).unwrap_or_default();
    Turn { tokens_per_second: 1024.0 / median(counted), peak_gigabytes: peak_bytes / 1e9 }
}

fn records(run: &Path) -> Result<Vec<Value>> {
    let path = run.join("metrics.jsonl");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let records: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    if records.is_empty() {
        bail!("{} holds no records", path.display());
    }
    Ok(records)
}

fn column(records: &[Value], key: &str) -> Vec<f64> {
    records.iter().filter_map(|record| record[key].as_f64()).collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Medians with their range; of each group in one unit, the ratio of its first row to each other.
fn table(rows: &[Row]) -> String {
    let mut text = format!("{:<42} {:>10}  {:<24} {:>18}  first is\n", "what", "median", "unit", "range");
    let mut first: Option<&Row> = None;
    for row in rows {
        let value = median(&row.values);
        let low = row.values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = row.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let ours = row.name.starts_with("tangelo");
        let ratio = match first.filter(|first| first.unit == row.unit && !ours) {
            Some(first) => format!("{:.2}x", median(&first.values) / value),
            None => String::new(),
        };
        text += &format!(
            "{:<42} {value:>10.2}  {:<24} {:>18}  {ratio}\n",
            row.name,
            row.unit,
            format!("{low:.2}-{high:.2}")
        );
        if ours {
            first = Some(row);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_table_relates_peers_to_us() {
        let row = |name: &str, values: &[f64]| Row { name: name.into(), unit: "tokens/s", values: values.to_vec() };
        let text = table(&[row("tangelo float32", &[200.0, 220.0, 210.0]), row("transformers eager", &[100.0])]);
        assert!(text.contains("210.00") && text.contains("2.10x"), "{text}");
    }

    #[test]
    fn warm_up_steps_do_not_count() {
        assert_eq!(turn(vec![9.0, 9.0, 1.0, 1.0], 2e9).tokens_per_second, 1024.0);
    }
}
