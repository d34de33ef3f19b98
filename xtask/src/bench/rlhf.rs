//! `cargo xtask bench rlhf`: steps of GRPO and PPO on SmolLM2-135M against TRL's trainers, side by side.
//!
//! Both sides get the same prompts as text (arithmetic questions in the model's chat form), answer each the same number
//! of times with the same number of tokens, and update once per step. GRPO has no KL on either side; PPO has policy,
//! critic and reference on both. What TRL does is in tests/python/bench_rlhf.py.

use super::inputs::peer_script;
use super::table::{Row, records, table};
use crate::setup;
use crate::shell::{self, Repo};
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// What to measure.
#[derive(Args)]
pub struct Options {
    /// Measure these only.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Algorithm::Grpo, Algorithm::Ppo])]
    algorithms: Vec<Algorithm>,
    /// In these types only.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Dtype::Bfloat16, Dtype::Float32])]
    dtypes: Vec<Dtype>,
    /// Turns that each side takes.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Steps per turn, of which the first is not counted.
    #[arg(long, default_value_t = 3)]
    steps: usize,
    /// Prompts per step.
    #[arg(long, default_value_t = 8)]
    prompts: usize,
    /// Answers per prompt.
    #[arg(long, default_value_t = 8)]
    samples: usize,
    /// Tokens of every answer.
    #[arg(long, default_value_t = 64)]
    new_tokens: usize,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Algorithm {
    Grpo,
    Ppo,
}

/// In which everything is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    Bfloat16,
    Float32,
}

impl Dtype {
    /// The field's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float32 => "float32",
        }
    }
}

/// A number of a step, and what it is called.
type Part = (&'static str, fn(&Step) -> f64);

/// Seconds of one step, whole and in parts.
#[derive(Clone, Copy, Debug, Default)]
struct Step {
    whole: f64,
    generate: f64,
    score: f64,
    train: f64,
}

/// Sets up, builds, measures, prints.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    setup::libtorch(repo)?;
    setup::peers(repo)?;
    let trl_with_ppo = setup::trl_with_ppo(repo)?;
    super::build(repo)?;
    let folder = repo.target().join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let bench = Bench { repo, options, model: setup::smollm2(repo)?, trl_with_ppo, folder };
    bench.write_prompts()?;
    let exported = export(repo, &bench.model, &bench.folder)?;
    let mut rows = Vec::new();
    for &algorithm in &options.algorithms {
        for &dtype in &options.dtypes {
            rows.extend(bench.compare(algorithm, dtype, &exported)?);
        }
    }
    println!("\n{}", table(&rows));
    Ok(())
}

/// The model as a Hugging Face folder, made once.
pub fn export(repo: &Repo, model: &Path, folder: &Path) -> Result<PathBuf> {
    let exported = folder.join("smollm2-135m-instruct");
    if !exported.join("config.json").is_file() {
        let arguments = ["prepare".to_owned(), model.display().to_string(), exported.display().to_string()];
        shell::step("the model as a Hugging Face folder", || {
            let mut command = repo.command(repo.python());
            shell::run(command.arg("tests/python/bench_rlhf.py").args(arguments).env("HF_HUB_OFFLINE", "1"))
        })?;
    }
    Ok(exported)
}

/// An arithmetic question in the form that SmolLM2 was taught.
pub fn question(index: usize) -> (String, usize) {
    let (a, b) = (11 + index * 7 % 89, 10 + index * 13 % 90);
    let text = format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n"
    );
    (text, a + b)
}

struct Bench<'a> {
    repo: &'a Repo,
    options: &'a Options,
    model: PathBuf,
    trl_with_ppo: PathBuf,
    folder: PathBuf,
}

