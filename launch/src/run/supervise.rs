//! One attempt: starts the ranks of this node, watches over them, and leaves none behind.
//!
//! | actor | waits for | unblocked by | bounded by |
//! |---|---|---|---|
//! | supervisor (the main thread) | a signal or a child's end | the signal thread's channel | 100 ms, then it looks anyway |
//! | signal thread | signals | the kernel | ends with the process |
//! | two log threads per rank | output | the rank | every writer's end; 1 s after the ranks |
//! | progress thread | progress lines | rank 0 | rank 0's end |
//!
//! Invariants: only the supervisor starts, signals and reaps ranks, so a process id is never used after it was freed.
//! It is the main thread, which lives as long as the process: a rank's parent-death signal fires when the launcher
//! ends and at no other time. Each rank leads its own process group; the group is killed whole before its leader is
//! reaped. Dropping [`Ranks`] kills what is left. Deliberately absent: `pre_exec` (ranks arm PDEATHSIG themselves).

use super::culprit::{Death, Ending};
use super::logs::{Forwarder, LogFolder, wait_for};
use super::standing::{Standing, who_is_behind};
use super::{Terminal, Topology};
use crate::driver::{DRIVER, is_rank, of_node};
use crate::error::LaunchError;
use crate::worker;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::io::PipeReader;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tangelo_control::Meeting;
use tangelo_core::env;
use tangelo_core::position::Behind;
use tangelo_observe::{ErrorRecord, ProgressEvent, unix_millis};

/// What an attempt is made of.
#[derive(Debug)]
pub struct Attempt<'a> {
    /// The worker binary.
    pub worker: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The arguments with which this very program is the driver of the ranks (on the first node; on others the agent
    /// between driver and ranks), where the job has one.
    pub driver: Option<Vec<OsString>>,
    /// Who takes part.
    pub topology: &'a Topology,
    /// By which name or address the other nodes reach this one, where there are any.
    pub host: Option<String>,
    /// Name of the run, the same on all nodes.
    pub run_id: &'a str,
    /// Restarts so far and allowed.
    pub restarts: (u32, u32),
    /// The run's folder, which all nodes share.
    pub run_folder: &'a Path,
    /// Logs and error files.
    pub logs: LogFolder,
    /// From SIGTERM to SIGKILL when a rank failed.
    pub grace: Duration,
    /// Where output goes.
    pub terminal: &'a Terminal,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// One per rank of this node.
    pub deaths: Vec<Death>,
    /// The first signal that the user or a scheduler sent to the launcher.
    pub signal: Option<i32>,
    /// The last step that rank 0 reported.
    pub last_step: Option<u64>,
    /// Whether the last of the steps asked for is done, where rank 0 said that it ends.
    pub finished: Option<bool>,
    /// Who kept the others waiting when the first failure was seen, or else when they gave up, and in which collective.
    pub behind: Option<String>,
}

/// What progress said so far.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    last_step: Option<u64>,
    finished: Option<bool>,
}

/// Runs one attempt to its end, whatever that is.
pub fn run(attempt: &Attempt<'_>, signals: &Receiver<i32>) -> Result<Outcome, LaunchError> {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let mut ranks = Ranks::start(attempt, signals, &seen)?;
    let signal = ranks.supervise(attempt, signals);
    let deaths = ranks.finish(attempt);
    let seen = *seen.lock().unwrap_or_else(PoisonError::into_inner);
    let behind = ranks.who_was_behind(attempt).map(|behind| behind.to_string());
    Ok(Outcome { deaths, signal, last_step: seen.last_step, finished: seen.finished, behind })
}

/// Where the supervisor is.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// All is well.
    Running,
    /// The user asked to stop: ranks finish their step and save, however long that takes.
    Stopping,
    /// A rank failed: the others have until then.
    Ending { kill_at: Instant },
    /// Everything was killed.
    Killed,
}

#[derive(Debug)]
struct Rank {
    rank: usize,
    child: Child,
    forwarder: Option<Forwarder>,
    progress: Option<JoinHandle<()>>,
    sent: Vec<i32>,
    death: Option<Death>,
}

