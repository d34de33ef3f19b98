//! `tangelo run`: from a job file to ranks that train, and what is said when it ends.
//!
//! ```text
//! load, resolve -> lock RUN -> same run? -> prepare data -> RUN/config.toml -> attempt -> ok -------> report
//!                                                              ^                  |
//!                                                              +--- restart? <----+ first failure
//! ```
//! A process that torchrun or Slurm started as one rank goes the same way up to the configuration, then becomes the
//! worker ([`external`]).

mod culprit;
mod external;
mod folder;
mod logs;
mod prepare;
mod replay;
mod report_failure;
mod restart;
mod signals;
mod standing;
mod supervise;
mod terminal;
mod topology;

pub use logs::Stream;
pub use replay::replay;
pub use terminal::{Terminal, short_count, use_colors};
pub use topology::{Topology, parse_endpoint};

use crate::cli::run::{Processes, RunArgs};
use crate::error::LaunchError;
use crate::worker;
use culprit::{Death, Failure, failure_while_ending, first_failure, signal_name};
use logs::LogFolder;
use restart::{Decision, RestartOptions, RestartState};
use signal_hook::consts::{SIGCHLD, SIGTERM};
use signals::Inbox;
use std::cell::Cell;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use supervise::{Attempt, Outcome};
use tangelo_configs::job::{DeviceChoice, JobType};
use tangelo_configs::{ConfigError, JobPlan, ModelAssets, Plan, Resources, Role, resolve};
use tangelo_data::DataError;
use tangelo_formats::Assets;
use tangelo_observe::records::EventKind;
use tangelo_observe::{EventLog, report, unix_millis};
use tangelo_planner::publish::GenerationLayout;

/// Runs a job.
pub fn run(arguments: &RunArgs) -> Result<(), LaunchError> {
    let var = |name: &str| std::env::var(name).ok();
    let spawns = arguments.nproc_per_node.is_some() || arguments.nnodes.is_some();
    match external::rank_environment(var, spawns)? {
        Some(added) => become_rank(arguments, &added),
        None => launch(arguments),
    }
}

/// Loads and resolves a job file for so many ranks.
pub fn load_plan(
    job: &Path,
    sets: &[String],
    world_size: usize,
    local: usize,
    assets: &dyn ModelAssets,
) -> Result<Plan, LaunchError> {
    let config = resolve::load(job, sets)?;
    Ok(resolve::resolve(config, &Resources::of_this_machine(world_size, local)?, assets)?)
}

