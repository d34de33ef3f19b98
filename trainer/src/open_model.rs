//! Models by path: a Hugging Face folder, a GGUF file, a run folder, a checkpoint folder.

use crate::checkpoint::{Checkpoint, Verify, complete_steps, find_usable};
use crate::error::{Result, TrainError};
use crate::init::{self, TensorSource};
use crate::worker::kind_of;
use std::path::{Path, PathBuf};
use tangelo_configs::job::{ComputeType, DeviceChoice};
use tangelo_configs::requests::ModelRequest;
use tangelo_configs::rlhf::role_folder;
use tangelo_configs::{JobConfig, ModelSpec, Role, num_gpus};
use tangelo_formats::Weights;
use tangelo_formats::tokenizer::{self, TokenizerAssets};
use tangelo_models::Model;
use tangelo_observe::{files, stderr_line};
use tch::Device;

/// Weights by Hugging Face's names, and the architecture they belong to.
pub enum Source {
    /// A Hugging Face folder or a GGUF file.
    Pretrained(Weights),
    /// A checkpoint of a run.
    Checkpoint(Checkpoint),
}

impl Source {
    /// Opens what lies at `path`; in a run folder, the checkpoint of `step` or the newest usable one.
    pub fn open(path: &Path, step: Option<u64>) -> Result<Source> {
        if !path.exists() {
            return Err(TrainError::Data(format!(
                "{}: no such file or folder; give a Hugging Face folder, a .gguf file, a run folder or a checkpoint",
                path.display()
            )));
        }
        if path.join("manifest.json").is_file() {
            let checkpoint = Checkpoint::open(path, Verify::Full).map_err(|e| TrainError::Data(e.to_string()))?;
            return Ok(Source::Checkpoint(checkpoint));
        }
        if let Some(folder) = checkpoint_folder(path) {
            return Ok(Source::Checkpoint(newest(&folder, step)?));
        }
        Weights::open(path).map(Source::Pretrained).map_err(|e| TrainError::Data(e.to_string()))
    }

    /// The architecture.
    pub fn spec(&self) -> &ModelSpec {
        match self {
            Source::Pretrained(weights) => weights.spec(),
            Source::Checkpoint(checkpoint) => &checkpoint.manifest().model,
        }
    }

    /// Where the values are read.
    pub fn tensors(&self) -> &dyn TensorSource {
        match self {
            Source::Pretrained(weights) => weights,
            Source::Checkpoint(checkpoint) => checkpoint,
        }
    }

    /// The tokenizer that belongs to the model at `path`.
    pub fn tokenizer(&self, path: &Path) -> Result<TokenizerAssets> {
        let place = match self {
            Source::Pretrained(_) => path.to_path_buf(),
            Source::Checkpoint(checkpoint) => run_tokenizer(checkpoint)?,
        };
        tokenizer::load(&place).map_err(|e| TrainError::Data(e.to_string()))
    }
}

/// The folder of checkpoints that `path` stands for: of a run folder as its resolved configuration names it, or `path`
/// itself. Where roles have folders of their own in it, the policy's.
fn checkpoint_folder(path: &Path) -> Option<PathBuf> {
    let config = std::fs::read_to_string(path.join(files::CONFIG)).ok();
    let config: Option<JobConfig> = config.and_then(|text| toml::from_str(&text).ok());
    let (folder, is_run) = match &config {
        Some(config) => (path.join(&config.checkpoint.folder), true),
        None => (path.to_owned(), false),
    };
    let policy = role_folder(&folder, Role::Policy.name());
    let holds_steps = |folder: &Path| complete_steps(folder).is_ok_and(|steps| !steps.is_empty());
    match (holds_steps(&policy), is_run || holds_steps(&folder)) {
        (true, _) => Some(policy),
        (false, true) => Some(folder),
        (false, false) => None,
    }
}

fn newest(folder: &Path, step: Option<u64>) -> Result<Checkpoint> {
    let found = find_usable(folder, step).map_err(|e| TrainError::Data(e.to_string()))?;
    for warning in &found.warnings {
        stderr_line(format!("warning: {warning}"));
    }
    found.checkpoint.ok_or_else(|| {
        TrainError::Data(format!("{} holds no checkpoint; train with checkpoint.enable = true first", folder.display()))
    })
}

/// The tokenizer file that a checkpoint's run read its data with.
fn run_tokenizer(checkpoint: &Checkpoint) -> Result<PathBuf> {
    // RUN/checkpoint/step-N, or RUN/checkpoint/ROLE/step-N.
    let beside = checkpoint.path().ancestors().skip(1).take(3).map(|f| f.join("tokenizer.json")).find(|p| p.is_file());
    let config: Option<JobConfig> = toml::from_str(&checkpoint.manifest().config_toml).ok();
    let named = config.and_then(|c| c.data.tokenizer_path());
    beside.or(named).ok_or_else(|| {
        TrainError::Data(format!(
            "{}: no tokenizer.json in the run folder and none in its config",
            checkpoint.path().display()
        ))
    })
}

/// A model ready to run, and its tokenizer.
pub struct Opened {
    /// The model.
    pub model: Model,
    /// Its tokenizer, or why there is none: ids can be scored without.
    pub tokenizer: Result<TokenizerAssets>,
}

/// Opens and loads the model of a request.
pub fn open(request: &ModelRequest) -> Result<Opened> {
    let source = Source::open(&request.model, None)?;
    let device = choose_device(request.device, 0)?;
    let dtype = match request.dtype {
        ComputeType::Auto if device.is_cuda() => ComputeType::Bfloat16,
        other => other,
    };
    let threads = crate::process::threads_for(request.num_threads, 1);
    tangelo_kernels::device::set_threads(threads);
    let model = Model::zeros(source.spec(), kind_of(dtype), device, false);
    model.units().iter().try_for_each(|unit| init::from_source(unit, source.tensors(), &mut |_, _| {}))?;
    let tokenizer = source.tokenizer(&request.model);
    Ok(Opened { model, tokenizer })
}

/// The device that the configuration asks for; what `auto` means is decided where a job's configuration decides it.
pub fn choose_device(choice: DeviceChoice, local_rank: usize) -> Result<Device> {
    use tangelo_kernels::device::{DeviceChoice as Choice, choose};
    let choice = match choice {
        DeviceChoice::Auto if num_gpus() > 0 => Choice::Cuda,
        DeviceChoice::Auto | DeviceChoice::Cpu => Choice::Cpu,
        DeviceChoice::Cuda => Choice::Cuda,
    };
    choose(choice, local_rank).map_err(|e| TrainError::Device(e.to_string()))
}
