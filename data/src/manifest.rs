//! What a prepared folder holds and what it was made from.
//!
//! `sources.json` is written first and holds what the shards are being made from; `manifest.json` is written last and
//! says that all is there. Both carry the fingerprints that decide whether a folder may be continued or reused.

use crate::chat::StoredChat;
use crate::error::{DataError, IoContext, Result};
use crate::files;
use crate::shard::{ChatCounts, ShardRecord, TokenType};
use crate::source::ScannedFile;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3Default;

/// Name of the file that makes a folder a prepared one.
pub const MANIFEST_NAME: &str = "manifest.json";
/// Name of the file that says what unfinished shards are made from.
pub(crate) const ORIGIN_NAME: &str = "sources.json";
/// Name of the copy of the tokenizer.
pub(crate) const TOKENIZER_NAME: &str = "tokenizer.json";
const FORMAT_VERSION: u32 = 1;

/// Options that change what shards hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredOptions {
    /// The column with the text.
    pub text_column: String,
    /// Tokens after which a shard is closed.
    pub shard_tokens: usize,
    /// Longer documents are cut at line borders.
    pub max_document_bytes: usize,
    /// Of conversations: how they become tokens, and which of them are trained.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub chat: Option<StoredChat>,
}

impl StoredOptions {
    /// What the fingerprint is made from: for text as before there were conversations.
    fn fingerprint(&self) -> String {
        let StoredOptions { text_column, shard_tokens, max_document_bytes, chat } = self;
        let mut text = format!(
            "StoredOptions {{ text_column: {text_column:?}, shard_tokens: {shard_tokens:?}, max_document_bytes: \
             {max_document_bytes:?} }}"
        );
        if let Some(chat) = chat {
            text += &format!("{chat:?}");
        }
        files::hex(xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }
}

/// The tokenizer, as far as shards depend on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredTokenizer {
    /// Ids are below this.
    pub vocab_size: usize,
    /// Appended to each document.
    pub eos: u32,
    /// Prepended to each document, where the tokenizer says so.
    pub bos: Option<u32>,
    /// Width of a token in shards.
    pub token_type: TokenType,
}

/// Hashes of everything that shards depend on, hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// Name, size and content of every file that was read, in order.
    pub sources: String,
    /// The tokenizer's JSON and the ids of its bos and eos.
    pub tokenizer: String,
    /// [`StoredOptions`].
    pub options: String,
}

/// What shards are made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Version of this layout.
    pub format_version: u32,
    /// What decides whether a folder may be continued.
    pub fingerprints: Fingerprints,
    /// Options.
    pub options: StoredOptions,
    /// Tokenizer.
    pub tokenizer: StoredTokenizer,
    /// Files, those left out included.
    pub files: Vec<ScannedFile>,
}

impl Origin {
    pub(crate) fn new(
        files: Vec<ScannedFile>,
        options: StoredOptions,
        tokenizer: StoredTokenizer,
        tokenizer_hash: String,
    ) -> Origin {
        let fingerprints = Fingerprints {
            sources: sources_fingerprint(&files),
            tokenizer: tokenizer_hash,
            options: options.fingerprint(),
        };
        Origin { format_version: FORMAT_VERSION, fingerprints, options, tokenizer, files }
    }

    /// Fails, naming what differs, unless shards made from `self` are those that `wanted` asks for.
    pub(crate) fn check_same(&self, wanted: &Origin, folder: &Path) -> Result<()> {
        let differs = |what, detail| DataError::Mismatch { folder: folder.into(), what, detail };
        if self.format_version != wanted.format_version {
            let detail = format!("layout version {}, this program writes {FORMAT_VERSION}", self.format_version);
            return Err(differs("version of tangelo", detail));
        }
        if self.fingerprints.sources != wanted.fingerprints.sources {
            return Err(differs("set of sources", files_difference(&self.files, &wanted.files)));
        }
        if self.fingerprints.tokenizer != wanted.fingerprints.tokenizer {
            let (then, now) = (&self.tokenizer, &wanted.tokenizer);
            let detail = format!("{}, now {}", describe_tokenizer(then), describe_tokenizer(now));
            return Err(differs("tokenizer", detail));
        }
        if self.fingerprints.options != wanted.fingerprints.options {
            return Err(differs("set of options", format!("{:?}, now {:?}", self.options, wanted.options)));
        }
        Ok(())
    }

    /// Files whose text is in the shards, with their indices.
    pub(crate) fn read_files(&self) -> impl Iterator<Item = (usize, &ScannedFile)> {
        self.files.iter().enumerate().filter(|(_, f)| f.skipped.is_none())
    }
}

fn describe_tokenizer(tokenizer: &StoredTokenizer) -> String {
    format!("vocabulary of {} with eos {} and bos {:?}", tokenizer.vocab_size, tokenizer.eos, tokenizer.bos)
}

