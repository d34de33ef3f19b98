//! What rank 0 writes about a run: metrics, events, samples, progress. Other ranks only contribute their numbers.
//!
//! Means are over the steps since the last record. A failure to write never stops training.

use crate::checkpoint::TrainState;
use crate::error::Result;
use crate::optim::StepStats;
use crate::process::RankInfo;
use crate::utilization::measured_peak;
use crate::worker::{LossStats, TrainWorker, sum_over_ranks};
use std::time::Duration;
use tangelo_configs::Plan;
use tangelo_core::{Phase, env};
use tangelo_kernels::device;
use tangelo_observe::records::EventKind;
use tangelo_observe::{
    EventLog, Metric, MetricsWriter, ProgressEvent, ProgressWriter, SampleLog, SampleRecord, report, stderr_line,
    stdout_line,
};
use tangelo_planner::flops::FlopsPerToken;

/// Sums since the last record.
#[derive(Clone, Debug, Default)]
struct Window {
    steps: u32,
    tokens: u64,
    wall: Duration,
    data: Duration,
    forward: Duration,
    backward: Duration,
    communication: Duration,
    optimizer: Duration,
    checkpoint: Duration,
}

/// Where rank 0 writes what is cut to the step that a run goes on from.
struct Sinks {
    metrics: MetricsWriter,
    samples: SampleLog,
}

/// Gathers and writes.
pub struct Recorder {
    log_freq: u64,
    steps: u64,
    plan: Plan,
    flops: FlopsPerToken,
    predicted_bytes: f64,
    progress: ProgressWriter,
    /// Rank 0 only, from the beginning: what is found while the run is set up belongs there too.
    events: Option<EventLog>,
    /// Rank 0 only, from the first step on.
    sinks: Option<Sinks>,
    is_first: bool,
    window: Window,
    peak_flops: Option<f64>,
    speed: Speed,
}

/// Numbers of the last record, repeated in progress between records.
#[derive(Clone, Copy, Debug, Default)]
struct Speed {
    tokens_per_second: Option<f64>,
    mfu: Option<f64>,
    memory_bytes: Option<u64>,
}

impl Recorder {
    /// A recorder that is silent except on rank 0.
    pub fn new(plan: &Plan, info: &RankInfo) -> Result<Recorder> {
        let is_first = info.rank == 0;
        let fd = std::env::var(env::PROGRESS_FD).ok().filter(|_| is_first);
        Ok(Recorder {
            log_freq: plan.config.metrics.log_freq.max(1) as u64,
            steps: plan.config.training.steps as u64,
            plan: plan.clone(),
            flops: tangelo_planner::flops::per_token(plan),
            predicted_bytes: tangelo_planner::memory::predict(plan).total_bytes() as f64,
            progress: ProgressWriter::from_fd_number(fd.as_deref()),
            events: is_first.then(|| EventLog::open(&plan.config.job.dump_folder)),
            sinks: None,
            is_first,
            window: Window::default(),
            peak_flops: None,
            speed: Speed::default(),
        })
    }

    /// Opens the files of a run that starts after `state.step`.
    pub fn begin(&mut self, state: &TrainState, worker: &TrainWorker) -> Result<()> {
        if !self.is_first {
            return Ok(());
        }
        let run = &self.plan.config.job.dump_folder;
        let tensorboard =
            self.plan.config.metrics.enable_tensorboard.then_some(&self.plan.config.metrics.save_tb_folder);
        self.sinks = Some(Sinks {
            metrics: MetricsWriter::open(run, tensorboard.map(|p| p.as_path()), state.step),
            samples: SampleLog::open(run, state.step),
        });
        if state.step > 0 {
            let message =
                format!("went on from the checkpoint of step {} on {} ranks", state.step, worker.world().size());
            self.event(EventKind::Resume, state.step, &message);
        }
        self.phase("training");
        Ok(())
    }

    /// Something long begins.
    pub fn phase(&mut self, name: &str) {
        self.progress.send(&ProgressEvent::Phase { name: name.into() });
    }