/// One rank of a job that another launcher started: prepares what it needs, then becomes the worker.
fn become_rank(arguments: &RunArgs, added: &[(&'static str, String)]) -> Result<(), LaunchError> {
    let (rank, world_size, local_size) = external::sizes(|name| std::env::var(name).ok(), added)?;
    let worker = worker::find(arguments.worker_binary.as_deref())?;
    let plan = load_plan(&arguments.job, &arguments.set, world_size, local_size, &Assets)?;
    if plan.config.job.kind == JobType::Rlhf {
        return Err(LaunchError::Usage(format!(
            "rank {rank} of {world_size} was started by another launcher, and a job of `job.type` = \"rlhf\" has a driver \
             beside its ranks: start `tangelo run` once per node, with --nproc-per-node, and let it start the ranks"
        )));
    }
    folder::check_same_run(&plan)?;
    let terminal = Terminal::new(arguments.quiet || rank != 0, arguments.progress_interval());
    if external::is_first_of_node(|name| std::env::var(name).ok(), added)? {
        prepare::prepare(&plan, &terminal, &|| false)?;
    } else {
        prepare::wait(&plan, &terminal)?;
    }
    let config = folder::write_config(&plan)?;
    if rank == 0 {
        print_config(&plan, &terminal)?;
        let message = format!("{world_size} ranks, started by another launcher");
        EventLog::open(&plan.config.job.dump_folder).append(EventKind::Start, None, message);
    }
    let error =
        Command::new(&worker).args(train_arguments(&config, plan.config.job.kind)).envs(added.iter().cloned()).exec();
    Err(LaunchError::io("start", worker)(error))
}

/// Starts this node's ranks and watches over them.
fn launch(arguments: &RunArgs) -> Result<(), LaunchError> {
    let signals = signals::listen().map_err(|e| LaunchError::Internal(format!("cannot listen for signals: {e}")))?;
    let terminal = Terminal::new(arguments.quiet, arguments.progress_interval());
    let worker = worker::find(arguments.worker_binary.as_deref())?;
    let config = resolve::load(&arguments.job, &arguments.set)?;
    let ranks_per_node = ranks_per_node(arguments.nproc_per_node, config.training.device);
    let topology = topology(arguments, ranks_per_node)?;
    let resources = Resources::of_this_machine(topology.world_size(), ranks_per_node)?;
    let plan = match config.job.kind {
        JobType::Rlhf => JobPlan::resolve(config, &resources, &Assets)?.policy,
        JobType::Pretrain | JobType::Sft => resolve::resolve(config, &resources, &Assets)?,
    };
    let run_folder = plan.config.job.dump_folder.clone();
    let _lock = folder::lock(&run_folder, topology.node_rank)?;
    folder::check_same_run(&plan)?;
    let mut roles = Vec::new();
    if plan.config.job.kind == JobType::Rlhf {
        roles = roles_of_ranks(&plan, &resources)?;
    } else {
        prepare_unless_stopped(&plan, &terminal, &signals)?;
    }
    let config = folder::write_config(&plan)?;
    print_config(&plan, &terminal)?;
    let (kind, driver_arguments) = (plan.config.job.kind, Vec::new());
    let restarting = RestartOptions {
        max_restarts: arguments.max_restarts,
        backoff_ms: arguments.restart_backoff_ms,
        max_backoff_ms: 60_000,
    };
    let grace = Duration::from_secs_f64(arguments.grace_seconds);
    let terminal = &terminal;
    let job = Job {
        restarting,
        grace,
        terminal,
        worker,
        config,
        run_folder,
        topology,
        kind,
        roles,
        driver_arguments,
        signals,
    };
    job.run_to_the_end()
}

/// What each rank of a reinforcement-learning job does. Roles that do not fit their ranks, and generation that does not fit
/// its model, are refused before anything starts.
fn roles_of_ranks(plan: &Plan, resources: &Resources) -> Result<Vec<String>, LaunchError> {
    let job = JobPlan::new(plan.clone(), resources, &Assets)?;
    GenerationLayout::of_job(&job).map_err(|e| ConfigError::Values(vec![e.to_string()]))?;
    let roles = |rank: usize| {
        let here = job.roles().into_iter().filter(|&role| job.ranks(role).contains(&rank));
        here.map(Role::name).collect::<Vec<_>>().join(", ")
    };
    Ok((0..job.world_size()).map(roles).collect())
}

fn print_config(plan: &Plan, terminal: &Terminal) -> Result<(), LaunchError> {
    if plan.config.job.print_config {
        terminal.say(&plan.to_toml()?);
    }
    Ok(())
}

/// Prepares data, unless a signal comes.
fn prepare_unless_stopped(plan: &Plan, terminal: &Terminal, signals: &Inbox) -> Result<(), LaunchError> {
    let stopped = Cell::new(None);
    let cancelled = || {
        if let (None, Some(signal)) = (stopped.get(), signals.take()) {
            stopped.set(Some(signal));
            terminal.say(&format!("{}: the preparation of data ends; once more to end at once", signal_name(signal)));
        }
        stopped.get().is_some()
    };
    let result = prepare::prepare(plan, terminal, &cancelled);
    match (result, stopped.get()) {
        // A signal that came too late to stop the preparation still asks to stop.
        (Ok(()) | Err(LaunchError::Data(DataError::Interrupted)), Some(signal)) => {
            let name = signal_name(signal);
            let message = format!("{name} ended the preparation of data; the same command goes on where it stopped");
            Err(LaunchError::Interrupted { signal, message })
        }
        (result, _) => result,
    }
}

/// Everything that all attempts share.
struct Job<'a> {
    /// Restarts and their waits.
    restarting: RestartOptions,
    /// From SIGTERM to SIGKILL when a rank failed.
    grace: Duration,
    terminal: &'a Terminal,
    worker: PathBuf,
    config: PathBuf,
    run_folder: PathBuf,
    topology: Topology,
    kind: JobType,
    /// The roles of each rank, where the job has roles.
    roles: Vec<String>,
    /// What its driver is told beside the configuration.
    driver_arguments: Vec<OsString>,
    signals: Inbox,
}

impl Job<'_> {
    fn run_to_the_end(mut self) -> Result<(), LaunchError> {
        let mut events = EventLog::open(&self.run_folder);
        let ranks = self.topology.world_size();
        let shown = self.run_folder.display();
        self.terminal.say(&format!("training with {ranks} rank{} in {shown}", if ranks == 1 { "" } else { "s" }));
        events.append(EventKind::Start, None, format!("{ranks} ranks on {} node(s)", self.topology.num_nodes));
        let options = self.restarting;
        let mut state = RestartState::default();
        loop {
            let logs = self.new_logs()?;
            let outcome = self.attempt(state.restarts, logs.clone())?;
            if let Some(signal) = outcome.signal {
                return self.interrupted(signal, &outcome, &logs, &mut events);
            }
            let Some(failure) = first_failure(&outcome.deaths, outcome.last_step) else {
                return self.finished(&outcome, &mut events);
            };
            state.failures.push(failure.clone());
            let (decision, reason) = restart::decide(&state, &options, unix_millis());
            let text = self.told(&failure, &outcome, &logs, &mut events);
            let Decision::Restart { at_ms } = decision else {
                let message = if options.max_restarts > 0 { format!("{text}\nno restart: {reason}") } else { text };
                return Err(LaunchError::Ranks { kind: failure.kind, message });
            };
            self.terminal.warn(&format!("{text}\n{reason}"));
            self.wait_until(at_ms, &mut events)?;
            state.restarts += 1;
            events.append(EventKind::Restart, outcome.last_step, format!("restart {}", state.restarts));
        }
    }

    fn new_logs(&self) -> Result<LogFolder, LaunchError> {
        let ranks: Vec<usize> = (0..self.topology.ranks_per_node).map(|local| self.topology.rank(local)).collect();
        LogFolder::new_attempt(&self.run_folder, &ranks).map_err(LaunchError::io("create logs in", &self.run_folder))
    }

    fn attempt(&mut self, restarts: u32, logs: LogFolder) -> Result<Outcome, LaunchError> {
        if self.topology.num_nodes == 1 {
            let free = topology::free_port();
            self.topology.master_port =
                free.map_err(|e| LaunchError::Internal(format!("no free port on 127.0.0.1: {e}")))?;
        }
        let attempt = Attempt {
            worker: self.worker.clone(),
            arguments: train_arguments(&self.config, self.kind),
            driver: (self.kind == JobType::Rlhf).then(|| {
                let first = ["driver".into(), self.config.clone().into()];
                first.into_iter().chain(self.driver_arguments.iter().cloned()).collect()
            }),
            topology: &self.topology,
            host: topology::own_address(&self.topology)?,
            run_id: "tangelo",
            restarts: (restarts, self.restarting.max_restarts),
            run_folder: &self.run_folder,
            logs,
            grace: self.grace,
            terminal: self.terminal,
        };
        self.signals.set_ranks(true);
        let outcome = supervise::run(&attempt, &self.signals.signals);
        self.signals.set_ranks(false);
        outcome
    }

    /// After a signal: a success where the last step was done all the same, and a failure where a rank failed.
    fn interrupted(
        &self,
        signal: i32,
        outcome: &Outcome,
        logs: &LogFolder,
        events: &mut EventLog,
    ) -> Result<(), LaunchError> {
        let name = signal_name(signal);
        events.append(EventKind::Signal, outcome.last_step, name.clone());
        if let Some(failure) = failure_while_ending(&outcome.deaths, outcome.last_step) {
            let text = self.told(&failure, outcome, logs, events);
            let message = format!("{text}\n{name} had asked it to end");
            return Err(LaunchError::Ranks { kind: failure.kind, message });
        }
        if outcome.finished == Some(true) {
            return self.finished(outcome, events);
        }
        Err(LaunchError::Interrupted { signal, message: format!("{name}: {}", self.ended_early(outcome)) })
    }

    /// Where a run stopped that somebody asked to end; only the first node knows the step.
    fn ended_early(&self, outcome: &Outcome) -> String {
        let step = match (outcome.last_step, self.topology.node_rank) {
            (Some(step), _) => format!(" after step {step}"),
            (None, 0) => " before the first step".to_owned(),
            (None, _) => String::new(),
        };
        let rest = if outcome.deaths.iter().all(Death::is_success) {
            "the same command goes on from the newest checkpoint"
        } else {
            "ranks were ended before they could save, and steps since the newest checkpoint are lost"
        };
        format!("the run ended{step}; {rest}")
    }

    fn finished(&self, outcome: &Outcome, events: &mut EventLog) -> Result<(), LaunchError> {
        // Only the first node learns how far the run came. Nobody asked its launcher.
        if outcome.finished == Some(false) {
            let signal = SIGTERM;
            events.append(EventKind::Signal, outcome.last_step, "on another node, or to a single process");
            let message = format!("another node, or a single process, was asked to end: {}", self.ended_early(outcome));
            return Err(LaunchError::Interrupted { signal, message });
        }
        events.append(EventKind::Done, outcome.last_step, "all ranks ended well");
        if self.topology.node_rank != 0 {
            return Ok(());
        }
        match report::write(&self.run_folder) {
            Ok(path) => self.terminal.say(&format!("done; report: {}", path.display())),
            Err(e) => self.terminal.warn(&format!("done, but the report cannot be written: {e}")),
        }
        Ok(())
    }

    /// Records a failure; the text for the user.
    fn told(&self, failure: &Failure, outcome: &Outcome, logs: &LogFolder, events: &mut EventLog) -> String {
        let roles = self.roles.get(failure.rank).map(String::as_str);
        events.append(EventKind::Failure, failure.step, report_failure::one_line(failure, roles, logs));
        report_failure::report(failure, roles, outcome, logs)
    }

    /// Waits for a restart, unless a signal says not to.
    fn wait_until(&self, at_ms: u64, events: &mut EventLog) -> Result<(), LaunchError> {
        let deadline = Instant::now() + Duration::from_millis(at_ms.saturating_sub(unix_millis()));
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            let Ok(signal) = self.signals.signals.recv_timeout(left) else { continue };
            if signal != SIGCHLD {
                events.append(EventKind::Signal, None, signal_name(signal));
                let message = format!("{} while waiting for the restart", signal_name(signal));
                return Err(LaunchError::Interrupted { signal, message });
            }
        }
        Ok(())
    }
}

