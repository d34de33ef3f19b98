//! The user's binary: starts at once, links no libtorch, and runs `tangelo-worker` for whatever needs tensors.
//!
//! Invariants: a command either does what it was asked or ends with one message on stderr and the exit code of
//! [`error::LaunchError::exit_code`]. Deliberately absent: an async runtime outside of `driver`
//! (one supervisor thread waits for signals and children; pipes have threads of their own).

mod cli;
mod driver;
mod error;
mod progress;
mod run;
mod verbs;
mod worker;

use clap::Parser;
use cli::{Cli, Command};
use error::LaunchError;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(&cli.command) {
        Ok(code) => code,
        Err(error) => {
            let label = if run::use_colors(&std::io::stderr()) { "\u{1b}[31;1merror:\u{1b}[0m" } else { "error:" };
            let _ = writeln!(std::io::stderr(), "{label} {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn dispatch(command: &Command) -> Result<ExitCode, LaunchError> {
    match command {
        Command::Run(arguments) => run::run(arguments)?,
        Command::Replay(arguments) => return run::replay(arguments),
        Command::Driver(arguments) => driver::run(arguments)?,
        Command::Check(arguments) => verbs::check(arguments)?,
        Command::Data(command) => verbs::data(command)?,
        Command::Export(a) => {
            return worker::run_worker(a.worker(), "export", &a.request(), &verbs::terminal(a.quiet));
        }
        Command::Generate(a) => return worker::become_worker(a.worker(), "generate", &a.request()),
        Command::Score(a) => return worker::become_worker(a.worker(), "score", &a.request()),
        Command::Eval(a) => return worker::run_worker(a.worker(), "eval", &a.request(), &verbs::terminal(a.quiet)),
        Command::Report(arguments) => verbs::report(arguments)?,
        Command::Schema(arguments) => verbs::schema(arguments)?,
        Command::Completions(arguments) => verbs::completions(arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}
