//! From a [`JobConfig`] to a [`Plan`]: every default filled in, every cross-field rule checked.
//!
//! [`resolve`] is a function of the configuration, the [`Resources`] and what [`ModelAssets`] reads; it looks at no
//! environment variable and no clock. Resolving a resolved configuration again gives the same plan.
//!
//! Three values stay as the user wrote them because they are instructions, not defaults: `checkpoint.load_step = -1`
//! (the newest), `validation.steps = -1` (all of the held-out data), and absent `data.sources.weight`s (by size).

use crate::check::{Found, check_values, check_with_model, degrees_are_sound};
use crate::job::{ComputeType, DEFAULT_TEXT_COLUMN, Data, DataSource, DeviceChoice, JobConfig, JobType, Packing};
use crate::{ConfigError, ModelSpec, Plan, Role, architecture, parallel};
use std::path::{Path, PathBuf};
use tangelo_core::{Group, env};

pub use crate::load::{load, load_str};

/// What a configuration is resolved for.
#[derive(Clone, Debug, PartialEq)]
pub struct Resources {
    /// Ranks in the job.
    pub world_size: usize,
    /// Ranks on this node: they share its cores.
    pub local_world_size: usize,
    /// Cores of this node.
    pub num_cores: usize,
    /// Whether there is a GPU.
    pub cuda: bool,
    /// What relative paths are relative to.
    pub current_dir: PathBuf,
    /// What `~/` stands for.
    pub home: Option<PathBuf>,
}

impl Resources {
    /// What this machine offers to `local_world_size` of `world_size` ranks.
    ///
    /// # Errors
    /// Where the current directory is gone.
    pub fn of_this_machine(world_size: usize, local_world_size: usize) -> Result<Resources, ConfigError> {
        let current_dir = std::env::current_dir()
            .map_err(|e| ConfigError::Read { path: PathBuf::from("."), message: e.to_string() })?;
        Ok(Resources {
            world_size,
            local_world_size,
            num_cores: std::thread::available_parallelism().map_or(1, usize::from),
            cuda: num_gpus() > 0,
            current_dir,
            home: std::env::var_os("HOME").map(PathBuf::from),
        })
    }

    /// `path` without `~/` and relative parts at its front.
    pub fn absolute(&self, path: &Path) -> PathBuf {
        let (base, rest) = self.split_base(path);
        base.join(rest)
    }

    /// The folder that a path is relative to, and the rest of it.
    fn split_base<'a>(&'a self, path: &'a Path) -> (&'a Path, &'a Path) {
        match (path.strip_prefix("~"), &self.home) {
            (Ok(rest), Some(home)) => (home, rest),
            _ => (&self.current_dir, path),
        }
    }

    /// The same for a glob: characters of the folder put in front stand for themselves.
    pub(crate) fn absolute_pattern(&self, pattern: &str) -> String {
        let (base, rest) = self.split_base(Path::new(pattern));
        let is_glob = pattern.contains(GLOB_CHARACTERS) && !rest.is_absolute();
        let base = base.to_string_lossy();
        let base = if is_glob { escape(&base) } else { base.into_owned() };
        Path::new(&base).join(rest).to_string_lossy().into_owned()
    }
}

/// What makes a path a pattern.
const GLOB_CHARACTERS: [char; 3] = ['*', '?', '['];

/// Characters that stand for themselves in a pattern, in the glob crate's way of writing.
const ESCAPES: [(&str, &str); 4] = [("[*]", "*"), ("[?]", "?"), ("[[]", "["), ("[]]", "]")];

/// A path as a pattern that names only that path.
fn escape(path: &str) -> String {
    let escaped = |c: char| ESCAPES.iter().find(|(_, plain)| plain.starts_with(c)).map(|(escaped, _)| *escaped);
    path.chars().map(|c| escaped(c).map_or_else(|| c.to_string(), str::to_owned)).collect()
}

/// The path that a pattern names, where it names only one.
fn unescape(pattern: &str) -> Option<String> {
    let rest = ESCAPES.iter().fold(pattern.to_owned(), |text, (escaped, _)| text.replace(escaped, ""));
    let plain = || ESCAPES.iter().fold(pattern.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain));
    (!rest.contains(GLOB_CHARACTERS)).then(plain)
}

