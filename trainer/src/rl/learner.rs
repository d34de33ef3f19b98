//! A role that learns: a train worker with its last loss and its checkpoints.

use crate::checkpoint::{Checkpoint, Retention, Saver, SaverOptions, TrainState, Verify, step_folder_name};
use crate::error::{Result, TrainError};
use crate::faults::Fault;
use crate::persist::{self, WritePlan};
use crate::recipe::checkpointing::{attempt_name, kill_in_save};
use crate::recipe::setup;
use crate::utilization::Utilization;
use crate::worker::{LossStats, TrainWorker};
use std::path::Path;
use std::time::Duration;
use tangelo_configs::job::Checkpoint as CheckpointConfig;
use tangelo_configs::{Plan, Role};
use tangelo_control::{Metrics, Reading};
use tangelo_core::{Batch, LossSpec, Phase};
use tangelo_kernels::device;
use tangelo_observe::stderr_line;

/// A model that learns, and how it is saved.
pub struct Learner {
    role: Role,
    plan: Plan,
    worker: TrainWorker,
    /// Of the gradients that wait for an update.
    loss: LossStats,
    utilization: Utilization,
    saving: Option<(Saver, WritePlan)>,
    /// The step of the checkpoint that the role went on from.
    resumed_from: Option<u64>,
    /// Tests only.
    fault: Option<Fault>,
}

impl Learner {
    /// A role that has its weights.
    pub fn new(role: Role, plan: &Plan, worker: TrainWorker) -> Learner {
        let (loss, plan, utilization) = (LossStats::default(), plan.clone(), Utilization::default());
        Learner { role, plan, worker, loss, utilization, saving: None, resumed_from: None, fault: None }
    }

    /// Tests only: something will go wrong on this rank.
    pub fn plant(&mut self, fault: Option<Fault>) {
        self.fault = fault;
        self.worker.plant(fault);
    }

    /// The model.
    pub fn worker(&self) -> &TrainWorker {
        &self.worker
    }

    /// Loss and gradients of a mini-batch.
    pub fn forward_backward(&mut self, batch: &Batch, loss: &LossSpec) -> Result<Metrics> {
        self.loss = self.utilization.during(|| self.worker.forward_backward(batch, loss, false))?;
        let share = self.plan.data_parallel_size as f64 / self.worker.world().size() as f64;
        self.utilization.learnt_from(&self.plan.model, &self.loss.computed, share);
        let mut metrics = Metrics::default();
        let own = self.loss.metrics.iter().map(|&(name, value)| (name.to_owned(), value));
        let prefix = self.prefix();
        own.chain([(format!("{prefix}/loss"), self.loss.loss)])
            .for_each(|(name, value)| metrics.add(&name, Reading::Mean { sum: value, weight: 1.0 }));
        Ok(metrics)
    }

    /// Clips and updates.
    pub fn optim_step(&mut self, lr: f64) -> Result<Metrics> {
        let stats = self.utilization.during(|| self.worker.optim_step(lr, &self.loss))?;
        let prefix = self.prefix();
        let mut metrics = Metrics::default();
        metrics.add(&format!("{prefix}/grad_norm"), Reading::Mean { sum: stats.grad_norm, weight: 1.0 });
        metrics.add(&format!("{prefix}/skipped"), Reading::Mean { sum: f64::from(stats.skipped), weight: 1.0 });
        let (name, bytes) = match device::gpu_memory(self.worker.model().device()) {
            Some(gpu) => ("perf/max_memory_allocated_gb", gpu.peak_allocated_bytes),
            None => ("perf/cpu_memory_used_gb", device::memory().peak_resident_bytes),
        };
        metrics.add(name, Reading::Max(bytes as f64 / (1u64 << 30) as f64));
        let mfu = self.utilization.take(&self.worker);
        if mfu.is_finite() {
            metrics.add(&format!("perf/mfu/{prefix}"), Reading::Mean { sum: mfu, weight: 1.0 });
        }
        Ok(metrics)
    }