    /// Something the user should know.
    pub fn warn(&mut self, step: u64, message: &str) {
        if self.is_first {
            stderr_line(format!("warning: {message}"));
        }
        self.event(EventKind::Warning, step, message);
    }

    fn event(&mut self, kind: EventKind, step: u64, message: &str) {
        if let Some(events) = &mut self.events {
            events.append(kind, Some(step), message);
        }
    }

    /// Whether rank 0 speaks for itself: torchrun or srun started the ranks, and no launcher of ours listens.
    fn is_alone(&self) -> bool {
        self.is_first && !self.progress.is_open()
    }

    /// A checkpoint is complete.
    pub fn saved(&mut self, step: u64, seconds: f64) {
        self.event(EventKind::Saved, step, &format!("checkpoint of step {step} written in {seconds:.2} s"));
        self.progress.send(&ProgressEvent::Saved { step });
    }

    /// Training stood still for a checkpoint.
    pub fn stalled(&mut self, time: Duration) {
        self.window.checkpoint += time;
        self.window.wall += time;
    }

    /// As [`Recorder::stalled`], within a step, whose time holds it already.
    pub fn fenced(&mut self, time: Duration) {
        self.window.checkpoint += time;
    }

    /// The run is over, or a signal ended it before the last of its `steps`.
    pub fn done(&mut self, step: u64, steps: u64) {
        let kind = if step < steps { EventKind::Signal } else { EventKind::Done };
        self.event(kind, step, &format!("ended after step {step} of {steps}"));
        self.progress.send(&ProgressEvent::Done { step, steps });
        if self.is_alone()
            && let Err(e) = report::write(&self.plan.config.job.dump_folder)
        {
            self.warn(step, &format!("the report cannot be written: {e}"));
        }
    }

    /// After each step; every rank calls it, for records need everybody's memory.
    pub fn step(
        &mut self,
        worker: &TrainWorker,
        state: &TrainState,
        wall: Duration,
        waited: Duration,
        loss: &LossStats,
        stats: &StepStats,
    ) -> Result<()> {
        worker.enter(Phase::Metrics)?;
        let w = &mut self.window;
        w.steps += 1;
        w.tokens += loss.tokens;
        w.wall += wall;
        w.data += waited;
        w.forward += loss.forward;
        w.backward += loss.backward;
        w.communication += loss.communication + stats.communication;
        w.optimizer += stats.update;
        if stats.skipped {
            self.skipped(state, loss, stats);
        }
        if state.step.is_multiple_of(self.log_freq) || state.step == 1 || state.step == self.steps {
            self.record(worker, state, loss, stats)?;
        }
        self.progress.send(&ProgressEvent::Step {
            step: state.step,
            steps: self.steps,
            loss: Some(loss.loss).filter(|x| x.is_finite()),
            tokens_per_second: self.speed.tokens_per_second,
            mfu: self.speed.mfu,
            memory_bytes: self.speed.memory_bytes,
            lr: Some(state.learning_rate),
            grad_norm: Some(stats.grad_norm).filter(|x| x.is_finite()),
        });
        Ok(())
    }

    fn skipped(&mut self, state: &TrainState, loss: &LossStats, stats: &StepStats) {
        let last = state.global_sample_index - 1;
        let first = state.global_sample_index - self.plan.global_batch_size as u64;
        let (loss, grad_norm, step) = (loss.loss, stats.grad_norm, state.step);
        let reason = format!("loss {loss}, gradient norm {grad_norm}; samples {first} to {last}");
        self.event(EventKind::Skipped, step, &reason);
        if self.is_alone() {
            stderr_line(format!("warning: step {step} skipped: {reason}"));
        }
        self.progress.send(&ProgressEvent::Skipped { step, reason });
    }

