//! `cargo xtask`: everything around the code that is not the code.
//!
//! Needs no libtorch and few crates, so that it compiles before anything is set up. Each command is a module; each
//! calls the same set-up first, which does nothing where nothing is missing. Absent: anything a user's run needs at
//! run time (that is `tangelo`'s business).

mod bench;
mod corpus;
mod demo;
mod gpu_bundle;
mod layouts;
mod loss_compare;
mod pins;
mod quickstart;
mod setup;
mod shell;
mod soak;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Set-up, first run and checks of Tangelo.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make .venv, install the pinned libtorch, link .libtorch to it. Does nothing where all is there.
    Setup {
        /// Also install the pinned Python peers that tests and benchmarks compare with.
        #[arg(long)]
        peers: bool,
    },
    /// Set up, build, and train a small model on real text with two workers, in minutes.
    Quickstart(quickstart::Options),
    /// Set up, build, and show what a run of a kind does, in minutes.
    Demo(demo::Options),
    /// Set up, then check everything: format, lints, docs, build, tests.
    Test(test::Options),
    /// Measure Tangelo and its peers side by side. Takes a while and wants the machine for itself.
    Bench(bench::Options),
    /// Run the same job by two commits, or with two sets of options, and compare every step.
    LossCompare(loss_compare::Options),
    /// Loss curves of many layouts against one rank: fp32, bf16, and a long run of ring attention.
    Layouts(layouts::Options),
    /// Kill a run again and again; its end must have the bits of an undisturbed one's.
    Soak(soak::Options),
    /// Pack stripped release binaries and a start script for a machine with a GPU and no Rust.
    GpuBundle,
    /// Write the text that `quickstart` trains on: one JSON line per file.
    Corpus {
        /// Folder or file to take text from; the crates in cargo's registry where absent.
        path: Option<PathBuf>,
        /// Where to write the lines.
        #[arg(long)]
        output: PathBuf,
        /// Stop after this many bytes of text.
        #[arg(long, default_value_t = corpus::DEFAULT_BYTES)]
        bytes: u64,
    },
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    // The chain, outermost first; no backtrace: every error here says what to do.
    error.chain().for_each(|cause| eprintln!("error: {cause}"));
    ExitCode::FAILURE
}

fn run() -> Result<()> {
    let repo = shell::Repo::find()?;
    match Cli::parse().command {
        Command::Setup { peers } => {
            setup::libtorch(&repo)?;
            if peers {
                setup::peers(&repo)?;
            }
            Ok(())
        }
        Command::Quickstart(options) => quickstart::run(&repo, &options),
        Command::Demo(options) => demo::run(&repo, &options),
        Command::Test(options) => test::run(&repo, &options),
        Command::GpuBundle => {
            setup::libtorch(&repo)?;
            gpu_bundle::bundle(&repo)
        }
        Command::Bench(options) => bench::run(&repo, &options),
        Command::LossCompare(options) => loss_compare::run(&repo, &options),
        Command::Layouts(options) => layouts::run(&repo, &options),
        Command::Soak(options) => soak::run(&repo, &options),
        Command::Corpus { path, output, bytes } => {
            let summary = corpus::write(path.as_deref(), &output, bytes)?;
            println!("{summary}");
            Ok(())
        }
    }
}
