//! What a user asks for, resolved once into what the program needs.
//!
//! [`JobConfig`] is the TOML file, section by section, in torchtitan v0.2's names where the meaning is the same.
//! [`load`](resolve::load) reads it, with includes and `--set`; [`resolve`](resolve::resolve) turns it into a
//! [`Plan`]: every default filled in, every cross-field rule checked. Nothing downstream sees the raw TOML.
//! [`ModelSpec`] is an architecture as data: it lists parameters and counts FLOPs and bytes without libtorch;
//! [`hf_config`] reads and writes it as Hugging Face's config.json.
//!
//! Invariant: only `load`, [`num_gpus`] and
//! [`Resources::of_this_machine`](resolve::Resources::of_this_machine) touch the system.

pub mod algorithm;
mod architecture;
mod check;
mod defaults;
mod error;
pub mod flavor;
pub mod hf_config;
pub mod job;
mod known;
mod load;
pub mod model;
mod nearest;
mod parallel;
mod places;
pub mod plan;
pub mod preset;
pub mod prompts;
pub mod requests;
pub mod resolve;
pub mod reward;
pub mod rlhf;
pub mod sampling;
pub mod schema;
pub mod sharding;
mod types;

pub use algorithm::Algorithm;
pub use error::{ConfigError, Origin, Place, TextError};
pub use flavor::flavors;
pub use job::JobConfig;
pub use model::{AttentionSpec, BlockSpec, FeedForwardSpec, HeadSpec, MixerSpec, ModelSpec, RopeScaling, RopeSpec};
pub use nearest::nearest;
pub use plan::Plan;
pub use prompts::Prompts;
pub use resolve::{ModelAssets, Resources, SpecialTokens, num_gpus};
pub use reward::Reward;
pub use rlhf::{JobPlan, Role};
pub use sampling::{EngineConfig, SamplingParams};
pub use schema::schema;
pub use sharding::Sharding;