impl Rank {
    fn group(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn standing(&self) -> Standing {
        let ending = self.death.as_ref().map(|d| d.ending);
        let process = ending.is_none().then(|| self.child.id());
        Standing { rank: self.rank, process, killed: matches!(ending, Some(Ending::Signal(_))) }
    }

    fn send(&mut self, signal: Signal) {
        if self.death.is_none() {
            // The group exists until the leader is reaped.
            let _ = killpg(self.group(), signal);
            self.sent.push(signal as i32);
        }
    }

    /// Notes the end of the rank, if it has ended, and ends whatever it left in its group.
    fn look(&mut self, error_path: PathBuf) {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        if self.death.is_some() || matches!(waitid(Id::Pid(self.group()), flags), Ok(WaitStatus::StillAlive)) {
            return;
        }
        let _ = killpg(self.group(), Signal::SIGKILL);
        let ending = match self.child.wait() {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Ending::Exit(code),
                (None, signal) => Ending::Signal(signal.unwrap_or(0)),
            },
            Err(_) => Ending::Exit(1),
        };
        let record = ErrorRecord::read(&error_path);
        self.death = Some(Death { rank: self.rank, ending, time_ms: unix_millis(), sent: self.sent.clone(), record });
    }
}

/// The ranks of this node.
#[derive(Debug)]
struct Ranks {
    ranks: Vec<Rank>,
    behind: Option<Behind>,
    /// The first signal that came from outside.
    signal: Option<i32>,
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            rank.send(Signal::SIGKILL);
            if rank.death.is_none() {
                let _ = rank.child.wait();
            }
        }
    }
}

impl Ranks {
    fn start(attempt: &Attempt<'_>, signals: &Receiver<i32>, seen: &Arc<Mutex<Seen>>) -> Result<Ranks, LaunchError> {
        let mut ranks = Ranks { ranks: Vec::new(), behind: None, signal: None };
        let mut environment = Vec::new();
        if let Some(arguments) = &attempt.driver {
            match ranks.start_driver(attempt, arguments, signals, seen)? {
                Some(found) => environment = found,
                None => return Ok(ranks),
            }
        }
        for local_rank in 0..attempt.topology.ranks_per_node {
            let rank = start_rank(attempt, local_rank, &environment, seen)?;
            ranks.ranks.push(rank);
        }
        Ok(ranks)
    }

    /// Starts the driver and waits until it listens; what ranks need to find it, or `None` where it ended before, which
    /// [`Ranks::supervise`] sees like any rank's end. A signal ends it at once: it has nothing to save yet.
    fn start_driver(
        &mut self,
        attempt: &Attempt<'_>,
        arguments: &[OsString],
        signals: &Receiver<i32>,
        seen: &Arc<Mutex<Seen>>,
    ) -> Result<Option<Vec<(&'static str, OsString)>>, LaunchError> {
        let program = std::env::current_exe().map_err(LaunchError::io("find", "the executable of tangelo"))?;
        let mut command = Command::new(program);
        command.args(arguments);
        let (listening, heard) = std::sync::mpsc::channel();
        let number = of_node(attempt.topology.node_rank);
        self.ranks.push(start_process(attempt, command, number, 0, Some(listening), seen)?);
        while let Some(driver) = self.ranks.first_mut().filter(|driver| driver.death.is_none()) {
            if let Ok((address, secret_file)) = heard.recv_timeout(Duration::from_millis(50)) {
                return Ok(Some(vec![(env::DRIVER_ADDRESS, address.into()), (env::JOB_SECRET_FILE, secret_file)]));
            }
            if let Some(signal) = signals.try_iter().find(|&signal| signal != Signal::SIGCHLD as i32) {
                driver.send(Signal::SIGKILL);
                self.signal = self.signal.or(Some(signal));
            }
            driver.look(attempt.logs.error_path(number));
        }
        Ok(None)
    }

