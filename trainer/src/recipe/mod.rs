//! The loops that every rank runs.

pub mod checkpointing;
pub mod evaluation;
pub mod pretrain;
pub mod recorder;
pub mod rlhf;
pub mod setup;
