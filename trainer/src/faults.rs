//! Faults that tests plant: `TANGELO_FAULT=kind@step[:rank][/phase]`, on the first attempt only.
//!
//! They strike at the start of the step, or in front of the first instruction of the phase in it: `kill@3:1/ring`. A phase
//! that the layout does not have never comes, and the run ends well.

use crate::error::{Result, TrainError};
use tangelo_core::{Moment, Phase, env};

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The process is killed as by `kill -9`.
    Kill,
    /// The process is stopped as by `kill -STOP`.
    Stop,
    /// The rank fails with an error of its own.
    Error,
    /// The rank panics.
    Panic,
    /// The rank stops answering; the threads of its collectives go on.
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
    /// In which phase of the step; `None` is its start.
    pub phase: Option<Phase>,
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
        let wrong = |what: String| TrainError::Config(format!("{}={text:?}: {what}", env::FAULT));
        let bad = || wrong("expected kind@step[:rank][/phase], such as kill@5:1 or kill@5:1/ring".into());
        let (kind, place) = text.split_once('@').ok_or_else(bad)?;
        let (place, phase) = place.split_once('/').map_or((place, None), |(place, phase)| (place, Some(phase)));
        let (step, rank) = place.split_once(':').unwrap_or((place, "0"));
        let names = || Phase::ALL.map(Phase::name).join(", ");
        let named =
            |name| Phase::named(name).ok_or_else(|| wrong(format!("phase {name:?}: expected one of {}", names())));
        let phase = phase.map(named).transpose()?;
        let name = kind;
        let kind = match kind {
            "kill" => FaultKind::Kill,
            "stop" => FaultKind::Stop,
            "error" => FaultKind::Error,
            "panic" => FaultKind::Panic,
            "hang" => FaultKind::Hang,
            "nan" => FaultKind::Nan,
            "kill_in_save" => FaultKind::KillInSave,
            other => {
                let known = "kill, stop, error, panic, hang, nan or kill_in_save";
                return Err(wrong(format!("kind {other:?}: expected {known}")));
            }
        };
        if phase.is_some() && matches!(kind, FaultKind::Nan | FaultKind::KillInSave) {
            return Err(wrong(format!("{name} has a moment of its own in the step: give no phase")));
        }
        Ok(Fault { kind, step: step.parse().map_err(|_| bad())?, rank: rank.parse().map_err(|_| bad())?, phase })
    }

    /// Strikes at this moment, where the fault is planted for it and of a kind that does.
    pub fn strike(&self, now: Moment) -> Result<()> {
        if now != (Moment { step: self.step, phase: self.phase }) {
            return Ok(());
        }
        match self.kind {
            FaultKind::Kill => kill_self(),
            FaultKind::Stop => nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP)
                .map_err(|e| TrainError::Internal(format!("a planted stop failed: {e}"))),
            FaultKind::Error => Err(TrainError::Internal(format!("planted error {now}"))),
            FaultKind::Panic => panic!("planted panic {now}"),
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
        let fault = |kind, step, rank, phase| Fault { kind, step, rank, phase };
        assert_eq!(Fault::parse("kill@5:1").unwrap(), fault(FaultKind::Kill, 5, 1, None));
        assert_eq!(Fault::parse("nan@2").unwrap(), fault(FaultKind::Nan, 2, 0, None));
        assert_eq!(Fault::parse("stop@3:1/ring").unwrap(), fault(FaultKind::Stop, 3, 1, Some(Phase::Ring)));
        assert_eq!(Fault::parse("kill@3/save").unwrap(), fault(FaultKind::Kill, 3, 0, Some(Phase::Save)));
        for (text, said) in [
            ("explode@2", "expected kill, stop"),
            ("kill", "kind@step[:rank][/phase]"),
            ("kill@x", "kind@step[:rank][/phase]"),
            ("kill@3:/ring", "kind@step[:rank][/phase]"),
            ("kill@3/lunch", "phase \"lunch\": expected one of count, gather"),
            ("nan@3/ring", "give no phase"),
        ] {
            let error = Fault::parse(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_fault_strikes_at_its_moment_alone() {
        let strikes = |fault: &str, step, phase| Fault::parse(fault).unwrap().strike(Moment { step, phase }).is_err();
        assert!(strikes("error@3", 3, None) && strikes("error@3/ring", 3, Some(Phase::Ring)));
        assert!(!strikes("error@3", 3, Some(Phase::Ring)) && !strikes("error@3/ring", 3, None));
        assert!(!strikes("error@3/ring", 4, Some(Phase::Ring)) && !strikes("nan@3", 3, None));
    }
}
