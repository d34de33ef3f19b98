//! The binary as a user starts it, with a shell script in the worker's place.

#![allow(clippy::unwrap_used)] // a failure outside of the test functions is a test's too

mod cli;
mod fake;
mod supervision;
mod terminal;
