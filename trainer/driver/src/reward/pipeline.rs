//! The parts of a reward put together: all samples to all parts at once, then the sum.
//!
//! Invariants: values and totals are finite; a total is a function of the values, the weights and `on_error` alone;
//! samples and answers have the same order.

use super::Sample;
use super::alarm::{Alarm, AlarmKind, ZeroWatch};
use super::builtin::Builtin;
use super::process::{Answer, CallError, ProcessPool, payload};
use super::summary::{PartSummary, Tally};
use crate::error::{DriverError, Result};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tangelo_configs::Reward;
use tangelo_configs::reward::{OnError, RewardFunction, RewardPart};

/// Characters of a completion that an alarm or an error shows.
const SHOWN: usize = 120;

/// What the job says beyond `[reward]`.
#[derive(Clone, Debug, Default)]
pub struct RewardOptions {
    /// Where the stderr of each part's processes is appended, as `reward-<part>.log`; nowhere where absent.
    pub log_folder: Option<PathBuf>,
}

/// All parts of a reward, running. Calls may come from several threads at once; from async code, on a blocking one.
pub struct RewardPipeline {
    parts: Vec<Part>,
    watches: Mutex<Vec<ZeroWatch>>,
}

struct Part {
    config: RewardPart,
    runner: Runner,
}

enum Runner {
    Builtin(Builtin),
    Processes(ProcessPool),
    /// A role gives the values.
    Model,
}

/// A sample's reward.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// The sum of weight x value; 0 where the sample is dropped.
    pub total: f64,
    /// The values before the weights, of the parts that apply; behind each, what else it said, as `part/name`.
    pub parts: Vec<(String, f64)>,
    /// What went wrong, where something did.
    pub error: Option<String>,
    /// The sample is to be left out of training.
    pub dropped: bool,
}

/// The rewards of a batch.
#[derive(Clone, Debug, Default)]
pub struct ScoredBatch {
    /// One for each sample, in their order.
    pub samples: Vec<Scored>,
    /// What each part did, for metrics.
    pub parts: Vec<PartSummary>,
    /// What looks wrong.
    pub alarms: Vec<Alarm>,
}

/// What a part says of one sample.
#[derive(Clone, Debug)]
enum Cell {
    /// The part does not apply.
    None,
    Value {
        answer: Answer,
        answered: bool,
        took: Duration,
    },
    /// No finite number.
    NonFinite(f64),
    Failed(String),
}

/// A batch whose own parts are scored, waiting for what reward models say.
pub struct Pending<'a> {
    pipeline: &'a RewardPipeline,
    samples: &'a [Sample],
    /// By part, then by sample; nothing for a model that was not heard yet.
    cells: Vec<Option<Vec<Cell>>>,
    seconds: Vec<f64>,
}

impl RewardPipeline {
    /// Compiles patterns and starts the processes of the user's parts.
    ///
    /// # Errors
    /// Values that make no sense, patterns that do not compile, programs that do not start (with the end of their
    /// stderr).
    pub fn start(config: &Reward, options: &RewardOptions) -> Result<RewardPipeline> {
        config.check()?;
        let parts = config.parts.iter().map(|part| Part::start(part, options)).collect::<Result<Vec<_>>>()?;
        let watches = Mutex::new(vec![ZeroWatch::default(); parts.len()]);
        Ok(RewardPipeline { parts, watches })
    }

    /// Whether a built-in part compares with a ground truth, so that prompts must have one.
    pub fn needs_ground_truth(&self) -> bool {
        self.parts.iter().any(|part| matches!(&part.runner, Runner::Builtin(b) if b.needs_ground_truth()))
    }

