//! A look into a prepared folder, for people.

use crate::chat::marked;
use crate::encode::TextTokenizer;
use crate::error::Result;
use crate::manifest::{Manifest, TOKENIZER_NAME};
use crate::shard::{ChatCounts, TokenType};
use crate::source::ScannedFile;
use crate::store::TokenStore;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// What a prepared folder holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// The folder.
    pub folder: PathBuf,
    /// Documents.
    pub documents: u64,
    /// Tokens, bos and eos included.
    pub tokens: u64,
    /// Bytes of text they were made from.
    pub text_bytes: u64,
    /// Documents without text that were passed over.
    pub empty_documents: u64,
    /// Files, and how many of them were left out.
    pub files: (usize, usize),
    /// The files that were left out, and why (the first few).
    pub skipped: Vec<(PathBuf, String)>,
    /// Of conversations: what is trained of them.
    pub chat: Option<ChatCounts>,
    /// Shard files.
    pub shards: usize,
    /// Bytes of all shards.
    pub size_bytes: u64,
    /// Tokens per document: number of documents with fewer than 2^(k+1) tokens and at least 2^k.
    pub length_histogram: Vec<u64>,
    /// Longest document, tokens.
    pub longest: u64,
    /// Vocabulary of the tokenizer.
    pub vocab_size: usize,
    /// Width of a token.
    pub token_type: TokenType,
    /// Hash of everything.
    pub fingerprint: String,
    /// Hash of the sources.
    pub sources_fingerprint: String,
    /// Hash of the tokenizer.
    pub tokenizer_fingerprint: String,
    /// Hash of the options.
    pub options_fingerprint: String,
    /// Beginnings of the first documents, decoded.
    pub samples: Vec<String>,
}

/// Tokens of a document that are shown.
const SHOWN_TOKENS: u64 = 64;
/// Tokens of a conversation that are shown: what is trained of it comes late.
const SHOWN_CHAT_TOKENS: u64 = 512;
/// Left-out files that are listed.
const SHOWN_FILES: usize = 10;

/// Checks every shard of `folder` by its checksum and counts, decoding the first `num_samples` documents.
pub fn inspect(folder: &Path, num_samples: u64) -> Result<Inspection> {
    let store = TokenStore::open(folder, true)?;
    let tokenizer = TextTokenizer::open(&folder.join(TOKENIZER_NAME))?;
    let (mut histogram, mut longest) = (Vec::new(), 0);
    for document in 0..store.num_documents() {
        let length = store.document_len(document);
        let bucket = length.max(1).ilog2() as usize;
        if histogram.len() <= bucket {
            histogram.resize(bucket + 1, 0);
        }
        histogram[bucket] += 1;
        longest = longest.max(length);
    }
    let mut samples = Vec::new();
    for document in 0..num_samples.min(store.num_documents()) {
        let mut tokens = Vec::new();
        let shown = if store.is_masked() { SHOWN_CHAT_TOKENS } else { SHOWN_TOKENS };
        store.copy(document, 0..store.document_len(document).min(shown), &mut tokens);
        let mut trained = Vec::new();
        if store.is_masked() {
            store.copy_trained(document, 0..tokens.len() as u64, &mut trained);
        }
        samples.push(if trained.is_empty() {
            tokenizer.decode(&tokens)?
        } else {
            marked(&tokenizer, &tokens, &trained)?
        });
    }
    Ok(report(folder, &store.manifest, histogram, longest, samples))
}

fn report(folder: &Path, manifest: &Manifest, histogram: Vec<u64>, longest: u64, samples: Vec<String>) -> Inspection {
    let origin = &manifest.origin;
    let skipped = |f: &ScannedFile| Some((f.file.path.clone(), f.skipped.clone()?));
    Inspection {
        folder: folder.into(),
        documents: manifest.documents,
        tokens: manifest.tokens,
        text_bytes: manifest.text_bytes,
        empty_documents: manifest.empty_documents,
        files: (origin.files.len(), manifest.skipped_files),
        skipped: origin.files.iter().filter_map(skipped).take(SHOWN_FILES).collect(),
        chat: manifest.chat,
        shards: manifest.shards.len(),
        size_bytes: manifest.shards.iter().map(|s| s.size_bytes).sum(),
        length_histogram: histogram,
        longest,
        vocab_size: origin.tokenizer.vocab_size,
        token_type: origin.tokenizer.token_type,
        fingerprint: manifest.fingerprint(),
        sources_fingerprint: origin.fingerprints.sources.clone(),
        tokenizer_fingerprint: origin.fingerprints.tokenizer.clone(),
        options_fingerprint: origin.fingerprints.options.clone(),
        samples,
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let per_token = self.text_bytes as f64 / self.tokens.max(1) as f64;
        writeln!(f, "{}", self.folder.display())?;
        writeln!(f, "  documents    {} ({} empty ones passed over)", self.documents, self.empty_documents)?;
        writeln!(f, "  tokens       {} ({per_token:.2} bytes of text per token)", self.tokens)?;
        if let Some(ChatCounts { trained_tokens, truncated, dropped }) = self.chat {
            let share = 100.0 * trained_tokens as f64 / self.tokens.max(1) as f64;
            writeln!(
                f,
                "  trained      {trained_tokens} tokens ({share:.1} %), in samples between \u{27e6} and \u{27e7}"
            )?;
            writeln!(f, "  too long     {truncated} conversations cut, {dropped} left out")?;
        }
        writeln!(f, "  files        {} ({} left out)", self.files.0, self.files.1)?;
        for (path, reason) in &self.skipped {
            writeln!(f, "    left out   {}: {reason}", path.display())?;
        }
        writeln!(f, "  shards       {} ({} bytes, every checksum right)", self.shards, self.size_bytes)?;
        writeln!(f, "  vocabulary   {} ({} bytes per token)", self.vocab_size, self.token_type.size_bytes())?;
        writeln!(f, "  fingerprint  {}", self.fingerprint)?;
        writeln!(f, "    sources {}", self.sources_fingerprint)?;
        writeln!(f, "    tokenizer {}", self.tokenizer_fingerprint)?;
        writeln!(f, "    options {}", self.options_fingerprint)?;
        writeln!(f, "  tokens per document (longest {})", self.longest)?;
        let most = self.length_histogram.iter().copied().max().unwrap_or(1).max(1);
        for (bucket, count) in self.length_histogram.iter().enumerate() {
            let bar = "#".repeat((count * 40).div_ceil(most) as usize);
            writeln!(f, "    {:>9} to {:<9} {count:>9} {bar}", 1u64 << bucket, (2u64 << bucket) - 1)?;
        }
        for (number, sample) in self.samples.iter().enumerate() {
            writeln!(f, "  document {number}: {sample:?}")?;
        }
        Ok(())
    }
}
