//! The data of a job: which folders its sources are prepared into, and the loader that reads them.
//!
//! The launcher calls [`prepare_job`] once before ranks start; every rank calls [`loader_options`] with the same
//! configuration and finds the same folders.

use crate::encode::TextTokenizer;
use crate::error::{DataError, Result};
use crate::files;
use crate::loader::{LoaderOptions, LoaderSource};
use crate::lock::FolderLock;
use crate::manifest::{MANIFEST_NAME, Manifest, TOKENIZER_NAME, check_one_tokenizer, read_json};
use crate::prepare::{PrepareOptions, prepare};
use crate::progress::Progress;
use crate::source::{ScannedFile, discover, scan};
use crate::split::Split;
use crate::tokenizer::{TrainOptions, train_on};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tangelo_configs::JobConfig;
use tangelo_configs::job::DataSource;

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
    /// Where the tokenizer lies: what `data.tokenizer` should be.
    pub tokenizer: PathBuf,
}

impl PreparedJob {
    /// Tokens of all sources.
    pub fn tokens(&self) -> u64 {
        self.sources.iter().map(|s| s.manifest.tokens).sum()
    }
}

/// Where sources of `config` are prepared: `data.prepared_folder`, or `prepared` in the run folder.
pub fn prepared_folder(config: &JobConfig) -> PathBuf {
    config.data.prepared_folder.clone().unwrap_or_else(|| config.job.dump_folder.join("prepared"))
}

/// The loader's sources of a job: a folder of `prepared_folder` each, or the source's own path where that is a
/// prepared folder already.
pub fn loader_sources(config: &JobConfig) -> Vec<LoaderSource> {
    let root = prepared_folder(config);
    let mut sources: Vec<LoaderSource> = Vec::new();
    for source in &config.data.sources {
        let wanted = folder_name(source);
        let taken = |name: &str| sources.iter().any(|s| s.name == name);
        let numbered = (2..).map(|number| format!("{wanted}-{number}"));
        let name = std::iter::once(wanted.clone()).chain(numbered).find(|name| !taken(name)).unwrap_or_default();
        let folder = already_prepared(source).unwrap_or_else(|| root.join(&name));
        sources.push(LoaderSource { name, folder, weight: source.weight });
    }
    sources
}

/// The loader's sources of a job, each prepared.
///
/// # Errors
/// A job without sources, or with one whose folder is not finished.
pub fn job_sources(config: &JobConfig) -> Result<Vec<LoaderSource>> {
    let sources = loader_sources(config);
    if sources.is_empty() {
        return Err(no_sources());
    }
    sources.iter().try_for_each(|source| Manifest::read(&source.folder).map(|_| ()))?;
    Ok(sources)
}

fn no_sources() -> DataError {
    DataError::Options("the job reads nothing: add [[data.sources]] with paths = [\"...\"]".into())
}

/// What a rank loads of a job.
pub fn loader_options(
    config: &JobConfig,
    split: Split,
    global_batch_size: usize,
    data_rank: usize,
    data_size: usize,
) -> LoaderOptions {
    LoaderOptions {
        sources: loader_sources(config),
        split,
        validation_fraction: config.data.validation_fraction,
        seq_len: config.training.seq_len,
        packing: config.data.packing,
        document_mask: config.data.document_mask,
        seed: config.debug.seed,
        global_batch_size,
        data_rank,
        data_size,
        verify: false,
    }
}

