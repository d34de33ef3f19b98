//! Shapes by name: the TOML files in `configs/flavors`, part of the binary.

use crate::job::Model;
use crate::{ConfigError, ModelSpec, architecture};
use serde::Deserialize;

/// A shape by name: a `[model]` section for others to be laid over.
#[derive(Clone, Debug, PartialEq)]
pub struct Flavor {
    /// What `model.flavor` says.
    pub name: &'static str,
    /// One line: what it is.
    pub description: String,
    /// Its number of parameters, a tied head counted once; for a shape without a vocabulary, without embedding and
    /// head.
    pub num_parameters: usize,
    /// The keys it sets.
    pub model: Model,
}

macro_rules! flavors {
    ($($name:literal),* $(,)?) => {
        const FILES: &[(&str, &str)] = &[$(($name, include_str!(concat!("../flavors/", $name, ".toml")))),*];
    };
}

flavors![
    "debugmodel",
    "tiny-4m",
    "tiny-10m",
    "smollm2-135m",
    "llama-3.2-1b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-8b",
];

/// A file in `configs/flavors`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FlavorFile {
    description: String,
    num_parameters: usize,
    model: Model,
}

/// Every flavor, in the order of the list above.
///
/// # Errors
/// Where a file in `configs/flavors` is wrong, which a test excludes.
pub fn flavors() -> Result<Vec<Flavor>, ConfigError> {
    FILES.iter().map(|&(name, text)| parse(name, text)).collect()
}

/// The flavor called `name`.
///
/// # Errors
/// [`ConfigError::Values`] with the nearest name and the list.
pub fn flavor(name: &str) -> Result<Flavor, ConfigError> {
    match FILES.iter().find(|(known, _)| *known == name) {
        Some(&(name, text)) => parse(name, text),
        None => {
            let nearest = crate::nearest::nearest(name, FILES.iter().map(|f| f.0));
            let hint = nearest.map_or(String::new(), |n| format!("did you mean \"{n}\"? "));
            let known = names().join(", ");
            Err(ConfigError::Values(vec![format!("`model.flavor` = \"{name}\" is not known; {hint}There are {known}")]))
        }
    }
}

/// The names of all flavors.
pub fn names() -> Vec<&'static str> {
    FILES.iter().map(|f| f.0).collect()
}

impl Flavor {
    /// The architecture; `vocab_size` serves where the flavor leaves the vocabulary to the tokenizer.
    ///
    /// # Errors
    /// Where the file in `configs/flavors` is wrong, which a test excludes.
    pub fn spec(&self, vocab_size: usize) -> Result<ModelSpec, ConfigError> {
        architecture::flavor_spec(&self.model, vocab_size)
    }
}

fn parse(name: &'static str, text: &str) -> Result<Flavor, ConfigError> {
    let file: FlavorFile = toml::from_str(text)
        .map_err(|e| ConfigError::Values(vec![format!("configs/flavors/{name}.toml: {}", e.message())]))?;
    let FlavorFile { description, num_parameters, model } = file;
    Ok(Flavor { name, description, num_parameters, model })
}