    /// The parts that reward models give: (part, role).
    pub fn model_parts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.parts.iter().filter_map(|part| match &part.config.function {
            RewardFunction::Model { role } => Some((part.config.name(), role.as_str())),
            _ => None,
        })
    }

    /// Scores a batch where no part is a reward model's.
    ///
    /// # Errors
    /// As [`RewardPipeline::evaluate`].
    pub fn score(&self, samples: &[Sample]) -> Result<ScoredBatch> {
        self.evaluate(samples)?.finish()
    }

    /// Runs all parts but those of reward models, whose values are added later.
    ///
    /// # Errors
    /// A sample that a part with `on_error = "stop"` cannot score, a program that fails whatever it is given, a sample
    /// to which no part applies.
    pub fn evaluate<'a>(&'a self, samples: &'a [Sample]) -> Result<Pending<'a>> {
        self.check_applies(samples)?;
        // Processes first: they work while this thread runs the built-in parts.
        let submitted: Vec<_> = self.parts.iter().map(|part| part.submit(samples)).collect();
        let mut pending = Pending { pipeline: self, samples, cells: Vec::new(), seconds: Vec::new() };
        for part in &self.parts {
            let start = Instant::now();
            pending.cells.push(part.judge_all(samples)?);
            pending.seconds.push(start.elapsed().as_secs_f64());
        }
        for (index, submitted) in submitted.into_iter().enumerate() {
            if let Some(submitted) = submitted {
                pending.cells[index] = Some(self.parts[index].collect(&submitted.answers, samples)?);
                pending.seconds[index] = submitted.start.elapsed().as_secs_f64();
            }
        }
        Ok(pending)
    }

    fn check_applies(&self, samples: &[Sample]) -> Result<()> {
        let lost = samples.iter().find(|sample| !self.parts.iter().any(|part| part.applies(sample)));
        lost.map_or(Ok(()), |sample| {
            Err(DriverError::Reward {
                part: "*".into(),
                reason: format!(
                    "no part applies to data source `{}`; add it to `data_sources` of one, or a part without \
                     `data_sources`",
                    sample.prompt.data_source
                ),
            })
        })
    }
}

/// Whether a built-in part compares with a ground truth; nothing is started.
///
/// # Errors
/// Patterns that do not compile.
pub fn needs_ground_truth(config: &Reward) -> Result<bool> {
    let wrong = |part: &RewardPart, reason| DriverError::Reward { part: part.name().to_owned(), reason };
    let builtin = |part: &RewardPart| Builtin::new(&part.function).map_err(|reason| wrong(part, reason));
    let builtins = config.parts.iter().map(builtin).collect::<Result<Vec<_>>>()?;
    Ok(builtins.into_iter().flatten().any(|b| b.needs_ground_truth()))
}

struct Submitted {
    answers: Receiver<super::process::Done>,
    start: Instant,
}

impl Part {
    fn start(config: &RewardPart, options: &RewardOptions) -> Result<Part> {
        let wrong = |reason| DriverError::Reward { part: config.name().to_owned(), reason };
        let builtin = Builtin::new(&config.function).map_err(wrong)?;
        let runner = match builtin {
            Some(builtin) => Runner::Builtin(builtin),
            None => ProcessPool::start(config.name(), &config.function, options.log_folder.as_deref())
                .map_err(wrong)?
                .map_or(Runner::Model, Runner::Processes),
        };
        Ok(Part { config: config.clone(), runner })
    }

    fn applies(&self, sample: &Sample) -> bool {
        let sources = &self.config.data_sources;
        sources.is_empty() || sources.contains(&sample.prompt.data_source)
    }

    /// What a built-in part says; nothing of another.
    fn judge_all(&self, samples: &[Sample]) -> Result<Option<Vec<Cell>>> {
        let Runner::Builtin(builtin) = &self.runner else { return Ok(None) };
        let cells: Vec<Cell> = samples.iter().map(|sample| self.judge(builtin, sample)).collect();
        for (cell, sample) in cells.iter().zip(samples) {
            self.check(cell, sample)?;
        }
        Ok(Some(cells))
    }

