//! One reward process: its pipes, its end, and nobody left behind.
//!
//! | thread | waits for | unblocked by | bounded by |
//! |---|---|---|---|
//! | writer | calls to send; a full pipe | the pool | the process's end |
//! | reader of its answers | a line | the process | the end of every writer of the pipe |
//! | reader of its stderr | a line | the process | the same |
//!
//! The process leads a group of its own, and the group is killed whole before its leader is reaped. Should this process
//! die without a chance to do so, a guard does: a shell in a group of its own that reads from a pipe which only this
//! process can write to; at its end it kills the group. (The parent-death signal would reach the leader only, and could
//! not be set for another's program without code between fork and exec.) A process also loses its stdin, which ends a
//! program that reads lines. Invariant: only the pool's thread starts, signals and reaps.

use super::Event;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A longer line of output ends the process's reader, and so the process.
const MAX_LINE_BYTES: u64 = 16 << 20;
/// Lines of stderr that an error shows.
const TAIL_LINES: usize = 12;
const MAX_TAIL_LINE: usize = 400;
/// How long the last words of a dead process are waited for.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// Ends the group $0 when the pipe on its stdin has no writer any more.
const GUARD: &str = "read -r _; kill -KILL -- \"-$0\"";

/// What is run.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// The process says when it is ready for calls.
    pub says_ready: bool,
    /// Which key of the job names the program, for errors.
    pub key: &'static str,
    /// Where its stderr is appended.
    pub log: Option<PathBuf>,
}

/// A running process.
pub(super) struct Process {
    child: Child,
    guard: Child,
    /// Dropping it closes the process's stdin.
    input: Option<Sender<String>>,
    tail: Arc<Tail>,
}

impl Process {
    /// Starts it; its lines arrive in `events`, marked with `slot` and `generation`.
    ///
    /// # Errors
    /// In words, why the program cannot be started.
    pub fn start(launch: &Launch, slot: usize, generation: u64, events: &Sender<Event>) -> Result<Process, String> {
        let mut command = Command::new(&launch.program);
        command.args(&launch.arguments).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            let program = launch.program.display();
            let hint = match error.kind() {
                std::io::ErrorKind::NotFound => ": there is no such program on PATH or at this path",
                _ => "",
            };
            format!("cannot start `{program}`: {error}{hint}; see `{}`", launch.key)
        })?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let guard = start_guard(child.id());
        let (Ok(guard), (Some(stdin), Some(stdout), Some(stderr))) = (guard, pipes) else {
            let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
            let _ = child.wait();
            return Err("cannot start /bin/sh, which ends the process should this one die".into());
        };
        let (input, calls) = channel();
        let tail = Arc::new(Tail::default());
        spawn("reward-writer", move || write_calls(stdin, &calls));
        let (sender, for_stderr) = (events.clone(), tail.clone());
        spawn("reward-reader", move || read_answers(stdout, slot, generation, &sender));
        let log = launch.log.as_ref().and_then(|path| OpenOptions::new().create(true).append(true).open(path).ok());
        spawn("reward-stderr", move || for_stderr.fill(stderr, log));
        Ok(Process { child, guard, input: Some(input), tail })
    }

    /// Hands a line to the writer; a process that does not read is found out by its deadline.
    pub fn send(&self, line: String) {
        if let Some(input) = &self.input {
            let _ = input.send(line);
        }
    }

    /// Whether it has ended by itself; it is not reaped yet.
    pub fn has_ended(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(Id::Pid(self.group()), flags), Ok(WaitStatus::StillAlive))
    }

    /// Closes its stdin, so that it ends when it likes.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Kills what is left of its group and says how it ended, with the end of its stderr. One that closed its output
    /// is most likely ending: `patience` is how long that may take.
    pub fn end(mut self, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        while !self.has_ended() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
        let by_itself = self.has_ended();
        // The guard first: after the reaping its group's number may be another's.
        let _ = self.guard.kill();
        let _ = self.guard.wait();
        let _ = killpg(self.group(), Signal::SIGKILL);
        let status = self.child.wait();
        let tail = self.tail.text();
        match status {
            Ok(status) if by_itself => format!("the process ended ({}){tail}", describe(status)),
            _ => format!("the process was ended{tail}"),
        }
    }

    fn group(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }
}

fn start_guard(group: u32) -> std::io::Result<Child> {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", GUARD, &group.to_string()]).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn()
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    // Without a thread the process is mute, and its calls end by their deadlines.
    let _ = thread::Builder::new().name(name.to_owned()).spawn(work);
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => {
            let name = Signal::try_from(signal).map_or_else(|_| signal.to_string(), |s| s.as_str().to_owned());
            format!("signal {name}")
        }
        (None, None) => "no exit code".into(),
    }
}

fn write_calls(mut stdin: ChildStdin, calls: &Receiver<String>) {
    for line in calls {
        if stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_answers(output: impl Read, slot: usize, generation: u64, events: &Sender<Event>) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    loop {
        line.clear();
        let count = output.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line).unwrap_or(0);
        let whole = count > 0 && (line.ends_with(b"\n") || (count as u64) < MAX_LINE_BYTES);
        let event = match whole {
            true => Event::Line { slot, generation, line: String::from_utf8_lossy(&line).into_owned() },
            false => Event::Closed { slot, generation },
        };
        if events.send(event).is_err() || !whole {
            return;
        }
    }
}

/// The last lines of a process's stderr.
#[derive(Debug, Default)]
struct Tail {
    lines: Mutex<(VecDeque<String>, bool)>,
    closed: Condvar,
}

impl Tail {
    fn fill(&self, stderr: impl Read, mut log: Option<File>) {
        let mut stderr = BufReader::new(stderr);
        let mut line = Vec::new();
        while stderr.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if let Some(log) = &mut log {
                let _ = log.write_all(&line);
            }
            let text: String = String::from_utf8_lossy(&line).trim_end().chars().take(MAX_TAIL_LINE).collect();
            let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            lines.0.push_back(text);
            if lines.0.len() > TAIL_LINES {
                lines.0.pop_front();
            }
            line.clear();
        }
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.closed.notify_all();
    }

    /// What is to be appended to an error; waits a little for the last words.
    fn text(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.closed.wait_timeout_while(lines, LAST_WORDS, |lines| !lines.1);
        let (lines, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if lines.0.is_empty() {
            return String::new();
        }
        let shown: Vec<String> = lines.0.iter().map(|line| format!("\n  | {line}")).collect();
        format!("; the end of its stderr:{}", shown.concat())
    }
}

/// Waits until all have ended by themselves, or `patience` is over.
pub(super) fn let_end(processes: &mut [Option<Process>], patience: Duration) {
    processes.iter_mut().flatten().for_each(Process::close_input);
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline && processes.iter().flatten().any(|process| !process.has_ended()) {
        thread::sleep(Duration::from_millis(5));
    }
}
