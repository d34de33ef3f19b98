//! `cargo xtask test`: every check, each as a stage with its time; also what `.ci/run` calls.
//!
//! All stages run even where one failed, except those that need what failed. The build stage makes what the tests run
//! (all test executables, `tangelo`, `tangelo-worker`) in one go, so that features are resolved once.

use crate::setup;
use crate::shell::{self, Repo};
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use std::time::{Duration, Instant};

/// Tells tests where the build stage put `tangelo` and `tangelo-worker`; as listed in `tangelo_core::env`.
const TEST_BINARIES: &str = "TANGELO_TEST_BINARIES";

/// Which stages to run.
#[derive(Args)]
pub struct Options {
    /// Run these stages only, and before them what they need.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Stage>,
    /// Hand this filter expression to cargo-nextest, or this name to `cargo test`.
    #[arg(long)]
    filter: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// libtorch in .venv.
    Setup,
    /// The pinned Python peers that tests compare with.
    Peers,
    /// rustfmt.
    Fmt,
    /// clippy, warnings denied.
    Clippy,
    /// rustdoc, warnings denied.
    Doc,
    /// Binaries and test executables.
    Build,
    /// All tests.
    Test,
    /// Examples in the documentation.
    Doctest,
}

impl Stage {
    const ALL: &[Stage] =
        &[Stage::Setup, Stage::Peers, Stage::Fmt, Stage::Clippy, Stage::Doc, Stage::Build, Stage::Doctest, Stage::Test];

    fn name(self) -> &'static str {
        match self {
            Stage::Setup => "setup",
            Stage::Peers => "peers",
            Stage::Fmt => "fmt",
            Stage::Clippy => "clippy",
            Stage::Doc => "doc",
            Stage::Build => "build",
            Stage::Test => "test",
            Stage::Doctest => "doctest",
        }
    }

    /// The stage without which this one makes no sense.
    fn needs(self) -> Option<Stage> {
        match self {
            Stage::Setup | Stage::Fmt => None,
            Stage::Peers | Stage::Clippy | Stage::Doc | Stage::Build => Some(Stage::Setup),
            Stage::Test | Stage::Doctest => Some(Stage::Build),
        }
    }

    fn run(self, repo: &Repo, options: &Options) -> Result<()> {
        match self {
            Stage::Setup => setup::libtorch(repo),
            Stage::Peers => setup::peers(repo),
            Stage::Fmt => shell::run(&mut repo.cargo(&["fmt", "--all", "--check"])),
            Stage::Clippy => {
                let arguments = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
                shell::run(&mut repo.cargo(&arguments))
            }
            Stage::Doc => {
                let mut command = repo.cargo(&["doc", "--workspace", "--no-deps"]);
                shell::run(command.env("RUSTDOCFLAGS", "-D warnings"))
            }
            Stage::Build => shell::run(&mut repo.cargo(&["build", "--workspace", "--bins", "--tests"])),
            Stage::Test => tests(repo, options),
            Stage::Doctest => shell::run(&mut repo.cargo(&["test", "--workspace", "--doc", "--quiet"])),
        }
    }
}

/// What became of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    /// The stage it needs failed.
    NotRun,
}

struct Line {
    stage: Stage,
    outcome: Outcome,
    time: Duration,
}

/// Runs the stages and prints a table; an error where one failed.
pub fn run(repo: &Repo, options: &Options) -> Result<()> {
    let start = Instant::now();
    let mut lines: Vec<Line> = Vec::new();
    for stage in selected(&options.only) {
        let blocked =
            stage.needs().is_some_and(|need| lines.iter().any(|l| l.stage == need && l.outcome != Outcome::Passed));
        lines.push(if blocked { not_run(stage) } else { timed(stage, repo, options) });
    }
    println!("\n{}", table(&lines, start.elapsed()));
    let failed: Vec<_> = lines.iter().filter(|l| l.outcome != Outcome::Passed).map(|l| l.stage.name()).collect();
    if !failed.is_empty() {
        bail!("failed: {}\nagain: cargo xtask test --only {}", failed.join(", "), failed.join(","));
    }
    Ok(())
}

