//! The data pipeline from files to batches.

mod loading;
mod preparing;
mod support;
