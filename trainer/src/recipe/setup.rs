//! What happens before the first step: meet the other ranks, build the model, give it values, open the data.

use super::checkpointing::Checkpointing;
use super::recorder::Recorder;
use crate::checkpoint::{Checkpoint, TrainState, find_usable};
use crate::error::{Result, TrainError};
use crate::init::WithNewHead;
use crate::open_model::{self, Source};
use crate::persist;
use crate::process::{RankInfo, threads_for};
use crate::verb::export;
use crate::worker::TrainWorker;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tangelo_configs::Plan;
use tangelo_core::Group;
use tangelo_data::{Loader, LoaderOptions, Prefetcher, Split, open_validation};
use tangelo_formats::ChatTemplate;
use tangelo_formats::chat::TemplateChoice;
use tangelo_formats::tokenizer::{self, TokenizerAssets};
use tangelo_kernels::comm::{Communicator, connect as connect_ranks, gloo};
use tangelo_kernels::device;
use tangelo_planner::memory::{self, Memory};
use tch::Device;

/// Batches made ready while the current one is trained on.
const PREFETCHED_BATCHES: usize = 2;

/// Everything the loop needs.
pub struct Setup {
    /// This rank's share of the model.
    pub worker: TrainWorker,
    /// Where training stands.
    pub state: TrainState,
    /// This rank's rows of the global batches that follow.
    pub batches: Batches,
    /// The held-out documents, where the job evaluates.
    pub held_out: Option<Loader>,
    /// Saving.
    pub checkpoints: Checkpointing,
}

/// The global batches from a position on, this rank's rows of each.
pub struct Batches(Prefetcher);

impl Batches {
    /// The next one.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<tangelo_core::Batch> {
        self.0.next_batch().map_err(data_error)
    }
}

/// Takes operators on a GPU that give the same bits again, where the job asks for them; those of a CPU do.
pub(super) fn be_deterministic(plan: &Plan, device: Device) -> Result<()> {
    match device.is_cuda() && plan.config.debug.deterministic {
        true => device::use_deterministic_operations().map_err(|e| TrainError::Device(e.to_string())),
        false => Ok(()),
    }
}

/// Builds everything, in the order in which errors are cheapest.
pub fn build(plan: &Plan, info: &RankInfo, recorder: &mut Recorder) -> Result<Setup> {
    let device = open_model::choose_device(plan.config.training.device, info.local_rank)?;
    be_deterministic(plan, device)?;
    device::set_threads(threads_for(plan.config.training.num_threads, info.local_world_size));
    check_memory(plan, info, device)?;
    let loader = Loader::open(loader_options(plan, info.rank)?).map_err(data_error)?;
    let held_out = open_validation(&plan.config, &loader).map_err(data_error)?;
    recorder.phase("meeting the other ranks");
    let data = connect(plan, info, device)?;
    recorder.phase("building the model");
    let mut worker = TrainWorker::new(plan, info.rank, data, device)?;
    let found = Checkpointing::find(plan, info, worker.world(), recorder)?;
    if info.rank == 0 {
        keep_tokenizer(plan, found.is_some())?;
    }
    let fingerprint = loader.fingerprint();
    let state = match &found {
        Some(checkpoint) => resume(plan, &mut worker, checkpoint, &fingerprint, recorder)?,
        None => start(plan, &mut worker, fingerprint, recorder)?,
    };
    let checkpoints = Checkpointing::start(plan, info, &worker, found.as_ref().map(Checkpoint::step))?;
    recorder.begin(&state, &worker)?;
    let batches =
        Prefetcher::new(Arc::new(loader), state.global_sample_index, PREFETCHED_BATCHES).map_err(data_error)?;
    let batches = Batches(batches);
    Ok(Setup { worker, state, batches, held_out, checkpoints })
}

