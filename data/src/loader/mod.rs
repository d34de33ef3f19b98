//! Batches by number: the last stage of the data pipeline.
//!
//! Sample `i` is a pure function of (manifests, options, seed, `i`). Each data-parallel rank asks for the same global
//! batch and gets its own rows of it, so that any number of ranks and any restart sees the same global batches. The
//! whole state of a loader is the number of the next sample.

mod prefetch;
mod row;

pub use prefetch::Prefetcher;

use crate::error::{DataError, Result};
use crate::manifest::check_one_tokenizer;
use crate::order::{Blend, Permutation};
use crate::pack::{Documents, PackIndex};
use crate::source::SourceFile;
use crate::split::{HeldOut, Split};
use crate::store::TokenStore;
use row::Rows;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use tangelo_configs::job::Packing;
use tangelo_core::Batch;
use tangelo_core::hash::{hash_bytes, mix64};
use tangelo_core::layout::part_range;

/// A prepared folder to read from.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderSource {
    /// Names it in messages.
    pub name: String,
    /// The prepared folder.
    pub folder: PathBuf,
    /// Share of the samples, relative to the other sources'. Absent for all sources: each sample of each source once
    /// per epoch.
    pub weight: Option<f64>,
}

/// What to load and in which shape.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderOptions {
    /// Prepared folders.
    pub sources: Vec<LoaderSource>,
    /// Training or held-out documents.
    pub split: Split,
    /// Part of each source's documents that is held out; 1 only for [`Split::Validation`]: everything.
    pub validation_fraction: f64,
    /// Tokens per row (S).
    pub seq_len: usize,
    /// How documents are laid into rows.
    pub packing: Packing,
    /// Attention, positions and targets stay within documents.
    pub document_mask: bool,
    /// Keys the orders of documents and samples.
    pub seed: u64,
    /// Rows of a global batch.
    pub global_batch_size: usize,
    /// This rank among those that read different data.
    pub data_rank: usize,
    /// How many read different data.
    pub data_size: usize,
    /// Check the checksum of every shard before reading it (its size and row count are always checked).
    pub verify: bool,
}

/// Reads batches by the number of their first sample.
#[derive(Debug)]
pub struct Loader {
    options: LoaderOptions,
    sources: Vec<Source>,
    mix: Mix,
    num_samples: u64,
}

#[derive(Debug)]
struct Source {
    name: String,
    store: Arc<TokenStore>,
    held_out: HeldOut,
    index: PackIndex,
}

/// Which source a sample comes from.
#[derive(Clone, Debug)]
enum Mix {
    /// One shuffled list of all sources' rows; holds the first number of each source.
    Union(Vec<u64>),
    /// By weight; each source repeats at its own pace.
    Weighted(Blend),
}

/// Tokens of a document that a sample holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SamplePiece {
    /// Name of the source.
    pub source: String,
    /// File the document came from.
    pub file: Option<SourceFile>,
    /// Which document of the file, counted from 0 with empty ones and the pieces of cut ones.
    pub document: u64,
    /// Which tokens of it.
    pub tokens: Range<u64>,
}

impl Loader {
    /// Maps the prepared folders and builds the index of rows.
    ///
    /// # Errors
    /// A folder that is unfinished or damaged (the file is named), options that do not fit, or too little text.
    pub fn open(options: LoaderOptions) -> Result<Loader> {
        check(&options)?;
        let mut opened = Vec::new();
        for source in &options.sources {
            let store = Arc::new(TokenStore::open(&source.folder, options.verify)?);
            if store.is_masked() && !options.document_mask {
                return Err(DataError::Options(format!(
                    "source `{}` holds conversations, of which not every token is trained: set data.document_mask = true",
                    source.name
                )));
            }
            let held_out = HeldOut::new(&store, options.validation_fraction);
            opened.push((store, held_out));
        }
        Loader::build(options, opened)
    }

    /// A loader of the held-out documents that shares this one's mapped shards.
    ///
    /// # Errors
    /// Nothing is held out.
    pub fn validation(&self) -> Result<Loader> {
        let options = LoaderOptions { split: Split::Validation, ..self.options.clone() };
        Loader::build(options, self.sources.iter().map(|s| (s.store.clone(), s.held_out)).collect())
    }

    fn build(options: LoaderOptions, opened: Vec<(Arc<TokenStore>, HeldOut)>) -> Result<Loader> {
        let names = options.sources.iter().map(|s| s.name.as_str());
        check_one_tokenizer(names.zip(opened.iter().map(|(store, _)| &store.manifest)))?;
        let mut sources = Vec::new();
        for (number, (store, held_out)) in opened.into_iter().enumerate() {
            let seed = mix64(options.seed ^ mix64(number as u64));
            let documents = Documents::new(store.clone(), held_out, options.split, seed);
            let index = PackIndex::new(documents, options.packing, options.seq_len)?;
            let name = options.sources[number].name.clone();
            sources.push(Source { name, store, held_out, index });
        }
        let mix = mix_of(&options, &sources)?;
        let num_samples = sources.iter().map(|s| s.index.num_rows()).sum();
        if num_samples == 0 {
            return Err(no_samples(&options));
        }
        Ok(Loader { options, sources, mix, num_samples })
    }

    /// What was asked for.
    pub fn options(&self) -> &LoaderOptions {
        &self.options
    }

    /// Samples of this split over all sources; with equal shares, the length of an epoch.
    pub fn num_samples(&self) -> u64 {
        self.num_samples
    }

