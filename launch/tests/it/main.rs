//! The binary as a user starts it, with a shell script in the worker's place.

mod cli;
mod fake;
mod supervision;
mod terminal;
