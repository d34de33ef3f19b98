//! What a user asks for, resolved once into what the program needs.
//!
//! [`JobConfig`] is the TOML file, section by section, in torchtitan v0.2's names where the meaning is the same.
//! [`resolve`](resolve::resolve) turns it into a [`Plan`]: every default filled in, every cross-field rule checked.
//! Nothing downstream sees the raw TOML. [`ModelSpec`] is an architecture as data: it lists parameters and counts
//! FLOPs and bytes without libtorch.

pub mod job;
pub mod model;
pub mod plan;
pub mod requests;

pub use job::JobConfig;
pub use model::{AttentionSpec, BlockSpec, FeedForwardSpec, MixerSpec, ModelSpec, RopeScaling, RopeSpec};
pub use plan::Plan;
