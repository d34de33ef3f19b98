//! Writers of a run's records. None of them returns an error: the first failure is said once on stderr, and training
//! goes on.

use crate::records::{EventKind, EventRecord, MetricRecord, NamedRecord, SampleRecord, open_after};
use crate::tensorboard::EventFile;
use crate::{Metric, files, stderr_line, unix_seconds};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Something that may fail without anybody minding more than once.
#[derive(Debug)]
struct Quiet<T> {
    what: &'static str,
    inner: Option<T>,
    failed: bool,
}

impl<T> Quiet<T> {
    fn open(what: &'static str, result: io::Result<T>) -> Quiet<T> {
        let mut quiet = Quiet { what, inner: None, failed: false };
        match result {
            Ok(inner) => quiet.inner = Some(inner),
            Err(e) => quiet.failed(&e),
        }
        quiet
    }

    fn with(&mut self, write: impl FnOnce(&mut T) -> io::Result<()>) {
        if let Some(Err(e)) = self.inner.as_mut().map(write) {
            self.failed(&e);
        }
    }

    fn failed(&mut self, error: &io::Error) {
        if !self.failed {
            stderr_line(format!(
                "warning: {} cannot be written: {error}; the run goes on without (said once)",
                self.what
            ));
        }
        self.failed = true;
    }
}

/// Writes metrics to metrics.jsonl and, if asked, to a TensorBoard event file. Rank 0 owns it.
#[derive(Debug)]
pub struct MetricsWriter {
    lines: Quiet<File>,
    events: Option<Quiet<EventFile>>,
}

impl MetricsWriter {
    /// Opens the metrics of a run whose last finished step is `resume_step` (0: from the start). Records of later
    /// steps, left by a run that went further than its checkpoint, are dropped first. `tensorboard` is the folder of
    /// the event files, inside `run_folder` unless absolute.
    pub fn open(run_folder: &Path, tensorboard: Option<&Path>, resume_step: u64) -> MetricsWriter {
        let lines = Quiet::open(files::METRICS, open_after(&run_folder.join(files::METRICS), resume_step));
        let create = |folder| EventFile::create(&run_folder.join(folder), resume_step);
        let events = tensorboard.map(|folder| Quiet::open("the TensorBoard event file", create(folder)));
        MetricsWriter { lines, events }
    }

    /// Records values of a step, in the order given.
    pub fn record(&mut self, step: u64, values: &[(Metric, f64)]) {
        let record = MetricRecord { step, time: unix_seconds(), values: values.to_vec() };
        self.lines.with(|file| file.write_all((record.to_json() + "\n").as_bytes()));
        if let Some(events) = &mut self.events {
            events.with(|file| file.scalars(record.time, step, values.iter().map(|(m, v)| (m.tag(), *v))));
        }
    }
}

/// Writes metrics whose names are not known beforehand (those of reinforcement learning, under verl's names) to
/// metrics.jsonl and, if asked, to a TensorBoard event file. The driver owns it.
#[derive(Debug)]
pub struct NamedMetrics {
    lines: Quiet<File>,
    events: Option<Quiet<EventFile>>,
}

impl NamedMetrics {
    /// As [`MetricsWriter::open`].
    pub fn open(run_folder: &Path, tensorboard: Option<&Path>, resume_step: u64) -> NamedMetrics {
        let MetricsWriter { lines, events } = MetricsWriter::open(run_folder, tensorboard, resume_step);
        NamedMetrics { lines, events }
    }

    /// Records values of a step, in the order given.
    pub fn record(&mut self, step: u64, values: &[(String, f64)]) {
        let record = NamedRecord { step, time: unix_seconds(), values: values.to_vec() };
        self.lines.with(|file| file.write_all((record.to_json() + "\n").as_bytes()));
        if let Some(events) = &mut self.events {
            let values = values.iter().map(|(name, value)| (name.as_str(), *value));
            events.with(|file| file.scalars(record.time, step, values));
        }
    }
}

/// Appends events of a run to events.jsonl. The launcher and rank 0 may both hold one: lines are appended whole.
#[derive(Debug)]
pub struct EventLog {
    file: Quiet<File>,
}

impl EventLog {
    /// Opens the events of a run; earlier ones stay, they are history.
    pub fn open(run_folder: &Path) -> EventLog {
        let open = || {
            fs::create_dir_all(run_folder)?;
            OpenOptions::new().create(true).append(true).open(run_folder.join(files::EVENTS))
        };
        EventLog { file: Quiet::open(files::EVENTS, open()) }
    }

