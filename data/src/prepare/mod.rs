//! From text to token shards: parallel, in order, restartable.
//!
//! The work is done once per source. A folder is finished when it has a `manifest.json`; until then every finished
//! shard is kept, and the next run checks it and goes on behind it. A folder made from something else is refused.

mod pipeline;

use crate::chat::{ChatEncoder, ChatOptions};
use crate::encode::TextTokenizer;
use crate::error::{DataError, IoContext, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::manifest::read_json;
use crate::manifest::{MANIFEST_NAME, Manifest, ORIGIN_NAME, Origin, StoredOptions, StoredTokenizer, TOKENIZER_NAME};
use crate::progress::Progress;
use crate::shard::{ShardRecord, record_name, shard_name};
use crate::source::{Content, MAX_DOCUMENT_BYTES, describe_skipped, discover, scan};
use std::fs;
use std::path::{Path, PathBuf};
use tangelo_configs::job::DEFAULT_TEXT_COLUMN;
use tangelo_formats::chat::TemplateChoice;

/// What to do with a damaged file of an unfinished folder.
const REMOVE: &str = "remove it to prepare the folder again";

/// What to prepare and how.
#[derive(Clone, Debug)]
pub struct PrepareOptions {
    /// Files, folders or globs.
    pub paths: Vec<String>,
    /// Column with the text, in files that have columns.
    pub text_column: String,
    /// tokenizer.json, a folder with one, or a GGUF file.
    pub tokenizer: PathBuf,
    /// Where shards and the manifest go.
    pub folder: PathBuf,
    /// A shard is closed after this many tokens.
    pub shard_tokens: usize,
    /// Tokenising threads; 0: one per core. The output does not depend on it.
    pub num_threads: usize,
    /// Bytes of text between reader and writer.
    pub buffer_bytes: usize,
    /// Longer documents are cut at line borders.
    pub max_document_bytes: usize,
    /// Start over where the folder was made from something else.
    pub overwrite: bool,
    /// Rows are conversations, read and masked so; else documents of text.
    pub chat: Option<ChatOptions>,
    /// A file with the chat template to use instead of the tokenizer's.
    pub chat_template: Option<PathBuf>,
    /// The name of the tokenizer's template to use, where it has several.
    pub chat_template_name: Option<String>,
}

impl PrepareOptions {
    /// Defaults for `paths`, `tokenizer` and `folder`.
    pub fn new(paths: Vec<String>, tokenizer: impl Into<PathBuf>, folder: impl Into<PathBuf>) -> PrepareOptions {
        PrepareOptions {
            paths,
            text_column: DEFAULT_TEXT_COLUMN.into(),
            tokenizer: tokenizer.into(),
            folder: folder.into(),
            shard_tokens: 1 << 26,
            num_threads: 0,
            buffer_bytes: 64 << 20,
            max_document_bytes: MAX_DOCUMENT_BYTES,
            overwrite: false,
            chat: None,
            chat_template: None,
            chat_template_name: None,
        }
    }

    /// What a document is.
    pub(crate) fn content(&self) -> Content<'_> {
        if self.chat.is_some() { Content::Record } else { Content::Column(&self.text_column) }
    }

    fn chat_encoder<'a>(&self, tokenizer: &'a TextTokenizer) -> Result<Option<ChatEncoder<'a>>> {
        let choice = TemplateChoice { file: self.chat_template.as_deref(), name: self.chat_template_name.as_deref() };
        let encoder = |options: ChatOptions| ChatEncoder::new(tokenizer, choice, options);
        self.chat.clone().map(encoder).transpose()
    }
}

