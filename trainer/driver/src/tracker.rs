//! What the driver writes about a run: metrics under verl's names, rollouts as Parquet, samples, events, progress.
//!
//! A failure to write is said once and stops nothing.

use crate::collect::{Rollout, Rollouts};
use crate::course::mean_of_updates;
use crate::prompts::PromptInput;
use crate::rollout_file::{self, Learnt, RolloutFile};
use std::path::{Path, PathBuf};
use tangelo_control::Metrics;
use tangelo_observe::records::{EventKind, read_lines};
use tangelo_observe::report::validation_name;
use tangelo_observe::{
    EventLog, NamedMetrics, NamedRecord, ProgressEvent, ProgressWriter, SampleLog, SampleRecord, files, stderr_line,
};

/// Phases of a step that the bar names, by their metrics.
const PHASES: [(&str, &str); 4] = [
    ("timing_s/gen", "generating"),
    ("timing_s/reward", "rewards"),
    ("timing_s/old_log_prob", "scoring"),
    ("timing_s/update_actor", "learning"),
];

/// Characters of a sample's prompt and completion that the report shows.
const SHOWN: usize = 2000;

/// Writes.
pub struct Tracker {
    metrics: NamedMetrics,
    samples: SampleLog,
    events: EventLog,
    progress: ProgressWriter,
    /// Where rollouts go, where they are wanted.
    rollouts: Option<PathBuf>,
    report_samples: usize,
    steps: u64,
    /// Numbers of the updates of the step under way.
    learnt: Vec<Metrics>,
    /// Whether the last that was told is a step, so that its bar is there.
    has_bar: bool,
    /// Whether the step that the run goes on from was validated.
    pub went_on_validated: bool,
}

/// What a tracker needs to know of the run.
pub struct TrackerOptions<'a> {
    /// The run's folder.
    pub run_folder: &'a Path,
    /// The folder of TensorBoard's files in it, where wanted.
    pub tensorboard: Option<&'a Path>,
    /// Whether every rollout is kept.
    pub save_rollouts: bool,
    /// Samples of a step for the report.
    pub report_samples: usize,
    /// Steps of the run.
    pub steps: u64,
    /// The step it goes on from.
    pub resumed_from: u64,
    /// Where progress goes.
    pub progress: ProgressWriter,
}

impl Tracker {
    /// Opens the files of a run; what steps beyond the checkpoint left there is dropped.
    pub fn new(options: TrackerOptions<'_>) -> Tracker {
        let TrackerOptions { run_folder, tensorboard, save_rollouts, report_samples, steps, resumed_from, progress } =
            options;
        let mut tracker = Tracker {
            metrics: NamedMetrics::open(run_folder, tensorboard, resumed_from),
            samples: SampleLog::open(run_folder, resumed_from),
            events: EventLog::open(run_folder),
            progress,
            rollouts: save_rollouts.then(|| run_folder.join("rollouts")),
            report_samples,
            steps,
            learnt: Vec::new(),
            has_bar: false,
            went_on_validated: is_validated(run_folder, resumed_from),
        };
        if resumed_from > 0 {
            let message = format!("went on from the checkpoint of step {resumed_from}");
            tracker.events.append(EventKind::Resume, Some(resumed_from), message);
        }
        tracker
    }

    /// Something long begins, and takes the place of the bar.
    pub fn phase(&mut self, name: &str) {
        self.progress.send(&ProgressEvent::Phase { name: name.into() });
        self.has_bar = false;
    }

    /// A step begins. Where there is no bar to look at until it is done, what is going on is said.
    pub fn step_begins(&mut self, step: u64) {
        if !self.has_bar {
            self.phase(&format!("step {step} of {}", self.steps));
        }
    }

    /// Something that the user should know.
    pub fn warn(&mut self, step: u64, message: &str) {
        stderr_line(format!("warning: {message}"));
        self.events.append(EventKind::Warning, Some(step), message);
    }

    /// A checkpoint is complete.
    pub fn saved(&mut self, step: u64, seconds: f64) {
        self.events.append(
            EventKind::Saved,
            Some(step),
            format!("checkpoint of step {step} written in {seconds:.2} s"),
        );
        self.progress.send(&ProgressEvent::Saved { step });
    }

    /// One update's numbers.
    pub fn learnt(&mut self, metrics: Metrics) {
        self.learnt.push(metrics);
    }