    fn judge(&self, builtin: &Builtin, sample: &Sample) -> Cell {
        if !self.applies(sample) {
            return Cell::None;
        }
        let start = Instant::now();
        match builtin.judge(sample) {
            Ok(judged) => {
                let answer = Answer { score: judged.value, parts: Vec::new() };
                Cell::Value { answer, answered: judged.answered, took: start.elapsed() }
            }
            Err(reason) => Cell::Failed(reason),
        }
    }

    fn submit(&self, samples: &[Sample]) -> Option<Submitted> {
        let Runner::Processes(pool) = &self.runner else { return None };
        let (reply, answers) = channel();
        let start = Instant::now();
        for (tag, sample) in samples.iter().enumerate().filter(|(_, sample)| self.applies(sample)) {
            pool.submit(tag, payload(sample, pool.is_verl), reply.clone());
        }
        Some(Submitted { answers, start })
    }

    /// Waits for the answers; with `on_error = "stop"` no longer than to the first error.
    fn collect(&self, answers: &Receiver<super::process::Done>, samples: &[Sample]) -> Result<Vec<Cell>> {
        let mut cells = vec![Cell::None; samples.len()];
        let mut left = samples.iter().filter(|sample| self.applies(sample)).count();
        while left > 0 {
            let done = answers.recv().map_err(|_| self.error("the thread of its processes ended".into()))?;
            left -= 1;
            cells[done.tag] = match done.result {
                Ok(answer) if answer.score.is_finite() => Cell::Value { answer, answered: true, took: done.took },
                Ok(answer) => Cell::NonFinite(answer.score),
                Err(CallError::Call(reason)) => Cell::Failed(reason),
                Err(CallError::Unusable(reason)) => return Err(self.error(reason)),
            };
            self.check(&cells[done.tag], &samples[done.tag])?;
        }
        Ok(cells)
    }

    /// Turns a sample's failure into the job's where `on_error` is `stop`.
    fn check(&self, cell: &Cell, sample: &Sample) -> Result<()> {
        let Some(reason) = reason_of(cell).filter(|_| self.config.on_error == OnError::Stop) else { return Ok(()) };
        let prompt = &sample.prompt;
        Err(self.error(format!(
            "prompt {} of `{}`: {reason}. To go on without such samples set on_error = \"drop\" (or \"zero\")",
            prompt.index, prompt.data_source
        )))
    }

    fn error(&self, reason: String) -> DriverError {
        DriverError::Reward { part: self.config.name().to_owned(), reason }
    }

    fn watches_zeros(&self) -> bool {
        match &self.runner {
            Runner::Builtin(builtin) => builtin.zero_is_failure(),
            Runner::Processes(_) | Runner::Model => true,
        }
    }

    fn restarts(&self) -> u64 {
        match &self.runner {
            Runner::Processes(pool) => pool.take_restarts(),
            Runner::Builtin(_) | Runner::Model => 0,
        }
    }
}

fn reason_of(cell: &Cell) -> Option<String> {
    match cell {
        Cell::None | Cell::Value { .. } => None,
        Cell::NonFinite(value) => Some(format!("its value is {value}, no finite number")),
        Cell::Failed(reason) => Some(reason.clone()),
    }
}

