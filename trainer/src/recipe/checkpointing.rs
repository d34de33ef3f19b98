//! When a run saves, what it resumes from, and that all ranks agree on both.

use super::recorder::Recorder;
use crate::checkpoint::{
    Checkpoint, Retention, SaveEvent, SaveReport, SaveStage, Saver, SaverOptions, TrainState, Verify, find_usable,
    step_folder_name,
};
use crate::error::{Result, TrainError};
use crate::faults::{Fault, FaultKind, kill_self};
use crate::persist::{self, WritePlan};
use crate::process::RankInfo;
use crate::worker::TrainWorker;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tangelo_configs::Plan;
use tangelo_configs::job::AsyncMode;
use tangelo_core::Phase;
use tangelo_kernels::comm::Communicator;

/// A run's saving; nothing is saved where `checkpoint.enable` is false.
pub struct Checkpointing {
    active: Option<(Saver, WritePlan)>,
    interval: u64,
    last_weights_only: bool,
    last_step: u64,
    /// The last step whose save was started.
    saved: u64,
    /// The last step whose save ended well.
    written: u64,
    /// Deadlines of a step's collectives, and of waiting until every rank has handed over its state.
    deadlines: [Duration; 2],
}

impl Checkpointing {
    /// The checkpoint that every rank is to go on from: rank 0 looks, the others are told.
    pub fn find(
        plan: &Plan,
        info: &RankInfo,
        comm: &Communicator,
        recorder: &mut Recorder,
    ) -> Result<Option<Checkpoint>> {
        if !plan.config.checkpoint.enable {
            return Ok(None);
        }
        let folder = folder(plan);
        let (mut chosen, mut answer) = (None, String::from("none"));
        if info.rank == 0 {
            match look(plan, info, recorder) {
                Ok(found) => {
                    answer = found.as_ref().map_or("none".into(), |c| format!("step {}", c.step()));
                    chosen = found;
                }
                Err(e) => answer = format!("error {e}"),
            }
        }
        let told = tell(comm, &answer)?;
        if let Some(message) = told.strip_prefix("error ") {
            return Err(TrainError::Data(message.into()));
        }
        let step: Option<u64> = told.strip_prefix("step ").and_then(|s| s.parse().ok());
        match step {
            Some(step) if info.rank != 0 => {
                let path = folder.join(step_folder_name(step));
                Checkpoint::open(&path, Verify::Sizes).map(Some).map_err(|e| TrainError::Data(e.to_string()))
            }
            _ => Ok(chosen),
        }
    }

    /// Starts saving after the choice of what to resume from.
    pub fn start(
        plan: &Plan,
        info: &RankInfo,
        worker: &TrainWorker,
        resumed_from: Option<u64>,
    ) -> Result<Checkpointing> {
        let config = &plan.config.checkpoint;
        let attempt = tell(worker.world(), &attempt_name())?;
        let active = if config.enable {
            let fault = Fault::from_env(info.rank, info.restart_count)?;
            let options = SaverOptions {
                folder: folder(plan),
                rank: info.rank,
                world_size: info.world_size,
                attempt,
                resumed_from,
                retention: Retention { keep_latest_k: config.keep_latest_k, keep_every: config.keep_every as u64 },
                asynchronous: config.async_mode == AsyncMode::Async,
                rank_deadline: Duration::from_secs(plan.config.comm.init_timeout_seconds),
                config_toml: plan.to_toml().map_err(|e| TrainError::Config(e.to_string()))?,
                model: plan.model.clone(),
                observer: fault.and_then(kill_in_save),
            };
            let mut saver = Saver::start(options).map_err(|e| TrainError::Device(e.to_string()))?;
            let writes = WritePlan::new(plan, worker);
            saver.reserve(writes.num_elements(worker));
            Some((saver, writes))
        } else {
            None
        };
        let comm = &plan.config.comm;
        // Rank 0 may wait for the other ranks' files of the save before and, where saving is synchronous, of this one.
        let waiting = 2 * comm.init_timeout_seconds + comm.train_timeout_seconds;
        Ok(Checkpointing {
            active,
            deadlines: [comm.train_timeout_seconds, waiting].map(Duration::from_secs),
            interval: config.interval as u64,
            last_weights_only: config.last_save_model_only,
            last_step: plan.config.training.steps as u64,
            saved: resumed_from.unwrap_or(0),
            written: resumed_from.unwrap_or(0),
        })
    }