fn train_arguments(config: &Path, kind: JobType) -> Vec<OsString> {
    let verb = if kind == JobType::Rlhf { "rlhf" } else { "train" };
    vec![verb.into(), config.into()]
}

fn topology(arguments: &RunArgs, ranks_per_node: usize) -> Result<Topology, LaunchError> {
    let num_nodes = arguments.nnodes.unwrap_or(1);
    let node_rank = arguments.node_rank.unwrap_or(0);
    let (master_addr, master_port) = match &arguments.rdzv_endpoint {
        Some(endpoint) => endpoint.clone(),
        // The port is chosen for each attempt.
        None => ("127.0.0.1".to_owned(), 0),
    };
    if num_nodes > 1 && (arguments.node_rank.is_none() || arguments.rdzv_endpoint.is_none()) {
        return Err(LaunchError::Usage(format!(
            "--nnodes {num_nodes} needs --node-rank (0 to {}, another on each node) and --rdzv-endpoint HOST:PORT (the \
             same on all: node 0's address and a free port there)",
            num_nodes - 1
        )));
    }
    if num_nodes == 1 && arguments.rdzv_endpoint.is_some() {
        return Err(LaunchError::Usage(
            "--rdzv-endpoint is where the ranks of several nodes meet, and there is one node: drop it, or say how many \
             with --nnodes"
                .into(),
        ));
    }
    if node_rank >= num_nodes {
        let last = num_nodes - 1;
        let message = format!("--node-rank {node_rank} with --nnodes {num_nodes}: node ranks go from 0 to {last}");
        return Err(LaunchError::Usage(message));
    }
    Ok(Topology { num_nodes, node_rank, ranks_per_node, master_addr, master_port })
}

/// One rank per GPU, or one on a CPU, unless the user says otherwise.
fn ranks_per_node(asked: Option<Processes>, device: DeviceChoice) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    match asked.unwrap_or(Processes::Auto) {
        Processes::Number(number) => number.get(),
        Processes::Cpu => cores(),
        Processes::Auto if device == DeviceChoice::Cpu => 1,
        Processes::Auto | Processes::Gpu => tangelo_configs::num_gpus().max(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_has_one_rank() {
        assert_eq!(ranks_per_node(None, DeviceChoice::Cpu), 1);
    }
}