/// Fails at once where the ranks of this node cannot fit: an out-of-memory kill names nobody and explains nothing.
fn check_memory(plan: &Plan, info: &RankInfo, device: Device) -> Result<()> {
    let first = info.rank - info.local_rank;
    let here = (first..first + info.local_world_size).map(|rank| plan.topology.stage(rank));
    let stages: Vec<Memory> = here.map(|stage| memory::predict_stage(plan, stage)).collect();
    let needed: u64 = stages.iter().map(Memory::total_bytes).sum();
    let predicted = stages.into_iter().max_by_key(Memory::total_bytes).unwrap_or_default();
    match device::available_memory() {
        Some(available) if !device.is_cuda() && info.local_rank == 0 && needed > available => {
            Err(TrainError::Device(format!(
                "{} ranks on this node are predicted to need {:.1} GiB, {:.1} GiB are available. Lower \
                 training.local_batch_size or training.seq_len, set activation_checkpoint.mode = \"full\", or use \
                 fewer ranks per node. The fullest rank:\n{}",
                info.local_world_size,
                gib(needed),
                gib(available),
                predicted.render(plan)
            )))
        }
        _ => Ok(()),
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// What this rank's loader reads.
fn loader_options(plan: &Plan, rank: usize) -> Result<LoaderOptions> {
    let (rows, reader) = (plan.global_batch_size, plan.topology.index(Group::Batch, rank));
    tangelo_data::loader_options(&plan.config, Split::Train, rows, reader, plan.data_parallel_size).map_err(data_error)
}

/// This rank's end of a communicator over all ranks of the job.
pub fn connect(plan: &Plan, info: &RankInfo, device: Device) -> Result<Communicator> {
    if info.world_size == 1 {
        return Ok(Communicator::single_on(device));
    }
    let meeting = gloo::GlooOptions {
        rank: info.rank,
        size: info.world_size,
        master_addr: info.master_addr.clone(),
        master_port: info.master_port,
        host_store: info.rank == 0 && !info.agent_store,
        prefix: format!("{}/{}", info.run_id, info.restart_count),
        init_timeout: Duration::from_secs(plan.config.comm.init_timeout_seconds),
        // The first step is slow (memory is touched for the first time); the loop shortens this after it.
        timeout: Duration::from_secs(plan.config.comm.init_timeout_seconds),
        interface: None,
    };
    Ok(connect_ranks(&meeting, device)?)
}

/// Goes on from a checkpoint of this run.
fn resume(
    plan: &Plan,
    worker: &mut TrainWorker,
    from: &Checkpoint,
    fingerprint: &str,
    recorder: &mut Recorder,
) -> Result<TrainState> {
    let state = from.state().clone();
    if state.step >= plan.config.training.steps as u64 {
        // Nothing is left to train: the weights are there to be exported, moments may not be.
        persist::restore(worker, from, true)?;
        return Ok(state);
    }
    if state.loader_fingerprint != fingerprint {
        return Err(TrainError::Data(format!(
            "{} was trained on other data (fingerprint {}, now {fingerprint}): the order of samples would silently \
             differ. Restore the data and the [data] section, or start a new run with another job.dump_folder and \
             checkpoint.initial_load_path = \"{}\"",
            from.path().display(),
            state.loader_fingerprint,
            from.path().display()
        )));
    }
    let expected = plan.schedule().lr(state.step as usize);
    if state.step > 0 && state.learning_rate != expected {
        let rates = format!("step {} had a learning rate of {:e}, now {expected:e}", state.step, state.learning_rate);
        recorder.warn(state.step, &format!("the schedule changed: {rates}"));
    }
    let (now, seen) = (plan.global_batch_size as u64, state.global_sample_index);
    if seen != state.step * now {
        let before = seen as f64 / state.step.max(1) as f64;
        recorder.warn(
            state.step,
            &format!(
                "the global batch changed: {before} samples per step until step {}, now {now} (by default it grows with \
                 the number of ranks). Set training.global_batch_size to go on as before",
                state.step
            ),
        );
    }
    persist::restore(worker, from, false)?;
    Ok(state)
}

/// Starts at step 0: from the seed, a pre-trained model, or another run's checkpoint.
fn start(plan: &Plan, worker: &mut TrainWorker, fingerprint: String, recorder: &mut Recorder) -> Result<TrainState> {
    let fresh = TrainState {
        step: 0,
        num_updates: 0,
        global_sample_index: 0,
        tokens_seen: 0,
        skipped_steps: 0,
        seed: plan.config.debug.seed,
        learning_rate: 0.0,
        loader_fingerprint: fingerprint,
    };
    let mut tell = |what: Told<'_>| match what {
        Told::Phase(name) => recorder.phase(name),
        Told::Warning(message) => recorder.warn(0, message),
    };
    let found = give_first_weights(plan, worker, &mut tell)?;
    Ok(found.map_or(fresh.clone(), |state| TrainState { loader_fingerprint: fresh.loader_fingerprint, ..state }))
}

/// What is told while first weights are loaded.
pub enum Told<'a> {
    /// Something long begins.
    Phase(&'a str),
    /// Something the user should know.
    Warning(&'a str),
}

/// Gives a worker the weights it begins with: from the seed, a pre-trained model, or another run's checkpoint. Where the
/// whole state of that is wanted, it is returned.
pub fn give_first_weights(
    plan: &Plan,
    worker: &mut TrainWorker,
    tell: &mut dyn FnMut(Told<'_>),
) -> Result<Option<TrainState>> {
    let seed = plan.config.debug.seed;
    let Some(path) = initial_path(plan) else {
        worker.start_from_seed(seed);
        return Ok(None);
    };
    tell(Told::Phase(&format!("loading {}", path.display())));
    let source = Source::open(&path, None)?;
    match &source {
        Source::Checkpoint(checkpoint) if worker.learns() => {
            let weights_only = plan.config.checkpoint.initial_load_model_only;
            persist::restore(worker, checkpoint, weights_only)?;
            Ok((!weights_only).then(|| checkpoint.state().clone()))
        }
        Source::Checkpoint(checkpoint) => worker.start_from(checkpoint).map(|()| None),
        Source::Pretrained(weights) => {
            let new = check_shapes(plan, weights.spec(), &path)?;
            if !new.is_empty() {
                let names = new.join(", ");
                tell(Told::Warning(&format!("{}: no {names} there; the head starts from the seed", path.display())));
            }
            let (rest, std) = (source.tensors(), plan.model.initializer_range);
            worker.start_from(&WithNewHead { rest, new, seed, std })?;
            Ok(None)
        }
    }
}

fn initial_path(plan: &Plan) -> Option<PathBuf> {
    let checkpoint = &plan.config.checkpoint;
    let assets = plan.config.model.hf_assets_path.clone().filter(|_| checkpoint.initial_load_in_hf);
    checkpoint.initial_load_path.clone().or(assets)
}

/// Fails at the first parameter in which a pre-trained model differs from the plan's; names those of a scalar head that it
/// lacks.
fn check_shapes(plan: &Plan, found: &tangelo_configs::ModelSpec, path: &Path) -> Result<Vec<String>> {
    let dtype = tangelo_core::DType::F32;
    let (expected, found) = (plan.model.parameters(dtype), found.parameters(dtype));
    let mut new = Vec::new();
    for meta in &expected {
        let other = found.iter().find(|m| m.name == meta.name).map(|m| &m.shape);
        if other.is_none() && tangelo_configs::ModelSpec::is_scalar_head(&meta.name) {
            new.push(meta.name.clone());
        } else if other != Some(&meta.shape) {
            return Err(TrainError::Config(format!(
                "{}: {} has shape {other:?} there, {:?} in [model]; give the flavor of the weights or none",
                path.display(),
                meta.name,
                meta.shape
            )));
        }
    }
    Ok(new)
}

/// The tokenizer that the job's data was prepared with, and its chat template.
pub fn job_tokenizer(plan: &Plan) -> Result<TokenizerAssets> {
    let place = plan.config.data.tokenizer_path();
    let place = place.ok_or_else(|| TrainError::Config("the job names no tokenizer: set data.tokenizer".into()))?;
    let mut found = tokenizer::load(&place).map_err(|e| TrainError::Data(e.to_string()))?;
    let data = &plan.config.data;
    let choice = TemplateChoice { file: data.chat_template.as_deref(), name: data.chat_template_name.as_deref() };
    if choice != TemplateChoice::default() {
        let chosen = ChatTemplate::choose(choice, &found).map_err(|e| TrainError::Data(e.to_string()))?;
        found.chat_template = chosen.map(|template| template.text().to_owned());
    }
    Ok(found)
}

/// Keeps the tokenizer in the run folder, so that a run can be moved and still be used. One that is there already is
/// this run's only where the run goes on.
pub fn keep_tokenizer(plan: &Plan, resumes: bool) -> Result<()> {
    let path = plan.config.job.dump_folder.join("tokenizer.json");
    if resumes && path.exists() {
        return Ok(());
    }
    let kept = job_tokenizer(plan)?.save(&plan.config.job.dump_folder);
    kept.map_err(|e| TrainError::Data(e.to_string()))
}

/// The checkpoint of `step` in `folder` as a Hugging Face folder, `export` in the run folder; `warn` is told of what is
/// missing in it.
pub fn export_last(plan: &Plan, folder: &Path, step: u64, warn: &mut dyn FnMut(&str)) -> Result<()> {
    let run = &plan.config.job.dump_folder;
    let found = find_usable(folder, Some(step)).map_err(|e| TrainError::Data(e.to_string()))?;
    let Some(checkpoint) = found.checkpoint else {
        return Err(TrainError::Data(format!("{} holds no checkpoint of step {step} to export", folder.display())));
    };
    let source = Source::Checkpoint(checkpoint);
    let tokenizer = match source.tokenizer(run) {
        Ok(tokenizer) => Some(tokenizer),
        Err(e) => {
            warn(&format!("the exported model has no tokenizer: {e}"));
            None
        }
    };
    let output = run.join("export");
    if output.exists() {
        std::fs::remove_dir_all(&output).map_err(|e| TrainError::Device(format!("{}: {e}", output.display())))?;
    }
    let dtype = export::dtype_of(plan.config.checkpoint.export_dtype);
    export::write(&source, tokenizer.as_ref(), dtype, &output, |_, _| {})
}

/// Data errors are the data's.
pub fn data_error(e: tangelo_data::DataError) -> TrainError {
    TrainError::Data(e.to_string())
}
