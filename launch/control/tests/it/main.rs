//! Drivers, agents and ranks over real sockets on the loopback device, in one process; and in `process`, ranks in
//! processes of their own that are killed and stopped.

// Everything here is a test, also what lies outside of test functions.
#![allow(clippy::unwrap_used)]

mod data;
mod failures;
mod flow;
mod process;
mod security;
mod support;
mod verbs;
