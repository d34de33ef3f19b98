//! The JSON lines of a run folder, as types: metrics, events and samples; and how they are read, cut and appended.
//!
//! Readers skip lines that are not whole (a run killed in the middle of a write) and keys they do not know (another
//! version's). Numbers that are not finite are the strings `"NaN"`, `"inf"` and `"-inf"`, since JSON has no others.

use crate::Metric;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

/// One line of metrics.jsonl.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricRecord {
    /// The step, counted from 1.
    pub step: u64,
    /// When, seconds since 1970.
    pub time: f64,
    /// The numbers.
    pub values: Vec<(Metric, f64)>,
}

impl MetricRecord {
    /// The value of a metric, if the record has it.
    pub fn get(&self, metric: Metric) -> Option<f64> {
        self.values.iter().find(|(m, _)| *m == metric).map(|&(_, v)| v)
    }

    /// As a line of JSON, without line end.
    pub fn to_json(&self) -> String {
        let mut map = Map::new();
        map.insert("step".into(), self.step.into());
        map.insert("time".into(), number(self.time));
        for &(metric, value) in &self.values {
            map.insert(metric.name().into(), number(value));
        }
        Value::Object(map).to_string()
    }

    /// From a line of JSON.
    pub fn from_json(line: &str) -> Option<MetricRecord> {
        let map: Map<String, Value> = serde_json::from_str(line).ok()?;
        let step = map.get("step")?.as_u64()?;
        let time = map.get("time").and_then(parse_number).unwrap_or(f64::NAN);
        let known = |(key, value): (&String, &Value)| Some((Metric::from_name(key)?, parse_number(value)?));
        Some(MetricRecord { step, time, values: map.iter().filter_map(known).collect() })
    }
}

/// One line of metrics.jsonl whose names are the run's own.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedRecord {
    /// The step, counted from 1; 0: before the first.
    pub step: u64,
    /// When, seconds since 1970.
    pub time: f64,
    /// The numbers.
    pub values: Vec<(String, f64)>,
}

impl NamedRecord {
    /// As a line of JSON, without line end.
    pub fn to_json(&self) -> String {
        let mut map = Map::new();
        map.insert("step".into(), self.step.into());
        map.insert("time".into(), number(self.time));
        for (name, value) in &self.values {
            map.insert(name.clone(), number(*value));
        }
        Value::Object(map).to_string()
    }

    /// From a line of JSON.
    pub fn from_json(line: &str) -> Option<NamedRecord> {
        let map: Map<String, Value> = serde_json::from_str(line).ok()?;
        let step = map.get("step")?.as_u64()?;
        let time = map.get("time").and_then(parse_number).unwrap_or(f64::NAN);
        let own = map.iter().filter(|(name, _)| !["step", "time"].contains(&name.as_str()));
        let values = own.filter_map(|(name, value)| Some((name.clone(), parse_number(value)?))).collect();
        Some(NamedRecord { step, time, values })
    }
}

fn number(value: f64) -> Value {
    match serde_json::Number::from_f64(value) {
        Some(n) => Value::Number(n),
        None if value.is_nan() => "NaN".into(),
        None if value > 0.0 => "inf".into(),
        None => "-inf".into(),
    }
}

fn parse_number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.parse().ok(),
        _ => None,
    }
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The launcher started the ranks for the first time.
    Start,
    /// The launcher started them again after a failure.
    Restart,
    /// Training went on from a checkpoint.
    Resume,
    /// A checkpoint was completed.
    Saved,
    /// A step was left out because loss or gradient was not finite.
    Skipped,
    /// A checkpoint was found torn and left out, or something else that a user should know.
    Warning,
    /// Ranks failed.
    Failure,
    /// A signal asked the run to stop.
    Signal,
    /// The run is over.
    Done,
}

/// One line of events.jsonl.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// When, seconds since 1970.
    pub time: f64,
    /// At which step, where that is known.
    #[serde(default)]
    pub step: Option<u64>,
    /// What it is about.
    pub kind: EventKind,
    /// One or two sentences.
    pub message: String,
}

/// One line of samples.jsonl: what the model wrote after some step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRecord {
    /// After which step.
    pub step: u64,
    /// What it was to continue.
    pub prompt: String,
    /// What it wrote, prompt not included.
    pub text: String,
    /// What is known of it, such as its reward; empty where nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// Reads every whole line of a file of JSON lines; an absent file is empty.
pub fn read_lines<T>(path: &Path, parse: impl Fn(&str) -> Option<T>) -> io::Result<Vec<T>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut records = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        records.extend(std::str::from_utf8(&line?).ok().and_then(&parse));
    }
    Ok(records)
}

/// The metrics of a run.
pub fn read_metrics(path: &Path) -> io::Result<Vec<MetricRecord>> {
    read_lines(path, MetricRecord::from_json)
}

/// Opens a file of JSON lines for appending, after dropping every line whose `step` is beyond `last_step` and a torn
/// last one. The shortened file replaces the old one by rename, so a crash leaves one of the two.
pub fn open_after(path: &Path, last_step: u64) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    if path.exists() && !keeps_everything(path, last_step)? {
        let partial = path.with_extension("jsonl.partial");
        let mut kept = BufWriter::new(File::create(&partial)?);
        for line in BufReader::new(File::open(path)?).split(b'\n') {
            let line = line?;
            if step_of(&line).is_some_and(|step| step <= last_step) {
                kept.write_all(&line)?;
                kept.write_all(b"\n")?;
            }
        }
        kept.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        fs::rename(&partial, path)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

fn keeps_everything(path: &Path, last_step: u64) -> io::Result<bool> {
    let mut reader = BufReader::new(File::open(path)?);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        if line.pop() != Some(b'\n') || step_of(&line).is_none_or(|step| step > last_step) {
            return Ok(false);
        }
        line.clear();
    }
    Ok(true)
}

fn step_of(line: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Step {
        step: u64,
    }
    serde_json::from_slice::<Step>(line).ok().map(|s| s.step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_lacks_survive() {
        let values = vec![(Metric::Loss, f64::INFINITY), (Metric::GradNorm, f64::NEG_INFINITY), (Metric::Lr, 1e-300)];
        let record = MetricRecord { step: 5, time: 1.5, values };
        assert_eq!(record.to_json(), r#"{"step":5,"time":1.5,"loss":"inf","grad_norm":"-inf","lr":1e-300}"#);
        assert_eq!(MetricRecord::from_json(&record.to_json()), Some(record));
        let nan = MetricRecord { step: 1, time: 0.0, values: vec![(Metric::Loss, f64::NAN)] };
        assert!(MetricRecord::from_json(&nan.to_json()).unwrap().get(Metric::Loss).unwrap().is_nan());
    }

    #[test]
    fn unknown_keys_and_torn_lines_are_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.jsonl");
        fs::write(&path, b"{\"step\":1,\"new\":3,\"loss\":2.0}\nnot json\n\xff\xfe\n{\"step\":2,\"lo").unwrap();
        let records = read_metrics(&path).unwrap();
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].values, [(Metric::Loss, 2.0)]);
        assert_eq!(read_metrics(&folder.path().join("absent")).unwrap(), []);
    }
}
