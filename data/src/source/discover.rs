//! From what the user wrote to a list of files.

use crate::error::{DataError, IoContext, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// How a file's bytes become documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// The whole file is one document, UTF-8.
    Text,
    /// A JSON object per line.
    JsonLines,
    /// Apache Parquet.
    Parquet,
    /// Arrow IPC: file or stream.
    Arrow,
}

/// How a file is compressed as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Where it lies.
    pub path: PathBuf,
    /// What it is, by its extension.
    pub kind: FileKind,
    /// Compression, by its extension.
    pub compression: Compression,
    /// The user named this very file, so that being unable to read it is an error; else it is skipped with a warning.
    pub explicit: bool,
}

/// The name without what says how the file is compressed, in lower case.
fn stem_of(path: &Path) -> (String, Compression) {
    let mut name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    for (extension, compression) in [(".gz", Compression::Gzip), (".zst", Compression::Zstd)] {
        if name.ends_with(extension) {
            name.truncate(name.len() - extension.len());
            return (name, compression);
        }
    }
    (name, Compression::None)
}

impl SourceFile {
    /// A file whose kind follows from its name. Extensions that are not known to be something else are text.
    pub fn from_path(path: PathBuf, explicit: bool) -> SourceFile {
        let (stem, compression) = stem_of(&path);
        let kind = match stem.rsplit_once('.').map(|(_, extension)| extension) {
            Some("jsonl" | "ndjson" | "json") => FileKind::JsonLines,
            Some("parquet") => FileKind::Parquet,
            Some("arrow" | "feather") => FileKind::Arrow,
            _ => FileKind::Text,
        };
        SourceFile { path, kind, compression, explicit }
    }

    /// Whether this is a `.json` file that nobody named: maybe JSON lines, maybe some program's settings.
    pub(super) fn may_be_other_json(&self) -> bool {
        !self.explicit && stem_of(&self.path).0.ends_with(".json")
    }
}

/// The files that `patterns` name, in order and without repetition. A pattern is a file, a folder (taken with all
/// that is below it, hidden entries left out) or a glob.
///
/// # Errors
/// A pattern that names nothing: an empty source is a mistake.
pub fn discover(patterns: &[String]) -> Result<Vec<SourceFile>> {
    let mut files: Vec<SourceFile> = Vec::new();
    for pattern in patterns {
        let found = expand(pattern)?;
        if found.is_empty() {
            let reason = "no file there. Paths are relative to the current folder; `dir/**/*.md` looks into subfolders";
            return Err(DataError::Source { pattern: pattern.clone(), reason: reason.into() });
        }
        files.extend(found);
    }
    let mut seen = std::collections::HashSet::new();
    files.retain(|file| seen.insert(file.path.clone()));
    if files.is_empty() {
        return Err(DataError::Options("a source names no paths: set paths = [\"...\"]".into()));
    }
    Ok(files)
}

fn expand(pattern: &str) -> Result<Vec<SourceFile>> {
    let path = Path::new(pattern);
    if path.is_file() {
        return Ok(vec![SourceFile::from_path(path.into(), true)]);
    }
    let mut files = Vec::new();
    if path.is_dir() {
        walk(path, &mut files)?;
        return Ok(files.into_iter().map(|p| SourceFile::from_path(p, false)).collect());
    }
    let bad = |reason: String| DataError::Source { pattern: pattern.into(), reason };
    for entry in glob::glob(pattern).map_err(|e| bad(format!("not a valid glob: {e}")))? {
        let entry = entry.map_err(|e| bad(e.to_string()))?;
        if entry.is_dir() {
            // `dir/**` names the folders below as well as their files; a glob such as `corpus-*` names folders only.
            if !pattern.ends_with("**") {
                walk(&entry, &mut files)?;
            }
        } else {
            files.push(entry);
        }
    }
    files.sort();
    files.dedup();
    Ok(files.into_iter().map(|p| SourceFile::from_path(p, false)).collect())
}

/// Files below `folder`, sorted, without hidden ones; links to folders are not followed, so that the walk ends.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries =
        fs::read_dir(folder).and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>()).at("list", folder)?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let (path, kind) = (entry.path(), entry.file_type().at("look at", &entry.path())?);
        if kind.is_dir() {
            walk(&path, files)?;
        } else if path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_follow_from_names() {
        let check = |name: &str, kind, compression| {
            let file = SourceFile::from_path(name.into(), true);
            assert_eq!((file.kind, file.compression), (kind, compression), "{name}");
        };
        check("a.txt", FileKind::Text, Compression::None);
        check("a.rs", FileKind::Text, Compression::None);
        check("README", FileKind::Text, Compression::None);
        check("a.txt.gz", FileKind::Text, Compression::Gzip);
        check("a.JSONL", FileKind::JsonLines, Compression::None);
        check("a.json.zst", FileKind::JsonLines, Compression::Zstd);
        check("a.b.parquet", FileKind::Parquet, Compression::None);
        check("a.arrow", FileKind::Arrow, Compression::None);
    }

    #[test]
    fn folders_are_walked_sorted_without_hidden_files() {
        let root = tempfile::tempdir().unwrap();
        for name in ["b/2.md", "b/1.md", "a.txt", ".git/x", "b/.hidden", "c/d/e.rs"] {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        let names = |pattern: &str| -> Vec<String> {
            let files = discover(&[format!("{}{pattern}", root.path().display())]).unwrap();
            files.iter().map(|f| f.path.strip_prefix(root.path()).unwrap().display().to_string()).collect()
        };
        assert_eq!(names(""), ["a.txt", "b/1.md", "b/2.md", "c/d/e.rs"]);
        assert_eq!(names("/**/*.md"), ["b/1.md", "b/2.md"]);
        assert_eq!(names("/[bc]"), ["b/1.md", "b/2.md", "c/d/e.rs"]);
        let error = discover(&[format!("{}/*.csv", root.path().display())]).unwrap_err().to_string();
        assert!(error.contains("*.csv") && error.contains("no file there"), "{error}");
    }
}
