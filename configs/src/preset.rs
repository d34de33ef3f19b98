//! Whole jobs to start from: the TOML files in `configs/presets`, one by one, so that tests can walk them.

/// A job's TOML file by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// The file's name without `.toml`.
    pub name: &'static str,
    /// Its text.
    pub toml: &'static str,
}

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        /// Every preset.
        pub const PRESETS: &[Preset] =
            &[$(Preset { name: $name, toml: include_str!(concat!("../presets/", $name, ".toml")) }),*];
    };
}

presets![
    "quickstart",
    "debugmodel",
    "tiny-10m",
    "smollm2-135m",
    "smollm2-135m-continue",
    "smollm2-135m-long",
    "smollm2-135m-sft",
    "llama-3.2-1b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-8b",
];
