//! What a run tells about itself: metrics, TensorBoard event files, events, samples, progress, errors, and the
//! report that shows them.
//!
//! Invariants: every metric is a [`Metric`], the one documented list; nothing here can stop training, so writers
//! swallow their own failures after warning once; every file is line by line valid on its own, so a torn last line
//! costs one record. Deliberately absent: aggregation over ranks (the recipe reduces before it records), a server,
//! and clocks inside pure functions.

pub mod failure;
pub mod metric;
pub mod progress;
pub mod records;
pub mod report;
pub mod tensorboard;
pub mod writer;

pub use failure::{ErrorRecord, FailureKind};
pub use metric::Metric;
pub use progress::{ProgressEvent, ProgressWriter};
pub use records::{EventRecord, MetricRecord, NamedRecord, SampleRecord};
pub use writer::{EventLog, MetricsWriter, NamedMetrics, SampleLog};

use std::fmt::Display;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Names of the files this room writes inside a run folder.
pub mod files {
    /// Metrics as JSON lines.
    pub const METRICS: &str = "metrics.jsonl";
    /// Starts, restarts, skipped steps and other events as JSON lines.
    pub const EVENTS: &str = "events.jsonl";
    /// Generated samples as JSON lines.
    pub const SAMPLES: &str = "samples.jsonl";
    /// The resolved configuration.
    pub const CONFIG: &str = "config.toml";
    /// The report.
    pub const REPORT: &str = "report.html";
}

/// Writes a line to stderr. Unlike the macro it does not panic when nobody reads any more: that must not end a run.
pub fn stderr_line(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// As [`stderr_line`], to stdout.
pub fn stdout_line(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Seconds since 1970, with fraction.
pub fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Milliseconds since 1970.
pub fn unix_millis() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
