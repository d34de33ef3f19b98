//! What can be wrong with a configuration, in words that let the user fix it.

use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a configuration is refused.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {}: {message}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        message: String,
    },
    /// A file includes itself, directly or through others.
    #[error("{} includes itself: {}; remove one of these includes", chain[0].display(), arrows(chain))]
    Cycle {
        /// From the file to itself, each including the next.
        chain: Vec<PathBuf>,
    },
    /// Text that is not a configuration: bad syntax, unknown keys, wrong types.
    #[error("{}", list(.0))]
    Text(Vec<TextError>),
    /// Values that make no sense alone or together; every one that was found, with the place of the key at fault.
    #[error("{}", list(.0))]
    Values(Vec<String>),
    /// Model assets (config.json, GGUF, tokenizer) cannot be used.
    #[error("`{key}` = \"{}\": {message}", path.display())]
    Assets {
        /// The key that names them.
        key: &'static str,
        /// Where they should be.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A Hugging Face config.json says what no model here can be.
    #[error("config.json: `{key}` is {found}; expected {expected}")]
    HfConfig {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What is supported.
        expected: String,
    },
}

/// One thing wrong at one place in a TOML text.
#[derive(Clone, Debug, PartialEq)]
pub struct TextError {
    /// Where.
    pub place: Place,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// A place in a TOML text.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Where the text comes from.
    pub origin: Origin,
    /// Line and column, from 1, where known.
    pub position: Option<(usize, usize)>,
}

/// Where TOML text comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    /// A file.
    File(PathBuf),
    /// A `--set` argument.
    Set(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::File(path) => write!(f, "{}", path.display())?,
            Origin::Set(text) => write!(f, "--set {text}")?,
        }
        if let Some((line, column)) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        Ok(())
    }
}

impl fmt::Display for TextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

fn arrows(chain: &[PathBuf]) -> String {
    chain.iter().map(|p: &PathBuf| Path::display(p).to_string()).collect::<Vec<_>>().join(" -> ")
}

fn list<T: fmt::Display>(problems: &[T]) -> String {
    problems.iter().map(T::to_string).collect::<Vec<_>>().join("\n")
}
