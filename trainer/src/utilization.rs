//! How much of what its device could do a rank does: model FLOPs over measured peak (MFU).

use crate::worker::TrainWorker;
use std::time::{Duration, Instant};
use tangelo_configs::ModelSpec;
use tangelo_kernels::device;
use tangelo_planner::flops;

/// How long a device's matrix products are measured, seconds.
const PEAK_SECONDS: f64 = 0.2;

/// FLOP/s that this rank's matrix products reach in the type that it computes in; not a number where that cannot be
/// measured.
pub fn measured_peak(worker: &TrainWorker) -> f64 {
    let model = worker.model();
    device::measured_matmul_peak_flops(model.device(), model.kind(), PEAK_SECONDS).unwrap_or(f64::NAN)
}

/// What was computed since the last reading, and how long it took.
#[derive(Default)]
pub struct Utilization {
    flops: f64,
    busy: Duration,
    peak: Option<f64>,
}

impl Utilization {
    /// Runs `work` on the clock.
    pub fn during<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let done = work();
        self.busy += begin.elapsed();
        done
    }

    /// Forward and backward over documents of so many tokens behind so many of a shared prompt, a `share` of them by this
    /// rank.
    pub fn learnt_from(&mut self, model: &ModelSpec, documents: &[(usize, usize)], share: f64) {
        self.flops += share * training_flops(model, documents);
    }

    /// Model FLOPs utilization since the last reading, attention counted causally. The first reading measures the peak,
    /// off the clock.
    pub fn take(&mut self, worker: &TrainWorker) -> f64 {
        let peak = *self.peak.get_or_insert_with(|| measured_peak(worker));
        let (flops, busy) = (std::mem::take(&mut self.flops), std::mem::take(&mut self.busy));
        flops / busy.as_secs_f64() / peak
    }
}

/// A token attends to what goes before its document's and to half of that document on average.
fn training_flops(model: &ModelSpec, documents: &[(usize, usize)]) -> f64 {
    let of =
        |&(tokens, before): &(usize, usize)| 3.0 * tokens as f64 * flops::forward(model, 2 * before + tokens).causal();
    documents.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangelo_configs::flavor::flavor;

    #[test]
    fn documents_count_by_themselves_and_with_what_goes_before_them() {
        let model = flavor("smollm2-135m").unwrap().spec(0).unwrap();
        let weights = 6.0 * (134_515_008 - 61 * 576) as f64;
        // 30 layers, scores and values: 4 H d FLOPs for a query and a key, S / 2 keys, times three.
        let attention = |length: f64| 30.0 * 3.0 * 4.0 * 576.0 * length / 2.0;
        let expected = 300.0 * weights + 100.0 * attention(100.0) + 200.0 * attention(200.0);
        assert_eq!(training_flops(&model, &[(100, 0), (200, 0)]), expected);
        let (cut, whole) = (training_flops(&model, &[(40, 0), (60, 40)]), training_flops(&model, &[(100, 0)]));
        assert!((cut / whole - 1.0).abs() < 1e-12, "{cut} {whole}");
    }

    #[test]
    fn time_off_the_clock_does_not_count() {
        let mut utilization = Utilization::default();
        std::thread::sleep(Duration::from_millis(20));
        let begin = Instant::now();
        utilization.during(|| std::thread::sleep(Duration::from_millis(2)));
        assert!(utilization.busy >= Duration::from_millis(2) && utilization.busy <= begin.elapsed());
    }
}
