//! Rewards that look wrong though every sample was scored: all of them 0, or some that are no finite number.
//!
//! Invariant: an alarm is a warning and changes no value. It is raised again only when its count has doubled, so that
//! a hard task does not fill the log.

use std::fmt;

/// Samples in a row with the value 0 before it is suspicious.
const SUSPICIOUS: u64 = 32;

/// What looks wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlarmKind {
    /// Every value of a part was 0 for many samples in a row.
    AllZero,
    /// Values that are no finite numbers.
    NonFinite,
}

/// A warning about a part of the reward.
#[derive(Clone, Debug, PartialEq)]
pub struct Alarm {
    /// What looks wrong.
    pub kind: AlarmKind,
    /// The part's name.
    pub part: String,
    /// How many samples: in a row where all are 0, of this batch where values are not finite.
    pub count: u64,
    /// How many of these had no answer of the kind that the part looks for.
    pub num_unanswered: u64,
    /// One of them: the end of its completion.
    pub completion: String,
    /// The ground truth of the same.
    pub ground_truth: String,
}

impl fmt::Display for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            AlarmKind::AllZero => write!(
                f,
                "reward `{}` was 0 for the last {} samples, of which {} had no answer to compare",
                self.part, self.count, self.num_unanswered
            )?,
            AlarmKind::NonFinite => {
                write!(f, "reward `{}` gave {} values that are no finite numbers", self.part, self.count)?;
            }
        }
        write!(f, "; for example ...{:?} with ground truth {}", self.completion, self.ground_truth)
    }
}

/// Zeros of one part in a row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ZeroWatch {
    zeros: u64,
    unanswered: u64,
    raised_at: u64,
}

impl ZeroWatch {
    /// Counts a value.
    pub fn see(&mut self, value: f64, answered: bool) {
        if value != 0.0 {
            *self = ZeroWatch::default();
        } else {
            self.zeros += 1;
            self.unanswered += u64::from(!answered);
        }
    }

    /// The zeros in a row and those without an answer, where an alarm is due.
    pub fn due(&mut self) -> Option<(u64, u64)> {
        if self.zeros < SUSPICIOUS.max(2 * self.raised_at) {
            return None;
        }
        self.raised_at = self.zeros;
        Some((self.zeros, self.unanswered))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_comes_back_at_the_double() {
        let mut watch = ZeroWatch::default();
        let mut due = Vec::new();
        for sample in 1..200 {
            watch.see(0.0, sample % 2 == 0);
            due.extend(watch.due());
        }
        assert_eq!(due, [(32, 16), (64, 32), (128, 64)]);
        watch.see(0.5, true);
        watch.see(0.0, true);
        assert_eq!(watch.due(), None);
    }
}