    /// Appends one event.
    pub fn append(&mut self, kind: EventKind, step: Option<u64>, message: impl Into<String>) {
        let record = EventRecord { time: unix_seconds(), step, kind, message: message.into() };
        self.file.with(|file| append_line(file, &record));
    }
}

/// Appends samples to samples.jsonl. Rank 0 owns it.
#[derive(Debug)]
pub struct SampleLog {
    file: Quiet<File>,
}

impl SampleLog {
    /// Opens the samples of a run; those of steps beyond `resume_step` are dropped.
    pub fn open(run_folder: &Path, resume_step: u64) -> SampleLog {
        let file = open_after(&run_folder.join(files::SAMPLES), resume_step);
        SampleLog { file: Quiet::open(files::SAMPLES, file) }
    }

    /// Appends one sample.
    pub fn append(&mut self, sample: &SampleRecord) {
        self.file.with(|file| append_line(file, sample));
    }
}

/// One write call per line, so that lines of several processes do not mix.
fn append_line(file: &mut File, record: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    file.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::{read_lines, read_metrics};

    fn steps(folder: &Path) -> Vec<u64> {
        read_metrics(&folder.join(files::METRICS)).unwrap().iter().map(|r| r.step).collect()
    }

    #[test]
    fn a_resumed_run_drops_what_its_checkpoint_does_not_know() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::open(folder.path(), None, 0);
        (1..=9).for_each(|step| writer.record(step, &[(Metric::Loss, step as f64)]));
        drop(writer);
        // The run was killed in the middle of a line.
        let path = folder.path().join(files::METRICS);
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":10,\"lo").unwrap();
        let mut writer = MetricsWriter::open(folder.path(), None, 6);
        assert_eq!(steps(folder.path()), [1, 2, 3, 4, 5, 6]);
        writer.record(7, &[(Metric::Loss, 70.0)]);
        drop(writer);
        let before = fs::read(&path).unwrap();
        drop(MetricsWriter::open(folder.path(), None, 7));
        assert_eq!(fs::read(&path).unwrap(), before, "nothing to drop, nothing changed");
        assert_eq!(steps(folder.path()), [1, 2, 3, 4, 5, 6, 7]);
        drop(MetricsWriter::open(folder.path(), None, 0));
        assert_eq!(steps(folder.path()), [0u64; 0]);
    }

    #[test]
    fn a_run_folder_that_cannot_be_written_stops_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a file, not a folder");
        fs::write(&file, b"").unwrap();
        let mut writer = MetricsWriter::open(&file, Some(Path::new("tb")), 3);
        writer.record(4, &[(Metric::Loss, 1.0)]);
        assert!(writer.lines.failed && writer.events.unwrap().failed);
        EventLog::open(&file).append(EventKind::Start, None, "x");
        SampleLog::open(&file, 0).append(&SampleRecord {
            step: 1,
            prompt: String::new(),
            text: String::new(),
            note: String::new(),
        });
    }

    #[test]
    fn events_and_samples_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("a run that begins");
        let (mut a, mut b) = (EventLog::open(&run), EventLog::open(&run));
        a.append(EventKind::Start, None, "2 ranks");
        b.append(EventKind::Skipped, Some(4), "loss is NaN");
        a.append(EventKind::Done, Some(9), "");
        let parse = |line: &str| serde_json::from_str::<EventRecord>(line).ok();
        let events = read_lines(&run.join(files::EVENTS), parse).unwrap();
        let kinds: Vec<_> = events.iter().map(|e| (e.kind, e.step)).collect();
        assert_eq!(kinds, [(EventKind::Start, None), (EventKind::Skipped, Some(4)), (EventKind::Done, Some(9))]);

        let sample = |step| SampleRecord {
            step,
            prompt: "fn main".into(),
            text: "() {\n\"\u{1f600}\"".into(),
            note: "reward 1".into(),
        };
        let mut log = SampleLog::open(folder.path(), 0);
        (1..4).for_each(|step| log.append(&sample(step)));
        drop(SampleLog::open(folder.path(), 2));
        let parse = |line: &str| serde_json::from_str::<SampleRecord>(line).ok();
        let samples = read_lines(&folder.path().join(files::SAMPLES), parse).unwrap();
        assert_eq!(samples, [sample(1), sample(2)]);
    }
}
