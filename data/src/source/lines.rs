//! JSON lines: one object per line; a document is the text under one of its keys, or the line.

use super::{Content, Documents, MAX_DOCUMENT_BYTES};
use crate::error::{DataError, IoContext, Result};
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// A longer line is refused unread: a file that is one array would be read into memory whole.
const MAX_LINE_BYTES: usize = 16 * MAX_DOCUMENT_BYTES;

/// Documents of a file of JSON lines.
pub(super) struct JsonLines {
    path: PathBuf,
    input: BufReader<Box<dyn Read + Send>>,
    /// `None`: the whole line.
    column: Option<String>,
    line: Vec<u8>,
    line_number: u64,
    limit: usize,
}

impl JsonLines {
    pub(super) fn new(path: &Path, input: Box<dyn Read + Send>, content: Content) -> JsonLines {
        let input = BufReader::with_capacity(1 << 18, input);
        let column = match content {
            Content::Column(name) => Some(name.to_owned()),
            Content::Record => None,
        };
        JsonLines { path: path.into(), input, column, line: Vec::new(), line_number: 0, limit: MAX_LINE_BYTES }
    }

    /// Reads the next line into `line`; false at the end.
    fn read_line(&mut self) -> Result<bool> {
        self.line.clear();
        self.line_number += 1;
        let mut bounded = self.input.by_ref().take(self.limit as u64 + 1);
        let count = bounded.read_until(b'\n', &mut self.line).at("read", &self.path)?;
        if count > self.limit && !self.line.ends_with(b"\n") {
            return Err(self.wrong(format!("longer than {} bytes", self.limit)));
        }
        Ok(count > 0)
    }

    fn wrong(&self, reason: String) -> DataError {
        let is_array = self.line.trim_ascii_start().starts_with(b"[");
        let hint = if is_array { "; a JSON array is not JSON lines: write one object per line" } else { "" };
        DataError::file(&self.path, format!("line {}: {reason}{hint}", self.line_number))
    }

    fn parse(&self) -> Result<String> {
        let Some(column) = &self.column else { return self.whole_line() };
        let mut deserializer = serde_json::Deserializer::from_slice(&self.line);
        let found = Field(column).deserialize(&mut deserializer).and_then(|f| deserializer.end().map(|()| f));
        match found {
            Ok(Found::Text(text)) => Ok(text),
            Ok(Found::Null) => Ok(String::new()),
            Ok(Found::Missing(keys)) => {
                Err(DataError::Column { path: self.path.clone(), column: column.clone(), found: keys.join(", ") })
            }
            Err(error) => Err(self.wrong(error.to_string())),
        }
    }
}

impl JsonLines {
    /// The line, which must hold one JSON object.
    fn whole_line(&self) -> Result<String> {
        let line = std::str::from_utf8(&self.line).map_err(|e| self.wrong(format!("not UTF-8: {e}")))?.trim();
        serde_json::from_str::<IgnoredAny>(line).map_err(|e| self.wrong(e.to_string()))?;
        if line.starts_with('{') { Ok(line.into()) } else { Err(self.wrong("no JSON object".into())) }
    }
}

impl Documents for JsonLines {
    fn next_document(&mut self) -> Result<Option<String>> {
        while self.read_line()? {
            if !self.line.trim_ascii().is_empty() {
                return self.parse().map(Some);
            }
        }
        Ok(None)
    }

    fn place(&self) -> u64 {
        self.line_number
    }
}

enum Found {
    Text(String),
    Null,
    Missing(Vec<String>),
}

/// Reads one key of an object as text and passes over the others.
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Found;
    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Found, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "a JSON object with the text under `{}`", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Found, A::Error> {
        let (mut found, mut others) = (None, Vec::new());
        while let Some(key) = map.next_key::<std::borrow::Cow<str>>()? {
            if key == self.0 {
                found = Some(map.next_value::<Option<String>>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
                if found.is_none() {
                    others.push(key.into_owned());
                }
            }
        }
        Ok(match found {
            Some(Some(text)) => Found::Text(text),
            Some(None) => Found::Null,
            None => Found::Missing(others),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn read(text: &str) -> Result<Vec<String>> {
        let input = Box::new(std::io::Cursor::new(text.as_bytes().to_vec()));
        let mut lines = JsonLines::new(Path::new("a.jsonl"), input, Content::Column("text"));
        std::iter::from_fn(|| lines.next_document().transpose()).collect()
    }

    #[test]
    fn picks_the_column() {
        let text = "{\"id\": [1, {}], \"text\": \"a\\u00e9\\n\"}\n\n{\"text\": null}\r\n{\"text\": \"\", \"z\": 0}";
        assert_eq!(read(text).unwrap(), ["a\u{e9}\n", "", ""]);
    }

    #[test]
    fn lines_are_bounded() {
        let read = |text: &str| {
            let input = Box::new(std::io::Cursor::new(text.as_bytes().to_vec()));
            let mut lines =
                JsonLines { limit: 16, ..JsonLines::new(Path::new("a.jsonl"), input, Content::Column("text")) };
            lines.next_document().map_err(|e| e.to_string())
        };
        assert_eq!(read("{\"text\": \"1234\"}"), Ok(Some("1234".into())));
        assert_eq!(read("{\"text\": \"1234\"}\n"), Ok(Some("1234".into())));
        let error = read("[{\"text\": \"1234\"}]").unwrap_err();
        assert!(error.contains("line 1: longer than 16 bytes; a JSON array is not JSON lines"), "{error}");
    }

    #[test]
    fn bad_lines_are_named() {
        let check =
            |text: &str, expected: expect_test::Expect| expected.assert_eq(&read(text).unwrap_err().to_string());
        check(
            "{\"question\": 1, \"answer\": 2}",
            expect![
                "a.jsonl: no text column `text`; columns there are: question, answer. Set text_column to one of them"
            ],
        );
        check(
            "{\"text\": \"a\"}\n{\"text\": 1}",
            expect!["a.jsonl: line 2: invalid type: integer `1`, expected a string at line 1 column 10"],
        );
        check(
            "[{\"text\": \"a\"}]",
            expect![[
                "a.jsonl: line 1: invalid type: sequence, expected a JSON object with the text under `text` at line 1 column 0; a JSON array is not JSON lines: write one object per line"
            ]],
        );
    }
}
