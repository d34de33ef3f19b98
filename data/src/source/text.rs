//! Plain text: a file is one document, or several where it is longer than the limit.

use super::Documents;
use crate::error::{DataError, IoContext, Result};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Documents of a text file: one, or consecutive parts of at most `limit` bytes cut after a line break.
pub(super) struct TextDocuments {
    path: PathBuf,
    input: Box<dyn Read + Send>,
    limit: usize,
    /// Bytes read and not handed out: the start of the next part.
    rest: Vec<u8>,
    first: bool,
    ended: bool,
}

impl TextDocuments {
    pub(super) fn new(path: &Path, input: Box<dyn Read + Send>, limit: usize) -> TextDocuments {
        TextDocuments { path: path.into(), input, limit, rest: Vec::new(), first: true, ended: false }
    }

    /// Reads until more than a part is there or the file ends.
    fn fill(&mut self) -> Result<()> {
        let wanted = (self.limit + 1).saturating_sub(self.rest.len()) as u64;
        let count = self.input.by_ref().take(wanted).read_to_end(&mut self.rest).at("read", &self.path)?;
        self.ended = (count as u64) < wanted;
        Ok(())
    }
}

impl Documents for TextDocuments {
    fn next_document(&mut self) -> Result<Option<String>> {
        if self.ended && self.rest.is_empty() {
            return Ok(None);
        }
        if !self.ended {
            self.fill()?;
        }
        let end = if self.ended { self.rest.len() } else { border(&self.rest, self.limit) };
        let tail = self.rest.split_off(end);
        let mut part = std::mem::replace(&mut self.rest, tail);
        if std::mem::take(&mut self.first) && part.starts_with(b"\xEF\xBB\xBF") {
            part.drain(..3);
        }
        if part.is_empty() && self.ended {
            return Ok(None);
        }
        String::from_utf8(part).map(Some).map_err(|e| {
            DataError::file(&self.path, format!("not UTF-8 at byte {} of a document", e.utf8_error().valid_up_to()))
        })
    }
}

/// Where to cut: after the last line break within `limit` bytes, or at the last character border where there is none.
fn border(bytes: &[u8], limit: usize) -> usize {
    if let Some(line) = bytes[..limit].iter().rposition(|&b| b == b'\n') {
        return line + 1;
    }
    (limit.saturating_sub(3)..=limit).rev().find(|&i| bytes.get(i).is_none_or(|b| b & 0xC0 != 0x80)).unwrap_or(limit)
}

/// The parts of a text that is longer than `limit` bytes.
pub(super) fn cut(mut text: &str, limit: usize) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let end = if text.len() <= limit { text.len() } else { border(text.as_bytes(), limit) };
        let (part, rest) = text.split_at(end);
        text = rest;
        (!part.is_empty()).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parts_of_file(bytes: &[u8], limit: usize) -> Vec<String> {
        let input = Box::new(std::io::Cursor::new(bytes.to_vec()));
        let mut documents = TextDocuments::new(Path::new("t"), input, limit);
        std::iter::from_fn(|| documents.next_document().unwrap()).collect()
    }

    #[test]
    fn long_files_are_cut_after_lines() {
        assert_eq!(parts_of_file(b"one\ntwo\nthree\n", 9), ["one\ntwo\n", "three\n"]);
        assert_eq!(parts_of_file(b"\xEF\xBB\xBFone", 9), ["one"]);
        assert_eq!(parts_of_file(b"", 9), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_by_cutting(text in "[a\n\u{e9}\u{6f22}\u{1F600}]{0,60}", limit in 4usize..20) {
            let parts = parts_of_file(text.as_bytes(), limit);
            prop_assert_eq!(parts.concat(), text.clone());
            prop_assert!(parts.iter().all(|p| !p.is_empty() && p.len() <= limit));
            prop_assert_eq!(cut(&text, limit).collect::<Vec<_>>(), parts);
        }
    }
}
