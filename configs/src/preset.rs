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
    ($(#[$doc:meta])* $of:ident in $folder:literal: $($name:literal),* $(,)?) => {
        $(#[$doc])*
        pub const $of: &[Preset] =
            &[$(Preset { name: $name, toml: include_str!(concat!("../presets/", $folder, $name, ".toml")) }),*];
    };
}

presets![
    /// Every preset.
    PRESETS in "": "quickstart",
    "debugmodel",
    "tiny-10m",
    "smollm2-135m",
    "smollm2-135m-continue",
    "smollm2-135m-long",
    "smollm2-135m-sft",
    "smollm2-135m-grpo",
    "llama-3.2-1b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-8b",
];

presets![
    /// `[algorithm]` as published, to include in a job.
    ALGORITHMS in "algorithm/": "grpo",
    "dr-grpo",
    "dapo",
    "ppo",
    "rloo",
    "reinforce-plus-plus",
    "reinforce-plus-plus-baseline",
];
