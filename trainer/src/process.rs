//! This process among the others: who it is, who started it, how it reports, when it must end.
//!
//! Invariant: a worker never outlives its supervisor. It asks the kernel to be killed with its parent, then checks that
//! the parent is still the one it was told of, because the parent may have died in between.

use crate::error::{Result, TrainError};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tangelo_core::env;
use tangelo_observe::{ErrorRecord, FailureKind, stderr_line, unix_millis};

/// The ranks of the job and this one's place among them, as torchrun's environment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankInfo {
    /// Global rank.
    pub rank: usize,
    /// Rank on this node.
    pub local_rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Number of ranks on this node.
    pub local_world_size: usize,
    /// Where ranks meet.
    pub master_addr: String,
    /// Port where ranks meet.
    pub master_port: u16,
    /// Whether the launcher serves the store.
    pub agent_store: bool,
    /// How often the job was restarted.
    pub restart_count: usize,
    /// Names the job in the store.
    pub run_id: String,
}

impl RankInfo {
    /// From the environment; a process that nobody launched is the only rank.
    pub fn from_env() -> Result<RankInfo> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let number = |name: &str, default: usize| -> Result<usize> {
            let Some(text) = var(name) else { return Ok(default) };
            text.parse().map_err(|_| {
                TrainError::Config(format!(
                    "{name}={text:?} is not a number; unset it or let `tangelo run` or torchrun set it"
                ))
            })
        };
        let world_size = number(env::WORLD_SIZE, 1)?;
        let rank = number(env::RANK, 0)?;
        if rank >= world_size {
            return Err(TrainError::Config(format!(
                "RANK={rank} but WORLD_SIZE={world_size}: ranks run from 0 to {}",
                world_size.saturating_sub(1)
            )));
        }
        if world_size > 1 && var(env::MASTER_PORT).is_none() {
            return Err(TrainError::Config(format!(
                "WORLD_SIZE={world_size} but MASTER_PORT is not set: start ranks with `tangelo run` or torchrun"
            )));
        }
        Ok(RankInfo {
            rank,
            local_rank: number(env::LOCAL_RANK, rank)?,
            world_size,
            local_world_size: number(env::LOCAL_WORLD_SIZE, world_size)?,
            master_addr: var(env::MASTER_ADDR).unwrap_or_else(|| "127.0.0.1".into()),
            master_port: u16::try_from(number(env::MASTER_PORT, 0)?)
                .map_err(|_| TrainError::Config(format!("{} is no port: ports end at 65535", env::MASTER_PORT)))?,
            agent_store: var(env::AGENT_STORE).is_some_and(|v| v.eq_ignore_ascii_case("true") || v == "1"),
            restart_count: number(env::RESTART_COUNT, 0)?,
            run_id: var(env::RUN_ID).unwrap_or_else(|| "tangelo".into()),
        })
    }
}

/// Ties this process's life to the supervisor's; exits at once where the supervisor is already gone.
pub fn die_with_supervisor() {
    let Ok(supervisor) = std::env::var(env::SUPERVISOR_PID) else { return };
    if nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).is_err() {
        stderr_line("warning: cannot ask the kernel to end this worker with its launcher");
    }
    let expected: Option<i32> = supervisor.parse().ok();
    if expected != Some(nix::unistd::getppid().as_raw()) {
        stderr_line(format!("the launcher (process {supervisor}) is gone; ending"));
        std::process::exit(FailureKind::Peer.exit_code().into());
    }
}

/// Set once by SIGTERM or SIGINT: finish the step, save, end. A second signal ends the process at once.
#[derive(Clone, Debug)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Listens for signals from now on.
    pub fn install() -> Result<StopFlag> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            // Order matters: the second signal finds the flag set and ends the process.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, flag.clone())
                .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
                .map_err(|e| TrainError::Internal(format!("cannot listen for signal {signal}: {e}")))?;
        }
        Ok(StopFlag(flag))
    }

    /// Whether a signal came.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Writes this rank's last error where the launcher looks for it, and to stderr.
pub fn report_error(rank: usize, step: u64, error: &TrainError) {
    stderr_line(format!("error: {error}"));
    let Some(path) = std::env::var_os(env::ERROR_FILE).map(PathBuf::from) else { return };
    let record = ErrorRecord {
        rank,
        step: (step > 0).then_some(step),
        kind: error.kind(),
        message: error.to_string(),
        unix_time_ms: unix_millis(),
    };
    if let Err(e) = record.write(&path) {
        stderr_line(format!("warning: cannot write {}: {e}", path.display()));
    }
}

/// The number of threads to use: this process's share of the node's cores where none is configured.
pub fn threads_for(configured: usize, local_world_size: usize) -> usize {
    if configured > 0 {
        return configured;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / local_world_size.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_the_cores() {
        assert_eq!(threads_for(3, 8), 3);
        assert_eq!(threads_for(0, 10_000), 1);
    }
}
