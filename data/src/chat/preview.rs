//! What a job would train of its first conversations, before anything is prepared.

use super::ChatEncoder;
use crate::encode::{Scratch, TextTokenizer};
use crate::error::{DataError, Result};
use crate::job::{already_prepared, chat_options, given, template_choice};
use crate::source::{Content, FileKind, MAX_DOCUMENT_BYTES, OpenFile, discover};
use std::fmt;
use std::path::PathBuf;
use tangelo_configs::JobConfig;
use tangelo_configs::job::JobType;

/// The first conversation of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    /// The source.
    pub source: String,
    /// The file it is in, and its line or row there.
    pub place: (PathBuf, u64),
    /// Its tokens.
    pub tokens: usize,
    /// How many of them are trained.
    pub trained: usize,
    /// Its text, with marks around what is trained.
    pub text: String,
}

/// Goes before what is trained.
const OPEN: &str = "\u{27e6}";
/// Goes behind it.
const CLOSE: &str = "\u{27e7}";

/// Looks at the first conversation of every source of text; nothing where the job trains no conversations.
///
/// # Errors
/// As preparing would fail on it.
pub fn preview(config: &JobConfig) -> Result<Vec<Preview>> {
    if config.job.kind != JobType::Sft {
        return Ok(Vec::new());
    }
    let tokenizer = TextTokenizer::open(&given(config)?)?;
    let mut found = Vec::new();
    for source in config.data.sources.iter().filter(|s| already_prepared(s).is_none()) {
        let options = chat_options(config, source)?;
        let encoder = ChatEncoder::new(&tokenizer, template_choice(config), options)?;
        let mut files = discover(&source.paths)?;
        files.retain(|file| file.kind != FileKind::Text);
        let Some(file) = files.first() else { continue };
        let mut open = OpenFile::open(file, Content::Record, MAX_DOCUMENT_BYTES)?;
        let Some(row) = open.next_document()? else { continue };
        let (name, place) = (source.name.clone().unwrap_or_default(), (file.path.clone(), open.place()));
        let failed = |e| DataError::row(file, open.place(), e);
        let Some(encoded) = encoder.encode(&row, &mut Scratch::default()).map_err(failed)? else { continue };
        let text = marked(&tokenizer, &encoded.tokens, &encoded.trained)?;
        found.push(Preview { source: name, place, tokens: encoded.tokens.len(), trained: encoded.num_trained(), text });
    }
    Ok(found)
}

/// The text of tokens, with marks around what is trained.
pub(crate) fn marked(tokenizer: &TextTokenizer, tokens: &[u32], trained: &[bool]) -> Result<String> {
    let mut text = String::new();
    let mut start = 0;
    for run in trained.chunk_by(|a, b| a == b) {
        let piece = tokenizer.decode(&tokens[start..start + run.len()])?;
        start += run.len();
        text += &if run[0] { format!("{OPEN}{piece}{CLOSE}") } else { piece };
    }
    Ok(text)
}

impl fmt::Display for Preview {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (path, place) = &self.place;
        writeln!(
            f,
            "{} ({}, row {place}): {} tokens, {} of them trained, between {OPEN} and {CLOSE}",
            self.source,
            path.display(),
            self.tokens,
            self.trained
        )?;
        self.text.lines().try_for_each(|line| writeln!(f, "  {line}"))
    }
}
