//! What the worker does beside training: one file per verb, each a function of its request.

pub mod eval;
pub mod export;
pub mod generate;
pub mod gpu_check;
pub mod score;

use crate::error::{Result, TrainError};
use std::time::{Duration, Instant};
use tangelo_core::env;
use tangelo_formats::tokenizer::TokenizerAssets;
use tangelo_observe::{ProgressEvent, ProgressWriter};

/// How far a verb is, for whoever started it; at most one line in [`VerbProgress::INTERVAL`].
pub(crate) struct VerbProgress {
    writer: ProgressWriter,
    name: &'static str,
    last: Option<Instant>,
}

impl VerbProgress {
    const INTERVAL: Duration = Duration::from_millis(100);

    /// Work called `name`; silent where nobody listens.
    pub(crate) fn new(name: &'static str) -> VerbProgress {
        let fd = std::env::var(env::PROGRESS_FD).ok();
        VerbProgress { writer: ProgressWriter::from_fd_number(fd.as_deref()), name, last: None }
    }

    /// Something long begins whose end cannot be foreseen.
    pub(crate) fn phase(&mut self, name: &str) {
        self.writer.send(&ProgressEvent::Phase { name: name.into() });
    }

    /// So much of `total` is done.
    pub(crate) fn update(&mut self, done: u64, total: u64, detail: impl FnOnce() -> String) {
        if done < total && self.last.is_some_and(|at| at.elapsed() < Self::INTERVAL) {
            return;
        }
        self.last = Some(Instant::now());
        self.writer.send(&ProgressEvent::Amount { name: self.name.into(), done, total, detail: detail() });
    }
}

/// The ids of a text, special tokens added as the tokenizer says.
pub(crate) fn encode(assets: &TokenizerAssets, text: &str) -> Result<Vec<u32>> {
    let encoding = assets.tokenizer.encode(text, true);
    Ok(encoding.map_err(|e| TrainError::Data(format!("cannot tokenise {text:?}: {e}")))?.get_ids().to_vec())
}

/// Fails unless every id is in the vocabulary.
pub(crate) fn check_ids(ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        Some(at) => Err(TrainError::Data(format!(
            "id {} at position {at} is outside the vocabulary: ids run from 0 to {}",
            ids[at],
            vocab_size - 1
        ))),
        None => Ok(()),
    }
}
