//! Finding `tangelo-worker`, and running it for the verbs that need tensors.

use crate::error::LaunchError;
use crate::run::{Stream, Terminal};
use crate::verbs::print;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::Serialize;
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter};
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::JoinHandle;
use tangelo_core::env;
use tangelo_observe::ProgressEvent;

/// The worker beside this executable, or the one that was named.
pub fn find(named: Option<&Path>) -> Result<PathBuf, LaunchError> {
    let path = match named {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .map_err(LaunchError::io("find", "the executable of tangelo"))?
            .with_file_name("tangelo-worker"),
    };
    if path.is_file() { Ok(path) } else { Err(LaunchError::NoWorker(path)) }
}

fn command(named: Option<&Path>, verb: &str, request: &impl Serialize) -> Result<Command, LaunchError> {
    let request = serde_json::to_string(request).map_err(|e| LaunchError::Internal(e.to_string()))?;
    let mut command = Command::new(find(named)?);
    command.arg(verb).arg(request);
    Ok(command)
}

/// Replaces this process by `tangelo-worker VERB REQUEST`. Returns only where that fails.
pub fn become_worker(named: Option<&Path>, verb: &str, request: &impl Serialize) -> Result<ExitCode, LaunchError> {
    let mut command = command(named, verb, request)?;
    let error = command.exec();
    Err(LaunchError::io("start", command.get_program())(error))
}

/// Runs `tangelo-worker VERB REQUEST` to its end, shows its progress, and hands on what it writes and how it ended:
/// the worker has said itself what was wrong. It ends with this process.
pub fn run_worker(
    named: Option<&Path>,
    verb: &str,
    request: &impl Serialize,
    terminal: &Terminal,
) -> Result<ExitCode, LaunchError> {
    let mut command = command(named, verb, request)?;
    let program = PathBuf::from(command.get_program());
    let started = start(&mut command, terminal).map_err(LaunchError::io("start", &program))?;
    // The command holds an end of the pipe.
    drop(command);
    let Started { mut child, progress, stdout, stderr } = started;
    for event in events(progress) {
        terminal.progress(&event);
    }
    let _ = stderr.join();
    terminal.clear();
    print(&stdout.join().unwrap_or_default())?;
    let status = child.wait().map_err(LaunchError::io("wait for", program))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(code as u8))
}

struct Started {
    child: Child,
    progress: PipeReader,
    /// Collects the answer, a few lines, which must not get between the parts of a bar.
    stdout: JoinHandle<String>,
    /// Shows warnings and errors as they come.
    stderr: JoinHandle<()>,
}

fn start(command: &mut Command, terminal: &Terminal) -> io::Result<Started> {
    command.env(env::SUPERVISOR_PID, std::process::id().to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let (progress, end) = progress_pipe(command)?;
    let mut child = command.spawn()?;
    drop(end);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let terminal = terminal.clone();
    let collect = move || stdout.map(io::read_to_string).and_then(Result::ok).unwrap_or_default();
    let show = move || {
        for line in stderr.into_iter().flat_map(|pipe| BufReader::new(pipe).split(b'\n').map_while(Result::ok)) {
            terminal.hand_on(Stream::Stderr, &String::from_utf8_lossy(&line));
        }
    };
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    Ok(Started { child, progress, stdout: thread("stdout").spawn(collect)?, stderr: thread("stderr").spawn(show)? })
}

/// A pipe for progress. `command` inherits the second end, the one descriptor that it does: start it at once, then drop
/// the end, or the first never sees the end of the lines.
pub fn progress_pipe(command: &mut Command) -> io::Result<(PipeReader, PipeWriter)> {
    let (progress, end) = io::pipe()?;
    // No other thread starts processes, so nobody else gets it.
    fcntl(&end, FcntlArg::F_SETFD(FdFlag::empty()))?;
    command.env(env::PROGRESS_FD, end.as_raw_fd().to_string());
    Ok((progress, end))
}

/// What a worker tells until it ends. A line of a newer worker that we do not know is passed over.
pub fn events(progress: PipeReader) -> impl Iterator<Item = ProgressEvent> {
    let lines = BufReader::new(progress).lines().map_while(Result::ok);
    lines.filter_map(|line| serde_json::from_str(&line).ok())
}
