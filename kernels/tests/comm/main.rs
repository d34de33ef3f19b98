//! Communicators: every call on every back end against plain sums, and every way a rank can be lost.

// Everything here is a test, also what lies outside of test functions.
#![allow(clippy::unwrap_used)]

mod background;
mod faults;
mod gloo;
mod local;
mod positions;
mod suite;