    /// What its metrics begin with, as verl names them.
    fn prefix(&self) -> &'static str {
        if self.role == Role::Critic { "critic" } else { "actor" }
    }

    /// Writes the checkpoint of `step` into `folder`, whole or not at all; waits until it is there.
    pub fn save(&mut self, folder: &Path, step: u64) -> Result<()> {
        self.worker.enter(Phase::Save)?;
        if self.saving.is_none() {
            self.saving = Some(self.open_saver(folder)?);
        }
        let Some((saver, writes)) = &mut self.saving else { unreachable!("opened above") };
        let state = TrainState {
            step,
            num_updates: self.worker.num_updates(),
            global_sample_index: 0,
            tokens_seen: 0,
            skipped_steps: 0,
            seed: self.plan.config.debug.seed,
            learning_rate: 0.0,
            loader_fingerprint: String::new(),
        };
        let failed = |e: crate::checkpoint::CheckpointError| {
            TrainError::Device(format!(
                "the checkpoint of step {step} was not saved: {e}; make room or mend the folder"
            ))
        };
        let config = &self.plan.config.checkpoint;
        let is_last = step >= self.plan.config.training.steps as u64;
        let weights_only = is_last && config.last_save_model_only;
        persist::save(&self.worker, writes, saver, state, weights_only).map_err(failed)?;
        saver.finish().map_err(failed)?;
        let comm = &self.plan.config.comm;
        let [deadline, waiting] = [comm.train_timeout_seconds, comm.init_timeout_seconds].map(Duration::from_secs);
        self.worker.wait_for_all(waiting, deadline)?;
        match is_last && config.last_save_in_hf && self.role == Role::Policy && self.worker.rank() == 0 {
            true => {
                setup::export_last(&self.plan, folder, step, &mut |warning| stderr_line(format!("warning: {warning}")))
            }
            false => Ok(()),
        }
    }

    fn open_saver(&self, folder: &Path) -> Result<(Saver, WritePlan)> {
        let (plan, worker) = (&self.plan, &self.worker);
        let names = worker.world().all_gather_bytes(attempt_name().as_bytes())?;
        let attempt = String::from_utf8_lossy(&names[0]).into_owned();
        let config = &plan.config.checkpoint;
        let options = SaverOptions {
            folder: folder.to_owned(),
            rank: worker.rank(),
            world_size: worker.world().size(),
            attempt,
            resumed_from: self.resumed_from,
            retention: retention(config),
            asynchronous: false,
            rank_deadline: Duration::from_secs(plan.config.comm.init_timeout_seconds),
            config_toml: plan.to_toml().map_err(|e| TrainError::Config(e.to_string()))?,
            model: plan.model.clone(),
            observer: self.fault.and_then(kill_in_save),
        };
        let saver = Saver::start(options).map_err(|e| TrainError::Device(e.to_string()))?;
        Ok((saver, WritePlan::new(plan, worker)))
    }

    /// Takes weights and optimizer states from the checkpoint of `step` in `folder`.
    pub fn restore(&mut self, folder: &Path, step: u64) -> Result<()> {
        let path = folder.join(step_folder_name(step));
        let checkpoint = Checkpoint::open(&path, Verify::Full).map_err(|e| TrainError::Data(e.to_string()))?;
        self.resumed_from = Some(step);
        // Where nothing is left to learn, moments may not be there.
        let weights_only = step >= self.plan.config.training.steps as u64;
        persist::restore(&mut self.worker, &checkpoint, weights_only)
    }
}

/// One more than is asked for: the driver writes its part last, so until then the checkpoint before must stay.
fn retention(config: &CheckpointConfig) -> Retention {
    let keep_latest_k = if config.keep_latest_k == 0 { 0 } else { config.keep_latest_k + 1 };
    Retention { keep_latest_k, keep_every: config.keep_every as u64 }
}
