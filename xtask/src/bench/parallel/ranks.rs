//! Processes that make one turn together: all of them end well, or those that are left are killed.

use crate::shell;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A turn takes seconds; one that hangs is ended after this long.
const LIMIT: Duration = Duration::from_secs(900);

/// What is running; killed where it still runs at the end.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // An error says that it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts all, waits for all; what the first printed. Their output passes through files in `folder`.
pub fn run_together(commands: &mut [Command], folder: &Path) -> Result<String> {
    let lines: Vec<String> = commands.iter().map(shell::command_line).collect();
    let by_hand = format!("by hand, all at once:\n{}", lines.join(" &\n"));
    let mut children = Children(Vec::new());
    for (index, command) in commands.iter_mut().enumerate() {
        let [out, err] = ["out", "err"].map(|end| create(&output_file(folder, index, end)));
        let command = command.stdin(Stdio::null()).stdout(out?).stderr(err?);
        children.0.push(command.spawn().with_context(|| format!("cannot start `{}`", lines[index]))?);
    }
    if let Some((index, why)) = first_failure(&mut children.0)? {
        let stderr = read(&output_file(folder, index, "err"))?;
        bail!("process {index} {why}\n{stderr}\n{by_hand}");
    }
    read(&output_file(folder, 0, "out"))
}

/// Waits until all have ended well (`None`), one has not, or time is up.
fn first_failure(children: &mut [Child]) -> Result<Option<(usize, String)>> {
    let begin = Instant::now();
    loop {
        let ended = children.iter_mut().map(Child::try_wait).collect::<std::io::Result<Vec<_>>>()?;
        let failed = |status: &Option<ExitStatus>| status.is_some_and(|status| !status.success());
        if let Some(index) = ended.iter().position(failed) {
            return Ok(ended[index].map(|status| (index, format!("failed: {status}"))));
        }
        let Some(running) = ended.iter().position(Option::is_none) else { return Ok(None) };
        if begin.elapsed() > LIMIT {
            return Ok(Some((running, format!("had not ended after {}", shell::seconds(LIMIT)))));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn output_file(folder: &Path, index: usize, end: &str) -> PathBuf {
    folder.join(format!("process-{index}.{end}"))
}

fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("cannot write {}", path.display()))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn the_first_process_is_heard() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(run_together(&mut [shell("echo one"), shell("echo two")], folder.path()).unwrap(), "one\n");
    }

    #[test]
    fn a_failure_ends_the_others_and_shows_why() {
        let folder = tempfile::tempdir().unwrap();
        // Were the sleeper waited for, this would take its ten minutes.
        let mut commands = [shell("exec sleep 600"), shell("echo no way >&2; exit 3")];
        let error = run_together(&mut commands, folder.path()).unwrap_err().to_string();
        for part in ["process 1 failed", "no way", "sh -c exec sleep 600 &"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
