//! The command line of `tangelo`, one file per group of commands.

pub mod data;
pub mod model;
pub mod run;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use std::path::PathBuf;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "tangelo", version, about = ABOUT, after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const ABOUT: &str = "Trains language models: from text to a model on disk";

const AFTER_HELP: &str = "\
Examples:
  tangelo check job.toml                               what would it train
  tangelo run job.toml --nproc-per-node 2              train
  tangelo report runs/my-run                           look at it
  tangelo generate runs/my-run --prompt 'fn main() {'  try it
  tangelo export runs/my-run --format hf               take it elsewhere

`tangelo COMMAND --help` says more.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train: prepare data, start the ranks, watch over them
    Run(run::RunArgs),
    /// Do one recorded step of a reinforcement-learning run again, alone, and compare
    Replay(run::ReplayArgs),
    /// Command the ranks of a reinforcement-learning job; `run` starts it
    #[command(hide = true)]
    Driver(DriverArgs),
    /// Resolve and validate a job without training, and print what it would do and cost
    Check(CheckArgs),
    /// Train a tokenizer, tokenise text, look at what was tokenised
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Write a trained model as a Hugging Face folder
    Export(model::ExportArgs),
    /// Continue a prompt; text streams as it is sampled
    Generate(model::GenerateArgs),
    /// Log-probabilities of given token ids or text, JSON lines in and out
    Score(model::ScoreArgs),
    /// Perplexity of a model on files of text
    Eval(model::EvalArgs),
    /// Write a run's curves, samples and events as one self-contained HTML page
    Report(ReportArgs),
    /// Print the JSON schema of a job file, or list the model flavors
    Schema(SchemaArgs),
    /// Print the completion script of a shell
    Completions(CompletionsArgs),
}

/// Arguments of `tangelo driver`.
#[derive(Args, Debug)]
pub struct DriverArgs {
    /// The resolved job.
    pub config: PathBuf,
    /// The run of which one step is to be done again.
    #[arg(long, requires = "step")]
    pub replay: Option<PathBuf>,
    /// That step.
    #[arg(long)]
    pub step: Option<u64>,
}

/// Arguments of `tangelo check`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo check configs/presets/llama-3.1-8b.toml --world-size 64
  tangelo check job.toml --set parallelism.zero_optimizer_degree=1

Exit code 2 where the job is refused; nothing is written.")]
pub struct CheckArgs {
    /// The job: a TOML file.
    pub job: PathBuf,
    /// Ranks to plan for.
    #[arg(long, value_name = "N", default_value = "1")]
    pub world_size: std::num::NonZeroUsize,
    /// Ranks on a node, which share its cores [default: 8, or all of fewer].
    #[arg(long, alias = "nproc_per_node", value_name = "N")]
    pub nproc_per_node: Option<std::num::NonZeroUsize>,
    /// Set a key of the job: `section.key=value`. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Arguments of `tangelo report`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo report runs/my-run            # writes runs/my-run/report.html
  tangelo report runs/my-run -o a.html

Works on runs that are still going or have failed.")]
pub struct ReportArgs {
    /// The run folder.
    pub run: PathBuf,
    /// Where to write the page [default: report.html in the run folder].
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Arguments of `tangelo schema`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo schema > job.schema.json      # for editors: completion and checks while you type
  tangelo schema --flavors")]
pub struct SchemaArgs {
    /// List the model flavors (`model.flavor`) instead.
    #[arg(long)]
    pub flavors: bool,
}

/// Arguments of `tangelo completions`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  tangelo completions bash > ~/.local/share/bash-completion/completions/tangelo
  tangelo completions zsh > ~/.zfunc/_tangelo
  tangelo completions fish > ~/.config/fish/completions/tangelo.fish")]
pub struct CompletionsArgs {
    /// The shell.
    pub shell: Shell,
}
