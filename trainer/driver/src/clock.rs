//! Where a step's time goes.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Seconds by phase, of the step under way.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    phases: Mutex<Phases>,
}

#[derive(Debug)]
struct Phases {
    seconds: BTreeMap<&'static str, f64>,
    /// When the last lap ended.
    lap: Instant,
}

impl Default for Clock {
    fn default() -> Clock {
        let started = Instant::now();
        Clock { started, phases: Mutex::new(Phases { seconds: BTreeMap::new(), lap: started }) }
    }
}

impl Clock {
    /// A step begins.
    pub fn restart(&mut self) {
        *self = Clock::default();
    }

    /// Waits for `work`; its time is added to `phase`.
    pub async fn time<T>(&self, phase: &'static str, work: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let result = work.await;
        *self.phases().seconds.entry(phase).or_default() += start.elapsed().as_secs_f64();
        result
    }

    /// Several things begin at once: each ends a [`Clock::lap`].
    pub fn begin_laps(&self) {
        self.phases().lap = Instant::now();
    }

    /// Something of `phase` is done; the time since anything else was is added to `phase`. So phases that take turns have
    /// their own time, those that overlap share it, and all add up to the whole.
    pub fn lap(&self, phase: &'static str) {
        let mut phases = self.phases();
        let (now, last) = (Instant::now(), phases.lap);
        phases.lap = now;
        *phases.seconds.entry(phase).or_default() += now.duration_since(last).as_secs_f64();
    }

    fn phases(&self) -> MutexGuard<'_, Phases> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seconds of the step so far.
    pub fn elapsed(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// `timing_s/<phase>` of each phase, and of the step.
    pub fn metrics(&self) -> Vec<(String, f64)> {
        let phases = self.phases();
        let seconds = phases.seconds.iter().map(|(phase, seconds)| (format!("timing_s/{phase}"), *seconds));
        seconds.chain([("timing_s/step".to_owned(), self.elapsed())]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn laps_add_up_to_the_whole() {
        let clock = Clock::default();
        clock.begin_laps();
        for phase in ["ref", "values", "ref"] {
            std::thread::sleep(Duration::from_millis(3));
            clock.lap(phase);
        }
        let seconds: BTreeMap<String, f64> = clock.metrics().into_iter().collect();
        let (reference, values) = (seconds["timing_s/ref"], seconds["timing_s/values"]);
        // Two sleeps and one; a sleep is never shorter than asked.
        assert!(reference >= 0.006 && values >= 0.003, "{seconds:?}");
        assert!(reference + values <= seconds["timing_s/step"], "{seconds:?}");
    }
}
