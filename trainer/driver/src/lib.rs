//! The reinforcement-learning loop of the one process that commands worker groups.
//!
//! [`prompts`] are what is asked; [`reward`] says what an answer is worth. Both are free of libtorch: user's reward
//! functions run in processes of their own, beside no tensor.

pub mod clock;
pub mod collect;
mod columns;
pub mod course;
pub mod error;
pub mod gather;
pub mod judge;
pub mod preview;
pub mod prompts;
pub mod recipe;
pub mod replay;
pub mod reward;
mod rollout_file;
pub mod scoring;
pub mod session;
pub mod start;
pub mod state;
pub mod team;
pub mod told;
pub mod tracker;
mod validation;

pub use error::{DriverError, Result};
