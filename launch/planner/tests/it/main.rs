//! Plans, what they cost, and what is shown of them.

#![allow(clippy::unwrap_used)] // a failure outside of the test functions is a test's too

mod check;
mod memory;
mod prove;

use std::path::Path;
use tangelo_configs::{ModelAssets, ModelSpec};

/// No model, and a tokenizer of 300 ids wherever one is asked for.
pub struct NoAssets;

impl ModelAssets for NoAssets {
    fn model_spec(&self, _: &Path) -> Result<ModelSpec, String> {
        Err("there is none".into())
    }

    fn vocab_size(&self, _: &Path) -> Result<usize, String> {
        Ok(300)
    }
}
