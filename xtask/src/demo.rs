//! `cargo xtask demo rlhf`: a small model learns to add by reinforcement learning, from a model file in a Python package.
//!
//! Does nothing that a user could not type: set-up, `cargo build --release`, then `tangelo run` of a preset and
//! `tangelo report`. What is printed at the end is read from the run: accuracy on held-out tasks by step.

use crate::quickstart::{fresh_folder, program, run_said, tangelo, toml_string};
use crate::setup;
use crate::shell::{self, Repo};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

/// The job that is run.
const PRESET: &str = "configs/presets/smollm2-135m-grpo.toml";
/// Share of held-out tasks that were answered right.
const ACCURACY: &str = "val-core/arithmetic/reward/mean@1";

/// Which demonstration.
#[derive(Args)]
#[command(disable_help_subcommand = true)]
pub struct Options {
    #[command(subcommand)]
    demo: Demo,
}

#[derive(Subcommand)]
enum Demo {
    /// SmolLM2-135M-Instruct learns to add two numbers by GRPO, in minutes on two cores.
    Rlhf(Rlhf),
}

#[derive(Args)]
struct Rlhf {
    /// Optimizer steps instead of the preset's.
    #[arg(long)]
    steps: Option<u64>,
}

/// Sets up, builds, trains, shows.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    let Demo::Rlhf(options) = &options.demo;
    setup::libtorch(repo)?;
    let model = setup::smollm2(repo)?;
    shell::step("building tangelo and tangelo-worker (release; the first time takes minutes)", || {
        shell::run(&mut repo.cargo(&["build", "--release"]))
    })?;
    let folder = fresh_folder(&repo.root.join("runs"), "rlhf")?;
    let begin = Instant::now();
    let mut command = tangelo(repo);
    command.args(["run", PRESET, "--nproc-per-node", "1"]);
    command.args(["--set", &format!("job.dump_folder={}", toml_string(&folder))]);
    command.args(["--set", &format!("model.hf_assets_path={}", toml_string(&model))]);
    if let Some(steps) = options.steps {
        command.args(["--set", &format!("training.steps={steps}")]);
    }
    shell::step("training", || run_said(&mut command))?;
    let seconds = begin.elapsed();
    run_said(tangelo(repo).arg("report").arg(&folder))?;
    println!("\n{}", accuracies(&folder)?);
    println!("run        {}", folder.display());
    println!("report     {}", folder.join("report.html").display());
    println!("time       {} for training", shell::seconds(seconds));
    let question = "What is 17 + 8?";
    println!("go on      {} generate {} --chat --prompt {question:?}", program(repo).display(), folder.display());
    Ok(())
}

/// Accuracy on held-out tasks by step, as bars.
fn accuracies(folder: &Path) -> Result<String> {
    let path = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let records = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let points: Vec<(u64, f64)> =
        records.filter_map(|record| Some((record["step"].as_u64()?, record[ACCURACY].as_f64()?))).collect();
    let (Some((_, before)), Some((step, after))) = (points.first(), points.last()) else {
        bail!("{} holds no {ACCURACY}", path.display());
    };
    let mut lines = String::from("step  held-out tasks answered right\n");
    for (step, accuracy) in &points {
        let bar = "#".repeat((accuracy * 40.0).round() as usize);
        writeln!(lines, "{step:4}  {:5.1} %  {bar}", 100.0 * accuracy)?;
    }
    write!(lines, "{:.1} % before training, {:.1} % after {step} steps", 100.0 * before, 100.0 * after)?;
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracies_come_from_validations_alone() {
        let folder = tempfile::tempdir().unwrap();
        let lines = format!(
            "{{\"step\":0,\"{ACCURACY}\":0.25}}\n{{\"step\":1,\"loss\":1.0}}\n{{\"step\":2,\"{ACCURACY}\":0.875}}\n"
        );
        std::fs::write(folder.path().join("metrics.jsonl"), lines).unwrap();
        let text = accuracies(folder.path()).unwrap();
        assert!(text.contains("   0   25.0 %  ##########\n") && text.contains("   2   87.5 %"), "{text}");
        assert!(text.ends_with("25.0 % before training, 87.5 % after 2 steps"), "{text}");
        std::fs::write(folder.path().join("metrics.jsonl"), "").unwrap();
        assert!(accuracies(folder.path()).is_err());
    }
}