/// What turns documents into tokens.
pub(crate) enum Encoder<'a> {
    /// Text.
    Text(&'a TextTokenizer),
    /// Conversations.
    Chat(Box<ChatEncoder<'a>>),
}

/// Tokenises everything that `options` names into `options.folder`, or finds it done.
///
/// # Errors
/// [`DataError::Mismatch`] where the folder was made from other sources, tokenizer or options; every error leaves
/// finished shards in place, from which the next call goes on.
pub fn prepare(options: &PrepareOptions, progress: &dyn Progress) -> Result<Manifest> {
    if options.shard_tokens == 0 {
        return Err(DataError::Options("shard_tokens is 0: a shard needs at least one token".into()));
    }
    let tokenizer = TextTokenizer::open(&options.tokenizer)?;
    let chat = options.chat_encoder(&tokenizer)?.map(Box::new);
    let encoder = chat.map_or(Encoder::Text(&tokenizer), Encoder::Chat);
    let folder = &options.folder;
    let _lock = FolderLock::acquire(folder, progress)?;
    let origin = scan_origin(options, &tokenizer, &encoder, progress)?;
    if let Some(before) = read_origin(folder)? {
        match before.check_same(&origin, folder) {
            Ok(()) => {}
            // Nothing was finished, so that nothing is lost: the user may just have mended what stopped it.
            Err(mismatch) if !options.overwrite && has_shards(folder)? => return Err(mismatch),
            Err(_) => clear(folder)?,
        }
    }
    if let Some(manifest) = finished(folder)? {
        warn_of_lost(&manifest, options, progress);
        return Ok(manifest);
    }
    files::write_json(&folder.join(ORIGIN_NAME), &origin)?;
    save_tokenizer(&tokenizer, &encoder, folder)?;
    let shards = keep_good_shards(folder, progress)?;
    let shards = pipeline::tokenise(options, &tokenizer, &encoder, &origin, shards, progress)?;
    let manifest = Manifest::new(origin, shards);
    if manifest.documents == 0 {
        return Err(DataError::Options(format!("{}: {}", options.paths.join(", "), nothing_there(options))));
    }
    files::write_json(&folder.join(MANIFEST_NAME), &manifest)?;
    warn_of_lost(&manifest, options, progress);
    Ok(manifest)
}

fn nothing_there(options: &PrepareOptions) -> String {
    match &options.chat {
        Some(chat) => format!(
            "no conversation is left: there are none, or all have more than {} tokens; raise training.seq_len",
            chat.max_tokens
        ),
        None => "the files hold no text at all".into(),
    }
}

/// Says how many conversations were too long.
fn warn_of_lost(manifest: &Manifest, options: &PrepareOptions, progress: &dyn Progress) {
    let (Some(counts), Some(chat)) = (manifest.chat, &options.chat) else { return };
    if counts.truncated + counts.dropped > 0 {
        progress.warn(&format!(
            "{} of {} conversations have more than {} tokens: {} are cut, {} are left out (data.overlong, \
             training.seq_len)",
            counts.truncated + counts.dropped,
            manifest.documents + counts.dropped,
            chat.max_tokens,
            counts.truncated,
            counts.dropped
        ));
    }
}

/// Looks at every file; the results of an earlier look spare reading unchanged ones again.
fn scan_origin(
    options: &PrepareOptions,
    tokenizer: &TextTokenizer,
    encoder: &Encoder,
    progress: &dyn Progress,
) -> Result<Origin> {
    progress.phase("looking at source files");
    let found = discover(&options.paths)?;
    let before = read_origin(&options.folder).ok().flatten().filter(|before| {
        let same = before.options.chat.is_some() == options.chat.is_some();
        same && before.options.text_column == options.text_column
    });
    let known = before.map(|o| o.files).unwrap_or_default();
    let files = scan(found, options.content(), &known, progress)?;
    if let Some(skipped) = describe_skipped(&files) {
        if files.iter().all(|f| f.skipped.is_some()) {
            return Err(DataError::Source { pattern: options.paths.join(", "), reason: skipped });
        }
        progress.warn(&skipped);
    }
    let stored = StoredOptions {
        text_column: options.text_column.clone(),
        shard_tokens: options.shard_tokens,
        max_document_bytes: options.max_document_bytes,
        chat: match encoder {
            Encoder::Text(_) => None,
            Encoder::Chat(chat) => Some(chat.stored()),
        },
    };
    let about = StoredTokenizer {
        vocab_size: tokenizer.vocab_size(),
        eos: tokenizer.eos(),
        bos: tokenizer.bos(),
        token_type: tokenizer.token_type(),
    };
    Ok(Origin::new(files, stored, about, tokenizer.fingerprint()))
}

fn read_origin(folder: &Path) -> Result<Option<Origin>> {
    let path = folder.join(ORIGIN_NAME);
    if path.exists() { read_json(&path, REMOVE).map(Some) } else { Ok(None) }
}

/// The manifest, if there is one and its shards are all there in their sizes. Their bytes were synced before the
/// manifest was written; reading them all at each start would take minutes ([`inspect`](crate::inspect()) does it).
fn finished(folder: &Path) -> Result<Option<Manifest>> {
    if !folder.join(MANIFEST_NAME).exists() {
        return Ok(None);
    }
    let manifest = Manifest::read(folder)?;
    if manifest.is_complete(folder) {
        return Ok(Some(manifest));
    }
    let path = folder.join(MANIFEST_NAME);
    fs::remove_file(&path).at("remove", &path)?;
    Ok(None)
}

/// The longest run of shards from the first that are there and whole; whatever else looks like a shard is removed.
fn keep_good_shards(folder: &Path, progress: &dyn Progress) -> Result<Vec<ShardRecord>> {
    let mut kept = Vec::new();
    while let Ok(record) = read_json::<ShardRecord>(&folder.join(record_name(kept.len())), REMOVE) {
        if kept.is_empty() {
            progress.phase("checking token shards");
        }
        if progress.cancelled() {
            return Err(DataError::Interrupted);
        }
        if record.file != shard_name(kept.len()) || record.verify(folder, true).is_err() {
            progress.warn(&format!("{} in {} is damaged and made again", shard_name(kept.len()), folder.display()));
            break;
        }
        kept.push(record);
    }
    for path in shard_files(folder)? {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if !(0..kept.len()).any(|i| name == shard_name(i) || name == record_name(i)) {
            fs::remove_file(&path).at("remove", &path)?;
        }
    }
    Ok(kept)
}

/// Files of the folder that are shards, records of shards, or unfinished ones.
fn shard_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).at("list", folder)?.collect::<std::io::Result<Vec<_>>>().at("list", folder)?;
    let paths = entries.into_iter().map(|entry| entry.path());
    Ok(paths.filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("shard-"))).collect())
}

