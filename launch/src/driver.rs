//! `tangelo driver`: the process that commands the ranks of a reinforcement-learning job, on the first node; on every
//! other the agent that passes its calls on to the ranks there. `tangelo run` starts it.

use crate::cli::DriverArgs;
use crate::error::LaunchError;
use crate::run::load_plan;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tangelo_configs::{JobPlan, Resources, resolve};
use tangelo_control::{Agent, Cause, ControlError, Meeting, Membership, RankFailure, Secret};
use tangelo_core::env;
use tangelo_driver::replay::{self, Comparison, Replay};
use tangelo_driver::session::Stop;
use tangelo_driver::start::{self, StartOptions};
use tangelo_formats::Assets;
use tangelo_observe::{ErrorRecord, ProgressEvent, ProgressWriter, stderr_line, unix_millis};

/// What stands for a rank's number where the driver is meant.
pub const DRIVER: usize = usize::MAX;
/// What stands for a rank's number where the agent of node 0 is meant; those of the other nodes follow.
const AGENTS: usize = usize::MAX - (1 << 32);

/// Whether a number is that of a rank, and not what stands for the driver or an agent.
pub fn is_rank(number: usize) -> bool {
    number < AGENTS
}

/// What stands for who runs on a node beside its ranks.
pub fn of_node(node_rank: usize) -> usize {
    if node_rank == 0 { DRIVER } else { AGENTS + node_rank }
}

/// `rank 3`, `driver`, or `agent of node 1`.
pub fn process_name(number: usize) -> String {
    match number {
        DRIVER => "driver".into(),
        number if is_rank(number) => format!("rank {number}"),
        agent => format!("agent of node {}", agent - AGENTS),
    }
}

/// What begins the names of its files.
pub fn file_stem(number: usize) -> String {
    match is_rank(number) {
        true => format!("rank-{number:05}"),
        false => process_name(number).replace(' ', "-"),
    }
}

/// Runs the job of a resolved configuration to its end; what goes wrong is left where the launcher looks for it.
pub fn run(arguments: &DriverArgs) -> Result<(), LaunchError> {
    die_with_launcher();
    let step = Arc::new(AtomicU64::new(0));
    let node = number(env::GROUP_RANK).unwrap_or(0);
    let result = if node == 0 { drive(arguments, &step) } else { serve(&arguments.config) };
    if let (Err(e), Some(path)) = (&result, std::env::var_os(env::ERROR_FILE)) {
        let record = ErrorRecord {
            rank: of_node(node),
            step: Some(step.load(Ordering::Relaxed)).filter(|&step| step > 0),
            kind: e.kind(),
            message: e.to_string(),
            unix_time_ms: unix_millis(),
        };
        if let Err(e) = record.write(Path::new(&path)) {
            stderr_line(format!("warning: cannot write {}: {e}", Path::new(&path).display()));
        }
    }
    result
}

fn drive(arguments: &DriverArgs, step: &Arc<AtomicU64>) -> Result<(), LaunchError> {
    let world_size = number(env::WORLD_SIZE).unwrap_or(1);
    let local = number(env::LOCAL_WORLD_SIZE).unwrap_or(world_size);
    let resources = Resources::of_this_machine(world_size, local)?;
    let job = JobPlan::new(load_plan(&arguments.config, &[], world_size, local, &Assets)?, &resources, &Assets)?;
    let options = StartOptions {
        run_id: std::env::var(env::RUN_ID).unwrap_or_else(|_| "tangelo".into()),
        host: std::env::var(env::HOST).unwrap_or_else(|_| "127.0.0.1".into()),
        num_nodes: number(env::GROUP_WORLD_SIZE).unwrap_or(1),
        progress: progress(),
        stop: listen_for_signals()?,
        current_step: step.clone(),
        restart_count: number(env::RESTART_COUNT).unwrap_or(0),
    };
    let runtime = runtime()?;
    if let (Some(run), Some(step)) = (&arguments.replay, arguments.step) {
        let compared = runtime.block_on(replay::run(&job, options, &Replay::new(run, &job, step)))?;
        return write_comparison(&job.policy.config.job.dump_folder.join(COMPARISON), &compared);
    }
    let outcome = runtime.block_on(start::run(&job, options))?;
    if outcome.stopped {
        stderr_line(format!("stopped by a signal after step {}; start the same command again to go on", outcome.step));
    }
    Ok(())
}

