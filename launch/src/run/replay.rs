//! `tangelo replay`: one recorded step of a reinforcement-learning run done again by ranks of its own.
//!
//! The run's configuration is taken as it was resolved, with another folder to write to; what the step needs is looked for
//! before anything starts. The driver does the work ([`tangelo_driver::replay`]) and leaves a file, which is shown here.

use super::culprit::first_failure;
use super::restart::RestartOptions;
use super::{Job, Terminal, Topology, folder, roles_of_ranks, signals};
use crate::cli::run::ReplayArgs;
use crate::driver::COMPARISON;
use crate::error::LaunchError;
use crate::verbs::print;
use crate::worker;
use std::path::{Path, absolute};
use std::process::ExitCode;
use std::time::Duration;
use tangelo_configs::job::{JobType, Parallelism};
use tangelo_configs::{JobConfig, JobPlan, Resources, resolve};
use tangelo_driver::replay::{Comparison, Replay};
use tangelo_formats::Assets;
use tangelo_observe::{EventLog, files};

/// Time from SIGTERM to SIGKILL for the other ranks when one has failed.
const GRACE: Duration = Duration::from_secs(5);

/// Does the step again; success where it has the same bits.
pub fn replay(arguments: &ReplayArgs) -> Result<ExitCode, LaunchError> {
    let signals = signals::listen().map_err(|e| LaunchError::Internal(format!("cannot listen for signals: {e}")))?;
    let terminal = Terminal::new(arguments.quiet, Duration::from_secs(10));
    let worker = worker::find(arguments.worker_binary.as_deref())?;
    let run = absolute(&arguments.run).map_err(LaunchError::io("find", &arguments.run))?;
    let output = arguments.output.clone().unwrap_or_else(|| run.join(format!("replay/step-{:08}", arguments.step)));
    let config = config_of(&run, &output)?;
    let topology = Topology::alone(ranks_of(&config));
    let resources = Resources::of_this_machine(topology.world_size(), topology.world_size())?;
    let plan = resolve::resolve(config, &resources, &Assets)?;
    let job = JobPlan::new(plan.clone(), &resources, &Assets)?;
    Replay::new(&run, &job, arguments.step).check(&job)?;
    let roles = roles_of_ranks(&plan, &resources)?;
    let run_folder = plan.config.job.dump_folder.clone();
    let _lock = folder::lock(&run_folder, 0)?;
    let found = run_folder.join(COMPARISON);
    // One of an earlier replay must not be taken for this one's.
    _ = std::fs::remove_file(&found);
    terminal.say(&format!("replaying step {} of {} in {}", arguments.step, run.display(), run_folder.display()));
    let job = Job {
        restarting: RestartOptions { max_restarts: 0, backoff_ms: 0, max_backoff_ms: 0 },
        grace: GRACE,
        terminal: &terminal,
        worker,
        config: folder::write_config(&plan)?,
        run_folder,
        topology,
        kind: JobType::Rlhf,
        roles,
        driver_arguments: vec!["--replay".into(), run.into(), "--step".into(), arguments.step.to_string().into()],
        signals,
    };
    job.once()?;
    show(&found)
}

/// The run's configuration, with `output` to write to.
fn config_of(run: &Path, output: &Path) -> Result<JobConfig, LaunchError> {
    let path = run.join(files::CONFIG);
    if !path.is_file() {
        return Err(LaunchError::Input(format!(
            "{} is not a run folder: it has no {}; name the folder that `tangelo run` wrote (job.dump_folder)",
            run.display(),
            files::CONFIG
        )));
    }
    let mut config = resolve::load(&path, &[])?;
    if config.job.kind != JobType::Rlhf {
        return Err(LaunchError::Input(format!(
            "{}: only steps of a reinforcement-learning run (`job.type` = \"rlhf\") are recorded and can be replayed",
            run.display()
        )));
    }
    config.job.dump_folder = absolute(output).map_err(LaunchError::io("find", output))?;
    Ok(config)
}

/// The ranks that a resolved job had.
fn ranks_of(config: &JobConfig) -> usize {
    let pools = config.placement.iter().flat_map(|placement| &placement.pools);
    let pooled: usize = pools.map(|pool| pool.ranks).sum();
    if pooled > 0 {
        return pooled;
    }
    let Parallelism {
        data_parallel_replicate_degree: replicas,
        data_parallel_shard_degree: shards,
        tensor_parallel_degree,
        pipeline_parallel_degree,
        context_parallel_degree,
        ..
    } = &config.parallelism;
    // A resolved degree is a number of ranks.
    let shards = usize::try_from(*shards).unwrap_or(1);
    replicas * shards * tensor_parallel_degree * pipeline_parallel_degree * context_parallel_degree
}

/// Prints what the driver found.
fn show(found: &Path) -> Result<ExitCode, LaunchError> {
    let text = std::fs::read(found).map_err(LaunchError::io("read", found))?;
    let compared: Comparison = serde_json::from_slice(&text).map_err(|e| LaunchError::Internal(e.to_string()))?;
    print(&compared.render())?;
    Ok(if compared.is_equal() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Job<'_> {
    /// One attempt, to its good end.
    fn once(mut self) -> Result<(), LaunchError> {
        let mut events = EventLog::open(&self.run_folder);
        let logs = self.new_logs()?;
        let outcome = self.attempt(0, logs.clone())?;
        if let Some(signal) = outcome.signal {
            return self.interrupted(signal, &outcome, &logs, &mut events);
        }
        match first_failure(&outcome.deaths, outcome.last_step) {
            Some(failure) => {
                let message = self.told(&failure, &outcome, &logs, &mut events);
                Err(LaunchError::Ranks { kind: failure.kind, message })
            }
            None => Ok(()),
        }
    }
}
