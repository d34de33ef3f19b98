//! Faults that tests plant: `TANGELO_FAULT=kind@step[:rank]`, on the first attempt only.

use crate::error::{Result, TrainError};
use tangelo_core::env;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The process is killed as by `kill -9`.
    Kill,
    /// The rank fails with an error of its own.
    Error,
    /// The rank panics.
    Panic,
    /// The rank stops answering.
    Hang,
    /// A gradient turns NaN.
    Nan,
    /// The process is killed while its saver writes the checkpoint of that step.
    KillInSave,
}

/// A planted fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub kind: FaultKind,
    /// In which step.
    pub step: u64,
    /// On which rank.
    pub rank: usize,
}

impl Fault {
    /// The fault planted for `rank` on the attempt with this restart count, if any.
    pub fn from_env(rank: usize, restart_count: usize) -> Result<Option<Fault>> {
        match std::env::var(env::FAULT) {
            Ok(text) if restart_count == 0 => Ok(Some(Fault::parse(&text)?).filter(|fault| fault.rank == rank)),
            _ => Ok(None),
        }
    }

    fn parse(text: &str) -> Result<Fault> {
        let bad =
            || TrainError::Config(format!("{}={text:?}: expected kind@step[:rank], such as kill@5:1", env::FAULT));
        let (kind, place) = text.split_once('@').ok_or_else(bad)?;
        let (step, rank) = place.split_once(':').unwrap_or((place, "0"));
        let kind = match kind {
            "kill" => FaultKind::Kill,
            "error" => FaultKind::Error,
            "panic" => FaultKind::Panic,
            "hang" => FaultKind::Hang,
            "nan" => FaultKind::Nan,
            "kill_in_save" => FaultKind::KillInSave,
            _ => return Err(bad()),
        };
        Ok(Fault { kind, step: step.parse().map_err(|_| bad())?, rank: rank.parse().map_err(|_| bad())? })
    }

    /// Strikes at the start of `step`, where the fault is of a kind that does.
    pub fn strike(&self, step: u64) -> Result<()> {
        if step != self.step {
            return Ok(());
        }
        match self.kind {
            FaultKind::Kill => kill_self(),
            FaultKind::Error => Err(TrainError::Internal(format!("planted error in step {step}"))),
            FaultKind::Panic => panic!("planted panic in step {step}"),
            FaultKind::Hang => loop {
                std::thread::park();
            },
            FaultKind::Nan | FaultKind::KillInSave => Ok(()),
        }
    }
}

/// Ends this process as `kill -9` does.
pub fn kill_self() -> ! {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_parse() {
        assert_eq!(Fault::parse("kill@5:1").unwrap(), Fault { kind: FaultKind::Kill, step: 5, rank: 1 });
        assert_eq!(Fault::parse("nan@2").unwrap(), Fault { kind: FaultKind::Nan, step: 2, rank: 0 });
        assert!(Fault::parse("explode@2").unwrap_err().to_string().contains("kind@step"));
    }
}
