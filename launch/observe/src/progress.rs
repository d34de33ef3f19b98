//! Progress of a run or of a verb, from rank 0 to the launcher, as JSON lines over an inherited pipe.
//!
//! The launcher draws it as a bar or prints it as lines. Writing never blocks and never fails loudly: a launcher that
//! does not read loses lines, training goes on.

use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

/// One line of progress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum ProgressEvent {
    /// Something long begins, such as `loading model`.
    Phase {
        /// What.
        name: String,
    },
    /// Some more of a long piece of work is done.
    Amount {
        /// Which work, such as `exporting`.
        name: String,
        /// How much is done.
        done: u64,
        /// How much there is.
        total: u64,
        /// More numbers about it, for people.
        #[serde(default)]
        detail: String,
    },
    /// A step is done.
    Step {
        /// Which, counted from 1.
        step: u64,
        /// How many there are.
        steps: u64,
        /// Its loss; `None` where it was not finite.
        #[serde(default)]
        loss: Option<f64>,
        /// Tokens per second over all ranks.
        #[serde(default)]
        tokens_per_second: Option<f64>,
        /// Model FLOPs utilisation, 0 to 1.
        #[serde(default)]
        mfu: Option<f64>,
        /// Peak memory of the fullest rank.
        #[serde(default)]
        memory_bytes: Option<u64>,
        /// Learning rate.
        #[serde(default)]
        lr: Option<f64>,
        /// Norm of the gradient before clipping.
        #[serde(default)]
        grad_norm: Option<f64>,
    },
    /// The driver of an RL job listens: its ranks may start.
    Listening {
        /// host:port.
        address: String,
        /// The file with the job's secret.
        secret_file: std::path::PathBuf,
    },
    /// A step of reinforcement learning is done.
    RlStep {
        /// Which, counted from 1.
        step: u64,
        /// How many there are.
        steps: u64,
        /// Mean reward of the step's completions.
        #[serde(default)]
        reward: Option<f64>,
        /// Mean KL between the policies before and after, estimated from the update's own ratios.
        #[serde(default)]
        kl: Option<f64>,
        /// Mean length of completions, tokens.
        #[serde(default)]
        response_length: Option<f64>,
        /// The whole step, seconds.
        #[serde(default)]
        seconds: Option<f64>,
        /// Of it, by phase, in their order.
        #[serde(default)]
        phases: Vec<(String, f64)>,
    },
    /// A validation of reinforcement learning is done.
    Validation {
        /// After which step.
        step: u64,
        /// Names and values.
        #[serde(default)]
        text: String,
    },
    /// An evaluation is done.
    Eval {
        /// After which step.
        step: u64,
        /// Loss on held-out documents.
        #[serde(default)]
        loss: Option<f64>,
        /// Its exponential.
        #[serde(default)]
        perplexity: Option<f64>,
    },
    /// A checkpoint is complete on disk.
    Saved {
        /// Of which step.
        step: u64,
    },
    /// A step was left out because loss or gradient was not finite.
    Skipped {
        /// Which.
        step: u64,
        /// Why.
        #[serde(default)]
        reason: String,
    },
    /// Training is over.
    Done {
        /// The last step.
        #[serde(default)]
        step: u64,
        /// The steps asked for; more than `step` after a signal.
        #[serde(default)]
        steps: u64,
    },
}

/// The worker's end of the pipe. Without one, every call does nothing.
#[derive(Debug)]
pub struct ProgressWriter {
    pipe: Option<File>,
}

impl ProgressWriter {
    /// The pipe named by the value of `TANGELO_PROGRESS_FD`; none where it is absent or not open.
    pub fn from_fd_number(value: Option<&str>) -> ProgressWriter {
        // Opened anew through /proc: needs no raw descriptor, and O_NONBLOCK stays ours alone.
        let open = |fd: u32| {
            let flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
            OpenOptions::new().write(true).custom_flags(flags.bits()).open(format!("/proc/self/fd/{fd}")).ok()
        };
        ProgressWriter { pipe: value.and_then(|v| v.parse().ok()).and_then(open) }
    }

    /// Whether anybody listens.
    pub fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    /// Writes one line; shorter than PIPE_BUF, so it arrives whole or not at all.
    pub fn send(&mut self, event: &ProgressEvent) {
        let Some(pipe) = &mut self.pipe else { return };
        if let Ok(mut line) = serde_json::to_vec(event) {
            line.push(b'\n');
            // A full pipe means that the launcher is stopped: the line is lost, and nothing else.
            let _ = pipe.write(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsRawFd;

    #[test]
    fn events_cross_a_pipe_and_a_full_one_does_not_block() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut progress = ProgressWriter::from_fd_number(Some(&writer.as_raw_fd().to_string()));
        assert!(progress.is_open());
        drop(writer);
        let event = ProgressEvent::Saved { step: 7 };
        // A pipe holds 64 KiB by default; 10,000 lines of 27 bytes overflow it.
        (0..10_000).for_each(|_| progress.send(&event));
        drop(progress);
        let lines: Vec<String> = BufReader::new(reader).lines().map(|l| l.unwrap()).collect();
        assert!(lines.len() > 1000 && lines.len() < 10_000, "{}", lines.len());
        assert!(lines.iter().all(|l| serde_json::from_str::<ProgressEvent>(l).unwrap() == event));
    }

    #[test]
    fn the_lines_are_those_of_the_contract() {
        let line = r#"{"event":"step","step":3,"steps":100,"loss":5.1,"tokens_per_second":123.0,"mfu":0.31,"memory_bytes":1,"lr":0.001}"#;
        let ProgressEvent::Step { step: 3, steps: 100, loss: Some(loss), grad_norm: None, .. } =
            serde_json::from_str(line).unwrap()
        else {
            panic!("parsed to something else")
        };
        assert_eq!(loss, 5.1);
        assert!(serde_json::from_str::<ProgressEvent>(r#"{"event":"done"}"#).is_ok());
        assert!(!ProgressWriter::from_fd_number(None).is_open());
        assert!(!ProgressWriter::from_fd_number(Some("9999")).is_open());
    }
}
