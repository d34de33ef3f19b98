//! Numbers over steps, thinned to what a chart can show. Pure.

use crate::records::MetricRecord;
use crate::{Metric, records};

/// What lies between two vertical lines of a chart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// Mean step of its points.
    pub step: f64,
    /// Mean of its finite values; NaN where there is none.
    pub mean: f64,
    /// Smallest finite value, the lowest fiftieth of many left out.
    pub low: f64,
    /// Largest finite value, the highest fiftieth of many left out.
    pub high: f64,
}

/// A metric over the steps of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Ascending steps.
    pub points: Vec<(u64, f64)>,
}

impl Series {
    /// The values of a metric; records without it are left out.
    pub fn of(records: &[records::MetricRecord], metric: Metric) -> Series {
        Series { points: records.iter().filter_map(|r: &MetricRecord| Some((r.step, r.get(metric)?))).collect() }
    }

    /// The values that are numbers.
    pub fn finite(&self) -> impl Iterator<Item = f64> + '_ {
        self.points.iter().map(|p| p.1).filter(|v| v.is_finite())
    }

    /// Steps whose value is not a number.
    pub fn broken_steps(&self) -> impl Iterator<Item = u64> + '_ {
        self.points.iter().filter(|p| !p.1.is_finite()).map(|p| p.0)
    }

    /// The last value that is a number, with its step.
    pub fn last(&self) -> Option<(u64, f64)> {
        self.points.iter().rev().find(|p| p.1.is_finite()).copied()
    }

    /// The value below which `part` of the finite ones lie.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let mut values: Vec<f64> = self.finite().collect();
        values.sort_by(f64::total_cmp);
        values.get((part * values.len().saturating_sub(1) as f64).round() as usize).copied()
    }

    /// At most `count` buckets over `steps`, each with at least one point; as many as points where those are fewer.
    pub fn buckets(&self, steps: (u64, u64), count: usize) -> Vec<Bucket> {
        let (first, last) = steps;
        let width = ((last - first) as f64 + 1.0) / count as f64;
        let index = |step: u64| ((step.saturating_sub(first)) as f64 / width) as usize;
        let in_range: Vec<(u64, f64)> = self.points.iter().copied().filter(|p| (first..=last).contains(&p.0)).collect();
        in_range.chunk_by(|a, b| index(a.0) == index(b.0)).map(bucket).collect()
    }
}

fn bucket(points: &[(u64, f64)]) -> Bucket {
    let mut finite: Vec<f64> = points.iter().map(|p| p.1).filter(|v| v.is_finite()).collect();
    finite.sort_by(f64::total_cmp);
    let count = finite.len();
    let step = points.iter().map(|p| p.0 as f64).sum::<f64>() / points.len() as f64;
    if count == 0 {
        return Bucket { step, mean: f64::NAN, low: f64::NAN, high: f64::NAN };
    }
    let outer = count / 50;
    let mean = finite.iter().sum::<f64>() / count as f64;
    Bucket { step, mean, low: finite[outer].min(mean), high: finite[count - 1 - outer].max(mean) }
}

/// Round numbers from 1, 2 or 5 times a power of ten that divide `low..high` into at most `count` parts.
pub fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    if !(low.is_finite() && high > low) {
        return Vec::new();
    }
    let rough = (high - low) / count as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough * 0.999).unwrap_or(rough);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(3.1, 4.9, 4), [3.5, 4.0, 4.5]);
        assert_eq!(ticks(1.0, 1.0, 4), [0.0; 0]);
        assert_eq!(ticks(f64::NAN, 1.0, 4), [0.0; 0]);
        let tiny = ticks(0.0, 3e-4, 4);
        assert!(tiny.len() >= 3 && tiny.iter().all(|t| *t <= 3.001e-4), "{tiny:?}");
    }

    #[test]
    fn buckets_show_the_spread_and_leave_out_what_is_not_a_number() {
        let mut series = Series { points: (1..=100_000).map(|i| (i, (i % 7) as f64)).collect() };
        series.points[500].1 = 1e6;
        series.points[501].1 = f64::NAN;
        let buckets = series.buckets((1, 100_000), 300);
        assert_eq!(buckets.len(), 300);
        // Values go from 0 to 6; the bucket with the peak of a million has it in its mean.
        assert!(buckets.iter().all(|b| b.low == 0.0 && (b.high == 6.0 || b.high == b.mean)));
        assert_eq!(buckets.iter().filter(|b| b.mean > 1000.0).count(), 1);
        assert!(buckets.iter().all(|b| b.low <= b.mean && b.mean <= b.high), "NaN fails this too");
        assert!(buckets.windows(2).all(|w| w[0].step < w[1].step));
        assert_eq!(series.broken_steps().collect::<Vec<_>>(), [502]);

        let few = Series { points: vec![(1, 2.0), (5, f64::INFINITY), (9, 4.0)] };
        let buckets = few.buckets((1, 9), 300);
        assert_eq!((buckets.len(), buckets[0].mean, buckets[2].mean), (3, 2.0, 4.0));
        assert!(buckets[1].mean.is_nan());
        assert_eq!(Series::default().buckets((0, 0), 300), []);
        assert_eq!((few.quantile(0.5), few.last()), (Some(4.0), Some((9, 4.0))));
    }
}
