//! What a rank runs: recipes, the executor of programs, optimizers, checkpoints; the binary `tangelo-worker`.
//!
//! ```text
//! bin/tangelo-worker -> recipe::pretrain -> TrainWorker { Executor -> models, Optimizer -> comm } -> checkpoint
//!                    -> verb::{generate, score, eval, export}
//! ```
//!
//! Invariants: one thread (the device thread) touches tensors; a step's decisions (skip, stop, resume) are the same on
//! every rank; gradients and updates do not depend on how buffers are cut into shards and buckets. Deliberately absent: hooks and callbacks.

pub mod alone;
pub mod buckets;
pub mod checkpoint;
pub mod error;
pub mod executor;
pub mod faults;
pub mod forward;
pub mod groups;
pub mod init;
pub mod micro_batch;
pub mod open_model;
pub mod optim;
pub mod persist;
pub mod process;
pub mod publish;
pub mod recipe;
pub mod rl;
pub mod sample;
pub mod shards;
pub mod store;
pub mod utilization;
pub mod verb;
pub mod worker;

pub use error::TrainError;
pub use worker::TrainWorker;