    /// Whether to save after `step`: at the interval, at the end, and when asked to stop.
    pub fn due(&self, step: u64, steps: u64, stopped: bool) -> bool {
        let at_interval = self.interval > 0 && step.is_multiple_of(self.interval);
        self.active.is_some() && step != self.saved && (at_interval || step == steps || stopped)
    }

    /// Belongs before every update: waits until the last save has copied the state, which it mostly has.
    pub fn fence(&mut self, recorder: &mut Recorder) {
        if let Some((saver, _)) = &mut self.active {
            recorder.fenced(saver.fence());
        }
    }

    /// Saves; training goes on as soon as the state is copied. A save that failed is reported and the run goes on.
    ///
    /// Ranks wait here for one another: one whose save before is slow must not look lost to the others, who would go on
    /// to the next step's collectives.
    pub fn save(&mut self, worker: &TrainWorker, state: &TrainState, recorder: &mut Recorder) -> Result<()> {
        let Some((saver, writes)) = &mut self.active else { return Ok(()) };
        worker.enter(Phase::Save)?;
        let weights_only = self.last_weights_only && state.step == self.last_step;
        match persist::save(worker, writes, saver, state.clone(), weights_only) {
            Ok(stalled) => recorder.stalled(stalled),
            Err(e) => recorder.warn(state.step, &format!("a checkpoint was not saved: {e}")),
        }
        let [step, waiting] = self.deadlines;
        worker.wait_for_all(waiting, step)?;
        self.saved = state.step;
        self.report(recorder)
    }

    /// Reports saves that ended since the last look.
    fn report(&mut self, recorder: &mut Recorder) -> Result<()> {
        let Some((saver, _)) = &mut self.active else { return Ok(()) };
        loop {
            match saver.poll() {
                Ok(Some(report)) => self.written = tell_saved(&report, recorder),
                Ok(None) => return Ok(()),
                Err(e) => recorder.warn(self.saved, &format!("a checkpoint was not saved: {e}")),
            }
        }
    }

    /// Waits for the last save; here a failure is an error.
    pub fn finish(&mut self, recorder: &mut Recorder) -> Result<()> {
        let Some((saver, _)) = &mut self.active else { return Ok(()) };
        for report in saver.finish().map_err(|e| TrainError::Device(e.to_string()))? {
            self.written = tell_saved(&report, recorder);
        }
        if self.written != self.saved {
            return Err(TrainError::Device(format!(
                "the checkpoint of step {} was not saved; the newest one is of step {}. Make room or mend the folder, \
                 then start the same command again",
                self.saved, self.written
            )));
        }
        Ok(())
    }
}

/// Records a save that ended well; its step.
fn tell_saved(report: &SaveReport, recorder: &mut Recorder) -> u64 {
    if let Some(e) = &report.prune_error {
        recorder.warn(report.step, &format!("an older checkpoint was not deleted: {e}"));
    }
    recorder.saved(report.step, report.seconds);
    report.step
}

fn folder(plan: &Plan) -> PathBuf {
    plan.config.job.dump_folder.join(&plan.config.checkpoint.folder)
}

/// Rank 0: the checkpoint asked for or the newest usable one; damaged ones are named.
fn look(plan: &Plan, info: &RankInfo, recorder: &mut Recorder) -> Result<Option<Checkpoint>> {
    // A step asked for is where the job begins; a restart goes on from the newest.
    let asked = u64::try_from(plan.config.checkpoint.load_step).ok().filter(|_| info.restart_count == 0);
    let found = find_usable(&folder(plan), asked).map_err(|e| TrainError::Data(e.to_string()))?;
    for warning in &found.warnings {
        recorder.warn(warning.step, &warning.to_string());
    }
    Ok(found.checkpoint)
}

/// What rank 0 says, on every rank.
fn tell(comm: &Communicator, words: &str) -> Result<String> {
    let all = comm.all_gather_bytes(words.as_bytes())?;
    Ok(String::from_utf8_lossy(&all[0]).into_owned())
}

pub(crate) fn attempt_name() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    format!("{now:x}-{}", std::process::id())
}

/// Tests only: the process dies while the checkpoint of that step is being written.
pub(crate) fn kill_in_save(fault: Fault) -> Option<crate::checkpoint::SaveObserver> {
    if fault.kind != FaultKind::KillInSave {
        return None;
    }
    Some(Arc::new(move |event: SaveEvent| {
        if event.step == fault.step && event.stage == SaveStage::ShardWritten {
            kill_self();
        }
    }))
}