    /// Hexadecimal hash of everything that decides what sample `i` is. A run that resumes compares it.
    pub fn fingerprint(&self) -> String {
        let o = &self.options;
        let order = (o.split, o.validation_fraction, o.seq_len, o.packing, o.document_mask, o.seed);
        let sources: Vec<_> = self
            .sources
            .iter()
            .zip(&o.sources)
            .map(|(s, asked)| (s.store.manifest.fingerprint(), asked.weight))
            .collect();
        crate::files::hex(hash_bytes(0, format!("{order:?} {sources:?}").as_bytes()))
    }

    /// This rank's rows of the global batch that starts at sample `first_sample`: Tokens, Targets, Positions, SeqId,
    /// CeWeight and SampleIndex, each row exactly `seq_len` tokens.
    ///
    /// Training samples go on for ever, epoch after epoch. Behind the last validation sample come rows of padding
    /// with weight 0, so that all ranks have rows to the end.
    pub fn batch_at(&self, first_sample: u64) -> Result<Batch> {
        let o = &self.options;
        let mine = part_range(o.global_batch_size, 1, o.data_size, o.data_rank);
        let mut rows = Rows::new(o.seq_len, mine.len(), o.document_mask);
        for sample in first_sample + mine.start as u64..first_sample + mine.end as u64 {
            match self.locate(sample) {
                Some((source, row)) => {
                    let source = &self.sources[source];
                    rows.push(&source.index, row, source.store.manifest.origin.tokenizer.eos, sample);
                }
                None => rows.push_padding(self.sources[0].store.manifest.origin.tokenizer.eos, sample),
            }
        }
        rows.finish()
    }

    /// What a sample is made of, for reports: which tokens of which documents of which files.
    pub fn describe(&self, sample: u64) -> Vec<SamplePiece> {
        let Some((source, row)) = self.locate(sample) else { return Vec::new() };
        let source = &self.sources[source];
        let pieces = source.index.pieces(row).into_iter().map(|piece| {
            let at = source.store.origin(piece.document).unwrap_or_default();
            let file = source.store.manifest.origin.files.get(at.file).map(|f| f.file.clone());
            SamplePiece { source: source.name.clone(), file, document: at.document, tokens: piece.range }
        });
        pieces.collect()
    }

    /// Source and row of a sample; nothing behind the end of the validation split.
    fn locate(&self, sample: u64) -> Option<(usize, u64)> {
        if self.options.split == Split::Validation && sample >= self.num_samples {
            return None;
        }
        let key = |epoch: u64, salt: u64| mix64(self.options.seed ^ mix64(epoch ^ mix64(salt)));
        Some(match &self.mix {
            Mix::Union(starts) => {
                let (epoch, index) = (sample / self.num_samples, sample % self.num_samples);
                let index = Permutation::new(self.num_samples, key(epoch, u64::MAX)).at(index);
                let source = starts.partition_point(|&start| start <= index) - 1;
                (source, index - starts[source])
            }
            Mix::Weighted(blend) => {
                let (source, index) = blend.at(sample);
                let rows = self.sources[source].index.num_rows();
                let order = Permutation::new(rows, key(index / rows, source as u64));
                (source, order.at(index % rows))
            }
        })
    }
}

fn check(options: &LoaderOptions) -> Result<()> {
    let o = options;
    let fail = |message: String| Err(DataError::Options(message));
    if o.sources.is_empty() {
        return fail("no data sources: set [[data.sources]] with paths".into());
    }
    if o.seq_len == 0 || o.global_batch_size == 0 {
        return fail(format!("seq_len {} and global_batch_size {} must be at least 1", o.seq_len, o.global_batch_size));
    }
    if o.data_rank >= o.data_size {
        return fail(format!("data rank {} of {} does not exist", o.data_rank, o.data_size));
    }
    let all_held_out = o.split == Split::Validation && o.validation_fraction == 1.0;
    if !(0.0..1.0).contains(&o.validation_fraction) && !all_held_out {
        return fail(format!("validation_fraction = {} must be at least 0 and below 1", o.validation_fraction));
    }
    Ok(())
}

fn mix_of(options: &LoaderOptions, sources: &[Source]) -> Result<Mix> {
    let weights: Vec<f64> = options.sources.iter().filter_map(|s| s.weight).collect();
    // All of the held-out data is read once, whatever the weights.
    if weights.is_empty() || options.split == Split::Validation {
        let starts = sources.iter().scan(0, |end, source| {
            let start = *end;
            *end += source.index.num_rows();
            Some(start)
        });
        return Ok(Mix::Union(starts.collect()));
    }
    if weights.len() != sources.len() {
        return Err(DataError::Options(format!(
            "{} of {} data sources have a weight: give all of them one, or none",
            weights.len(),
            sources.len()
        )));
    }
    let blend = Blend::new(&weights)
        .ok_or_else(|| DataError::Options(format!("weights {weights:?}: must be finite, not negative, not all 0")))?;
    if let Some((source, _)) = sources.iter().zip(&weights).find(|(s, w)| **w > 0.0 && s.index.num_rows() == 0) {
        return Err(DataError::Options(format!("source `{}` has a weight but too little text for a row", source.name)));
    }
    Ok(Mix::Weighted(blend))
}

fn no_samples(options: &LoaderOptions) -> DataError {
    DataError::Options(match options.split {
        Split::Train => "the sources hold too little text to train on: at least two tokens are needed".into(),
        Split::Validation => format!(
            "nothing is held out with validation_fraction = {}: raise it, or switch validation off",
            options.validation_fraction
        ),
    })
}
