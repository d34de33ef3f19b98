//! Communicators: every call on every back end against plain sums, and every way a rank can be lost.

mod faults;
mod gloo;
mod local;
mod suite;