impl Pending<'_> {
    /// Adds what a reward model says, one value for each sample in their order.
    ///
    /// # Errors
    /// A name that is no part of a model, another number of values, values that are not finite where the part's
    /// `on_error` is `stop`.
    pub fn set_model(&mut self, part: &str, values: &[f64]) -> Result<()> {
        let parts = &self.pipeline.parts;
        let found = parts.iter().position(|p| p.config.name() == part && matches!(p.runner, Runner::Model));
        let Some(index) = found else {
            return Err(DriverError::Internal(format!("reward part `{part}` is no reward model's")));
        };
        if values.len() != self.samples.len() {
            return Err(DriverError::Internal(format!(
                "reward model `{part}` gave {} values for {} samples",
                values.len(),
                self.samples.len()
            )));
        }
        let cell = |(sample, value): (&Sample, &f64)| match *value {
            _ if !parts[index].applies(sample) => Cell::None,
            score if score.is_finite() => {
                Cell::Value { answer: Answer { score, parts: Vec::new() }, answered: true, took: Duration::ZERO }
            }
            score => Cell::NonFinite(score),
        };
        let cells: Vec<Cell> = self.samples.iter().zip(values).map(cell).collect();
        for (cell, sample) in cells.iter().zip(self.samples) {
            parts[index].check(cell, sample)?;
        }
        self.cells[index] = Some(cells);
        Ok(())
    }

    /// The sums, with what to record and what to warn of.
    ///
    /// # Errors
    /// A reward model that was not heard.
    pub fn finish(self) -> Result<ScoredBatch> {
        let mut batch = ScoredBatch { samples: vec![Scored::default(); self.samples.len()], ..Default::default() };
        for (index, part) in self.pipeline.parts.iter().enumerate() {
            let cells = self.cells[index].as_ref().ok_or_else(|| {
                DriverError::Internal(format!("reward model `{}` gave no values", part.config.name()))
            })?;
            let mut tally = Tally::new(part.config.name());
            for (scored, cell) in batch.samples.iter_mut().zip(cells) {
                add(scored, &part.config, cell, &mut tally);
            }
            tally.summary.seconds = self.seconds[index];
            tally.summary.num_restarts = part.restarts();
            batch.parts.push(tally.summary);
            batch.alarms.extend(self.non_finite(part, cells));
            batch.alarms.extend(self.all_zero(index, part, cells));
        }
        for scored in batch.samples.iter_mut().filter(|scored| scored.dropped) {
            scored.total = 0.0;
        }
        Ok(batch)
    }

    fn non_finite(&self, part: &Part, cells: &[Cell]) -> Option<Alarm> {
        let mut wrong = cells.iter().zip(self.samples).filter(|(cell, _)| matches!(cell, Cell::NonFinite(_)));
        let (_, first) = wrong.next()?;
        Some(alarm(AlarmKind::NonFinite, part, (1 + wrong.count() as u64, 0), first))
    }

    fn all_zero(&self, index: usize, part: &Part, cells: &[Cell]) -> Option<Alarm> {
        if !part.watches_zeros() {
            return None;
        }
        let mut watches = self.pipeline.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let mut last = None;
        for (cell, sample) in cells.iter().zip(self.samples) {
            if let Cell::Value { answer, answered, .. } = cell {
                watches[index].see(answer.score, *answered);
                last = Some(sample);
            }
        }
        let (zeros, unanswered) = watches[index].due()?;
        last.map(|sample| alarm(AlarmKind::AllZero, part, (zeros, unanswered), sample))
    }
}

fn alarm(kind: AlarmKind, part: &Part, (count, num_unanswered): (u64, u64), sample: &Sample) -> Alarm {
    let length = sample.completion.chars().count();
    Alarm {
        kind,
        part: part.config.name().to_owned(),
        count,
        num_unanswered,
        completion: sample.completion.chars().skip(length.saturating_sub(SHOWN)).collect(),
        ground_truth: sample.prompt.ground_truth.to_string(),
    }
}

/// Adds a part's value to a sample's reward.
fn add(scored: &mut Scored, config: &RewardPart, cell: &Cell, tally: &mut Tally) {
    let name = config.name();
    match cell {
        Cell::None => {}
        Cell::Value { answer, answered, took } => {
            scored.total += config.weight * answer.score;
            scored.parts.push((name.to_owned(), answer.score));
            scored.parts.extend(answer.parts.iter().map(|(key, value)| (format!("{name}/{key}"), *value)));
            tally.scored(answer.score, *answered, *took);
        }
        Cell::NonFinite(_) | Cell::Failed(_) => {
            let reason = reason_of(cell).unwrap_or_default();
            tally.failed(&reason);
            scored.error.get_or_insert_with(|| format!("{name}: {reason}"));
            scored.dropped |= config.on_error == OnError::Drop;
            scored.parts.push((name.to_owned(), 0.0));
        }
    }
}

#[cfg(test)]
mod tests;
