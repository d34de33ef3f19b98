//! Pre-training and supervised fine-tuning: the loop that every rank runs. The two differ in what the loader's
//! `ce_weight` marks.

use super::checkpointing::Checkpointing;
use super::evaluation::Evaluation;
use super::recorder::Recorder;
use super::setup::{self, Setup};
use crate::checkpoint::TrainState;
use crate::error::{Result, TrainError};
use crate::faults::{Fault, FaultKind};
use crate::process::{RankInfo, StopFlag};
use crate::worker::TrainWorker;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tangelo_configs::Plan;
use tangelo_core::LossSpec;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The last step done.
    pub step: u64,
    /// Whether a signal ended it before the last step that was asked for.
    pub stopped: bool,
}

/// Trains until `training.steps`, or until a signal. `current_step` is where others see how far it is.
pub fn run(plan: &Plan, info: &RankInfo, stop: &StopFlag, current_step: &Arc<AtomicU64>) -> Result<Outcome> {
    let mut recorder = Recorder::new(plan, info)?;
    let Setup { mut worker, mut state, mut batches, held_out, mut checkpoints } =
        setup::build(plan, info, &mut recorder)?;
    let mut evaluation = Evaluation::new(plan, info, held_out)?;
    let fault = Fault::from_env(info.rank, info.restart_count)?;
    worker.plant(fault);
    let (loss, schedule, steps) = (LossSpec::next_token(), plan.schedule(), plan.config.training.steps as u64);
    let (mut stopped, first_step) = (false, state.step + 1);

    while state.step < steps && !stopped {
        state.step += 1;
        current_step.store(state.step, Ordering::Relaxed);
        worker.begin_step(state.step)?;
        // ---- one training step ------------------------------------------------------------------------------------
        let start = Instant::now();
        let batch = batches.next()?;
        let waited = start.elapsed();
        plant_nan(fault.as_ref(), &worker, state.step);
        let loss_stats = worker.forward_backward(&batch, &loss, stop.is_set())?;
        checkpoints.fence(&mut recorder);
        state.learning_rate = schedule.lr(state.step as usize);
        let step_stats = worker.optim_step(state.learning_rate, &loss_stats)?;
        // ---- below here nothing is on the hot path ----------------------------------------------------------------
        stopped = loss_stats.stop && state.step < steps;
        advance(plan, &mut state, &worker, loss_stats.tokens, step_stats.skipped);
        recorder.step(&worker, &state, start.elapsed(), waited, &loss_stats, &step_stats)?;
        check_skipped(plan, &state, step_stats.skipped)?;
        if evaluation.due(state.step) {
            evaluation.run(&worker, &state, &loss, &mut recorder)?;
        }
        if state.step == first_step {
            worker.world().set_timeout(Duration::from_secs(plan.config.comm.train_timeout_seconds));
        }
        if checkpoints.due(state.step, steps, stopped) {
            checkpoints.save(&worker, &state, &mut recorder)?;
        }
    }
    finish(plan, info, &mut checkpoints, &mut recorder, &state, stopped)?;
    Ok(Outcome { step: state.step, stopped })
}

/// Counters after a step.
fn advance(plan: &Plan, state: &mut TrainState, worker: &TrainWorker, tokens: u64, skipped: bool) {
    state.global_sample_index += plan.global_batch_size as u64;
    state.tokens_seen += tokens;
    state.num_updates = worker.num_updates();
    state.skipped_steps += u64::from(skipped);
}

/// Fails where more steps were skipped than allowed, naming the samples of the last. What helps is another
/// configuration; the same one would fail again.
fn check_skipped(plan: &Plan, state: &TrainState, skipped: bool) -> Result<()> {
    let first = state.global_sample_index - plan.global_batch_size as u64;
    let allowed = plan.config.training.max_skipped as u64;
    if skipped && state.skipped_steps > allowed {
        return Err(TrainError::Config(format!(
            "step {}: loss or gradient is not finite, the {}th step skipped (training.max_skipped = {allowed}); the \
             batch holds samples {first} to {}. Lower optimizer.lr, or start from an earlier checkpoint with \
             checkpoint.load_step",
            state.step,
            state.skipped_steps,
            state.global_sample_index - 1
        )));
    }
    Ok(())
}

fn finish(
    plan: &Plan,
    info: &RankInfo,
    checkpoints: &mut Checkpointing,
    recorder: &mut Recorder,
    state: &TrainState,
    stopped: bool,
) -> Result<()> {
    checkpoints.finish(recorder)?;
    if info.rank == 0 && !stopped && plan.config.checkpoint.last_save_in_hf {
        recorder.phase("exporting");
        let folder = plan.config.job.dump_folder.join(&plan.config.checkpoint.folder);
        setup::export_last(plan, &folder, state.step, &mut |warning| recorder.warn(state.step, warning))?;
    }
    recorder.done(state.step, plan.config.training.steps as u64);
    Ok(())
}

/// Tests only: a gradient of this rank turns NaN.
fn plant_nan(fault: Option<&Fault>, worker: &TrainWorker, step: u64) {
    if fault.is_some_and(|f| f.kind == FaultKind::Nan && f.step == step) {
        let _ = worker.kept_gradient(0).narrow(0, 0, 1).fill_(f64::NAN);
    }
}
