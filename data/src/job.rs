//! The data of a job: which folders its sources are prepared into, and the loader that reads them.
//!
//! The launcher calls [`prepare_job`] once before ranks start; every rank calls [`loader_options`] with the same
//! configuration and finds the same folders. The configuration is a resolved one: names, columns and folders are taken
//! from it as they stand.

use crate::chat::ChatOptions;
use crate::encode::TextTokenizer;
use crate::error::{DataError, Result};
use crate::files;
use crate::loader::{Loader, LoaderOptions, LoaderSource};
use crate::lock::{FolderLock, POLL};
use crate::manifest::{Manifest, TOKENIZER_NAME, check_one_tokenizer, is_prepared, read_json};
use crate::prepare::{PrepareOptions, prepare};
use crate::progress::Progress;
use crate::source::{Content, ScannedFile, discover, scan};
use crate::split::Split;
use crate::tokenizer::{TrainOptions, train_on};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tangelo_configs::JobConfig;
use tangelo_configs::job::{DataSource, JobType};
use tangelo_formats::chat::TemplateChoice;

/// What was learnt for the tokenizer of a job, beside it in the prepared folder.
const TRAINING_NAME: &str = "tokenizer-training.json";

/// A source, ready to be loaded.
#[derive(Clone, Debug)]
pub struct PreparedSource {
    /// Its name and folder.
    pub source: LoaderSource,
    /// What the folder holds.
    pub manifest: Manifest,
}

/// Everything a job reads.
#[derive(Clone, Debug)]
pub struct PreparedJob {
    /// The sources, in the order of the configuration.
    pub sources: Vec<PreparedSource>,
    /// The sources that are only evaluated on.
    pub held_out: Vec<PreparedSource>,
}

impl PreparedJob {
    /// Tokens of all sources that are trained on.
    pub fn tokens(&self) -> u64 {
        self.sources.iter().map(|s| s.manifest.tokens).sum()
    }

    /// Tokens of conversations that are to be learnt; nothing where the sources are text.
    pub fn trained_tokens(&self) -> Option<u64> {
        self.sources.iter().filter_map(|s| s.manifest.chat).map(|chat| chat.trained_tokens).reduce(|a, b| a + b)
    }
}

/// A value that resolving fills in.
fn resolved<T>(value: Option<T>, key: &str) -> Result<T> {
    value.ok_or_else(|| DataError::Internal(format!("`{key}` is absent: the configuration was not resolved")))
}

/// Where the sources of `config` are prepared.
fn prepared_folder(config: &JobConfig) -> Result<&Path> {
    resolved(config.data.prepared_folder.as_deref(), "data.prepared_folder")
}

/// The loader's sources of a job: a folder of `data.prepared_folder` each, or the source's own path where that is a
/// prepared folder already.
///
/// # Errors
/// A job without sources, or a configuration that was not resolved.
pub fn loader_sources(config: &JobConfig) -> Result<Vec<LoaderSource>> {
    if config.data.sources.is_empty() {
        return Err(DataError::Options("the job reads nothing: add [[data.sources]] with paths = [\"...\"]".into()));
    }
    sources_in(prepared_folder(config)?, &config.data.sources)
}

/// The sources that the job only evaluates on.
fn validation_sources(config: &JobConfig) -> Result<Vec<LoaderSource>> {
    sources_in(prepared_folder(config)?, &config.validation.sources)
}

fn sources_in(root: &Path, sources: &[DataSource]) -> Result<Vec<LoaderSource>> {
    let loaded = |source: &DataSource| {
        let name = resolved(source.name.clone(), "data.sources.name")?;
        let folder = already_prepared(source).unwrap_or_else(|| root.join(&name));
        Ok(LoaderSource { name, folder, weight: source.weight })
    };
    sources.iter().map(loaded).collect()
}

/// The loader that evaluation reads, where the job evaluates: `validation.sources` whole, or else the documents that
/// `training` holds out.
///
/// # Errors
/// Nothing is held out; as [`Loader::open`].
pub fn open_validation(config: &JobConfig, training: &Loader) -> Result<Option<Loader>> {
    if !config.validation.enable {
        return Ok(None);
    }
    let sources = validation_sources(config)?;
    if sources.is_empty() {
        return training.validation().map(Some);
    }
    let options = training.options().clone();
    Loader::open(LoaderOptions { sources, split: Split::Validation, validation_fraction: 1.0, ..options }).map(Some)
}