/// GPUs that a process started from here will see: the driver's `/dev/nvidia0`, `/dev/nvidia1`, ..., as far as
/// `CUDA_VISIBLE_DEVICES` shows them. This alone decides what `auto` means; libcuda is not opened.
pub fn num_gpus() -> usize {
    let entries = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let is_gpu = |name: &str| name.strip_prefix("nvidia").is_some_and(|n| n.parse::<u32>().is_ok());
    let present = entries.filter(|entry| is_gpu(&entry.file_name().to_string_lossy())).count();
    visible_gpus(std::env::var(env::CUDA_VISIBLE_DEVICES).ok().as_deref(), present)
}

/// How many of `present` GPUs the list in `CUDA_VISIBLE_DEVICES` shows: CUDA reads it up to the first entry that names
/// none. Indices count what is present; other names (`GPU-...`, `MIG-...`) are taken as they come.
fn visible_gpus(list: Option<&str>, present: usize) -> usize {
    let names_one = |entry: &&str| match entry.parse::<usize>() {
        Ok(index) => index < present,
        Err(_) => entry.starts_with("GPU-") || entry.starts_with("MIG-"),
    };
    match list {
        Some(list) if present > 0 => list.split(',').map(str::trim).take_while(names_one).count(),
        _ => present,
    }
}

/// The marks that a tokenizer puts around documents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Id that starts a document.
    pub bos: Option<u32>,
    /// Ids that end a document.
    pub eos: Vec<u32>,
}

/// What resolving needs to know of files that this room does not read.
pub trait ModelAssets {
    /// The architecture of the model at `path`: a Hugging Face folder or a GGUF file.
    fn model_spec(&self, path: &Path) -> Result<ModelSpec, String>;

    /// Number of ids of the tokenizer at `path`, added tokens included: tokenizer.json, a folder or a GGUF file.
    fn vocab_size(&self, tokenizer: &Path) -> Result<usize, String>;

    /// The tokenizer's document marks; none where it does not say.
    fn special_tokens(&self, tokenizer: &Path) -> Result<SpecialTokens, String> {
        let _ = tokenizer;
        Ok(SpecialTokens::default())
    }

    /// Whether the tokenizer at `path` is not there and the caller only looks at the plan: then a job that says its
    /// vocabulary is resolved without it.
    fn may_lack(&self, tokenizer: &Path) -> bool {
        let _ = tokenizer;
        false
    }
}

/// The id that ends a document in a tokenizer trained for `data.train_tokenizer_vocab`: special tokens come first.
pub const TRAINED_TOKENIZER_EOS: u32 = 0;

/// The vocabulary is padded to a multiple of this: matrix products over odd sizes are slow.
pub const VOCAB_MULTIPLE: usize = 64;

/// Fills in every default and checks every rule.
///
/// # Errors
/// [`ConfigError::Values`] with everything that is wrong at once, or [`ConfigError::Assets`].
pub fn resolve(config: JobConfig, resources: &Resources, assets: &dyn ModelAssets) -> Result<Plan, ConfigError> {
    let mut config = config;
    let places = std::mem::take(&mut config.places);
    config.include.clear();
    resolve_role(config, Role::Policy, resources, assets).map_err(|error| places.locate(error))
}

/// The plan of a job, or of a role of an `rlhf` job.
pub(crate) fn resolve_role(
    mut config: JobConfig,
    role: Role,
    resources: &Resources,
    assets: &dyn ModelAssets,
) -> Result<Plan, ConfigError> {
    let mut found = Found::default();
    found.take(resolve_paths(&mut config, resources))?;
    let ranks = crate::rlhf::resolve_sections(&mut found, &mut config, role, resources);
    check_values(&mut found, &config);
    let mesh = match ranks.filter(|_| degrees_are_sound(&config.parallelism)) {
        Some(ranks) => found.take(parallel::resolve_mesh(&mut config, ranks))?,
        None => None,
    };
    found.result()?;
    let mesh = mesh.unwrap_or_else(|| unreachable!("whatever keeps the mesh from being built is an error"));
    parallel::resolve_reshard(&mut config.parallelism);
    resolve_device(&mut config, resources);
    resolve_schedule(&mut config);
    let model = architecture::resolve(&mut config, assets)?;
    check_with_model(&config, &model)?;
    architecture::check_initial_load(&model, &config, assets)?;
    let stage_layers = parallel::resolve_stages(&mut config, &model)?;
    let topology = parallel::topology(&config, &model, mesh)?;
    let data_parallel_size = topology.size(Group::Batch);
    let accumulation = resolve_batch(&mut config, data_parallel_size)?;
    Ok(Plan {
        model,
        topology,
        stage_layers,
        data_parallel_size,
        global_batch_size: config.training.global_batch_size as usize,
        gradient_accumulation_steps: accumulation,
        config,
    })
}

