//! Where the tokenizer of a model or a run is.

use super::TOKENIZER;
use crate::error::{FormatError, Result};
use crate::weights::only_gguf;
use std::path::{Path, PathBuf};

pub(super) enum Found {
    Json(PathBuf),
    Gguf(PathBuf),
}

/// Folders below a model or a run in which its `tokenizer.json` may lie.
const BELOW: [&str; 4] = ["", "tokenizer", "prepared", "export"];

pub(super) fn find(path: &Path) -> Result<Found> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if path.is_file() {
        return match extension {
            "gguf" => Ok(Found::Gguf(path.to_owned())),
            "json" => Ok(Found::Json(path.to_owned())),
            _ => Err(FormatError::unsupported(path, format!("is no tokenizer; expected {EXPECTED}"))),
        };
    }
    if !path.is_dir() {
        return Err(FormatError::not_found(path, format!("does not exist; expected {EXPECTED}")));
    }
    // A checkpoint lies at RUN/checkpoint/step-N, its tokenizer with the run.
    let run = path.parent().filter(|p| p.file_name().is_some_and(|n| n == "checkpoint")).and_then(Path::parent);
    let folders = [Some(path), run].into_iter().flatten();
    let files = folders.flat_map(|folder| BELOW.map(|below| folder.join(below).join(TOKENIZER)));
    for file in files {
        if file.is_file() {
            return Ok(Found::Json(file));
        }
    }
    if let Some(file) = only_gguf(path)? {
        return Ok(Found::Gguf(file));
    }
    let hint = if path.join("tokenizer.model").is_file() {
        "; tokenizer.model (SentencePiece) is not read: convert it with transformers' AutoTokenizer and save_pretrained"
    } else {
        ""
    };
    Err(FormatError::not_found(path, format!("holds no tokenizer; expected {EXPECTED}{hint}")))
}

const EXPECTED: &str = "a tokenizer.json, a folder that holds one, or a .gguf file";