/// The stages asked for and, before them, those they need: tests start the binaries that the build stage makes.
fn selected(only: &[Stage]) -> Vec<Stage> {
    if only.is_empty() {
        return Stage::ALL.to_vec();
    }
    let with_needs = |stage: &Stage| std::iter::successors(Some(*stage), |s| s.needs());
    let wanted: Vec<Stage> = only.iter().flat_map(with_needs).collect();
    Stage::ALL.iter().copied().filter(|s| wanted.contains(s)).collect()
}

fn timed(stage: Stage, repo: &Repo, options: &Options) -> Line {
    println!("\n==> {}", stage.name());
    let start = Instant::now();
    let outcome = match stage.run(repo, options) {
        Ok(()) => Outcome::Passed,
        Err(error) => {
            error.chain().for_each(|cause| eprintln!("{}: {cause}", stage.name()));
            Outcome::Failed
        }
    };
    Line { stage, outcome, time: start.elapsed() }
}

fn not_run(stage: Stage) -> Line {
    Line { stage, outcome: Outcome::NotRun, time: Duration::ZERO }
}

/// Through cargo-nextest where it is installed, one process per test; else through `cargo test`.
fn tests(repo: &Repo, options: &Options) -> Result<()> {
    let binaries = repo.target().join("debug");
    if shell::output(&mut repo.cargo(&["nextest", "--version"])).is_some() {
        let mut command = repo.cargo(&["nextest", "run", "--workspace", "--no-fail-fast"]);
        command.env(TEST_BINARIES, &binaries);
        if let Some(filter) = &options.filter {
            command.args(["-E", filter]);
        }
        return shell::run(&mut command);
    }
    println!("cargo-nextest is not installed: using cargo test");
    let mut command = repo.cargo(&["test", "--workspace", "--bins", "--tests", "--no-fail-fast"]);
    command.env(TEST_BINARIES, &binaries);
    if let Some(filter) = &options.filter {
        command.arg(filter);
    }
    // Tests that start several processes expect the machine for themselves; nextest's groups see to that.
    command.args(["--", "--test-threads=1"]);
    shell::run(&mut command)
}

fn table(lines: &[Line], total: Duration) -> String {
    let mut text = String::from("stage      result     time\n");
    for line in lines {
        let result = match line.outcome {
            Outcome::Passed => "ok",
            Outcome::Failed => "FAILED",
            Outcome::NotRun => "not run",
        };
        text += &format!("{:<10} {:<10} {}\n", line.stage.name(), result, shell::seconds(line.time));
    }
    let passed = lines.iter().filter(|l| l.outcome == Outcome::Passed).count();
    text += &format!("{passed} of {} stages passed in {}\n", lines.len(), shell::seconds(total));
    text + &format!("stages: {passed} passed, {} failed", lines.len() - passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_stage_brings_what_it_needs() {
        assert_eq!(selected(&[Stage::Fmt]), [Stage::Fmt]);
        assert_eq!(selected(&[Stage::Clippy]), [Stage::Setup, Stage::Clippy]);
        assert_eq!(selected(&[Stage::Test]), [Stage::Setup, Stage::Build, Stage::Test]);
        assert_eq!(selected(&[]), Stage::ALL);
    }

    #[test]
    fn stages_follow_what_they_need() {
        for (i, stage) in Stage::ALL.iter().enumerate() {
            assert!(stage.needs().is_none_or(|need| Stage::ALL[..i].contains(&need)));
        }
    }

    #[test]
    fn the_table_counts() {
        let line = |stage, outcome| Line { stage, outcome, time: Duration::from_secs(65) };
        let lines = [line(Stage::Fmt, Outcome::Passed), line(Stage::Doc, Outcome::Failed), not_run(Stage::Test)];
        let text = table(&lines, Duration::from_secs(130));
        assert!(text.contains("fmt        ok         1 min 05 s"), "{text}");
        assert!(text.ends_with("1 of 3 stages passed in 2 min 10 s\nstages: 1 passed, 2 failed"), "{text}");
    }
}