    /// The mean over the step's updates of each number, and the updates forgotten.
    pub fn take_learnt(&mut self) -> Vec<(String, f64)> {
        mean_of_updates(&std::mem::take(&mut self.learnt))
    }

    /// A step is done.
    pub fn step(&mut self, step: u64, values: &[(String, f64)], rollouts: &Rollouts, learnt: &[Learnt]) {
        self.metrics.record(step, values);
        for warning in &rollouts.warnings {
            self.warn(step, warning);
        }
        self.show(step, rollouts, "");
        if let Some(folder) = &self.rollouts {
            let file = RolloutFile { step, rollouts: &rollouts.rollouts, learnt };
            if let Err(e) = rollout_file::write(folder, &file) {
                self.warn(step, &format!("the rollouts of step {step} were not written: {e}"));
            }
        }
        let value = |name: &str| values.iter().find(|(n, _)| n == name).map(|&(_, v)| v).filter(|v| v.is_finite());
        self.has_bar = true;
        self.progress.send(&ProgressEvent::RlStep {
            step,
            steps: self.steps,
            reward: value("critic/score/mean"),
            kl: value("actor/ppo_kl"),
            response_length: value("response_length/mean"),
            seconds: value("timing_s/step"),
            phases: PHASES.iter().filter_map(|(phase, name)| Some(((*name).to_owned(), value(phase)?))).collect(),
        });
    }

    /// What went through the driver in a step.
    pub fn traffic(&mut self, step: u64, values: &[(String, f64)]) {
        self.metrics.record(step, values);
    }

    /// A validation is done.
    pub fn validated(&mut self, step: u64, values: &[(String, f64)], rollouts: &Rollouts) {
        self.metrics.record(step, values);
        self.show(step, rollouts, "validation, ");
        let told = values.iter().filter(|(name, _)| name.starts_with("val-core/"));
        let text: Vec<String> = told.map(|(name, value)| format!("{} {value:.3}", validation_name(name))).collect();
        self.progress.send(&ProgressEvent::Validation { step, text: text.join(", ") });
    }

    /// Keeps samples for the report, of prompts all over the batch; `kind` begins their notes.
    fn show(&mut self, step: u64, rollouts: &Rollouts, kind: &str) {
        let (all, count) = (&rollouts.rollouts, self.report_samples.min(rollouts.rollouts.len()));
        for index in 0..count {
            self.samples.append(&sample(step, &all[index * all.len() / count], kind));
        }
    }

    /// The run is over, or a signal ended it.
    pub fn done(&mut self, step: u64) {
        let kind = if step < self.steps { EventKind::Signal } else { EventKind::Done };
        self.events.append(kind, Some(step), format!("ended after step {step} of {}", self.steps));
        self.progress.send(&ProgressEvent::Done { step, steps: self.steps });
    }
}

/// Whether metrics.jsonl has a validation of the step.
fn is_validated(run_folder: &Path, step: u64) -> bool {
    let records = read_lines(&run_folder.join(files::METRICS), NamedRecord::from_json).unwrap_or_default();
    let mut names = records.iter().filter(|r| r.step == step).flat_map(|r| &r.values).map(|(name, _)| name);
    names.any(|name| name.starts_with("val-core/"))
}

/// What the report shows of a completion; `kind` begins its note.
fn sample(step: u64, rollout: &Rollout, kind: &str) -> SampleRecord {
    let tail = |text: &str| text.chars().rev().take(SHOWN).collect::<Vec<_>>().into_iter().rev().collect::<String>();
    let prompt = &rollout.prompt.prompt;
    // An answer in a conversation is a turn of its own; a text goes on where it stands.
    let turn = if matches!(prompt.input, PromptInput::Messages(_)) { "\n" } else { "" };
    let scored = &rollout.scored;
    let parts: Vec<String> = scored.parts.iter().map(|(name, value)| format!("{name} {}", short(*value))).collect();
    let parts = if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) };
    let error = scored.error.as_ref().map(|error| format!(", {error}")).unwrap_or_default();
    let note = format!("{kind}reward {}{parts}{error}", short(scored.total));
    SampleRecord { step, prompt: tail(&prompt.text()) + turn, text: tail(&rollout.text), note }
}

/// As many digits as a reader wants.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
