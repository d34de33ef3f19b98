//! Where a step's time goes.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Instant;

/// Seconds by phase, of the step under way.
#[derive(Clone, Debug)]
pub struct Clock {
    started: Instant,
    seconds: BTreeMap<&'static str, f64>,
}

impl Default for Clock {
    fn default() -> Clock {
        Clock { started: Instant::now(), seconds: BTreeMap::new() }
    }
}

impl Clock {
    /// A step begins.
    pub fn restart(&mut self) {
        *self = Clock::default();
    }

    /// Waits for `work`; its time is added to `phase`.
    pub async fn time<T>(&mut self, phase: &'static str, work: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let result = work.await;
        *self.seconds.entry(phase).or_default() += start.elapsed().as_secs_f64();
        result
    }

    /// Seconds of the step so far.
    pub fn elapsed(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// `timing_s/<phase>` of each phase, and of the step.
    pub fn metrics(&self) -> Vec<(String, f64)> {
        let phases = self.seconds.iter().map(|(phase, seconds)| (format!("timing_s/{phase}"), *seconds));
        phases.chain([("timing_s/step".to_owned(), self.elapsed())]).collect()
    }
}
