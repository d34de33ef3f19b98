//! Plans, what they cost, and what is shown of them.

#![allow(clippy::unwrap_used)] // a failure outside of the test functions is a test's too

mod check;
mod memory;
mod prove;
mod rlhf;

use std::path::Path;
use tangelo_configs::{ModelAssets, ModelSpec, Resources};

/// No model, and a tokenizer of so many ids wherever one is asked for.
pub struct Tokenizer(pub usize);

impl ModelAssets for Tokenizer {
    fn model_spec(&self, _: &Path) -> Result<ModelSpec, String> {
        Err("there is none".into())
    }

    fn vocab_size(&self, _: &Path) -> Result<usize, String> {
        Ok(self.0)
    }
}

/// `world_size` ranks, `local_world_size` a node.
pub fn machine(world_size: usize, local_world_size: usize, cuda: bool) -> Resources {
    Resources { world_size, local_world_size, num_cores: 8, cuda, current_dir: "/job".into(), home: None }
}