/// What a rank loads of a job.
///
/// # Errors
/// As [`loader_sources`].
pub fn loader_options(
    config: &JobConfig,
    split: Split,
    global_batch_size: usize,
    data_rank: usize,
    data_size: usize,
) -> Result<LoaderOptions> {
    Ok(LoaderOptions {
        sources: loader_sources(config)?,
        split,
        validation_fraction: config.data.validation_fraction,
        seq_len: config.training.seq_len,
        packing: resolved(config.data.packing, "data.packing")?,
        document_mask: config.data.document_mask,
        seed: config.debug.seed,
        global_batch_size,
        data_rank,
        data_size,
        verify: false,
    })
}

/// Trains the tokenizer where the job asks for one, and prepares every source that is not prepared yet.
///
/// May be called again at any time, also by several processes at once: what is done is found done. Sources that are
/// prepared folders already are used as they are.
///
/// # Errors
/// No sources; whatever [`prepare`] fails with.
pub fn prepare_job(config: &JobConfig, progress: &dyn Progress) -> Result<PreparedJob> {
    let (loaded, root) = (loader_sources(config)?, prepared_folder(config)?);
    let _lock = FolderLock::acquire(root, progress)?;
    let train = config.data.train_tokenizer_vocab > 0;
    let tokenizer = if train { train_once(config, root, progress)? } else { given(config)? };
    let prepared =
        |(asked, source): (&DataSource, LoaderSource)| prepare_source(config, asked, source, &tokenizer, progress);
    let sources = config.data.sources.iter().zip(loaded).map(prepared).collect::<Result<Vec<_>>>()?;
    let held_out = config.validation.sources.iter().zip(validation_sources(config)?).map(prepared);
    let held_out = held_out.collect::<Result<Vec<_>>>()?;
    check_one_tokenizer(sources.iter().chain(&held_out).map(|s| (s.source.name.as_str(), &s.manifest)))?;
    Ok(PreparedJob { sources, held_out })
}

fn prepare_source(
    config: &JobConfig,
    asked: &DataSource,
    source: LoaderSource,
    tokenizer: &Path,
    progress: &dyn Progress,
) -> Result<PreparedSource> {
    let is_chat = config.job.kind == JobType::Sft;
    let manifest = match already_prepared(asked) {
        Some(folder) => {
            let manifest = check_tokenizer(Manifest::read(&folder)?, &folder, tokenizer)?;
            if is_chat { check_chat(manifest, &folder, config)? } else { manifest }
        }
        None => {
            let mut options = PrepareOptions::new(asked.paths.clone(), tokenizer, &source.folder);
            match config.job.kind {
                JobType::Pretrain | JobType::Rlhf => options.text_column = text_column(asked)?,
                JobType::Sft => options.chat = Some(chat_options(config, asked)?),
            }
            options.chat_template.clone_from(&config.data.chat_template);
            options.chat_template_name.clone_from(&config.data.chat_template_name);
            options.shard_tokens = config.data.shard_tokens;
            progress.phase(&format!("preparing {}", source.name));
            prepare(&options, progress)?
        }
    };
    Ok(PreparedSource { source, manifest })
}

/// How the conversations of a source become tokens.
pub(crate) fn chat_options(config: &JobConfig, source: &DataSource) -> Result<ChatOptions> {
    let (data, defaults) = (&config.data, ChatOptions::new(config.training.seq_len));
    Ok(ChatOptions {
        format: resolved(source.format, "data.sources.format")?,
        messages_column: source.messages_column.clone(),
        prompt_column: source.prompt_column.clone().unwrap_or(defaults.prompt_column),
        completion_column: source.completion_column.clone().unwrap_or(defaults.completion_column),
        as_messages: resolved(source.as_messages, "data.sources.as_messages")?,
        assistant_only_loss: resolved(data.assistant_only_loss, "data.assistant_only_loss")?,
        completion_only_loss: resolved(data.completion_only_loss, "data.completion_only_loss")?,
        max_tokens: config.training.seq_len,
        overlong: resolved(data.overlong, "data.overlong")?,
    })
}

/// Which template the job means.
pub(crate) fn template_choice(config: &JobConfig) -> TemplateChoice<'_> {
    TemplateChoice { file: config.data.chat_template.as_deref(), name: config.data.chat_template_name.as_deref() }
}

/// A folder that was prepared before must hold conversations that fit a sequence.
fn check_chat(manifest: Manifest, folder: &Path, config: &JobConfig) -> Result<Manifest> {
    let reason = match &manifest.origin.options.chat {
        None => "holds text, of which nothing says what is trained; name the files of conversations themselves".into(),
        Some(chat) if chat.options.max_tokens > config.training.seq_len => format!(
            "holds conversations of up to {} tokens, above training.seq_len = {}; raise that, or name the files",
            chat.options.max_tokens, config.training.seq_len
        ),
        Some(_) => return Ok(manifest),
    };
    Err(DataError::prepared(folder, reason))
}

