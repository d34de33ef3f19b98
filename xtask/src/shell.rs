//! Running other programs: where the repository is, which environment children get, how long things take.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The repository this xtask belongs to.
pub struct Repo {
    /// Its root folder.
    pub root: PathBuf,
}

impl Repo {
    /// The folder above this crate's, as cargo knew it at compile time.
    pub fn find() -> Result<Repo> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the repository's root")?;
        if !root.join("Cargo.lock").is_file() {
            bail!(
                "no repository at {}: it was moved after xtask was built; run `cargo clean -p xtask`",
                root.display()
            );
        }
        Ok(Repo { root: root.to_owned() })
    }

    /// The Python of the virtual environment.
    pub fn python(&self) -> PathBuf {
        self.root.join(".venv/bin/python")
    }

    /// `LIBTORCH` as the user set it; cargo's own `[env]` default does not count.
    pub fn user_libtorch(&self) -> Option<PathBuf> {
        let value = std::env::var_os("LIBTORCH").filter(|v| !v.is_empty())?;
        let path = PathBuf::from(value);
        (path != self.root.join(".libtorch")).then_some(path)
    }

    /// Where cargo puts what it builds.
    pub fn target(&self) -> PathBuf {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
        self.root.join(target)
    }

    /// A command in the root folder, with the environment as if a user had typed it.
    ///
    /// `cargo run` adds variables that some build scripts watch: with them, the same build from here and from a shell
    /// would rebuild each other's crates.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") || text == "CARGO_CRATE_NAME" {
                command.env_remove(&name);
            }
        }
        if self.user_libtorch().is_none() {
            command.env_remove("LIBTORCH");
        }
        command
    }

    /// The cargo that runs us.
    pub fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(arguments);
        command
    }
}

/// Runs to the end with our stdio; an error names the command line.
pub fn run(command: &mut Command) -> Result<()> {
    let line = command_line(command);
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// Runs to the end and returns what it printed; `None` where it cannot start or fails.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The command as a user would type it.
pub fn command_line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Does `work` after saying so, and says how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("==> {what}");
    let start = Instant::now();
    let result = work();
    let verdict = if result.is_ok() { "done" } else { "failed" };
    println!("    {verdict} after {}", seconds(start.elapsed()));
    result
}

/// `0.3 s`, `12 s`, `4 min 05 s`.
pub fn seconds(duration: Duration) -> String {
    let whole = duration.as_secs();
    match whole {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{whole} s"),
        _ => format!("{} min {:02} s", whole / 60, whole % 60),
    }
}

/// Free bytes on the disk that holds `folder`, by `df`.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let text = output(Command::new("df").arg("-Pk").arg(folder))?;
    let kib: u64 = text.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let texts: Vec<_> = [340, 12_400, 245_000].map(|ms| seconds(Duration::from_millis(ms))).into();
        assert_eq!(texts, ["0.3 s", "12 s", "4 min 05 s"]);
    }

    #[test]
    fn disk_space_is_known() {
        assert!(free_bytes(Path::new("/")).is_some_and(|bytes| bytes > 0));
        assert_eq!(free_bytes(Path::new("/no/such/folder")), None);
    }

    #[test]
    fn a_failing_command_is_named() {
        let error = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c exit 3") && error.contains('3'), "{error}");
    }
}
