//! `tangelo run` on the command line: torchrun's options, in either spelling.

use clap::Args;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Arguments of `tangelo run`.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct RunArgs {
    /// The job: a TOML file, such as one of configs/presets.
    pub job: PathBuf,

    /// Ranks to start on this node: a number, `auto` (one per GPU, else one), `gpu`, or `cpu` (one per core)
    /// [default: auto].
    #[arg(long, alias = "nproc_per_node", value_name = "N|auto", help_heading = "Processes")]
    pub nproc_per_node: Option<Processes>,

    /// Nodes in the job. Run the same command on each, with its own --node-rank.
    #[arg(long, value_name = "N", value_parser = parse_nodes, help_heading = "Processes")]
    pub nnodes: Option<usize>,

    /// Index of this node, from 0.
    #[arg(long, alias = "node_rank", value_name = "R", help_heading = "Processes")]
    pub node_rank: Option<usize>,

    /// Where the ranks of several nodes meet: node 0's address and a free port there.
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST:PORT", value_parser = crate::run::parse_endpoint)]
    #[arg(help_heading = "Processes")]
    pub rdzv_endpoint: Option<(String, u16)>,

    /// Start all ranks again after a failure, up to K times. They go on from the newest complete checkpoint.
    /// Errors in the configuration or the data, and a failure that repeats at the same step, end the run at once.
    #[arg(long, alias = "max_restarts", value_name = "K", default_value_t = 0, help_heading = "Faults")]
    pub max_restarts: u32,

    /// Seconds between SIGTERM and SIGKILL for the other ranks when one has failed.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_seconds, help_heading = "Faults")]
    pub grace_seconds: f64,

    /// Set a key of the job: `section.key=value`, the value as in TOML (a bare word is a string). May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Show warnings and errors only. Logs and metrics are written all the same.
    #[arg(long, short)]
    pub quiet: bool,

    /// The worker binary to use instead of the one beside `tangelo`.
    #[arg(long, hide = true, value_name = "PATH")]
    pub worker_binary: Option<PathBuf>,

    /// Wait before the first restart, milliseconds.
    #[arg(long, hide = true, default_value_t = 1000)]
    pub restart_backoff_ms: u64,

    /// Seconds between progress lines where there is no terminal.
    #[arg(long, hide = true, default_value = "10", value_parser = parse_seconds)]
    pub progress_seconds: f64,
}

impl RunArgs {
    /// Time between progress lines.
    pub fn progress_interval(&self) -> Duration {
        Duration::from_secs_f64(self.progress_seconds)
    }
}

/// Arguments of `tangelo replay`.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = "\
Takes the checkpoint of the step before and the rollouts that the step recorded
(rollouts/step-N.parquet), does its update again from their tokens, rewards and
log-probabilities, and prints its metrics beside the recorded ones. Nothing is
generated, no reward is asked, and nothing of the run is changed.

Examples:
  tangelo replay runs/grpo --step 41
  tangelo replay runs/grpo --step 41 --output /tmp/step-41

A step can be replayed whose step before has a checkpoint (checkpoint.interval),
and the first. It takes as many ranks as the run had.

Exit codes: 0 all is equal bit for bit, 1 something differs, 3 the step cannot be
replayed; others as those of `tangelo run`.")]
pub struct ReplayArgs {
    /// The run folder.
    pub run: PathBuf,
    /// The step.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub step: u64,
    /// The folder for logs and replay.json [default: replay/step-N in the run folder].
    #[arg(long, short, value_name = "FOLDER")]
    pub output: Option<PathBuf>,
    /// Show warnings and errors, and the result.
    #[arg(long, short)]
    pub quiet: bool,
    /// The worker binary to use instead of the one beside `tangelo`.
    #[arg(long, hide = true, value_name = "PATH")]
    pub worker_binary: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  tangelo run configs/presets/quickstart.toml --set 'data.sources.0.paths=[\"notes/*.md\"]'
  tangelo run job.toml --nproc-per-node 2 --set training.steps=200
  tangelo run job.toml --max-restarts 3
  tangelo run job.toml --nnodes 2 --node-rank 0 --rdzv-endpoint 10.0.0.1:29500
  torchrun --nproc-per-node 2 --no-python tangelo run job.toml
  srun --ntasks 8 tangelo run job.toml

The run folder (job.dump_folder) gets config.toml, logs/, metrics.jsonl,
events.jsonl, tb/, checkpoint/ and report.html. The same command again goes on
from the newest complete checkpoint.

On the terminal: what rank 0 writes, and what others write to stderr; logs/ has
all of it. Ctrl-C lets the ranks finish their step and save; a second one kills
them.

Exit codes: 0 done, 1 internal error, 2 configuration, 3 data, 4 device,
5 another rank or node was lost; 128 + signal when a signal ended the run before
its last step.";

/// Number of ranks on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processes {
    /// One per GPU, or one where there is none.
    Auto,
    /// One per GPU.
    Gpu,
    /// One per core.
    Cpu,
    /// So many.
    Number(NonZeroUsize),
}

impl FromStr for Processes {
    type Err = String;

    fn from_str(text: &str) -> Result<Processes, String> {
        match text {
            "auto" => Ok(Processes::Auto),
            "gpu" => Ok(Processes::Gpu),
            "cpu" => Ok(Processes::Cpu),
            _ => text.parse().map(Processes::Number).map_err(|_| "expected a number from 1, auto, gpu or cpu".into()),
        }
    }
}

fn parse_nodes(text: &str) -> Result<usize, String> {
    match text.parse::<NonZeroUsize>() {
        Ok(nodes) => Ok(nodes.get()),
        Err(_) if text.contains(':') => {
            Err("a range of nodes is not supported: the number of nodes is fixed while a job runs".into())
        }
        Err(_) => Err("expected a number from 1".into()),
    }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected a number of seconds".to_owned())?;
    if (0.0..=86_400.0).contains(&seconds) { Ok(seconds) } else { Err("expected 0 to 86400 seconds".into()) }
}
