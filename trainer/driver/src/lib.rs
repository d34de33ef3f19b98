//! The reinforcement-learning loop of the one process that commands worker groups.
//!
//! [`prompts`] are what is asked; [`reward`] says what an answer is worth. Both are free of libtorch: user's reward
//! functions run in processes of their own, beside no tensor.

pub mod error;
pub mod prompts;
pub mod reward;

pub use error::{DriverError, Result};
