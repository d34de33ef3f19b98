//! The learning rate as a function of the step: warm-up, plateau, decay.
//!
//! The meaning is torchtitan's (`components/lr_scheduler.py`): a linear warm-up that is already at `peak / warmup` in
//! the first step, a plateau, and a decay over the last `decay_steps` steps that would reach the floor one step after
//! the last, so that no step is wasted on a learning rate of 0. Cosine and linear schedules decay over all that
//! follows the warm-up; WSD (warm-up, stable, decay) over a part of it; a constant schedule has `decay_steps` = 0.

use serde::{Deserialize, Serialize};

/// Shape of a decay, as the factor at progress p from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// 1 - p.
    Linear,
    /// 1 - sqrt(p) (Hägele et al. 2024, arXiv 2405.18392).
    Sqrt,
    /// (1 + cos(pi p)) / 2.
    Cosine,
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LrSchedule {
    /// The highest learning rate.
    pub peak: f64,
    /// Steps until the peak; the first step already has `peak / warmup_steps`.
    pub warmup_steps: usize,
    /// Length of the schedule.
    pub total_steps: usize,
    /// Steps at its end that decay; 0: none do.
    pub decay_steps: usize,
    /// How they decay.
    pub decay_type: DecayShape,
    /// Floor of the decay over the peak.
    pub min_factor: f64,
}

impl LrSchedule {
    /// The learning rate of optimizer step `step`, counted from 1. Steps past the end stay at the floor.
    pub fn lr(&self, step: usize) -> f64 {
        self.peak * self.factor(step.max(1))
    }

    fn factor(&self, step: usize) -> f64 {
        if step <= self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        // The first decaying step has progress 1 / decay_steps only after a step at the peak: the virtual step of
        // torchtitan's plateau.
        let stable_end = (self.total_steps + 1).saturating_sub(self.decay_steps);
        if self.decay_steps == 0 || step <= stable_end {
            return 1.0;
        }
        let progress = ((step - stable_end) as f64 / self.decay_steps as f64).min(1.0);
        let shape = match self.decay_type {
            DecayShape::Linear => 1.0 - progress,
            DecayShape::Sqrt => 1.0 - progress.sqrt(),
            DecayShape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.min_factor + (1.0 - self.min_factor) * shape
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn schedule(warmup: usize, total: usize, decay: usize, decay_type: DecayShape, min_factor: f64) -> LrSchedule {
        LrSchedule { peak: 1.0, warmup_steps: warmup, total_steps: total, decay_steps: decay, decay_type, min_factor }
    }

    #[test]
    fn the_shape_in_numbers() {
        let check = |s: LrSchedule, expected: &[f64]| {
            let got: Vec<f64> = (1..=s.total_steps).map(|step| s.lr(step)).collect();
            for (g, e) in got.iter().zip(expected) {
                assert!((g - e).abs() < 1e-12, "{got:?} is not {expected:?}");
            }
            assert_eq!(got.len(), expected.len());
        };
        check(schedule(2, 6, 4, DecayShape::Linear, 0.0), &[0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        check(schedule(0, 4, 4, DecayShape::Linear, 0.2), &[1.0, 0.8, 0.6, 0.4]);
        check(schedule(1, 5, 2, DecayShape::Sqrt, 0.0), &[1.0, 1.0, 1.0, 1.0, 1.0 - 0.5f64.sqrt()]);
        check(schedule(0, 2, 2, DecayShape::Cosine, 0.0), &[1.0, 0.5]);
        check(schedule(3, 5, 0, DecayShape::Cosine, 0.0), &[1.0 / 3.0, 2.0 / 3.0, 1.0, 1.0, 1.0]);
    }

    proptest! {
        #[test]
        fn rises_stays_falls_within_bounds(
            total in 1usize..400, warmup in 0.0f64..1.0, decay in 0.0f64..1.0, floor in 0.0f64..1.0, kind in 0usize..3,
        ) {
            let warmup = (total as f64 * warmup) as usize;
            let decay = ((total - warmup) as f64 * decay) as usize;
            let shape = [DecayShape::Linear, DecayShape::Sqrt, DecayShape::Cosine][kind];
            let s = schedule(warmup, total, decay, shape, floor);
            let lr: Vec<f64> = (1..=total + 20).map(|step| s.lr(step)).collect();
            for (i, pair) in lr.windows(2).enumerate() {
                let step = i + 2; // of pair[1]
                if step <= warmup {
                    prop_assert!(pair[1] > pair[0]);
                } else {
                    prop_assert!(pair[1] <= pair[0] || i + 1 < warmup);
                }
            }
            prop_assert!(lr.iter().all(|&x| x > 0.0 || floor == 0.0) && lr.iter().all(|&x| x <= 1.0));
            prop_assert!(lr[..total].iter().all(|&x| x > 0.0), "a step with learning rate 0");
            if decay > 0 {
                // One step past the end is at the floor, and everything after it.
                prop_assert!(lr[total..].iter().all(|&x| (x - floor).abs() < 1e-12));
            }
            prop_assert!(lr[warmup.max(1) - 1..(total - decay).max(1)].iter().all(|&x| x == 1.0 || warmup == 0));
        }
    }
}