    fn record(&mut self, worker: &TrainWorker, state: &TrainState, loss: &LossStats, stats: &StepStats) -> Result<()> {
        let own = device::gpu_memory(worker.model().device())
            .map_or_else(|| device::memory().peak_resident_bytes, |gpu| gpu.peak_allocated_bytes);
        let memory = max_over_ranks(worker, own as f64)?;
        let peak = self.peak(worker)?;
        let w = std::mem::take(&mut self.window);
        let per_step = |d: Duration| d.as_secs_f64() / f64::from(w.steps.max(1));
        let training = w.wall.saturating_sub(w.checkpoint);
        let tokens_per_second = w.tokens as f64 / training.as_secs_f64().max(1e-9);
        let mfu = |flops: f64| flops * tokens_per_second / peak;
        let (causal, full) = (mfu(self.flops.causal), mfu(self.flops.full));
        self.speed = Speed {
            tokens_per_second: Some(tokens_per_second),
            mfu: Some(causal).filter(|x| x.is_finite()),
            memory_bytes: Some(memory as u64),
        };
        let values = [
            (Metric::Loss, loss.loss),
            (Metric::GradNorm, stats.grad_norm),
            (Metric::Lr, state.learning_rate),
            (Metric::TokensSeen, state.tokens_seen as f64),
            (Metric::SkippedSteps, state.skipped_steps as f64),
            (Metric::TokensPerSecond, tokens_per_second),
            (Metric::Mfu, causal),
            (Metric::MfuFullAttention, full),
            (Metric::StepSeconds, per_step(w.wall)),
            (Metric::DataSeconds, per_step(w.data)),
            (Metric::ForwardSeconds, per_step(w.forward)),
            (Metric::BackwardSeconds, per_step(w.backward)),
            (Metric::CommunicationSeconds, per_step(w.communication)),
            (Metric::OptimizerSeconds, per_step(w.optimizer)),
            (Metric::CheckpointSeconds, per_step(w.checkpoint)),
            (Metric::MemoryBytes, memory),
            (Metric::PredictedMemoryBytes, self.predicted_bytes),
        ];
        let counted = match loss.allocated {
            Some(bytes) => Some((Metric::PassAllocationBytes, max_over_ranks(worker, bytes as f64)?)),
            None => None,
        };
        if let Some(sinks) = &mut self.sinks {
            sinks.metrics.record(state.step, &[&values[..], counted.as_slice()].concat());
        }
        if self.is_alone() {
            let (step, steps, loss) = (state.step, self.steps, loss.loss);
            stdout_line(format!("step {step}/{steps}  loss {loss:.4}  {tokens_per_second:.0} tokens/s"));
        }
        Ok(())
    }

    /// FLOP/s that all ranks' matrix products reach together, measured once while all of them measure.
    fn peak(&mut self, worker: &TrainWorker) -> Result<f64> {
        if let Some(peak) = self.peak_flops {
            return Ok(peak);
        }
        let peak = sum_over_ranks(worker.world(), &[measured_peak(worker)])?[0];
        self.peak_flops = Some(peak);
        Ok(peak)
    }

    /// An evaluation is done.
    pub fn evaluated(&mut self, step: u64, loss: f64, time: Duration) {
        let values =
            [(Metric::EvalLoss, loss), (Metric::EvalPerplexity, loss.exp()), (Metric::EvalSeconds, time.as_secs_f64())];
        if let Some(sinks) = &mut self.sinks {
            sinks.metrics.record(step, &values);
        }
        let finite = |x: f64| Some(x).filter(|x| x.is_finite());
        self.progress.send(&ProgressEvent::Eval { step, loss: finite(loss), perplexity: finite(loss.exp()) });
    }

    /// What the model wrote.
    pub fn sample(&mut self, step: u64, prompt: &str, text: &str) {
        if let Some(sinks) = &mut self.sinks {
            sinks.samples.append(&SampleRecord { step, prompt: prompt.into(), text: text.into(), note: String::new() });
        }
    }
}

/// The largest of a number over ranks.
fn max_over_ranks(worker: &TrainWorker, value: f64) -> Result<f64> {
    if worker.world().size() == 1 {
        return Ok(value);
    }
    let all = worker.world().all_gather(&tch::Tensor::from_slice(&[value]).to_device(worker.world().device()))?;
    Ok(all.max().double_value(&[]))
}
