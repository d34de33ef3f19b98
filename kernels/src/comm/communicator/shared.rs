//! What all groups split from one communicator share, on whatever threads they are.

use super::{CallRecord, CommStats};
use crate::comm::position::Recorder;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;
use tangelo_core::{Moment, Phase};

/// Counters, deadline and ids of a rank. Group ids are given out by one thread at a time: [`Shared::next_group`].
pub(crate) struct Shared {
    calls: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
    exposed_nanoseconds: AtomicU64,
    timeout_ms: AtomicU64,
    /// The step, and the phase's code in the lowest byte; 0 before the first.
    moment: AtomicU64,
    /// The first group id that no group of this rank uses. Locked while groups are agreed on.
    pub next_group: Mutex<i64>,
    /// What the first failed call of any group said.
    pub failure: OnceLock<String>,
    pub recorder: OnceLock<Recorder>,
    /// Calls made, where somebody wants to see them.
    pub calls_made: OnceLock<Mutex<Vec<CallRecord>>>,
}

impl Shared {
    pub fn new(timeout: Duration) -> Shared {
        Shared {
            calls: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            exposed_nanoseconds: AtomicU64::new(0),
            timeout_ms: AtomicU64::new(milliseconds(timeout)),
            moment: AtomicU64::new(0),
            next_group: Mutex::new(1),
            failure: OnceLock::new(),
            recorder: OnceLock::new(),
            calls_made: OnceLock::new(),
        }
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed))
    }

    pub fn set_timeout(&self, timeout: Duration) {
        self.timeout_ms.store(milliseconds(timeout), Ordering::Relaxed);
    }

    /// Returns whether anything changed.
    pub fn set_moment(&self, moment: Moment) -> bool {
        let code = moment.step << 8 | moment.phase.map_or(0, |phase| u64::from(phase as u8));
        self.moment.swap(code, Ordering::Relaxed) != code
    }

    pub fn phase(&self) -> Option<Phase> {
        Phase::from_code(self.moment.load(Ordering::Relaxed) as u8)
    }

    pub fn count_bytes(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn count_call(&self, under_way: Duration) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(under_way.as_nanos() as u64, Ordering::Relaxed);
    }

    pub fn count_exposed(&self, stood_still: Duration) {
        self.exposed_nanoseconds.fetch_add(stood_still.as_nanos() as u64, Ordering::Relaxed);
    }

    pub fn stats(&self) -> CommStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CommStats {
            num_calls: load(&self.calls),
            bytes_sent: load(&self.bytes),
            seconds: load(&self.nanoseconds) as f64 * 1e-9,
            exposed_seconds: load(&self.exposed_nanoseconds) as f64 * 1e-9,
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).clamp(1, 1000 * 86_400 * 365)
}
