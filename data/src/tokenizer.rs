//! Training a byte-level BPE tokenizer on the sources themselves.
//!
//! Words are counted by the same cutter that encodes, and the `tokenizers` library learns the merges. Invariants: the
//! result is a function of (text, options); it is a `tokenizer.json` that Hugging Face's libraries load; special tokens
//! come first, so that the end of a document is id 0. Memory is bounded by the sample: a larger corpus is sampled
//! document by document, by hash.

use crate::encode::{byte_alphabet, cl100k_expression, for_each_word};
use crate::error::{DataError, IoContext, Result};
use crate::progress::{PrepareProgress, Progress, abandonable};
use crate::source::{Content, MAX_DOCUMENT_BYTES, OpenFile, ScannedFile, discover, scan};
use ahash::AHashMap;
use compact_str::CompactString;
use std::path::{Path, PathBuf};
use tangelo_configs::job::DEFAULT_TEXT_COLUMN;
use tangelo_core::hash::mix64;
use tangelo_formats::TokenizerAssets;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

/// The token that ends documents.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// What to learn from.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Files, folders or globs.
    pub paths: Vec<String>,
    /// Column with the text, in files that have columns.
    pub text_column: String,
    /// Tokens in all, special ones and the 256 bytes included. A small corpus may yield fewer.
    pub vocab_size: usize,
    /// Tokens that text is never cut into; they get the first ids. The first ends documents.
    pub special_tokens: Vec<String>,
    /// Learn from about this many bytes of text at most.
    pub sample_bytes: u64,
    /// Chooses the sample.
    pub seed: u64,
}

impl TrainOptions {
    /// Defaults for `paths` and `vocab_size`.
    pub fn new(paths: Vec<String>, vocab_size: usize) -> TrainOptions {
        TrainOptions {
            paths,
            text_column: DEFAULT_TEXT_COLUMN.into(),
            vocab_size,
            special_tokens: vec![END_OF_TEXT.into()],
            sample_bytes: 128 << 20,
            seed: 0,
        }
    }
}

/// What was learnt, and from how much.
#[derive(Debug)]
pub struct TrainedTokenizer {
    /// The tokenizer.
    pub assets: TokenizerAssets,
    /// Documents that were learnt from.
    pub documents: u64,
    /// Bytes of text that were learnt from.
    pub text_bytes: u64,
}

impl TrainedTokenizer {
    /// Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.
    pub fn save(&self, folder: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(folder).at("create", folder)?;
        let path = folder.join("tokenizer.json");
        self.assets.save(folder).map_err(|e| DataError::Tokenizer { path: path.clone(), reason: e.to_string() })?;
        Ok(path)
    }
}

/// Learns a byte-level BPE from what `options` names.
///
/// # Errors
/// Files that cannot be read, or a vocabulary too small for the bytes and the special tokens.
pub fn train(options: &TrainOptions, progress: &dyn Progress) -> Result<TrainedTokenizer> {
    train_on(&[(options.paths.clone(), options.text_column.clone())], options, progress)
}

/// Learns from several sources with columns of their own; `options.paths` and `options.text_column` are not read.
pub(crate) fn train_on(
    sources: &[(Vec<String>, String)],
    options: &TrainOptions,
    progress: &dyn Progress,
) -> Result<TrainedTokenizer> {
    let least = 256 + options.special_tokens.len();
    if options.vocab_size < least || options.special_tokens.is_empty() {
        return Err(DataError::Options(format!(
            "vocab_size = {}: at least {} are needed for 256 bytes and {} special tokens (one of them to end documents)",
            options.vocab_size,
            least.max(257),
            options.special_tokens.len()
        )));
    }
    progress.phase("looking at source files");
    let mut files = Vec::new();
    for (paths, column) in sources {
        let found = scan(discover(paths)?, Content::Column(column), &[], progress)?;
        files.extend(found.into_iter().filter(|f| f.skipped.is_none()).map(|file| (file, column.as_str())));
    }
    let counts = count_words(&files, options, progress)?;
    if counts.words.is_empty() {
        return Err(DataError::Options("the sources hold no text to train a tokenizer on".into()));
    }
    progress.phase("learning merges");
    let (words, options) = (counts.words, options.clone());
    let learnt = abandonable(progress, move || learn(&words, &options)).ok_or(DataError::Interrupted)?;
    let tokenizer = learnt.map_err(|e| failed(&e))?;
    let assets = TokenizerAssets::from_tokenizer(tokenizer).map_err(|e| failed(&e))?;
    Ok(TrainedTokenizer { assets, documents: counts.documents, text_bytes: counts.text_bytes })
}

fn failed(error: &dyn std::fmt::Display) -> DataError {
    DataError::Options(format!("training the tokenizer failed: {error}"))
}

/// Words of a sample, and how often each occurs.
#[derive(Default)]
struct Counts {
    words: AHashMap<CompactString, u64>,
    documents: u64,
    text_bytes: u64,
}

fn count_words(files: &[(ScannedFile, &str)], options: &TrainOptions, progress: &dyn Progress) -> Result<Counts> {
    progress.phase("counting words");
    let bytes_total: u64 = files.iter().map(|(f, _)| f.size_bytes).sum();
    let share = options.sample_bytes as f64 / bytes_total.max(1) as f64;
    let threshold = (share.min(1.0) * u64::MAX as f64) as u64;
    let (mut counts, alphabet, mut mapped) = (Counts::default(), byte_alphabet(), String::new());
    let (mut number, mut before) = (0u64, 0u64);
    for (file, column) in files {
        let mut open = OpenFile::open(&file.file, Content::Column(column), MAX_DOCUMENT_BYTES)?;
        while let Some(text) = open.next_document()? {
            if progress.cancelled() {
                return Err(DataError::Interrupted);
            }
            number += 1;
            // Compressed sources hold more text than their size says: the budget is a limit too.
            let room = counts.text_bytes < options.sample_bytes.saturating_mul(2);
            let chosen = counts.documents == 0 || (room && mix64(mix64(options.seed) ^ number) <= threshold);
            if text.is_empty() || !chosen {
                continue;
            }
            (counts.documents, counts.text_bytes) = (counts.documents + 1, counts.text_bytes + text.len() as u64);
            for_each_word(&text, |word| {
                mapped.clear();
                mapped.extend(word.bytes().map(|b| alphabet[b as usize]));
                match counts.words.get_mut(mapped.as_str()) {
                    Some(count) => *count += 1,
                    None => _ = counts.words.insert(CompactString::new(&mapped), 1),
                }
            });
            let documents = counts.documents;
            progress.update(&PrepareProgress {
                bytes_done: before + open.bytes_read(),
                bytes_total,
                documents,
                tokens: 0,
            });
        }
        before += file.size_bytes;
    }
    Ok(counts)
}

fn learn(words: &AHashMap<CompactString, u64>, options: &TrainOptions) -> tokenizers::Result<Tokenizer> {
    let special: Vec<AddedToken> = options.special_tokens.iter().map(|t| AddedToken::from(t.clone(), true)).collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(options.vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(special.clone())
        .initial_alphabet(byte_alphabet().into_iter().collect())
        .build();
    let mut model = BPE::default();
    trainer.do_train(words, &mut model)?;
    let expression = SplitPattern::Regex(cl100k_expression());
    let cut = Split::new(expression, SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, true, false);
    let steps = vec![PreTokenizerWrapper::Split(cut), PreTokenizerWrapper::ByteLevel(bytes)];
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    tokenizer.add_special_tokens(special)?;
    Ok(tokenizer)
}
