//! A pool of processes that score samples: the user's own rewards, in any language.
//!
//! | thread | consumes | waits for | unblocked by | bounded by |
//! |---|---|---|---|---|
//! | caller | answers | its own calls | the pool | deadlines of the calls before its own |
//! | pool | events: calls, lines, ends | an event | callers, readers | the next deadline, or 100 ms |
//! | three per process | see `child` | | | |
//!
//! The pool's thread lives as long as the pool and alone starts, signals and reaps processes; what it does is decided by
//! [`dispatch`], without clocks or processes. Invariants: every call is answered; when the pool is dropped, or this
//! process dies, no process of it is left. Deliberately absent: limits of memory or rights.

mod child;
mod dispatch;
mod wire;

pub(super) use wire::{Answer, payload};

use child::{Launch, Process};
use dispatch::{Action, Dispatch, Failure, Limits};
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tangelo_configs::reward::RewardFunction;
use wire::Reply;

/// Runs a verl-style function; needs Python 3.8 or later and nothing else.
const PYTHON_WRAPPER: &str = include_str!("reward_process.py");
/// Failures in a row after which the program counts as unusable: so many per process, and at least.
const FAILURES_PER_PROCESS: u32 = 4;
const MIN_FAILURES: u32 = 8;
/// How often ends of processes are looked for that closed no pipe.
const LOOK: Duration = Duration::from_millis(100);
/// A program that does not say when it is ready, and ends within this time, has not started.
const SETTLE: Duration = Duration::from_millis(250);
/// How long a process may take to end after it closed its output.
const ENDING: Duration = Duration::from_millis(200);
/// How long processes may take to end after their stdin was closed.
const PATIENCE: Duration = Duration::from_millis(500);

/// Why a sample has no score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CallError {
    /// This call failed.
    Call(String),
    /// No call can succeed.
    Unusable(String),
}

/// The answer to a call, with the tag that its caller gave it and how long it took.
pub(super) struct Done {
    pub tag: usize,
    pub result: Result<Answer, CallError>,
    pub took: Duration,
}

pub(super) struct Call {
    tag: usize,
    payload: String,
    submitted: Instant,
    reply: Sender<Done>,
}

/// What wakes the pool.
pub(super) enum Event {
    Call(Call),
    Line {
        slot: usize,
        generation: u64,
        line: String,
    },
    Closed {
        slot: usize,
        generation: u64,
    },
    /// Tell when all processes are ready, or the first that failed to start.
    AwaitReady(Sender<Result<(), String>>),
    Shutdown,
}

/// Processes that run one program.
pub(super) struct ProcessPool {
    events: Sender<Event>,
    thread: Option<JoinHandle<()>>,
    restarts: Arc<AtomicU64>,
    /// The calls are those of a verl-style function.
    pub is_verl: bool,
}

impl ProcessPool {
    /// Starts the processes of a part and waits until they can take calls; nothing where the part has none.
    ///
    /// # Errors
    /// In words, why the program cannot run, with the end of its stderr.
    pub fn start(
        name: &str,
        function: &RewardFunction,
        log_folder: Option<&Path>,
    ) -> Result<Option<ProcessPool>, String> {
        let log = log_folder.map(|folder| folder.join(format!("reward-{name}.log")));
        let Some((launch, limits)) = plan(function, log)? else { return Ok(None) };
        let is_verl = launch.says_ready;
        let (events, receiver) = channel();
        let restarts = Arc::new(AtomicU64::new(0));
        let manager = Manager::new(launch, limits, receiver, events.clone(), restarts.clone());
        let thread = thread::Builder::new().name(format!("reward-{name}")).spawn(move || manager.run());
        let thread = Some(thread.map_err(|error| format!("cannot start a thread: {error}"))?);
        let pool = ProcessPool { events, thread, restarts, is_verl };
        let (reply, ready) = channel();
        let _ = pool.events.send(Event::AwaitReady(reply));
        ready.recv().unwrap_or_else(|_| Err("the thread of its processes ended".into()))?;
        Ok(Some(pool))
    }

    /// Hands in a call; its answer comes to `reply`. Where the pool's thread is gone, `reply` is dropped.
    pub fn submit(&self, tag: usize, payload: String, reply: Sender<Done>) {
        let _ = self.events.send(Event::Call(Call { tag, payload, submitted: Instant::now(), reply }));
    }

    /// Processes started anew since the last time this was asked.
    pub fn take_restarts(&self) -> u64 {
        self.restarts.swap(0, Ordering::Relaxed)
    }
}

