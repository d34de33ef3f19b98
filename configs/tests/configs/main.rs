//! Loading, resolving, presets and Hugging Face configurations.
#![allow(clippy::unwrap_used)] // a failure outside of the test functions is a test's too

mod algorithm;
mod hf_config;
mod load;
mod optimizer;
mod parallel;
mod presets;
mod resolve;
mod rl_draws;
mod rl_jobs;
mod rlhf;
mod schema;
mod sft;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tangelo_configs::{ModelAssets, ModelSpec, Resources, SpecialTokens};

/// A machine without a GPU.
pub fn machine(world_size: usize) -> Resources {
    Resources {
        world_size,
        local_world_size: world_size.min(8),
        num_cores: 16,
        cuda: false,
        current_dir: PathBuf::from("/job"),
        home: Some(PathBuf::from("/home/someone")),
    }
}

/// Assets that exist only here: models by path, and tokenizers of a given size.
#[derive(Default)]
pub struct FakeAssets {
    /// The model at each path.
    pub models: BTreeMap<PathBuf, ModelSpec>,
    /// The number of ids of the tokenizer at each path.
    pub tokenizers: BTreeMap<PathBuf, usize>,
}

impl FakeAssets {
    /// No model and one tokenizer.
    pub fn with_tokenizer(path: &str, size: usize) -> FakeAssets {
        FakeAssets { tokenizers: BTreeMap::from([(PathBuf::from(path), size)]), ..FakeAssets::default() }
    }
}

impl ModelAssets for FakeAssets {
    fn model_spec(&self, path: &Path) -> Result<ModelSpec, String> {
        self.models.get(path).cloned().ok_or_else(|| "no config.json and no GGUF file there".into())
    }

    fn vocab_size(&self, tokenizer: &Path) -> Result<usize, String> {
        self.tokenizers.get(tokenizer).copied().ok_or_else(|| "no tokenizer.json there".into())
    }

    fn special_tokens(&self, tokenizer: &Path) -> Result<SpecialTokens, String> {
        self.vocab_size(tokenizer).map(|n| SpecialTokens { bos: Some(1), eos: vec![n as u32 - 1] })
    }
}