/// Hash of file names, sizes and contents: a corpus may move to another folder without being prepared again.
fn sources_fingerprint(files: &[ScannedFile]) -> String {
    let mut hasher = Xxh3Default::new();
    for file in files.iter().filter(|f| f.skipped.is_none()) {
        let name = file.file.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        hasher.update(format!("{name}\0{}\0{}\n", file.size_bytes, file.xxh3).as_bytes());
    }
    files::hex(hasher.digest())
}

/// The first difference between two lists of files, in words.
fn files_difference(then: &[ScannedFile], now: &[ScannedFile]) -> String {
    let name = |f: &ScannedFile| f.file.path.display().to_string();
    for (a, b) in then.iter().zip(now) {
        if a.file.path.file_name() != b.file.path.file_name() {
            return format!("{} where {} was", name(b), name(a));
        }
        if a.xxh3 != b.xxh3 {
            return format!("the content of {} changed ({} bytes, was {})", name(b), b.size_bytes, a.size_bytes);
        }
    }
    format!("{} files, was {}", now.len(), then.len())
}

/// A finished folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What it was made from.
    #[serde(flatten)]
    pub origin: Origin,
    /// Documents in all shards.
    pub documents: u64,
    /// Tokens in all shards.
    pub tokens: u64,
    /// Bytes of text they were made from.
    pub text_bytes: u64,
    /// Documents without text, passed over.
    pub empty_documents: u64,
    /// Files left out because they are not text.
    pub skipped_files: usize,
    /// Of conversations: what is trained of them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub chat: Option<ChatCounts>,
    /// The shards, in order.
    pub shards: Vec<ShardRecord>,
}

impl Manifest {
    pub(crate) fn new(origin: Origin, shards: Vec<ShardRecord>) -> Manifest {
        let sum = |f: fn(&ShardRecord) -> u64| shards.iter().map(f).sum();
        Manifest {
            documents: sum(|s| s.documents),
            tokens: sum(|s| s.tokens),
            text_bytes: sum(|s| s.text_bytes),
            empty_documents: sum(|s| s.empty_documents),
            chat: shards.iter().filter_map(|s| s.chat).reduce(ChatCounts::plus),
            skipped_files: origin.files.iter().filter(|f| f.skipped.is_some()).count(),
            origin,
            shards,
        }
    }

    /// Whether every shard is in `folder` in its size.
    pub(crate) fn is_complete(&self, folder: &Path) -> bool {
        self.shards.iter().all(|shard| shard.verify(folder, false).is_ok())
    }

    /// Reads the manifest of a prepared folder.
    ///
    /// # Errors
    /// The folder is none, or was not finished.
    pub fn read(folder: &Path) -> Result<Manifest> {
        let path = folder.join(MANIFEST_NAME);
        if !path.exists() {
            let reason = "holds no manifest.json: not a prepared folder, or its preparation was interrupted. Run \
                          `tangelo data prepare` (or `tangelo run`) to make or finish it";
            return Err(DataError::prepared(folder, reason));
        }
        read_json(&path, "prepare it again, into another folder")
    }

    /// A hash of all that decides which tokens are where.
    pub fn fingerprint(&self) -> String {
        let Fingerprints { sources, tokenizer, options } = &self.origin.fingerprints;
        let shards: Vec<&str> = self.shards.iter().map(|s| s.xxh3.as_str()).collect();
        let text = format!("{sources} {tokenizer} {options} {}", shards.join(" "));
        files::hex(xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }
}

/// Fails where folders were tokenised differently: their tokens mean different things and cannot be mixed.
pub(crate) fn check_one_tokenizer<'a>(sources: impl IntoIterator<Item = (&'a str, &'a Manifest)>) -> Result<()> {
    let mut sources = sources.into_iter().map(|(name, m)| (name, &m.origin.fingerprints.tokenizer));
    let Some((first, hash)) = sources.next() else { return Ok(()) };
    match sources.find(|(_, other)| *other != hash) {
        None => Ok(()),
        Some((other, _)) => Err(DataError::Options(format!(
            "sources `{first}` and `{other}` were prepared with different tokenizers and cannot be mixed: prepare one \
             of them again"
        ))),
    }
}

/// Whether `folder` is one that was prepared: a corpus may well have a `manifest.json` of its own.
pub fn is_prepared(folder: &Path) -> bool {
    [MANIFEST_NAME, ORIGIN_NAME].iter().all(|name| folder.join(name).is_file())
}

/// Reads a JSON file of ours; `advice` says what to do where it is damaged.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, advice: &str) -> Result<T> {
    let bytes = std::fs::read(path).at("read", path)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| DataError::prepared(path, format!("not what tangelo writes ({e}); {advice}")))
}
