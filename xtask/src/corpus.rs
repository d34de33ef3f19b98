//! Real text that every machine already has: the sources and Markdown of the crates in cargo's registry folder.
//!
//! One JSON line per file, `{"path": ..., "text": ...}`, in an order fixed by a hash of the path, so that a corpus cut
//! at any size is a fair mixture and the same on the same machine. Binary, empty, very long and generated-looking files
//! are left out. The text is only copied on this machine; no licence of it is touched.

use anyhow::{Context, Result, bail};
use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Text that `quickstart` takes, bytes.
pub const DEFAULT_BYTES: u64 = 24 << 20;
/// Longer files are mostly tables and generated bindings.
const MAX_FILE_BYTES: u64 = 128 << 10;
/// Shorter ones say nothing.
const MIN_FILE_BYTES: u64 = 200;

/// What was written.
pub struct Summary {
    /// Files taken.
    pub num_files: usize,
    /// Their text, bytes.
    pub num_bytes: u64,
    /// Where it came from.
    pub origin: String,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = self.num_bytes as f64 / 1e6;
        write!(f, "{} documents, {megabytes:.1} MB of text from {}", self.num_files, self.origin)
    }
}

/// Writes up to `max_bytes` of text found under `source` (the registry where `None`) to `output`.
pub fn write(source: Option<&Path>, output: &Path, max_bytes: u64) -> Result<Summary> {
    let (mut files, origin) = match source {
        None => (registry_files()?, "the crates in cargo's registry".to_owned()),
        Some(path) => (files_of(path)?, path.display().to_string()),
    };
    files.sort_by_cached_key(|file| (hash(file), file.clone()));
    let out = std::fs::File::create(output).with_context(|| format!("cannot write {}", output.display()))?;
    let mut out = BufWriter::new(out);
    let mut summary = Summary { num_files: 0, num_bytes: 0, origin };
    for file in &files {
        if summary.num_bytes >= max_bytes {
            break;
        }
        let Some(text) = text_of(file) else { continue };
        let line = serde_json::json!({ "path": file.to_string_lossy(), "text": text });
        writeln!(out, "{line}").with_context(|| format!("cannot write {}", output.display()))?;
        summary.num_files += 1;
        summary.num_bytes += text.len() as u64;
    }
    out.flush().with_context(|| format!("cannot write {}", output.display()))?;
    if summary.num_files == 0 {
        bail!("no text found in {}\nfix: name a folder or a UTF-8 file: cargo xtask quickstart PATH", summary.origin);
    }
    Ok(summary)
}

/// `*.rs` and `*.md` of every crate unpacked in `$CARGO_HOME/registry/src`.
fn registry_files() -> Result<Vec<PathBuf>> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set\nfix: name your own text: cargo xtask quickstart PATH")?;
    let folder = home.join("registry/src");
    let mut files = Vec::new();
    walk(&folder, &mut files)
        .with_context(|| format!("cannot read {}\nfix: cargo xtask quickstart PATH", folder.display()))?;
    files.retain(|file| file.extension().is_some_and(|e| e == "rs" || e == "md"));
    Ok(files)
}

fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if path.is_dir() {
        walk(path, &mut files).with_context(|| format!("cannot read {}", path.display()))?;
    } else if path.is_file() {
        files.push(path.to_owned());
    } else {
        bail!("{} is neither a folder nor a file", path.display());
    }
    Ok(files)
}

/// Every file below `folder`; links and hidden folders are not followed.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        let kind = entry.file_type()?;
        if kind.is_dir() && !hidden {
            walk(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// The file's text, where it is UTF-8 of a sensible length.
fn text_of(file: &Path) -> Option<String> {
    let length = file.metadata().ok()?.len();
    if !(MIN_FILE_BYTES..=MAX_FILE_BYTES).contains(&length) {
        return None;
    }
    let text = String::from_utf8(std::fs::read(file).ok()?).ok()?;
    let longest_line = text.lines().map(str::len).max().unwrap_or(0);
    (longest_line <= 2000 && !text.contains('\0')).then_some(text)
}

/// Same on every run: `DefaultHasher::new` has fixed keys. Only the last parts of the path count, so that the order
/// does not depend on where the registry lies.
fn hash(file: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    file.iter().rev().take(4).for_each(|part| part.hash(&mut hasher));
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        std::fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }

    #[test]
    fn text_is_taken_and_binaries_are_not() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("a/b")).unwrap();
        let text = "a \"quoted\" line\nand another\n".repeat(20);
        std::fs::write(folder.path().join("a/b/one.txt"), &text).unwrap();
        std::fs::write(folder.path().join("a/two.bin"), [0xff; 500]).unwrap();
        std::fs::write(folder.path().join("a/short"), "tiny").unwrap();
        let output = folder.path().join("out.jsonl");
        let summary = write(Some(&folder.path().join("a")), &output, u64::MAX).unwrap();
        assert_eq!((summary.num_files, summary.num_bytes), (1, text.len() as u64));
        let lines = lines(&output);
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["text"], text);
    }

    #[test]
    fn the_budget_holds_and_the_order_is_fixed() {
        let folder = tempfile::tempdir().unwrap();
        let texts = folder.path().join("texts");
        std::fs::create_dir(&texts).unwrap();
        for i in 0..50 {
            std::fs::write(texts.join(format!("{i}.md")), format!("{i} ").repeat(200)).unwrap();
        }
        let (one, two) = (folder.path().join("1.jsonl"), folder.path().join("2.jsonl"));
        let summary = write(Some(&texts), &one, 5000).unwrap();
        assert!(summary.num_bytes >= 5000 && summary.num_bytes < 5000 + MAX_FILE_BYTES && summary.num_files < 50);
        write(Some(&texts), &two, 5000).unwrap();
        assert_eq!(std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
    }

    #[test]
    fn nothing_found_is_an_error_with_the_fix() {
        let folder = tempfile::tempdir().unwrap();
        let error = write(Some(folder.path()), &folder.path().join("out"), 1).err().unwrap().to_string();
        assert!(error.contains("fix:"), "{error}");
    }
}