/// Finds the driver, tells the launcher where it is, and passes calls on until it is done or gone.
fn serve(config: &Path) -> Result<(), LaunchError> {
    let config = resolve::load(config, &[])?;
    let meeting = Meeting::new(&config.job.dump_folder);
    let patience = Duration::from_secs(config.comm.init_timeout_seconds);
    let serve = async {
        let address = meeting.find(patience).await?;
        // Ranks come after this process, and find in its environment what it finds here.
        let secret = Secret::read(&meeting.secret_file())?;
        let member = Membership {
            job: std::env::var(env::RUN_ID).unwrap_or_else(|_| "tangelo".into()),
            node: number(env::GROUP_RANK).unwrap_or(0),
            driver: address.clone(),
            host: std::env::var(env::HOST).unwrap_or_else(|_| "127.0.0.1".into()),
            secret,
        };
        let agent = Agent::start(&member).await?;
        progress().send(&ProgressEvent::Listening { address, secret_file: meeting.secret_file() });
        agent.run().await?;
        match meeting.was_left(&member.driver) {
            true => Err(ControlError::Peer {
                action: format!("the driver on node 0 ({})", member.driver),
                failure: RankFailure::new(Cause::Lost, "it is gone without having finished the job"),
            }),
            false => Ok(()),
        }
    };
    runtime()?.block_on(serve).map_err(|e| LaunchError::Driver(e.into()))
}

fn number(name: &str) -> Option<usize> {
    std::env::var(name).ok()?.parse().ok()
}

fn progress() -> ProgressWriter {
    ProgressWriter::from_fd_number(std::env::var(env::PROGRESS_FD).ok().as_deref())
}

fn runtime() -> Result<tokio::runtime::Runtime, LaunchError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.map_err(|e| LaunchError::Internal(format!("cannot start a runtime: {e}")))
}

/// The file that a replay leaves in its folder.
pub const COMPARISON: &str = "replay.json";

fn write_comparison(path: &Path, compared: &Comparison) -> Result<(), LaunchError> {
    let text = serde_json::to_string_pretty(compared).map_err(|e| LaunchError::Internal(e.to_string()))?;
    std::fs::write(path, text).map_err(LaunchError::io("write", path))
}

/// The first signal lets the step finish and saves; a second one ends the process at once.
fn listen_for_signals() -> Result<Stop, LaunchError> {
    let stop = Stop::default();
    // Others may ask to stop, too; that makes the first signal no second one.
    let again = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, again.clone())
            .and_then(|_| signal_hook::flag::register(signal, again.clone()))
            .and_then(|_| signal_hook::flag::register(signal, stop.0.clone()))
            .map_err(|e| LaunchError::Internal(format!("cannot listen for signal {signal}: {e}")))?;
    }
    Ok(stop)
}

/// Asks the kernel to end this process with its launcher; ends at once where that is gone already.
fn die_with_launcher() {
    let Ok(launcher) = std::env::var(env::SUPERVISOR_PID) else { return };
    if nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).is_err() {
        stderr_line("warning: cannot ask the kernel to end the driver with its launcher");
    }
    if launcher.parse().ok() != Some(nix::unistd::getppid().as_raw()) {
        stderr_line(format!("the launcher (process {launcher}) is gone; ending"));
        std::process::exit(tangelo_observe::FailureKind::Peer.exit_code().into());
    }
}
