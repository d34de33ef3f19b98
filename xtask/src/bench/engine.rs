//! `cargo xtask bench engine`: generation by our engine and by others on a model of SmolLM2-135M's size.
//!
//! All compute in the same type and get the same number of prompt and new tokens for the same number of sequences at
//! once, greedily. Counted are new tokens per second of processor time, from prompts to the last token: on shared
//! machines it moves less than the clock on the wall, which is printed, too. Our side gives log-probabilities, the others
//! do not. What the others do is in tests/python/bench_engine.py.

use super::inputs::{last_json, peer_script};
use super::rlhf::{Dtype, export, question};
use super::table::{Row, table};
use crate::setup;
use crate::shell::{self, Repo};
use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

/// What to measure.
#[derive(Args)]
pub struct Options {
    /// In these types only.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Dtype::Bfloat16, Dtype::Float32])]
    dtypes: Vec<Dtype>,
    /// Beside these only.
    #[arg(long, value_delimiter = ',', default_value = "transformers,ctranslate2,openvino,llama.cpp")]
    engines: Vec<String>,
    /// Sequences at once.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    sequences: Vec<usize>,
    /// New tokens of each.
    #[arg(long, default_value_t = 64)]
    new_tokens: usize,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Turns that each side takes.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

/// Sets up, builds, measures, prints.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    setup::libtorch(repo)?;
    setup::engines(repo)?;
    shell::step("building the engine (release)", || {
        shell::run(&mut repo.cargo(&["build", "--release", "--workspace", "--example", "bench_engine"]))
    })?;
    let folder = repo.target().join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let model = setup::smollm2(repo)?;
    let exported = export(repo, &model, &folder)?;
    let bench = Bench { repo, options, folder, model, exported };
    bench.write_ggufs()?;
    let mut rows = Vec::new();
    for &dtype in &options.dtypes {
        for &sequences in &options.sequences {
            rows.extend(bench.compare(dtype, sequences)?);
        }
    }
    println!("\n{}", table(&rows));
    Ok(())
}

/// What a turn gives: new tokens per second of processor time, and per second.
type Turn = (f64, f64);

struct Bench<'a> {
    repo: &'a Repo,
    options: &'a Options,
    folder: PathBuf,
    model: PathBuf,
    exported: PathBuf,
}

impl Bench<'_> {
    fn gguf(&self, kind: &str) -> PathBuf {
        self.folder.join(format!("smollm2-135m-instruct-{kind}.gguf"))
    }

    /// The model in the types that llama.cpp and openvino read.
    fn write_ggufs(&self) -> Result<()> {
        for kind in ["f32", "f16", "bf16"].into_iter().filter(|kind| !self.gguf(kind).is_file()) {
            shell::step(&format!("the model as GGUF in {kind}"), || {
                let mut command = self.repo.command(self.repo.python());
                command.args(["tests/python/bench_engine.py", "gguf", kind]).arg(&self.model).arg(self.gguf(kind));
                shell::run(&mut command)
            })?;
        }
        Ok(())
    }

    fn compare(&self, dtype: Dtype, sequences: usize) -> Result<Vec<Row>> {
        let name = |who: &str| format!("{who} {}, {sequences} at once", dtype.name());
        let mut turns: Vec<(String, Vec<Turn>)> = vec![(name("tangelo"), Vec::new())];
        turns.extend(self.options.engines.iter().map(|engine| (name(engine), Vec::new())));
        for round in 0..self.options.rounds {
            shell::step(&format!("{}, {sequences} sequences, round {}", dtype.name(), round + 1), || {
                turns[0].1.push(self.our_turn(dtype, sequences)?);
                for (engine, (_, values)) in self.options.engines.iter().zip(&mut turns[1..]) {
                    // An engine that has no such type stays out of the table.
                    values.extend(self.peer_turn(engine, dtype, sequences));
                }
                Ok(())
            })?;
        }
        turns.retain(|(_, values)| !values.is_empty());
        let rows = |unit, value: fn(&Turn) -> f64| {
            let row = move |(name, turns): &(String, Vec<Turn>)| Row {
                name: name.clone(),
                unit,
                values: turns.iter().map(value).collect(),
            };
            turns.iter().map(row).collect::<Vec<_>>()
        };
        Ok([rows("tokens per processor s", |turn| turn.0), rows("tokens/s", |turn| turn.1)]
            .into_iter()
            .flatten()
            .collect())
    }

    fn our_turn(&self, dtype: Dtype, sequences: usize) -> Result<Turn> {
        let length = self.prompts(sequences)?.1;
        let mut command = self.repo.command(self.repo.target().join("release/examples/bench_engine"));
        let numbers = [self.options.threads, length, self.options.new_tokens, sequences];
        command.arg(dtype.name()).args(numbers.map(|number| number.to_string()));
        let line = shell::command_line(&command);
        let text = shell::output(&mut command).with_context(|| format!("`{line}` failed; run it to see why"))?;
        self.turn(&last_json(&text)?, sequences)
    }

    fn peer_turn(&self, engine: &str, dtype: Dtype, sequences: usize) -> Option<Turn> {
        let prompts = self.prompts(sequences).ok()?.0;
        let model = match (engine, dtype) {
            ("openvino", _) => self.gguf("f16"),
            ("llama.cpp", Dtype::Float32) => self.gguf("f32"),
            ("llama.cpp", Dtype::Bfloat16) => self.gguf("bf16"),
            _ => self.exported.clone(),
        };
        let arguments = [
            engine.to_owned(),
            model.display().to_string(),
            dtype.name().to_owned(),
            prompts.display().to_string(),
            self.options.new_tokens.to_string(),
            self.options.threads.to_string(),
            "1".to_owned(),
        ];
        let answer = peer_script(self.repo, "bench_engine.py", None, &arguments);
        match answer.and_then(|answer| self.turn(&answer, sequences)) {
            Ok(turn) => Some(turn),
            Err(e) => {
                println!("    {engine} in {}: {e:#}", dtype.name());
                None
            }
        }
    }

    fn turn(&self, answer: &Value, sequences: usize) -> Result<Turn> {
        let tokens = (sequences * self.options.new_tokens) as f64;
        let first = |name: &str| answer[name][0].as_f64().with_context(|| format!("no {name} in {answer}"));
        Ok((tokens / first("processor_seconds")?, tokens / first("seconds")?))
    }

    /// A file with a prompt for every sequence, all of the same length, and that length.
    fn prompts(&self, sequences: usize) -> Result<(PathBuf, usize)> {
        let path = self.folder.join(format!("prompts-{sequences}.json"));
        if !path.is_file() {
            let texts: Vec<String> = (0..sequences).map(|index| question(index).0).collect();
            let texts = serde_json::to_string(&texts)?;
            let mut command = self.repo.command(self.repo.python());
            command.args(["tests/python/bench_engine.py", "tokens"]).arg(&self.exported).arg(texts).arg(&path);
            shell::run(command.env("HF_HUB_OFFLINE", "1"))?;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let prompts: Vec<Vec<u32>> = serde_json::from_str(&text)?;
        Ok((path, prompts.first().map_or(0, Vec::len)))
    }
}