impl Bench<'_> {
    fn prompts(&self) -> PathBuf {
        self.folder.join("questions.jsonl")
    }

    fn write_prompts(&self) -> Result<()> {
        let mut lines = String::new();
        for index in 0..self.options.steps * self.options.prompts {
            let (text, sum) = question(index);
            writeln!(lines, "{}", json!({ "text": text, "ground_truth": sum.to_string() }))?;
        }
        fs::write(self.prompts(), lines).with_context(|| format!("cannot write {}", self.prompts().display()))
    }

    fn compare(&self, algorithm: Algorithm, dtype: Dtype, exported: &Path) -> Result<Vec<Row>> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..self.options.rounds {
            shell::step(&format!("{algorithm:?}, {}, round {}", dtype.name(), round + 1), || {
                ours.extend(self.our_turn(algorithm, dtype)?);
                // A peer that fails, as where memory is too small for it, stays out of the table.
                match self.peer_turn(algorithm, dtype, exported) {
                    Ok(steps) => theirs.extend(steps),
                    Err(e) => println!("    TRL: {e:#}"),
                }
                Ok(())
            })?;
        }
        let parts: [Part; 4] = [
            ("s a step", |step| step.whole),
            ("s of generation", |step| step.generate),
            ("s of scoring", |step| step.score),
            ("s of training", |step| step.train),
        ];
        let name = |who: &str| format!("{who} {algorithm:?} {}", dtype.name());
        let row = |who: &str, unit, value: fn(&Step) -> f64, steps: &[Step]| Row {
            name: name(who),
            unit,
            values: steps.iter().map(value).collect(),
        };
        let rows = parts
            .iter()
            .flat_map(|&(unit, value)| [row("tangelo", unit, value, &ours), row("TRL", unit, value, &theirs)]);
        Ok(rows.filter(|row| !row.values.is_empty()).collect())
    }

    fn our_turn(&self, algorithm: Algorithm, dtype: Dtype) -> Result<Vec<Step>> {
        let run = self.folder.join("rlhf");
        if run.exists() {
            fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
        }
        let job = self.folder.join("rlhf.toml");
        fs::write(&job, self.toml(algorithm, dtype, &run))
            .with_context(|| format!("cannot write {}", job.display()))?;
        let mut command = self.repo.command(self.repo.target().join("release/tangelo"));
        shell::run(command.arg("run").arg(&job).args(["--quiet", "--nproc-per-node", "1"]))?;
        let records = records(&run)?;
        let seconds = |record: &Value, name: &str| record[format!("timing_s/{name}")].as_f64().unwrap_or(0.0);
        let steps = records.iter().filter(|record| record["timing_s/step"].is_number());
        let parts = steps.map(|record| {
            let (whole, generate) = (seconds(record, "step"), seconds(record, "gen"));
            let train = seconds(record, "update_actor") + seconds(record, "update_critic");
            Step { whole, generate, train, score: whole - generate - train }
        });
        Ok(parts.skip(1).collect())
    }

    fn peer_turn(&self, algorithm: Algorithm, dtype: Dtype, exported: &Path) -> Result<Vec<Step>> {
        let (command, python_path) = match algorithm {
            Algorithm::Grpo => ("grpo", None),
            Algorithm::Ppo => ("ppo", Some(self.trl_with_ppo.as_path())),
        };
        let options = self.options;
        let arguments = [
            command.to_owned(),
            exported.display().to_string(),
            dtype.name().to_owned(),
            options.steps.to_string(),
            self.prompts().display().to_string(),
            options.samples.to_string(),
            options.new_tokens.to_string(),
            options.threads.to_string(),
        ];
        let answer = peer_script(self.repo, "bench_rlhf.py", python_path, &arguments)?;
        let number = |step: &Value, name: &str| step[name].as_f64().unwrap_or(f64::NAN);
        let steps = answer["steps"].as_array().context("the peer counted no steps")?;
        let parts = steps.iter().map(|step| Step {
            whole: number(step, "step"),
            generate: number(step, "generate"),
            score: number(step, "score"),
            train: number(step, "train"),
        });
        Ok(parts.skip(1).collect())
    }

    fn toml(&self, algorithm: Algorithm, dtype: Dtype, run: &Path) -> String {
        let Options { steps, prompts, samples, new_tokens, threads, .. } = self.options;
        let algorithm = match algorithm {
            Algorithm::Grpo => "[algorithm]\ntype = \"grpo\"\n",
            Algorithm::Ppo => "[algorithm]\ntype = \"ppo\"\n[algorithm.reward]\nuse_kl_in_reward = true\n",
        };
        format!(
            "[job]\ntype = \"rlhf\"\ndump_folder = {run:?}\n[model]\nhf_assets_path = {model:?}\n[training]\n\
             device = \"cpu\"\nnum_threads = {threads}\nsteps = {steps}\nseq_len = 256\n\
             mixed_precision_param = {dtype:?}\n[optimizer]\nlr = 1e-6\n[lr_scheduler]\nwarmup_steps = 0\n\
             decay_ratio = 0.0\n[checkpoint]\nenable = false\ninitial_load_in_hf = true\n[metrics]\n\
             enable_tensorboard = false\n{algorithm}[rlhf]\ntrain_batch_size = {prompts}\nppo_mini_batch_size = 0\n\
             ppo_max_token_len_per_rank = 4096\nval_before_train = false\nsave_rollouts = false\n[rollout.sampling]\n\
             n = {samples}\nmax_tokens = {new_tokens}\nignore_eos = true\n[prompts]\nfiles = [{questions:?}]\n\
             prompt_key = \"text\"\nchat = false\nshuffle = false\nmax_prompt_length = 128\n[[reward.parts]]\n\
             type = \"numeric\"\nmethod = \"flexible\"\n",
            run = run.display().to_string(),
            model = self.model.display().to_string(),
            dtype = dtype.name(),
            questions = self.prompts().display().to_string(),
        )
    }
}