/// Waits until another process has prepared the job, without taking part.
///
/// # Errors
/// Where nothing is there after `patience` and nobody is at work on it; [`DataError::Interrupted`].
pub fn wait_for_job(config: &JobConfig, patience: Duration, progress: &dyn Progress) -> Result<()> {
    let (sources, root) = (loader_sources(config)?, prepared_folder(config)?);
    let sources = [sources, validation_sources(config)?].concat();
    let is_ready = |source: &LoaderSource| Manifest::read(&source.folder).is_ok_and(|m| m.is_complete(&source.folder));
    let mut begun = Instant::now();
    while !sources.iter().all(is_ready) {
        if progress.cancelled() {
            return Err(DataError::Interrupted);
        }
        if begun.elapsed() > patience {
            if !FolderLock::is_held(root) {
                let waited = patience.as_secs();
                let reason = format!("nothing is prepared here after {waited} s, and no process is at work on it");
                return Err(DataError::prepared(root, reason));
            }
            begun = Instant::now();
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// A folder that was prepared before must have been so with the job's tokenizer.
fn check_tokenizer(manifest: Manifest, folder: &Path, tokenizer: &Path) -> Result<Manifest> {
    let wanted = TextTokenizer::open(tokenizer)?;
    if manifest.origin.fingerprints.tokenizer == wanted.fingerprint() {
        return Ok(manifest);
    }
    let detail = format!("its copy {} is not {}", folder.join(TOKENIZER_NAME).display(), tokenizer.display());
    Err(DataError::Mismatch { folder: folder.into(), what: "tokenizer", detail })
}

fn text_column(source: &DataSource) -> Result<String> {
    resolved(source.text_column.clone(), "data.sources.text_column")
}

/// The tokenizer the configuration names.
pub(crate) fn given(config: &JobConfig) -> Result<PathBuf> {
    resolved(config.data.tokenizer_path(), "data.tokenizer")
}

/// A source whose one path is a prepared folder.
pub(crate) fn already_prepared(source: &DataSource) -> Option<PathBuf> {
    let [path] = source.paths.as_slice() else { return None };
    is_prepared(Path::new(path)).then(|| PathBuf::from(path))
}

/// What a job's tokenizer was learnt from.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct TrainingRecord {
    vocab_size: usize,
    sources: Vec<ScannedFile>,
}

/// Trains the tokenizer of the job, unless that was done before from the same files.
fn train_once(config: &JobConfig, root: &Path, progress: &dyn Progress) -> Result<PathBuf> {
    let data = &config.data;
    let (path, record_path) = (root.join(TOKENIZER_NAME), root.join(TRAINING_NAME));
    if let Some(prepared) = data.sources.iter().find_map(already_prepared) {
        return Err(DataError::Options(format!(
            "{} is already tokenised and cannot train a tokenizer: unset data.train_tokenizer_vocab and set \
             data.tokenizer = \"{}\"",
            prepared.display(),
            prepared.join(TOKENIZER_NAME).display()
        )));
    }
    let advice = "remove it to train the tokenizer again";
    let before: Option<TrainingRecord> =
        if record_path.exists() { Some(read_json(&record_path, advice)?) } else { None };
    let known = before.as_ref().map(|b| b.sources.as_slice()).unwrap_or_default();
    progress.phase("looking at source files");
    let mut now = TrainingRecord { vocab_size: data.train_tokenizer_vocab, sources: Vec::new() };
    for source in &data.sources {
        now.sources.extend(scan(discover(&source.paths)?, Content::Column(&text_column(source)?), known, progress)?);
    }
    if let (Some(before), true) = (&before, path.exists()) {
        check_training(before, &now, root)?;
        return Ok(path);
    }
    let sources: Result<Vec<_>> = data.sources.iter().map(|s| Ok((s.paths.clone(), text_column(s)?))).collect();
    let trained = train_on(&sources?, &TrainOptions::new(Vec::new(), data.train_tokenizer_vocab), progress)?;
    trained.save(root)?;
    files::write_json(&record_path, &now)?;
    Ok(path)
}

fn check_training(before: &TrainingRecord, now: &TrainingRecord, root: &Path) -> Result<()> {
    let content = |r: &TrainingRecord| -> Vec<String> { r.sources.iter().map(|s| s.xxh3.clone()).collect() };
    let detail = if before.vocab_size != now.vocab_size {
        format!("its tokenizer was trained for {} tokens, now {} are asked for", before.vocab_size, now.vocab_size)
    } else if content(before) != content(now) {
        "its tokenizer was trained on other files, or they changed".into()
    } else {
        return Ok(());
    };
    Err(DataError::Mismatch { folder: root.into(), what: "tokenizer", detail })
}
