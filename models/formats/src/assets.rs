//! What resolving a job's configuration needs from files.

use crate::gguf::{self, Gguf};
use crate::weights::{CONFIG, Model, find, read_config};
use crate::{FormatError, tokenizer};
use std::path::Path;
use tangelo_configs::ModelSpec;
use tangelo_configs::resolve::{ModelAssets, SpecialTokens};

/// Reads architectures and tokenizers from files; no weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Assets;

impl Assets {
    /// The architecture at `path`: a `config.json`, a folder with one (weights need not be there), or a GGUF file.
    ///
    /// # Errors
    /// Where there is none, or it cannot be read.
    pub fn spec(path: &Path) -> Result<ModelSpec, FormatError> {
        if path.is_file() && path.extension().is_some_and(|e| e == "json") {
            return read_config(path);
        }
        if path.join(CONFIG).is_file() {
            return read_config(&path.join(CONFIG));
        }
        match find(path)? {
            Model::Gguf(file) => gguf::model::spec(&Gguf::open(&file)?),
            Model::HuggingFace { config, .. } => read_config(&config),
        }
    }
}

impl ModelAssets for Assets {
    fn model_spec(&self, path: &Path) -> Result<ModelSpec, String> {
        Assets::spec(path).map_err(|e| e.to_string())
    }

    fn vocab_size(&self, path: &Path) -> Result<usize, String> {
        tokenizer::load(path).map(|t| t.vocab_size()).map_err(|e| e.to_string())
    }

    fn special_tokens(&self, path: &Path) -> Result<SpecialTokens, String> {
        let found = tokenizer::load(path).map_err(|e| e.to_string())?;
        Ok(SpecialTokens { bos: found.bos_token_id, eos: found.eos_token_ids })
    }
}