fn resolve_paths(config: &mut JobConfig, resources: &Resources) -> Result<(), ConfigError> {
    let absolute = |path: &mut PathBuf| *path = resources.absolute(path);
    absolute(&mut config.job.dump_folder);
    config.model.hf_assets_path.iter_mut().for_each(absolute);
    config.checkpoint.initial_load_path.iter_mut().for_each(absolute);
    resolve_data(&mut config.data, &config.job.dump_folder, config.model.hf_assets_path.as_deref(), resources)?;
    resolve_chat(config, resources);
    let (kind, held_out) = (config.job.kind, &mut config.validation.sources);
    resolve_sources(&mut config.data.sources, kind, &[], resources);
    let taken: Vec<String> = config.data.sources.iter().filter_map(|source| source.name.clone()).collect();
    resolve_sources(held_out, kind, &taken, resources);
    if !held_out.is_empty() && config.data.validation_fraction == Data::default().validation_fraction {
        config.data.validation_fraction = 0.0;
    }
    let load = &mut config.checkpoint;
    if load.initial_load_in_hf && load.initial_load_path.is_none() {
        load.initial_load_path.clone_from(&config.model.hf_assets_path);
    }
    Ok(())
}

fn resolve_data(
    data: &mut Data,
    run_folder: &Path,
    hf_assets: Option<&Path>,
    resources: &Resources,
) -> Result<(), ConfigError> {
    let prepared = data.prepared_folder.take().unwrap_or_else(|| run_folder.join("prepared"));
    let prepared = resources.absolute(&prepared);
    let trains = data.train_tokenizer_vocab > 0;
    data.tokenizer = match data.tokenizer.take().map(|path| resources.absolute(&path)) {
        Some(path) if trains && path != prepared.join("tokenizer.json") => {
            return Err(ConfigError::Values(vec![format!(
                "`data.tokenizer` = \"{}\" and `data.train_tokenizer_vocab` = {} exclude each other: use the one or \
                 train the other",
                path.display(),
                data.train_tokenizer_vocab
            )]));
        }
        // It is the one in `prepared_folder`, wherever that may be moved to.
        _ if trains => None,
        None => hf_assets.map(Path::to_owned),
        given => given,
    };
    data.prepared_folder = Some(prepared);
    Ok(())
}

/// Fills in what only conversations have.
fn resolve_chat(config: &mut JobConfig, resources: &Resources) {
    let (data, is_chat) = (&mut config.data, config.job.kind == JobType::Sft);
    data.packing.get_or_insert(if is_chat { Packing::BestFit } else { Packing::Concat });
    data.chat_template.iter_mut().for_each(|path| *path = resources.absolute(path));
    if is_chat {
        data.assistant_only_loss.get_or_insert(true);
        data.completion_only_loss.get_or_insert(true);
        data.overlong.get_or_insert_default();
    }
}

/// Gives every source its absolute paths, a name that is not in `taken`, and its columns.
fn resolve_sources(sources: &mut [DataSource], kind: JobType, taken: &[String], resources: &Resources) {
    let mut names = taken.to_vec();
    for source in sources {
        for path in &mut source.paths {
            *path = resources.absolute_pattern(path);
        }
        let name = match &source.name {
            Some(name) => folder_name(name),
            None => unique(source_name(source), &names),
        };
        names.push(name.clone());
        source.name = Some(name);
        match kind {
            JobType::Pretrain | JobType::Rlhf => {
                _ = source.text_column.get_or_insert_with(|| DEFAULT_TEXT_COLUMN.into())
            }
            JobType::Sft => {
                source.format.get_or_insert_default();
                source.as_messages.get_or_insert(false);
            }
        }
    }
}

