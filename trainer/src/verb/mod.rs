//! What the worker does beside training: one file per verb, each a function of its request.

pub mod eval;
pub mod export;
pub mod generate;
pub mod gpu_check;
pub mod score;

use crate::error::{Result, TrainError};
use tangelo_formats::tokenizer::TokenizerAssets;

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