impl Drop for ProcessPool {
    fn drop(&mut self) {
        let _ = self.events.send(Event::Shutdown);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a part runs, and within which limits.
fn plan(function: &RewardFunction, log: Option<PathBuf>) -> Result<Option<(Launch, Limits)>, String> {
    match function {
        RewardFunction::Command { command, timeout_seconds, processes, calls_in_flight } => {
            let Some((program, arguments)) = command.split_first() else { return Err("`command` is empty".into()) };
            let arguments = arguments.iter().map(OsString::from).collect();
            let launch = Launch { program: program.into(), arguments, says_ready: false, key: "command", log };
            Ok(Some((launch, limits(*processes, *calls_in_flight, *timeout_seconds, LOOK.as_secs_f64()))))
        }
        RewardFunction::Python {
            path,
            function,
            arguments,
            interpreter,
            timeout_seconds,
            startup_timeout_seconds,
            processes,
            calls_in_flight,
        } => {
            if !path.is_file() {
                return Err(format!("there is no file `{}`; see `path`", path.display()));
            }
            let json = serde_json::to_string(arguments).map_err(|e| format!("`arguments`: {e}"))?;
            let arguments =
                vec!["-c".into(), PYTHON_WRAPPER.into(), path.into(), function.into(), OsString::from(json)];
            let program = interpreter.clone();
            let launch = Launch { program, arguments, says_ready: true, key: "interpreter", log };
            Ok(Some((launch, limits(*processes, *calls_in_flight, *timeout_seconds, *startup_timeout_seconds))))
        }
        _ => Ok(None),
    }
}

fn limits(processes: usize, calls_in_flight: usize, timeout: f64, startup: f64) -> Limits {
    let max_failures = (FAILURES_PER_PROCESS.saturating_mul(processes as u32)).max(MIN_FAILURES);
    let seconds = Duration::from_secs_f64;
    Limits { processes, calls_in_flight, timeout: seconds(timeout), startup: seconds(startup), max_failures }
}

/// The pool's thread.
struct Manager {
    launch: Launch,
    limits: Limits,
    receiver: Receiver<Event>,
    events: Sender<Event>,
    dispatch: Dispatch,
    processes: Vec<Option<Process>>,
    generations: Vec<u64>,
    calls: HashMap<u64, Call>,
    next_id: u64,
    restarts: Arc<AtomicU64>,
    awaiting: Vec<Sender<Result<(), String>>>,
    began: Instant,
    /// The first line of output that was no answer.
    noise: Option<String>,
}

impl Manager {
    fn new(
        launch: Launch,
        limits: Limits,
        receiver: Receiver<Event>,
        events: Sender<Event>,
        restarts: Arc<AtomicU64>,
    ) -> Manager {
        Manager {
            launch,
            limits,
            receiver,
            events,
            dispatch: Dispatch::new(limits),
            processes: (0..limits.processes).map(|_| None).collect(),
            generations: vec![0; limits.processes],
            calls: HashMap::new(),
            next_id: 0,
            restarts,
            awaiting: Vec::new(),
            began: Instant::now(),
            noise: None,
        }
    }

    fn run(mut self) {
        loop {
            let actions = self.dispatch.tick(Instant::now());
            self.act(actions);
            self.tell_ready();
            match self.receiver.recv_timeout(self.patience()) {
                Ok(Event::Shutdown) => break,
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.look_for_ends();
        }
        child::let_end(&mut self.processes, PATIENCE);
        self.processes.drain(..).flatten().for_each(|process| drop(process.end(Duration::ZERO)));
    }

    fn patience(&self) -> Duration {
        let idle = !self.dispatch.is_busy() && self.awaiting.is_empty();
        let longest = if idle { 10 * LOOK } else { LOOK };
        let due = self.dispatch.next_deadline().map(|time| time.saturating_duration_since(Instant::now()));
        due.map_or(longest, |due| due.min(longest))
    }

    fn handle(&mut self, event: Event) {
        let current = |slot: usize, generation| self.generations[slot] == generation;
        match event {
            Event::Call(call) => {
                self.next_id += 1;
                self.calls.insert(self.next_id, call);
                self.dispatch.call(self.next_id);
            }
            Event::Line { slot, generation, line } if current(slot, generation) => self.line(slot, &line),
            Event::Closed { slot, generation } if current(slot, generation) => self.has_ended(slot),
            Event::AwaitReady(reply) => self.awaiting.push(reply),
            // What a process said before it was ended.
            Event::Line { .. } | Event::Closed { .. } | Event::Shutdown => {}
        }
    }

    fn line(&mut self, slot: usize, line: &str) {
        match wire::parse(line) {
            Reply::Ready => self.dispatch.ready(slot, Instant::now()),
            Reply::Answer { id, result } => {
                if self.dispatch.answered(slot, id, Instant::now()) {
                    self.answer(id, result.map_err(CallError::Call));
                }
            }
            Reply::Noise => {
                self.noise.get_or_insert_with(|| line.trim_end().chars().take(200).collect());
            }
        }
    }

    fn answer(&mut self, id: u64, result: Result<Answer, CallError>) {
        if let Some(call) = self.calls.remove(&id) {
            // A caller that did not wait is no error.
            let _ = call.reply.send(Done { tag: call.tag, result, took: call.submitted.elapsed() });
        }
    }

    fn act(&mut self, actions: Vec<Action>) {
        let mut last_words = String::new();
        for action in actions {
            match action {
                Action::Start(slot) => self.start(slot),
                Action::Stop(slot) => last_words = self.stop(slot),
                Action::Send(slot, id) => self.send(slot, id),
                Action::Fail(id, failure) => {
                    let error = self.explain(failure, &last_words);
                    self.answer(id, Err(error));
                }
            }
        }
    }

    /// Ends a process that did not do something in time.
    fn stop(&mut self, slot: usize) -> String {
        let Some(process) = self.processes[slot].take() else { return String::new() };
        let words = process.end(Duration::ZERO);
        for waiting in self.awaiting.drain(..) {
            let seconds = self.limits.startup.as_secs_f64();
            let _ = waiting.send(Err(format!("not ready within `startup_timeout_seconds` = {seconds}; {words}")));
        }
        words
    }

    fn explain(&self, failure: Failure, last_words: &str) -> CallError {
        let noise = match &self.noise {
            Some(line) => format!("; its output has lines that are no answers, the first: {line:?}"),
            None => String::new(),
        };
        match failure {
            Failure::TimedOut => {
                let seconds = self.limits.timeout.as_secs_f64();
                CallError::Call(format!("no answer within `timeout_seconds` = {seconds}{noise}; {last_words}"))
            }
            Failure::Died(reason) => CallError::Call(format!("{reason}{noise}")),
            Failure::Unusable(reason) => CallError::Unusable(format!("{reason}{noise}")),
        }
    }

    fn start(&mut self, slot: usize) {
        self.generations[slot] += 1;
        if self.generations[slot] > 1 {
            self.restarts.fetch_add(1, Ordering::Relaxed);
        }
        match Process::start(&self.launch, slot, self.generations[slot], &self.events) {
            Ok(process) => {
                self.processes[slot] = Some(process);
                if !self.launch.says_ready {
                    self.dispatch.ready(slot, Instant::now());
                }
            }
            Err(reason) => self.report_end(slot, &reason),
        }
    }

    fn send(&mut self, slot: usize, id: u64) {
        if let (Some(process), Some(call)) = (&self.processes[slot], self.calls.get(&id)) {
            process.send(wire::request(id, &call.payload));
        }
    }

    /// Processes that ended while another of their group holds the pipes open.
    fn look_for_ends(&mut self) {
        for slot in 0..self.processes.len() {
            if self.processes[slot].as_ref().is_some_and(Process::has_ended) {
                self.drain_lines();
                self.has_ended(slot);
            }
        }
    }

    /// Takes what a dead process said in time, so that its last answer counts.
    fn drain_lines(&mut self) {
        thread::sleep(Duration::from_millis(5));
        while let Ok(event) = self.receiver.try_recv() {
            match event {
                Event::Shutdown => {
                    let _ = self.events.send(Event::Shutdown);
                    return;
                }
                event => self.handle(event),
            }
        }
    }

    fn has_ended(&mut self, slot: usize) {
        if let Some(process) = self.processes[slot].take() {
            let reason = process.end(ENDING);
            self.report_end(slot, &reason);
        }
    }

    fn report_end(&mut self, slot: usize, reason: &str) {
        self.generations[slot] += 1;
        for waiting in self.awaiting.drain(..) {
            let _ = waiting.send(Err(reason.to_owned()));
        }
        let actions = self.dispatch.ended(slot, reason, Instant::now());
        self.act(actions);
    }

    fn tell_ready(&mut self) {
        let settled = self.launch.says_ready || self.began.elapsed() >= SETTLE;
        if self.dispatch.all_ready() && settled {
            for waiting in self.awaiting.drain(..) {
                let _ = waiting.send(Ok(()));
            }
        }
    }
}

#[cfg(test)]
mod tests;
