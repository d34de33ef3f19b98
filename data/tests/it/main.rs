//! The data pipeline from files to batches.

// Tests may panic; the lint knows test functions but not what they call.
#![allow(clippy::unwrap_used)]

mod chat;
mod loading;
mod preparing;
mod support;
