//! What a batch of rewards says about each part, for metrics.

use std::time::Duration;
use tangelo_control::Reading;

/// One part over a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PartSummary {
    /// The part's name.
    pub name: String,
    /// Samples that it applies to.
    pub num_samples: u64,
    /// Of these, samples that it could not score.
    pub num_failed: u64,
    /// Samples with no answer of the kind that it looks for.
    pub num_unanswered: u64,
    /// Mean of the values before the weight, over the samples scored; 0 where there are none.
    pub mean: f64,
    /// Smallest value.
    pub min: f64,
    /// Largest value.
    pub max: f64,
    /// From the first call to the last answer.
    pub seconds: f64,
    /// The longest that one call waited for its answer, its turn included.
    pub slowest_seconds: f64,
    /// Processes started anew since the last batch.
    pub num_restarts: u64,
    /// The first error.
    pub first_error: Option<String>,
}

impl PartSummary {
    /// Names and values for the metrics of a step: `reward/<name>/mean`, ... They add up over the batches of a step. Where
    /// nothing was scored there is no mean.
    pub fn readings(&self) -> Vec<(String, Reading)> {
        let scored = (self.num_samples - self.num_failed) as f64;
        let values = [
            ("mean", Reading::Mean { sum: self.mean * scored, weight: scored }),
            ("min", Reading::Min(self.min)),
            ("max", Reading::Max(self.max)),
        ];
        let counts = [
            ("failed", Reading::Sum(self.num_failed as f64)),
            ("unanswered", Reading::Sum(self.num_unanswered as f64)),
            ("restarts", Reading::Sum(self.num_restarts as f64)),
            ("seconds", Reading::Sum(self.seconds)),
            ("slowest_seconds", Reading::Max(self.slowest_seconds)),
        ];
        let values = values.into_iter().filter(|_| scored > 0.0);
        values.chain(counts).map(|(key, reading)| (format!("reward/{}/{key}", self.name), reading)).collect()
    }
}

/// Sums values of a part as they come.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub summary: PartSummary,
    sum: f64,
}

impl Tally {
    pub fn new(name: &str) -> Tally {
        Tally { summary: PartSummary { name: name.to_owned(), ..PartSummary::default() }, sum: 0.0 }
    }

    pub fn scored(&mut self, value: f64, answered: bool, took: Duration) {
        let s = &mut self.summary;
        let first = s.num_samples == s.num_failed;
        s.min = if first { value } else { s.min.min(value) };
        s.max = if first { value } else { s.max.max(value) };
        s.num_samples += 1;
        s.num_unanswered += u64::from(!answered);
        s.slowest_seconds = s.slowest_seconds.max(took.as_secs_f64());
        self.sum += value;
        s.mean = self.sum / (s.num_samples - s.num_failed) as f64;
    }

    pub fn failed(&mut self, error: &str) {
        self.summary.num_samples += 1;
        self.summary.num_failed += 1;
        self.summary.first_error.get_or_insert_with(|| error.to_owned());
    }
}
