//! Recipes, block executor, optimizers, checkpoints; the binary tangelo-worker.

pub mod checkpoint;