/// Trains the tokenizer where the job asks for one, and prepares every source that is not prepared yet.
///
/// May be called again at any time, also by several processes at once: what is done is found done. Sources that are
/// prepared folders already are used as they are.
///
/// # Errors
/// No sources; whatever [`prepare`] fails with.
pub fn prepare_job(config: &JobConfig, progress: &dyn Progress) -> Result<PreparedJob> {
    let data = &config.data;
    if data.sources.is_empty() {
        return Err(no_sources());
    }
    let root = prepared_folder(config);
    let _lock = FolderLock::acquire(&root, progress)?;
    let tokenizer = if data.train_tokenizer_vocab > 0 { train_once(config, &root, progress)? } else { given(config)? };
    let mut sources = Vec::new();
    for (asked, source) in data.sources.iter().zip(loader_sources(config)) {
        let manifest = match already_prepared(asked) {
            Some(folder) => check_tokenizer(Manifest::read(&folder)?, &folder, &tokenizer)?,
            None => {
                let mut options = PrepareOptions::new(asked.paths.clone(), &tokenizer, &source.folder);
                options.text_column = text_column(asked);
                options.shard_tokens = data.shard_tokens;
                progress.phase(&format!("preparing {}", source.name));
                prepare(&options, progress)?
            }
        };
        sources.push(PreparedSource { source, manifest });
    }
    check_one_tokenizer(sources.iter().map(|s| (s.source.name.as_str(), &s.manifest)))?;
    Ok(PreparedJob { sources, tokenizer })
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

fn text_column(source: &DataSource) -> String {
    source.text_column.clone().unwrap_or_else(|| "text".into())
}

/// The tokenizer the configuration names, or the one of a source that is prepared already.
fn given(config: &JobConfig) -> Result<PathBuf> {
    let named = config.data.tokenizer.clone().or_else(|| config.model.hf_assets_path.clone());
    let kept = || config.data.sources.iter().find_map(already_prepared).map(|folder| folder.join(TOKENIZER_NAME));
    named.or_else(kept).ok_or_else(|| {
        DataError::Options(
            "no tokenizer: set data.tokenizer to a tokenizer.json, a model's folder or a GGUF file, or \
             data.train_tokenizer_vocab to the size of one to train"
                .into(),
        )
    })
}

/// A source whose one path is a prepared folder.
fn already_prepared(source: &DataSource) -> Option<PathBuf> {
    let [path] = source.paths.as_slice() else { return None };
    Path::new(path).join(MANIFEST_NAME).is_file().then(|| PathBuf::from(path))
}

/// The name of a source as a folder: its own, or the last part of its first path that is no glob.
fn folder_name(source: &DataSource) -> String {
    let plain = |path: &String| {
        let mut parts = Path::new(path).iter().map(|part| part.to_string_lossy().into_owned());
        parts.rfind(|part| !part.contains(['*', '?', '[']))
    };
    let name = source.name.clone().or_else(|| source.paths.first().and_then(plain)).unwrap_or_default();
    let safe = |c: char| if c.is_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let name: String = name.trim_start_matches('.').chars().map(safe).collect();
    if name.is_empty() { "source".into() } else { name }
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
    let before: Option<TrainingRecord> = if record_path.exists() { Some(read_json(&record_path)?) } else { None };
    let known = before.as_ref().map(|b| b.sources.as_slice()).unwrap_or_default();
    let patterns: Vec<String> = data.sources.iter().flat_map(|s| s.paths.clone()).collect();
    let now = TrainingRecord { vocab_size: data.train_tokenizer_vocab, sources: scan(discover(&patterns)?, known)? };
    if let (Some(before), true) = (&before, path.exists()) {
        check_training(before, &now, root)?;
        return Ok(path);
    }
    let sources: Vec<_> = data.sources.iter().map(|s| (s.paths.clone(), text_column(s))).collect();
    let trained = train_on(&sources, &TrainOptions::new(Vec::new(), data.train_tokenizer_vocab), progress)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_named_after_sources_and_unique() {
        let source = |name: Option<&str>, path: &str| DataSource {
            name: name.map(str::to_string),
            paths: vec![path.into()],
            ..DataSource::default()
        };
        let mut config = JobConfig::default();
        config.data.sources = vec![
            source(Some("wiki/en"), "x"),
            source(None, "corpus/**/*.md"),
            source(None, "other/corpus/*"),
            source(None, "*.txt"),
        ];
        let names: Vec<String> = loader_sources(&config).into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["wiki-en", "corpus", "corpus-2", "source"]);
    }
}
