//! `cargo xtask quickstart`: from a fresh clone to a trained model, a sample from it and its numbers.
//!
//! Does nothing that a user could not type: set-up, `cargo build --release`, then `tangelo run`, `tangelo generate` and
//! `tangelo report` with the arguments it prints.

use crate::corpus;
use crate::setup;
use crate::shell::{self, Repo};
use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// The job that is run.
const PRESET: &str = "configs/presets/quickstart.toml";
/// What the sample continues; the same text is in the preset's prompts where the corpus is code.
const PROMPT: &str = "/// Returns the ";

/// What to train on and for how long.
#[derive(Args)]
pub struct Options {
    /// Folder or file with text; the sources and Markdown of the crates in cargo's registry where absent.
    path: Option<PathBuf>,
    /// Optimizer steps instead of the preset's.
    #[arg(long)]
    steps: Option<u64>,
    /// Worker processes.
    #[arg(long, default_value_t = 2)]
    workers: u32,
    /// Text for the sample to continue.
    #[arg(long, default_value = PROMPT)]
    prompt: String,
}

/// Sets up, builds, trains, shows.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    let start = Instant::now();
    setup::libtorch(repo)?;
    shell::step("building tangelo and tangelo-worker (release; the first time takes minutes)", || {
        shell::run(&mut repo.cargo(&["build", "--release"]))
    })?;
    let built = Instant::now();
    let folder = fresh_folder(&repo.root.join("runs"), "quickstart")?;
    let corpus = folder.join("corpus.jsonl");
    let summary =
        shell::step("collecting text", || corpus::write(options.path.as_deref(), &corpus, corpus::DEFAULT_BYTES))?;
    println!("    {summary}");
    shell::step("training", || run_said(&mut train(repo, options, &folder, &corpus)))?;
    let exported = folder.join("export");
    let sample = shell::step("sampling from the trained model", || sample(repo, options, &exported))?;
    run_said(tangelo(repo).arg("report").arg(&folder))?;
    println!("\n{}{sample}\n", options.prompt);
    println!("{}", losses(&folder)?);
    println!("run        {}", folder.display());
    println!("report     {}", folder.join("report.html").display());
    println!("model      {} (Hugging Face format)", exported.display());
    let (total, work) = (shell::seconds(start.elapsed()), shell::seconds(built.elapsed()));
    println!("time       {total}, {work} of it after the build");
    println!("go on      {} generate {} --prompt \"fn \"", program(repo).display(), exported.display());
    Ok(())
}

/// The built `tangelo`.
pub fn program(repo: &Repo) -> PathBuf {
    repo.target().join("release/tangelo")
}

/// A call of it.
pub fn tangelo(repo: &Repo) -> Command {
    repo.command(program(repo))
}

/// Prints the command line, then runs it.
pub fn run_said(command: &mut Command) -> Result<()> {
    println!("    $ {}", shell::command_line(command));
    shell::run(command)
}

fn train(repo: &Repo, options: &Options, folder: &Path, corpus: &Path) -> Command {
    let mut command = tangelo(repo);
    command.args(["run", PRESET, "--nproc-per-node", &options.workers.to_string()]);
    let mut set = |key: &str, value: String| {
        command.args(["--set", &format!("{key}={value}")]);
    };
    set("job.dump_folder", toml_string(folder));
    set("data.sources.0.paths", format!("[{}]", toml_string(corpus)));
    // The loss of the very first step is the "before" below.
    set("metrics.log_freq", "1".into());
    if let Some(steps) = options.steps {
        set("training.steps", steps.to_string());
    }
    command
}

/// The path as a TOML string.
pub fn toml_string(path: &Path) -> String {
    format!("\"{}\"", path.display().to_string().replace('\\', "\\\\").replace('"', "\\\""))
}

fn sample(repo: &Repo, options: &Options, model: &Path) -> Result<String> {
    let mut command = tangelo(repo);
    command.arg("generate").arg(model).args(["--prompt", &options.prompt, "--json"]);
    command.args(["--max-new-tokens", "120", "--temperature", "0.7", "--seed", "1"]);
    let line = shell::command_line(&command);
    println!("    $ {line}");
    let text = shell::output(&mut command).with_context(|| format!("`{line}` failed"))?;
    let answer: Value = serde_json::from_str(&text).with_context(|| format!("`{line}` printed no JSON"))?;
    Ok(answer["text"].as_str().unwrap_or_default().to_owned())
}

/// `runs/NAME`, or with the next free number: an earlier run is never continued or overwritten.
pub fn fresh_folder(runs: &Path, name: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(runs).with_context(|| format!("cannot make {}", runs.display()))?;
    for number in 1..10_000 {
        let name = if number == 1 { name.to_owned() } else { format!("{name}-{number}") };
        match std::fs::create_dir(runs.join(&name)) {
            Ok(()) => return Ok(runs.join(name)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", runs.join(name).display())),
        }
    }
    bail!("{} is full of runs\nfix: remove some", runs.display())
}

/// The loss before the first update and after the last, from the run's metrics.
fn losses(folder: &Path) -> Result<String> {
    let path = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let records: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let all = |key: &str| records.iter().filter_map(|r| r[key].as_f64()).collect::<Vec<f64>>();
    let (train, held_out) = (all("loss"), all("eval_loss"));
    let (Some(before), Some(after)) = (train.first(), held_out.last().or(train.last())) else {
        bail!("{} holds no loss", path.display());
    };
    let what = if held_out.is_empty() { "last step" } else { "held-out documents" };
    Ok(format!(
        "loss       {before:.3} before training, {after:.3} after ({what}); perplexity {:.0} -> {:.1}",
        before.exp(),
        after.exp()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_never_reused() {
        let runs = tempfile::tempdir().unwrap();
        let names: Vec<_> = (0..3).map(|_| fresh_folder(runs.path(), "quickstart").unwrap()).collect();
        let expected = ["quickstart", "quickstart-2", "quickstart-3"].map(|name| runs.path().join(name));
        assert_eq!(names, expected);
    }

    #[test]
    fn losses_come_from_the_first_step_and_the_held_out_documents() {
        let folder = tempfile::tempdir().unwrap();
        let lines = "{\"step\":1,\"loss\":8.0}\n{\"step\":2,\"loss\":6.5,\"eval_loss\":6.25}\n{\"torn\":";
        std::fs::write(folder.path().join("metrics.jsonl"), lines).unwrap();
        let text = losses(folder.path()).unwrap();
        assert!(text.contains("8.000 before") && text.contains("6.250 after (held-out"), "{text}");
        std::fs::write(folder.path().join("metrics.jsonl"), "").unwrap();
        assert!(losses(folder.path()).is_err());
    }

    #[test]
    fn paths_survive_toml() {
        assert_eq!(toml_string(Path::new("/a b/\"c\"")), r#""/a b/\"c\"""#);
    }
}
