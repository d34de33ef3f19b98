//! The report of a run: one HTML page that needs nothing else, no network and no other file.
//!
//! Reads whatever the run folder holds: a run that has just begun, was killed, or lacks a file gives a page with less
//! in it. Curves are thinned to some hundred buckets, so a page for 100,000 steps is as small as one for 1,000.

mod chart;
mod page;
mod rl;
mod series;

pub use rl::validation_name;

use crate::records::{EventKind, EventRecord, MetricRecord, NamedRecord, SampleRecord, read_lines, read_metrics};
use crate::{files, unix_seconds};
use std::io;
use std::path::{Path, PathBuf};

/// How a run stands, as far as its files say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Done,
    Failed,
    Stopped,
    Unfinished,
    Empty,
}

/// Everything that the page shows.
#[derive(Clone, Debug)]
struct Run {
    name: String,
    description: String,
    model: String,
    started: String,
    written: String,
    status: Status,
    steps_asked: Option<u64>,
    duration: Option<String>,
    config_text: Option<String>,
    records: Vec<MetricRecord>,
    /// The same lines with all their names.
    named: Vec<NamedRecord>,
    events: Vec<EventRecord>,
    samples: Vec<SampleRecord>,
}

/// Writes `RUN/report.html` and returns where.
///
/// # Errors
/// Where a file of the run cannot be read or the page cannot be written.
pub fn write(run_folder: &Path) -> io::Result<PathBuf> {
    let path = run_folder.join(files::REPORT);
    write_to(run_folder, &path)?;
    Ok(path)
}

/// Writes the report of a run to `path`, whole or not at all.
///
/// # Errors
/// Where a file of the run cannot be read or the page cannot be written.
pub fn write_to(run_folder: &Path, path: &Path) -> io::Result<()> {
    let page = page::render(&gather(run_folder)?);
    let partial = path.with_extension("html.partial");
    std::fs::write(&partial, page)?;
    std::fs::rename(&partial, path)
}

fn gather(folder: &Path) -> io::Result<Run> {
    let mut records = read_metrics(&folder.join(files::METRICS))?;
    records.sort_by_key(|r| r.step);
    let mut named = read_lines(&folder.join(files::METRICS), NamedRecord::from_json)?;
    named.sort_by_key(|r| r.step);
    let events = read_lines(&folder.join(files::EVENTS), |line| serde_json::from_str::<EventRecord>(line).ok())?;
    let mut samples: Vec<SampleRecord> =
        read_lines(&folder.join(files::SAMPLES), |line| serde_json::from_str(line).ok())?;
    samples.sort_by_key(|s| s.step);
    let config_text = std::fs::read_to_string(folder.join(files::CONFIG)).ok();
    let config: toml::Table = config_text.as_deref().and_then(|text| text.parse().ok()).unwrap_or_default();
    let text = |section: &str, key: &str| get(&config, section, key).and_then(|v| v.as_str()).unwrap_or_default();
    let begun = events.first().map(|e| e.time).or(records.first().map(|r| r.time));
    let name = std::path::absolute(folder)?.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Run {
        name,
        description: text("job", "description").to_owned(),
        model: model_text(&config),
        started: begun.map(|t| format!("started {}", time_text(t))).unwrap_or_default(),
        written: format!("Written by tangelo {} on {}.", env!("CARGO_PKG_VERSION"), time_text(unix_seconds())),
        status: status(&records, &events),
        steps_asked: get(&config, "training", "steps").and_then(|v| v.as_integer()).map(|n| n as u64),
        duration: begun.and_then(|begin| duration_text(begin, &records, &events)),
        config_text,
        records,
        named,
        events,
        samples,
    })
}

fn get<'a>(config: &'a toml::Table, section: &str, key: &str) -> Option<&'a toml::Value> {
    config.get(section)?.as_table()?.get(key)
}

/// `llama smollm2-135m, 30 layers of 576`, as far as the configuration says.
fn model_text(config: &toml::Table) -> String {
    let text = |key| get(config, "model", key).and_then(|v| v.as_str());
    let number = |key| get(config, "model", key).and_then(|v| v.as_integer());
    let mut parts: Vec<String> = [text("name"), text("flavor")].into_iter().flatten().map(str::to_owned).collect();
    if let (Some(layers), Some(width)) = (number("num_hidden_layers"), number("hidden_size")) {
        parts.push(format!("{layers} layers of width {width}"));
    }
    parts.join(", ")
}

fn status(records: &[MetricRecord], events: &[EventRecord]) -> Status {
    let last = events.iter().rev().find(|e| !matches!(e.kind, EventKind::Warning | EventKind::Saved));
    match last.map(|e| e.kind) {
        Some(EventKind::Done) => Status::Done,
        Some(EventKind::Failure) => Status::Failed,
        Some(EventKind::Signal) => Status::Stopped,
        _ if records.is_empty() => Status::Empty,
        _ => Status::Unfinished,
    }
}

/// From the first to the last sign of life.
fn duration_text(begin: f64, records: &[MetricRecord], events: &[EventRecord]) -> Option<String> {
    let end = events.last().map(|e| e.time).into_iter().chain(records.last().map(|r| r.time)).fold(begin, f64::max);
    let seconds = (end - begin).round() as u64;
    Some(match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    })
}

/// `2026-03-01 12:00:05 UTC`
fn time_text(unix_seconds: f64) -> String {
    match jiff::Timestamp::from_second(unix_seconds as i64) {
        Ok(time) => time.to_string().replace('T', " ").replace('Z', " UTC"),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests;
