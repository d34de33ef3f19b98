//! What generation and rewards said of a step: numbers that add up over its rounds, and what looked wrong.

use crate::reward::ScoredBatch;
use std::collections::BTreeMap;
use tangelo_control::{Metrics, Reading};

/// Of one round of prompts, or of several together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// Numbers by name.
    pub metrics: Metrics,
    /// By part of the reward: samples that it could not score.
    failures: BTreeMap<String, Failures>,
    /// Rewards that look wrong though every sample was scored.
    alarms: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Failures {
    failed: u64,
    samples: u64,
    first: String,
}

impl Told {
    /// Of a round of prompts.
    pub fn of(generation: &Metrics, scored: &ScoredBatch) -> Told {
        let mut told = Told { alarms: scored.alarms.iter().map(ToString::to_string).collect(), ..Told::default() };
        for (name, &reading) in &generation.0 {
            // The slowest rank's seconds are those of a round; rounds come one after the other.
            let adds_up = name.ends_with("/seconds");
            told.metrics.add(name, if adds_up { Reading::Sum(reading.value()) } else { reading });
        }
        for part in &scored.parts {
            part.readings().into_iter().for_each(|(name, reading)| told.metrics.add(&name, reading));
            if let Some(first) = &part.first_error {
                let found = Failures { failed: part.num_failed, samples: part.num_samples, first: first.clone() };
                told.failures.insert(part.name.clone(), found);
            }
        }
        told
    }

    /// With those of a later round.
    pub fn merge(&mut self, later: Told) {
        self.metrics.merge(&later.metrics);
        self.alarms.extend(later.alarms);
        for (part, more) in later.failures {
            let all =
                self.failures.entry(part).or_insert_with(|| Failures { first: more.first, ..Failures::default() });
            all.failed += more.failed;
            all.samples += more.samples;
        }
    }

    /// What the user should know, a line each.
    pub fn warnings(&self) -> Vec<String> {
        let failed = self.failures.iter().map(|(part, found)| {
            let Failures { failed, samples, first } = found;
            format!("reward `{part}` had no value for {failed} of {samples} samples; the first: {first}")
        });
        failed.chain(self.alarms.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::PartSummary;
    use expect_test::expect;

    fn round(tokens: f64, seconds: f64, part: PartSummary) -> Told {
        let mut generation = Metrics::default();
        generation.add("rollout/generated_tokens", Reading::Sum(tokens));
        generation.add("rollout/seconds", Reading::Max(seconds));
        Told::of(&generation, &ScoredBatch { parts: vec![part], ..ScoredBatch::default() })
    }

    fn part(num_samples: u64, errors: &[&str], mean: f64, slowest_seconds: f64) -> PartSummary {
        PartSummary {
            name: "judge".into(),
            num_samples,
            num_failed: errors.len() as u64,
            mean,
            min: mean,
            max: mean,
            seconds: slowest_seconds,
            slowest_seconds,
            first_error: errors.first().map(ToString::to_string),
            ..PartSummary::default()
        }
    }

    #[test]
    fn numbers_of_a_step_are_of_all_its_rounds() {
        let mut told = round(100.0, 2.0, part(8, &[], 0.25, 1.0));
        told.merge(round(60.0, 3.0, part(4, &["it is late", "it is early"], 1.0, 0.5)));
        let numbers: Vec<String> = told.metrics.0.iter().map(|(n, r)| format!("{n} {}", r.value())).collect();
        // The mean is over the ten samples scored, (8 * 0.25 + 2 * 1) / 10.
        expect![[r#"
            reward/judge/failed 2
            reward/judge/max 1
            reward/judge/mean 0.4
            reward/judge/min 0.25
            reward/judge/restarts 0
            reward/judge/seconds 1.5
            reward/judge/slowest_seconds 1
            reward/judge/unanswered 0
            rollout/generated_tokens 160
            rollout/seconds 5"#]]
        .assert_eq(&numbers.join("\n"));
        told.merge(round(1.0, 1.0, part(3, &["it is gone"; 3], 0.0, 0.1)));
        assert_eq!(
            told.metrics.get("reward/judge/min"),
            Some(0.25),
            "a part that scored nothing has no smallest value"
        );
        expect!["reward `judge` had no value for 5 of 7 samples; the first: it is late"]
            .assert_eq(&told.warnings().join("\n"));
    }
}