    /// Watches until every rank has ended; returns the first signal that came from outside.
    fn supervise(&mut self, attempt: &Attempt<'_>, signals: &Receiver<i32>) -> Option<i32> {
        let mut phase = Phase::Running;
        loop {
            self.ranks.iter_mut().for_each(|rank| rank.look(attempt.logs.error_path(rank.rank)));
            if self.ranks.iter().all(|rank| rank.death.is_some()) {
                return self.signal;
            }
            phase = self.next_phase(phase, attempt);
            match signals.recv_timeout(Duration::from_millis(100)) {
                Ok(signal) if signal != Signal::SIGCHLD as i32 => {
                    phase = self.forward(signal, phase, attempt);
                }
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                // Without the signal thread nobody wakes us, so sleep as long as the timeout would.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// What follows from a failed rank or an expired deadline.
    fn next_phase(&mut self, phase: Phase, attempt: &Attempt<'_>) -> Phase {
        let failed = self.ranks.iter().any(|r| r.death.as_ref().is_some_and(|d| !d.is_success()));
        match phase {
            Phase::Running | Phase::Stopping if failed => {
                // Before anybody is told to end: afterwards all stand elsewhere.
                self.behind = who_is_behind(&self.standing(), &attempt.logs);
                self.send(Signal::SIGTERM);
                Phase::Ending { kill_at: Instant::now() + attempt.grace }
            }
            Phase::Ending { kill_at } if Instant::now() >= kill_at => {
                self.send(Signal::SIGKILL);
                Phase::Killed
            }
            phase => phase,
        }
    }

    /// What follows from a signal to the launcher: the first one is passed on (SIGHUP as SIGTERM, for a rank whose
    /// terminal went away shall save and end like any other), the second kills. Where there is a driver the first one is
    /// for it alone: it has the ranks of all nodes finish the step and save, and they end with it.
    fn forward(&mut self, signal: i32, phase: Phase, attempt: &Attempt<'_>) -> Phase {
        let again = self.signal.is_some();
        self.signal = self.signal.or(Some(signal));
        let running = self.ranks.iter().filter(|r| r.death.is_none() && is_rank(r.rank)).count();
        let name = super::culprit::signal_name(signal);
        if again {
            attempt.terminal.say(&format!("{name} again: killing {running} rank(s)"));
            self.send(Signal::SIGKILL);
            return Phase::Killed;
        }
        attempt.terminal.say(&format!("{name}: {running} rank(s) finish their step and save; once more to kill them"));
        let passed_on = if signal == Signal::SIGINT as i32 { Signal::SIGINT } else { Signal::SIGTERM };
        match self.ranks.iter_mut().find(|rank| !is_rank(rank.rank) && rank.death.is_none()) {
            Some(driver) if driver.rank == DRIVER => driver.send(passed_on),
            // The agent of another node only passes calls on; the driver alone can have all ranks finish the step.
            Some(_) => ask_driver_to_stop(attempt),
            // Ranks end with their driver.
            None if attempt.driver.is_some() => {}
            None => self.send(passed_on),
        }
        match phase {
            Phase::Running => Phase::Stopping,
            phase => phase,
        }
    }

    fn send(&mut self, signal: Signal) {
        self.ranks.iter_mut().for_each(|rank| rank.send(signal));
    }

    /// Who kept the others waiting when the first rank failed. When one was killed and nobody had come to wait for it yet,
    /// another that was merely slower may have looked like it: then the end tells.
    fn who_was_behind(&mut self, attempt: &Attempt<'_>) -> Option<Behind> {
        let early = self.behind.take();
        let is_killed = |d: &Death| matches!(d.ending, Ending::Signal(_)) && d.sent.is_empty();
        let killed = self.ranks.iter().find(|r| r.death.as_ref().is_some_and(is_killed)).map(|r| r.rank);
        match (early, killed) {
            (Some(early), Some(killed)) if early.rank != killed => {
                self.behind_in_the_end(attempt).filter(|behind| behind.rank == killed).or(Some(early))
            }
            (early, _) => early.or_else(|| self.behind_in_the_end(attempt)),
        }
    }

    /// Who was behind once all have ended: a rank's end may be seen before the others come to wait for it.
    fn behind_in_the_end(&self, attempt: &Attempt<'_>) -> Option<Behind> {
        if self.ranks.iter().all(|r| r.death.as_ref().is_some_and(Death::is_success)) {
            return None;
        }
        who_is_behind(&self.standing(), &attempt.logs)
    }

    /// Where the ranks stand; the driver is in no collective.
    fn standing(&self) -> Vec<Standing> {
        self.ranks.iter().filter(|rank| is_rank(rank.rank)).map(Rank::standing).collect()
    }

    /// Collects the deaths once all output has been carried.
    fn finish(&mut self, attempt: &Attempt<'_>) -> Vec<Death> {
        let patience = Duration::from_secs(1);
        for rank in &mut self.ranks {
            let forwarders = rank.forwarder.take().into_iter();
            forwarders.for_each(|forwarder| forwarder.finish(patience));
            rank.progress.take().into_iter().for_each(|thread| wait_for(&thread, patience));
        }
        attempt.terminal.clear();
        self.ranks.iter().filter_map(|rank| rank.death.clone()).collect()
    }
}

fn start_rank(
    attempt: &Attempt<'_>,
    local_rank: usize,
    environment: &[(&'static str, OsString)],
    seen: &Arc<Mutex<Seen>>,
) -> Result<Rank, LaunchError> {
    let mut command = Command::new(&attempt.worker);
    command.args(&attempt.arguments).envs(environment.iter().cloned());
    start_process(attempt, command, attempt.topology.rank(local_rank), local_rank, None, seen)
}

fn ask_driver_to_stop(attempt: &Attempt<'_>) {
    if let Err(e) = Meeting::new(attempt.run_folder).ask_to_stop() {
        attempt.terminal.warn(&format!("{e}: the driver on node 0 has to get the signal, too"));
    }
}

/// Where a driver says that it listens: its address, and the file with the job's secret.
type Listening = std::sync::mpsc::Sender<(String, OsString)>;

/// Starts a rank or the driver. Progress comes from the driver where there is one, else from rank 0.
fn start_process(
    attempt: &Attempt<'_>,
    mut command: Command,
    rank: usize,
    local_rank: usize,
    listening: Option<Listening>,
    seen: &Arc<Mutex<Seen>>,
) -> Result<Rank, LaunchError> {
    let doing = |action: &'static str| move |source| LaunchError::Start { rank, action, source };
    let (stdout, stdout_end) = std::io::pipe().map_err(doing("make a pipe"))?;
    let (stderr, stderr_end) = std::io::pipe().map_err(doing("make a pipe"))?;
    command.stdin(Stdio::null()).stdout(stdout_end).stderr(stderr_end).process_group(0);
    let (restarts, max_restarts) = attempt.restarts;
    command.envs(attempt.topology.environment(local_rank, attempt.run_id, restarts, max_restarts));
    command.env(env::ERROR_FILE, attempt.logs.error_path(rank));
    command.env(env::POSITION_FILE, attempt.logs.position_path(rank));
    command.env(env::SUPERVISOR_PID, std::process::id().to_string());
    command.env_remove(env::PROGRESS_FD);
    if let (Some(host), None) = (&attempt.host, std::env::var_os(env::HOST)) {
        command.env(env::HOST, host);
    }
    let (child, progress) = if !is_rank(rank) || (rank == 0 && attempt.driver.is_none()) {
        let (progress, end) = worker::progress_pipe(&mut command).map_err(doing("pass a pipe to"))?;
        let child = command.spawn().map_err(doing("start"))?;
        drop(end);
        (child, Some(progress))
    } else {
        (command.spawn().map_err(doing("start"))?, None)
    };
    // The command holds the pipes' ends: they must close, or the log threads never see the end.
    drop(command);
    let mut rank = Rank { rank, child, forwarder: None, progress: None, sent: Vec::new(), death: None };
    if let Err(e) = listen(&mut rank, attempt, (stdout, stderr), (progress, listening), seen) {
        drop(Ranks { ranks: vec![rank], behind: None, signal: None });
        return Err(doing("take the output of")(e));
    }
    Ok(rank)
}

/// Starts the threads that take a rank's output.
fn listen(
    rank: &mut Rank,
    attempt: &Attempt<'_>,
    (stdout, stderr): (PipeReader, PipeReader),
    (progress, listening): (Option<PipeReader>, Option<Listening>),
    seen: &Arc<Mutex<Seen>>,
) -> std::io::Result<()> {
    let watch = |pipe| watch_progress(pipe, attempt.terminal.clone(), listening, seen.clone());
    rank.progress = progress.map(watch).transpose()?;
    let log = attempt.logs.path(rank.rank);
    rank.forwarder = Some(Forwarder::start(rank.rank, &log, stdout, stderr, attempt.terminal)?);
    Ok(())
}

fn watch_progress(
    pipe: PipeReader,
    terminal: Terminal,
    listening: Option<Listening>,
    seen: Arc<Mutex<Seen>>,
) -> std::io::Result<JoinHandle<()>> {
    let watch = move || {
        for event in worker::events(pipe) {
            terminal.progress(&event);
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            match event {
                ProgressEvent::Step { step, .. } | ProgressEvent::RlStep { step, .. } => seen.last_step = Some(step),
                ProgressEvent::Listening { address, secret_file } => {
                    // Nobody waits for a second one.
                    let _ = listening.as_ref().map(|l| l.send((address, secret_file.into())));
                }
                ProgressEvent::Done { step, steps } => seen.finished = Some(step >= steps),
                _ => {}
            }
        }
    };
    std::thread::Builder::new().name("progress".into()).spawn(watch)
}
