//! What both sides of a comparison are fed: text, a tokenizer, a job and the model's config.json.

use crate::corpus;
use crate::shell::{self, Repo};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Tokens of a sequence.
pub const SEQ_LEN: usize = 512;
/// Sequences of a rank in a step.
pub const LOCAL_BATCH_SIZE: usize = 2;

/// The folder with all of it.
pub struct Inputs<'a> {
    pub repo: &'a Repo,
    pub folder: PathBuf,
}

impl<'a> Inputs<'a> {
    /// Makes text and tokenizer where they are missing; `tangelo` must have been built.
    pub fn new(repo: &'a Repo) -> Result<Inputs<'a>> {
        let folder = repo.target().join("bench");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let inputs = Inputs { repo, folder };
        if !inputs.corpus().exists() {
            corpus::write(None, &inputs.corpus(), 8 << 20)?;
        }
        if !inputs.tokenizer().exists() {
            let mut command = inputs.tangelo(&["data", "tokenizer", "--vocab-size", "8192", "--quiet", "--output"]);
            shell::run(command.arg(inputs.tokenizer()).arg(inputs.corpus()))?;
        }
        Ok(inputs)
    }

    pub fn corpus(&self) -> PathBuf {
        self.folder.join("corpus.jsonl")
    }

    pub fn tokenizer(&self) -> PathBuf {
        self.folder.join("tokenizer.json")
    }

    /// Where the run that [`Self::train`] prepared writes.
    pub fn run(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// The built `tangelo`.
    pub fn binary(&self) -> PathBuf {
        self.repo.target().join("release/tangelo")
    }

    pub fn tangelo(&self, arguments: &[&str]) -> Command {
        let mut command = self.repo.command(self.binary());
        command.args(arguments);
        command
    }

    /// A fresh run folder and the command that trains into it.
    pub fn train(&self, flavor: &str, dtype: &str, steps: usize, more: &[String]) -> Result<(PathBuf, Command)> {
        let mut command = self.tangelo(&["run", "--quiet"]);
        command.args(self.job(flavor, dtype, steps, more)?);
        Ok((self.run(), command))
    }

    /// The same as arguments that `tangelo run` and `tangelo check` take: the job's file and what is set.
    pub fn job(&self, flavor: &str, dtype: &str, steps: usize, more: &[String]) -> Result<Vec<String>> {
        let run = self.run();
        if run.exists() {
            fs::remove_dir_all(&run).with_context(|| format!("cannot remove {}", run.display()))?;
        }
        let job = self.folder.join("job.toml");
        fs::write(&job, self.toml(flavor)).with_context(|| format!("cannot write {}", job.display()))?;
        let mut arguments = vec![job.display().to_string()];
        let own = [format!("training.mixed_precision_param={dtype:?}"), format!("training.steps={steps}")];
        for setting in own.iter().chain(more) {
            arguments.extend(["--set".to_owned(), setting.clone()]);
        }
        Ok(arguments)
    }

    /// Two sequences of 512 tokens per step on two threads, nothing but training.
    fn toml(&self, flavor: &str) -> String {
        let path = |path: PathBuf| format!("{:?}", path.display().to_string());
        format!(
            "[job]\ndump_folder = {}\n[model]\nflavor = \"{flavor}\"\n[data]\nsources = [{{ paths = [{}] }}]\n\
             tokenizer = {}\nprepared_folder = {}\ndocument_mask = false\n[training]\nseq_len = {SEQ_LEN}\n\
             local_batch_size = {LOCAL_BATCH_SIZE}\nnum_threads = 2\ndevice = \"cpu\"\n[optimizer]\nlr = 1e-4\n\
             [lr_scheduler]\nwarmup_steps = 0\n[checkpoint]\n\
             enable = false\n[metrics]\nlog_freq = 1\nenable_tensorboard = false\n",
            path(self.run()),
            path(self.corpus()),
            path(self.tokenizer()),
            path(self.folder.join("prepared"))
        )
    }

    /// Runs the script; the JSON line it ends with.
    pub fn peer(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.repo.command(self.repo.python());
        command.arg("tests/python/bench.py").args(arguments).envs([("HF_HUB_OFFLINE", "1"), ("TQDM_DISABLE", "1")]);
        let line = shell::command_line(&command);
        let text = shell::output(&mut command).with_context(|| format!("`{line}` failed; run it to see why"))?;
        last_json(&text).with_context(|| format!("`{line}`"))
    }

    /// The model's config.json for transformers: that of the weights which `tangelo run` of no steps would export.
    pub fn peer_config(&self, flavor: &str) -> Result<PathBuf> {
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
}

/// Runs a script of tests/python with the peers' Python; the JSON line it ends with. `python_path` is searched first.
pub fn peer_script(repo: &Repo, script: &str, python_path: Option<&Path>, arguments: &[String]) -> Result<Value> {
    let mut command = repo.command(repo.python());
    command.arg(format!("tests/python/{script}")).args(arguments);
    // Threads that wait by turning take the cores from whoever works.
    command.envs([("HF_HUB_OFFLINE", "1"), ("TQDM_DISABLE", "1"), ("GOMP_SPINCOUNT", "0")]);
    if let Some(folder) = python_path {
        command.env("PYTHONPATH", folder);
    }
    let line = shell::command_line(&command);
    let output = command.output().with_context(|| format!("`{line}` could not be started"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.trim_end().lines().last().unwrap_or_default();
        bail!("`{line}` ended with {}: {last}", output.status);
    }
    last_json(&String::from_utf8_lossy(&output.stdout)).with_context(|| format!("`{line}`"))
}

/// The line of JSON that a peer's output ends with.
pub fn last_json(text: &str) -> Result<Value> {
    let last = text.trim_end().lines().last().unwrap_or_default();
    serde_json::from_str(last).with_context(|| format!("printed {last:?} at the end, expected JSON"))
}

/// The seconds of each step that a peer printed.
pub fn step_seconds(answer: &Value) -> Vec<f64> {
    answer["step_seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}
