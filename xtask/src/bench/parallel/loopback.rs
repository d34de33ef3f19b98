//! Bytes that went over the loopback interface while a command ran.
//!
//! In a network namespace of its own where the machine allows that, so that nothing else is counted; otherwise on the
//! interface that everybody shares.

use super::super::inputs::Inputs;
use anyhow::{Context, Result, bail};
use std::process::Command;

/// Prints the counters before and after the command, which keeps its own output for stderr.
const COUNTED: &str = "cat /proc/net/dev; \"$@\" >&2 || exit; cat /proc/net/dev";

/// How to count.
pub struct Loopback {
    /// Whether commands can have an interface of their own.
    pub private: bool,
}

impl Loopback {
    /// Tries a namespace.
    pub fn probe() -> Loopback {
        let output = namespace(Command::new("unshare"), "true").output();
        Loopback { private: output.is_ok_and(|output| output.status.success()) }
    }

    /// Bytes sent by all processes of `program` with `arguments`.
    pub fn count(&self, inputs: &Inputs, arguments: &[String]) -> Result<u64> {
        let mut command = if self.private {
            namespace(inputs.repo.command("unshare"), COUNTED)
        } else {
            let mut command = inputs.repo.command("sh");
            command.args(["-c", COUNTED]);
            command
        };
        command.arg("sh").args(arguments);
        let output = command.output().context("cannot start a shell")?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("`{}` failed: {}\n{stderr}", arguments.join(" "), output.status);
        }
        sent(&String::from_utf8_lossy(&output.stdout))
    }
}

/// A shell whose loopback interface is its own, and up.
fn namespace(mut unshare: Command, script: &str) -> Command {
    unshare.args(["--net", "--map-root-user", "sh", "-c", &format!("ip link set lo up && {{ {script}; }}")]);
    unshare
}

/// The difference between two prints of /proc/net/dev, one after the other.
fn sent(text: &str) -> Result<u64> {
    let counters = text.lines().filter_map(transmitted).collect::<Vec<_>>();
    match counters[..] {
        [before, after] if after >= before => Ok(after - before),
        _ => bail!("/proc/net/dev told {counters:?} of lo, expected two numbers that grow"),
    }
}

/// Bytes that `lo` transmitted, where this is its line of /proc/net/dev: eight columns of what it received, then these.
fn transmitted(line: &str) -> Option<u64> {
    let counters = line.trim_start().strip_prefix("lo:")?;
    counters.split_whitespace().nth(8)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(bytes: u64) -> String {
        format!(
            "Inter-|   Receive                                                |  Transmit\n\
             face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls\n\
             lo: 77 7473    0    0    0     0          0         0 {bytes}    7473    0    0    0     0       0    0\n\
             eth0: 5 1    0    0    0     0          0         0 6    1    0    0    0     0       0          0\n"
        )
    }

    #[test]
    fn what_lo_sent_is_the_difference() {
        assert_eq!(sent(&(print(100) + &print(350))).unwrap(), 250);
        assert_eq!(transmitted("    lo:410 1 0 0 0 0 0 0 192 1 0 0 0 0 0 0"), Some(192));
    }

    #[test]
    fn counters_that_are_missing_or_fall_are_refused() {
        for text in [String::new(), print(1), print(2) + &print(1)] {
            assert!(sent(&text).unwrap_err().to_string().contains("/proc/net/dev"));
        }
    }
}
