//! The binary as a user starts it, with a shell script in the worker's place.

#![allow(clippy::unwrap_used)] // as in tests: these are their helpers

mod cli;
mod fake;
mod supervision;
mod terminal;