/// The last part of the first path that is no pattern, without its extensions.
fn source_name(source: &DataSource) -> String {
    let first = source.paths.first().map_or("", String::as_str);
    let plain = first.rsplit('/').filter(|part| !part.is_empty()).find_map(unescape).unwrap_or_default();
    folder_name(plain.trim_start_matches('.').split('.').next().unwrap_or_default())
}

/// A name as that of a folder.
fn folder_name(name: &str) -> String {
    let safe = |c: char| if c.is_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let name: String = name.trim_start_matches('.').chars().map(safe).collect();
    if name.is_empty() { "source".into() } else { name }
}

fn unique(name: String, taken: &[String]) -> String {
    let numbered = (2..).map(|n| format!("{name}-{n}"));
    std::iter::once(name.clone()).chain(numbered).find(|n| !taken.contains(n)).unwrap_or(name)
}

fn resolve_device(config: &mut JobConfig, resources: &Resources) {
    let t = &mut config.training;
    if t.device == DeviceChoice::Auto {
        t.device = if resources.cuda { DeviceChoice::Cuda } else { DeviceChoice::Cpu };
    }
    if t.mixed_precision_param == ComputeType::Auto {
        t.mixed_precision_param = match t.device {
            DeviceChoice::Cuda => ComputeType::Bfloat16,
            _ => ComputeType::Float32,
        };
    }
    if t.num_threads == 0 {
        t.num_threads = (resources.num_cores / resources.local_world_size.max(1)).max(1);
    }
}

fn resolve_schedule(config: &mut JobConfig) {
    let s = &mut config.lr_scheduler;
    let total = *s.total_steps.get_or_insert(config.training.steps);
    let after_warmup = total.saturating_sub(s.warmup_steps) as f64 / total.max(1) as f64;
    s.decay_ratio.get_or_insert(after_warmup);
}

/// Fills in the global batch and returns the micro-batches per rank and step.
fn resolve_batch(config: &mut JobConfig, data_parallel: usize) -> Result<usize, ConfigError> {
    let t = &mut config.training;
    let per_pass = t.local_batch_size * data_parallel;
    if t.global_batch_size == -1 {
        t.global_batch_size = per_pass as i64;
    }
    let global = t.global_batch_size as usize;
    if !global.is_multiple_of(per_pass) {
        let below = global / per_pass * per_pass;
        let nearest = if below == 0 { per_pass.to_string() } else { format!("{below} or {}", below + per_pass) };
        return Err(ConfigError::Values(vec![format!(
            "`training.global_batch_size` = {global} is not `training.local_batch_size` {} x data-parallel size \
             {data_parallel} = {per_pass} sequences times a whole number of accumulation steps: {global} / {per_pass} \
             leaves {}; take {nearest}, or another local batch size",
            t.local_batch_size,
            global % per_pass
        )]));
    }
    Ok(global / per_pass)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_devices_decide_how_many_gpus_there_are() {
        let cases = [
            (None, 4, 4),
            (Some("0,2"), 4, 2),
            (Some(" 1 "), 2, 1),
            (Some(""), 4, 0),
            (Some("-1"), 4, 0),
            (Some("0,-1,1"), 4, 1),
            (Some("0,4,1"), 4, 1),
            (Some("GPU-8932f937,MIG-1234"), 2, 2),
            (Some("NoDevFiles"), 1, 0),
            (Some("0"), 0, 0),
        ];
        for (list, present, expected) in cases {
            assert_eq!(visible_gpus(list, present), expected, "{list:?} of {present}");
        }
    }

    #[test]
    fn escaped_paths_name_themselves() {
        for path in ["/runs[1]", "/a*b?", "/[]x]", "/plain"] {
            assert_eq!(unescape(&escape(path)).as_deref(), Some(path));
        }
        assert_eq!(unescape("notes-[0-9]"), None);
    }
}