fn has_shards(folder: &Path) -> Result<bool> {
    let records = shard_files(folder)?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "json"));
    Ok(records.count() > 0)
}

/// Removes what preparation wrote, and nothing else.
fn clear(folder: &Path) -> Result<()> {
    let mut ours = vec![folder.join(MANIFEST_NAME), folder.join(ORIGIN_NAME)];
    ours.extend(shard_files(folder)?);
    for path in ours.into_iter().filter(|p| p.exists()) {
        fs::remove_file(&path).at("remove", &path)?;
    }
    Ok(())
}

/// Keeps the tokenizer with the tokens, with the template they were made with: a prepared folder can be decoded without
/// anything else.
fn save_tokenizer(tokenizer: &TextTokenizer, encoder: &Encoder, folder: &Path) -> Result<()> {
    let path = folder.join(TOKENIZER_NAME);
    let mut assets = tokenizer.assets().clone();
    if let Encoder::Chat(chat) = encoder {
        assets.chat_template = chat.template_text().map(str::to_owned);
    }
    assets.save(folder).map_err(|e| DataError::Tokenizer { path, reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{TrainOptions, train};
    use std::os::unix::fs::symlink;

    #[test]
    fn a_full_disk_is_named_with_the_bytes_that_are_missing() {
        let root = tempfile::tempdir().unwrap();
        let text = root.path().join("a.txt");
        fs::write(&text, "some words, again and again. ".repeat(100_000)).unwrap();
        let paths = vec![text.display().to_string()];
        train(&TrainOptions::new(paths.clone(), 300), &()).unwrap().save(root.path()).unwrap();
        let options = PrepareOptions::new(paths, root.path(), root.path().join("out"));
        fs::create_dir_all(&options.folder).unwrap();
        let tokenizer = TextTokenizer::open(&options.tokenizer).unwrap();
        let encoder = Encoder::Text(&tokenizer);
        let origin = scan_origin(&options, &tokenizer, &encoder, &()).unwrap();
        // Every write to this device fails as a full disk does.
        symlink("/dev/full", options.folder.join(format!("{}.partial", shard_name(0)))).unwrap();
        let error = pipeline::tokenise(&options, &tokenizer, &encoder, &origin, Vec::new(), &()).unwrap_err();
        let DataError::DiskFull { folder, needed_bytes } = &error else { panic!("{error}") };
        assert_eq!(folder, &options.folder);
        assert!(*needed_bytes > 0, "{error}");
        assert!(shard_files(&options.folder).unwrap().is_empty(), "the unfinished shard gives its room back");
    }
}
